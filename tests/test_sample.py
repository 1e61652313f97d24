"""Clips on disk: the student in one step, its teacher in many, and what can be wrong."""
import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, refused
from PIL import Image
from runs import call

import data
import sample
from data import InputError
from model import LOG_MAX, LOG_MIN, load_student, pick_device, sampling_dtype
from sample import read_manifest


@pytest.fixture(scope="module")
def student(one_step_run):
    return one_step_run / "student"


def go(*flags):
    call(sample.main, "--device", "cpu", *flags)


def read(folder, name):
    return soundfile.read(folder / f"{name}.wav", dtype="int16")[0].astype(int)


def test_the_command_line(student, tmp_path, monkeypatch, capsys):
    """With nothing but defaults, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--student", str(student), "--prompt",
                                      "A dog, barking!", "rain", "--n", "2", "--seed", "3"])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "real-time factor" in output and "warning" not in output
    names = ["a-dog-barking_seed3_0", "a-dog-barking_seed3_1", "rain_seed3_0", "rain_seed3_1"]
    for name in names:
        wav, rate = soundfile.read(tmp_path / f"samples/{name}.wav", dtype="int16")
        assert rate == 16000 and wav.shape == (10240,) and wav.any()
        assert f"samples/{name}.wav" in output
        assert Image.open(tmp_path / f"samples/{name}.png").size == (256, 256)

    rows = read_manifest(tmp_path / "samples")
    assert [row["file"] for row in rows] == [f"{name}.wav" for name in names]
    assert rows[1] == {
        "file": "a-dog-barking_seed3_1.wav", "prompt": "A dog, barking!", "seed": 3, "k": 1,
        "student": str(student), "folder": str(student), "steps": 1,
        "dtype": str(sampling_dtype(pick_device()))}
    refused("sample.py", "--student", student, "--prompt", "rain", "--seed", 3, cwd=tmp_path,
            says=["rain_seed3_0.wav exists", "--overwrite"])


def test_a_clip_is_the_same_alone_and_in_a_batch(student, tmp_path):
    """And as the Python API makes it."""
    flags = ["--student", student, "--n", 2, "--seed", 3, "--precision", "fp32"]
    go(*flags, "--prompt", "a dog", "rain", "wind blows", "--batch_size", 5,
       "--out", tmp_path / "many")
    go(*flags, "--prompt", "rain", "--batch_size", 1, "--out", tmp_path / "one")
    system = load_student(student, precision="fp32", device="cpu")
    for k in range(2):
        many, one = (read(tmp_path / d, f"rain_seed3_{k}") for d in ("many", "one"))
        assert np.abs(many - one).max() <= 2
        wav, = system(["rain"], seed=3, k=k)
        assert np.abs(one - 32767 * wav).max() <= 3
    assert np.abs(one - read(tmp_path / "one", "rain_seed3_0")).max() > 2
    assert np.abs(wav - system("rain")[0]).max() > 1e-3
    assert {row["dtype"] for row in read_manifest(tmp_path / "one")} == {"torch.float32"}


def test_files_of_prompts_overwriting_and_the_manifest(student, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("rain\nRain!\nrain\n犬が吠える\n", encoding="utf-8")
    out, flags = tmp_path / "o", ("--student", student, "--out", tmp_path / "o")
    listed = (*flags, "--prompts", tmp_path / "p.txt")
    go(*listed)
    assert "3 prompts, of {'rows': 4" in capsys.readouterr().out
    names = ["rain_seed0_0.wav", "rain.2_seed0_0.wav", "犬が吠える_seed0_0.wav"]
    assert sorted(p.name for p in out.glob("*.wav")) == sorted(names)

    before = (out / "rain_seed0_0.wav").read_bytes()
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        go(*listed)
    go(*listed, "--overwrite")
    (out / "wind_seed0_0.png").touch()
    with pytest.raises(InputError, match="wind_seed0_0.png exists"):
        go(*flags, "--prompt", "wind")
    (out / "wind_seed0_0.png").unlink()
    go(*flags, "--prompt", "wind")
    assert (out / "rain_seed0_0.wav").read_bytes() == before
    assert [row["file"] for row in read_manifest(out)] == names + ["wind_seed0_0.wav"]
    assert [row["prompt"] for row in read_manifest(out)] == ["rain", "Rain!", "犬が吠える", "wind"]
    capsys.readouterr()
    go(*flags, "--prompt", "loud", "--prompts", tmp_path / "p.txt", "--n", 3, "--overwrite")
    printed = capsys.readouterr().out
    assert printed.count(".wav") == 10 and "12 clips, listed in" in printed


def test_a_name_for_every_clip():
    prompts = ["a b", "A  b?", "犬が吠える", "!!", "x" * 300, "a-b-2", "a b!", "a-b-3", "a-b-2!"]
    assert [*sample.file_names(prompts, 1, 0).values()] == [f"{slug}_seed0_0.wav" for slug in (
        "a-b", "a-b.2", "犬が吠える", "clip", "x" * 60, "a-b-2", "a-b.3", "a-b-3", "a-b-2.2")]
    assert sample.file_names(["a"], 2, 5) == {("a", 0): "a_seed5_0.wav", ("a", 1): "a_seed5_1.wav"}


def test_a_picture_has_low_frequencies_below_and_silence_black():
    mel = torch.full((64, 10), LOG_MIN)
    mel[:2] = torch.tensor([[LOG_MAX], [(LOG_MIN + LOG_MAX) / 2]])      # the two lowest bins
    image = np.asarray(sample.picture(mel)).astype(int).sum(-1)
    assert image.shape == (256, 40) and (image[-4:] > 600).all() and (image[:-8] < 10).all()
    assert (abs(image[-8:-4] - 365) < 15).all()             # 190 + 65 + 110, the colour between


def test_a_row_waits_for_another_process_and_stands_behind_its_own(tmp_path):
    row, path = dict(prompt="rain", seed=0, k=0), tmp_path / "manifest.json"
    with ThreadPoolExecutor() as pool:
        with data.locked(path):
            this = pool.submit(sample.add_to_manifest, tmp_path, {"b": {"file": "b", **row}})
            wait([this], 0.5)
            path.write_text(json.dumps([{"file": "a", **row}]))
        this.result()
    assert [row["file"] for row in read_manifest(tmp_path)] == ["a", "b"]


def test_what_was_made_is_listed_when_it_is_stopped(tmp_path):
    """Of a system that does next to nothing."""
    def make(prompts, noise):
        if "p120" in prompts:
            raise KeyboardInterrupt
        return torch.zeros(len(prompts), 64, 1), np.zeros((len(prompts), 8), np.float32)

    args = SimpleNamespace(out=tmp_path, n=1, seed=0, overwrite=False, batch_size=50)
    system = SimpleNamespace(make=make, noise=lambda numbers, seed: None, about={"steps": 1})
    with pytest.raises(KeyboardInterrupt):
        sample.write_clips(args, [f"p{i}" for i in range(200)], lambda: system,
                           {"p1": {"words": "one"}})
    assert [row["prompt"] for row in read_manifest(tmp_path)] == [f"p{i}" for i in range(100)]
    assert [row.get("words") for row in read_manifest(tmp_path)] == [None, "one", *98 * [None]]
    assert len(list(tmp_path.glob("*.wav"))) == len(list(tmp_path.glob("*.png"))) == 100


@pytest.mark.parametrize("content, says", [
    ("[{", "is not JSON"), ('{"a": 1}', "is no list of clips"), ('[{"file": 1}]', "choose another"),
    ("[1]", "choose another")])
def test_a_damaged_or_foreign_manifest_is_not_overwritten(student, tmp_path, content, says):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=f"manifest.json: .*{says}"):
        go("--student", student, "--prompt", "a", "--out", tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [content]


def test_what_cannot_be_written_is_named(student, tmp_path):
    for name, listed in (("a_seed0_0.wav", []), ("b_seed0_0.png", ["b_seed0_0.wav"])):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"{name}: not "):
            go("--student", student, "--prompt", name[0], "--out", tmp_path, "--overwrite")
        assert [row["file"] for row in read_manifest(tmp_path)] == listed


def test_what_is_not_read_of_prompts_is_told_in_short(student, tmp_path, capsys):
    prompts = [f"{i} {'dog ' * 2500}" for i in range(12)]
    go("--student", student, "--prompt", *prompts, "--seconds", 0.16, "--out", tmp_path)
    *warnings, last = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 9 and all("77 fit" in warning for warning in warnings)
    assert max(map(len, warnings)) < 200 and last == "warning: 12 prompts are not read whole"


def test_bad_input(student, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji.json").write_text('["rain", "a dog \\ud83d barks"]')
    for flags, says in (
            (["--prompt", " "], "empty prompt"), ([], "empty prompt"),
            (["--prompt", "a", "--n", 0], "--n: 0 must be between 1 and "),
            (["--prompt", "a", "--student", student, "--seconds", 1.3], "--seconds 1.3: .*0.08"),
            (["--prompt", "caf\udce9", "--student", student], "caf.*not in UTF-8; correct it"),
            (["--prompts", "emoji.json", "--student", student], "a dog .*not in UTF-8; correct"),
            (["--prompts", "no.txt"], "no.txt")):
        with pytest.raises(FileNotFoundError if "no.txt" in flags else InputError, match=says):
            go(*flags)
    assert [p.name for p in tmp_path.iterdir()] == ["emoji.json"]
