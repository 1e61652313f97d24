"""Clips on disk: the student in one step, its teacher in many, and what can be wrong."""
import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, refused, run, write_checkpoint
from PIL import Image

import sample
import train
from data import InputError
from model import LOG_MAX, LOG_MIN, TINY, load_student, pick_device, sampling_dtype


@pytest.fixture(scope="module")
def student(plain, captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main([str(f) for f in (
        "--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps", 1,
        "--batch_size", 2, "--grad_accum", 1, "--lora_rank", 2, "--device", "cpu")])
    return out / "student"


def go(*flags):
    sample.main([str(f) for f in ("--device", "cpu", *flags)])


def read(folder, name):
    return soundfile.read(folder / f"{name}.wav", dtype="int16")[0].astype(int)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


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

    rows = manifest(tmp_path / "samples")
    assert [row["file"] for row in rows] == [f"{name}.wav" for name in names]
    assert rows[1] == {
        "file": "a-dog-barking_seed3_1.wav", "prompt": "A dog, barking!", "seed": 3, "k": 1,
        "student": str(student), "folder": str(student), "steps": 1,
        "dtype": str(sampling_dtype(pick_device()))}
    refused("sample.py", "--student", student, "--prompt", "rain", "--seed", 3, cwd=tmp_path,
            says=["rain_seed3_0.wav exists", "--overwrite"])


def test_a_terminal_that_cannot_print_the_prompt(tmp_path):
    """Its letters are replaced there, also in a warning, and kept on disk."""
    flags = ["--student", TINY, "--prompt", "犬が吠える", "--out", "犬", "--seconds", "0.16"]
    code, out = run("sample.py", *flags, cwd=tmp_path, env={"PYTHONIOENCODING": "cp1252"})
    assert code == 0, out
    assert "warning: '?????': the teacher has never seen '?????'" in out
    assert os.path.join("?", "?????_seed0_0.wav") in out
    assert [row["prompt"] for row in manifest(tmp_path / "犬")] == ["犬が吠える"]
    assert (tmp_path / "犬/犬が吠える_seed0_0.wav").exists()


def test_a_clip_is_the_same_alone_and_in_a_batch(student, tmp_path):
    flags = ["--student", student, "--n", 2, "--precision", "fp32"]
    go(*flags, "--prompt", "a dog", "rain", "wind blows", "--batch_size", 5,
       "--out", tmp_path / "many")
    go(*flags, "--prompt", "rain", "--batch_size", 1, "--out", tmp_path / "one")
    for k in range(2):
        many, one = (read(tmp_path / d, f"rain_seed0_{k}") for d in ("many", "one"))
        assert np.abs(many - one).max() <= 2
    assert np.abs(one - read(tmp_path / "one", "rain_seed0_0")).max() > 2
    assert {row["dtype"] for row in manifest(tmp_path / "one")} == {"torch.float32"}


def test_files_of_prompts_overwriting_and_the_manifest(student, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("rain\nRain!\nrain\nwind\n")
    out, flags = tmp_path / "o", ("--student", student, "--out", tmp_path / "o")
    listed = (*flags, "--prompts", tmp_path / "p.txt")
    go(*listed)
    names = ["rain_seed0_0.wav", "rain-2_seed0_0.wav", "wind_seed0_0.wav"]
    assert sorted(p.name for p in out.glob("*.wav")) == sorted(names)

    before = (out / "rain_seed0_0.wav").read_bytes()
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        go(*listed)
    go(*listed, "--overwrite")
    (out / "thunder_seed0_0.png").touch()
    with pytest.raises(InputError, match="thunder_seed0_0.png exists"):
        go(*flags, "--prompt", "thunder")
    (out / "thunder_seed0_0.png").unlink()
    go(*flags, "--prompt", "thunder")
    assert (out / "rain_seed0_0.wav").read_bytes() == before
    assert [row["file"] for row in manifest(out)] == names + ["thunder_seed0_0.wav"]
    assert [row["prompt"] for row in manifest(out)] == ["rain", "Rain!", "wind", "thunder"]
    capsys.readouterr()
    go(*flags, "--prompt", "loud", "--prompts", tmp_path / "p.txt", "--n", 3, "--overwrite")
    printed = capsys.readouterr().out
    assert printed.count(".wav") == 10 and "12 clips, listed in" in printed
    assert len(manifest(out)) == 13


def test_two_processes_may_write_to_one_folder(student, tmp_path, monkeypatch):
    flags = ("--student", student, "--out", tmp_path, "--prompt")

    def open_system(*args):
        monkeypatch.undo()
        go(*flags, "wind")                                  # meanwhile, another process
        return sample.open_system(*args)

    monkeypatch.setattr(sample, "open_system", open_system)
    go(*flags, "rain")
    assert [row["prompt"] for row in manifest(tmp_path)] == ["wind", "rain"]


def test_the_seed_and_the_number_choose_the_noise(student, tmp_path):
    flags = ["--student", student, "--prompt", "rain", "--precision", "fp32", "--out", tmp_path]
    go(*flags, "--seed", 3, "--n", 2)
    system = load_student(student, precision="fp32", device="cpu")
    for k in range(2):
        wav, = system(["rain"], seed=3, k=k)
        assert np.abs(read(tmp_path, f"rain_seed3_{k}") - 32767 * wav).max() <= 3
    assert np.abs(wav - system("rain")[0]).max() > 1e-3


@pytest.mark.parametrize("precision, allowed", [("auto", True), ("fp32", False)])
def test_fp32_is_not_tf32(student, tmp_path, tf32, precision, allowed):
    go("--student", student, "--prompt", "rain", "--precision", precision, "--out", tmp_path)
    assert [switch.allow_tf32 for switch in tf32] == [allowed, allowed]


def test_a_name_for_every_clip():
    names = sample.file_names(["a b", "A  b?", "犬が吠える", "!!", "x" * 300, "a-b-2"], 1, 0)
    assert list(names.values()) == [
        "a-b_seed0_0.wav", "a-b-2_seed0_0.wav", "犬が吠える_seed0_0.wav", "clip_seed0_0.wav",
        "x" * 60 + "_seed0_0.wav", "a-b-2-2_seed0_0.wav"]
    assert sample.file_names(["a"], 2, 5) == {("a", 0): "a_seed5_0.wav", ("a", 1): "a_seed5_1.wav"}


def test_a_picture_has_low_frequencies_below(tmp_path):
    mel = torch.full((64, 10), LOG_MIN)
    mel[0] = LOG_MAX                                        # the lowest bin
    image = np.asarray(sample.picture(mel)).astype(int).sum(-1)
    assert image.shape == (256, 40) and (image[-4:] > 600).all() and (image[:-4] < 10).all()


# ---- which system it is -------------------------------------------------------------------------

def test_the_teacher_in_many_steps(student, plain, tmp_path):
    go("--student", student, "--prompt", "rain", "--teacher_steps", 11, "--guidance", 2,
       "--out", tmp_path)
    go("--teacher", plain, "--prompt", "wind", "--teacher_steps", 10, "--out", tmp_path)
    assert [(row["steps"], row["guidance"], row["teacher"]) for row in manifest(tmp_path)] == [
        (11, 2, str(plain)), (10, 7.5, str(plain))]


def test_too_few_steps_of_the_teacher_are_refused_before_anything_is_written(plain, tmp_path):
    for steps in (2, 9):
        refused("sample.py", "--teacher", plain, "--prompt", "a", "--teacher_steps", steps,
                "--device", "cpu", cwd=tmp_path, says=[f"{steps} steps", "another number"])
    refused("sample.py", "--teacher", plain, "--prompt", "a", "--teacher_steps", 1001,
            cwd=tmp_path, says=["--teacher_steps: 1001 must be between 1 and 1000"])
    assert not list(tmp_path.iterdir())


def test_two_steps_of_a_teacher_that_starts_from_noise(tmp_path):
    """The tiny teacher's DDIM with "trailing" steps, and the guidance that its folder names."""
    go("--teacher", TINY, "--prompt", "rain falls", "--teacher_steps", 2, "--out", tmp_path)
    row, = manifest(tmp_path)
    assert (row["steps"], row["guidance"]) == (2, 2)
    assert soundfile.info(tmp_path / "rain-falls_seed0_0.wav").frames == 40960


@pytest.mark.parametrize("layout", ["plain", "adapter"])
def test_a_complete_one_step_model(request, layout, tmp_path):
    go("--student", request.getfixturevalue(layout), "--prompt", "rain", "--out", tmp_path)
    assert soundfile.info(tmp_path / "rain_seed0_0.wav").frames == 10240
    refused("sample.py", "--student", request.getfixturevalue(layout), "--prompt", "rain",
            "--teacher_steps", 10, cwd=tmp_path, says=["--teacher is needed", "made from"])


# ---- prompts and length -------------------------------------------------------------------------

def test_long_prompts_are_cut_with_a_warning(student, tmp_path, capsys):
    go("--student", student, "--prompt", "dog " * 80, "--out", tmp_path)
    warning, = (line for line in capsys.readouterr().out.splitlines() if "warning: " in line)
    assert "77 fit; cut" in warning


def test_what_is_no_utf_8_is_refused(student, tmp_path):
    """A terminal of another encoding leaves such bytes in a word, a program that cuts an emoji."""
    prompts = tmp_path / "p.json"
    prompts.write_text('["rain", "a dog \\ud83d barks"]')
    for flags, says in ((["--prompt", "caf\udce9"], "caf"), (["--prompts", prompts], "a dog ")):
        refused("sample.py", "--student", student, *flags, "--device", "cpu", cwd=tmp_path,
                says=[says, "not in UTF-8; correct it"])
    assert not (tmp_path / "samples").exists()


def test_length(student, tmp_path):
    for seconds, samples in ((0.16, 2560), (1.28, 20480)):
        out = tmp_path / str(seconds)
        go("--student", student, "--prompt", "a dog", "--seconds", seconds, "--out", out)
        assert soundfile.info(out / "a-dog_seed0_0.wav").frames == samples
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 1.3,
            "--device", "cpu", cwd=tmp_path, says=["--seconds 1.3", "0.08"])
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 31,
            cwd=tmp_path, says=["--seconds: 31 must be between 0.16 and 30"])


# ---- what can be wrong --------------------------------------------------------------------------

def test_bad_input(student, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, says in (
            (["--prompt", " "], "empty prompt"), ([], "empty prompt"),
            (["--prompt", "a", "--n", 0], "--n: 0 must be between 1 and "),
            (["--prompt", "a", "--guidance", 3], "--guidance goes with --teacher_steps"),
            (["--prompt", "a", "--teacher", plain, "--teacher_steps", 10, "--decoder", "fast"],
             "--decoder fast does not go with --teacher_steps"),
            (["--prompt", "a", "--student", student, "--decoder", "fast"], "recipes.decoder"),
            (["--prompt", "a"], "no student there yet"),
            (["--prompt", "a", "--student", "./nowhere"], "nowhere"),
            (["--prompts", "no.txt"], "no.txt"),
            (["--prompt", "a", "--student", student, "--device", "quantum"], "--device quantum"),
            (["--prompt", "a", "--student", plain / "vae"], "neither a student")):
        with pytest.raises(InputError, match=says):
            go(*flags)
    assert not list(tmp_path.iterdir())


def test_a_student_of_another_architecture(student, tmp_path):
    other, out = write_checkpoint(tmp_path / "other", dim=32), tmp_path / "o"
    with pytest.raises(InputError, match="cross_attention_dim 24, the teacher has 32"):
        go("--student", student, "--teacher", other, "--prompt", "a", "--out", out)
    cut = tmp_path / "cut"
    shutil.copytree(student, cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        go("--student", cut, "--prompt", "a", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("content, says", [
    ("[{", "is not JSON"), ('{"a": 1}', "is not sample.py's"), ('[{"file": 1}]', "choose another"),
    ("[1]", "choose another")])
def test_a_damaged_or_foreign_manifest_is_not_overwritten(student, tmp_path, content, says):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=f"manifest.json: .*{says}"):
        go("--student", student, "--prompt", "a", "--out", tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [content]


def test_a_clip_that_cannot_be_written_is_named(student, tmp_path):
    (tmp_path / "a_seed0_0.wav").mkdir()
    with pytest.raises(InputError, match="a_seed0_0.wav: not "):
        go("--student", student, "--prompt", "a", "--out", tmp_path, "--overwrite")
    assert not (tmp_path / "manifest.json").exists()
