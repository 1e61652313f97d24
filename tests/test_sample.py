import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused, run, write_checkpoint
from PIL import Image

import sample
import train
from data import InputError
from model import sampling_dtype


@pytest.fixture(scope="module")
def student(plain, captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main([str(f) for f in ("--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps", 1, "--batch_size", 2,
                                 "--grad_accum", 1, "--lora_rank", 2, "--device", "cpu")])
    return out / "student"


def go(*flags):
    sample.main([str(f) for f in ("--device", "cpu", *flags)])


def test_the_command_line(student, tmp_path):
    code, output = run("sample.py", "--student", student, "--prompt", "A dog, barking!", "rain", "--n", 2, "--seed", 3, cwd=tmp_path)
    assert code == 0 and "real-time factor" in output, output
    names = ["a-dog-barking_seed3_0", "a-dog-barking_seed3_1", "rain_seed3_0", "rain_seed3_1"]
    for name in names:
        wav, rate = soundfile.read(tmp_path / f"samples/{name}.wav", dtype="int16")
        assert rate == 16000 and wav.shape == (10240,) and wav.any()
        assert f"samples/{name}.wav" in output and f"samples/{name}.png" in output
        assert Image.open(tmp_path / f"samples/{name}.png").size == (256, 256)
    rows = json.loads((tmp_path / "samples/manifest.json").read_text())
    assert [row["file"] for row in rows] == [f"{n}.wav" for n in names]
    assert rows[1] == {"file": "a-dog-barking_seed3_1.wav", "prompt": "A dog, barking!", "seed": 3, "k": 1, "student": str(student),
                       "folder": str(student), "steps": 1,
                       "dtype": str(sampling_dtype(torch.device("cpu")))}
    refused("sample.py", "--student", student, "--prompt", "rain", "--seed", 3, cwd=tmp_path, says=["rain_seed3_0.wav exists", "--overwrite"])


def test_a_clip_is_the_same_alone_and_in_a_batch(student, tmp_path):
    go("--student", student, "--prompt", "a dog", "rain", "wind blows", "--n", 2, "--batch_size", 5, "--out", tmp_path / "many")
    go("--student", student, "--prompt", "rain", "--n", 2, "--batch_size", 1, "--out", tmp_path / "one")
    for k in range(2):
        many, one = (soundfile.read(tmp_path / d / f"rain_seed0_{k}.wav", dtype="int16")[0].astype(int) for d in ("many", "one"))
        assert np.abs(many - one).max() <= 2
    other = soundfile.read(tmp_path / "one/rain_seed0_0.wav", dtype="int16")[0].astype(int)
    assert np.abs(one - other).max() > 2


def test_files_of_prompts_overwriting_and_the_manifest(student, tmp_path):
    (tmp_path / "p.txt").write_text("rain\nRain!\nrain\nwind\n")
    flags = ("--student", student, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o")
    go(*flags)
    names = ["rain_seed0_0.wav", "rain-2_seed0_0.wav", "wind_seed0_0.wav"]
    assert sorted(p.name for p in (tmp_path / "o").glob("*.wav")) == sorted(names)
    before = (tmp_path / "o/rain_seed0_0.wav").read_bytes()
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        go(*flags)
    go(*flags, "--overwrite")
    go("--student", student, "--prompt", "thunder", "--out", tmp_path / "o")
    assert (tmp_path / "o/rain_seed0_0.wav").read_bytes() == before
    assert [row["file"] for row in json.loads((tmp_path / "o/manifest.json").read_text())] == names + ["thunder_seed0_0.wav"]


def test_the_teacher_in_many_steps(student, plain, tmp_path):
    go("--student", student, "--prompt", "rain", "--teacher_steps", 3, "--guidance", 2, "--out", tmp_path)
    go("--teacher", plain, "--prompt", "wind", "--teacher_steps", 2, "--out", tmp_path)
    rows = json.loads((tmp_path / "manifest.json").read_text())
    assert [(row["steps"], row["guidance"]) for row in rows] == [(3, 2), (2, 7.5)]


@pytest.mark.parametrize("layout", ["plain", "adapter"])
def test_a_complete_one_step_model(request, layout, tmp_path):
    go("--student", request.getfixturevalue(layout), "--prompt", "rain", "--out", tmp_path)
    assert soundfile.info(tmp_path / "rain_seed0_0.wav").frames == 10240


def test_bad_input(student, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, says in ((("--prompt", " "), "empty prompt"), ((), "empty prompt"), (("--prompt", "a", "--n", 0), "--n"),
                        (("--prompt", "a", "--guidance", 3), "teacher_steps"), (("--prompt", "a"), "no student there yet"),
                        (("--prompt", "a", "--student", "./nowhere"), "nowhere"), (("--prompts", "no.txt"), "no.txt"),
                        (("--prompt", "a", "--student", plain / "vae"), "neither a student")):
        with pytest.raises(InputError, match=says):
            go(*flags)
    assert not list(tmp_path.iterdir())


def test_a_student_of_another_architecture(student, tmp_path):
    other = write_checkpoint(tmp_path / "other", dim=32)
    with pytest.raises(InputError, match="cross_attention_dim 24, the teacher has 32"):
        go("--student", student, "--teacher", other, "--prompt", "a", "--out", tmp_path / "o")
    cut = tmp_path / "cut"
    shutil.copytree(student, cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        go("--student", cut, "--prompt", "a", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_long_prompts_are_cut_with_a_warning(student, tmp_path, capsys):
    go("--student", student, "--prompt", "dog " * 80, "--out", tmp_path)
    assert "77 fit; cut" in capsys.readouterr().out


def test_a_name_for_every_clip():
    names = sample.file_names(["a b", "A  b?", "犬が吠える", "!!", "x" * 300], 1, 0)
    assert list(names.values()) == ["a-b_seed0_0", "a-b-2_seed0_0", "犬が吠える_seed0_0", "clip_seed0_0", "x" * 60 + "_seed0_0"]


def test_the_picture_has_low_frequencies_at_the_bottom():
    mel = torch.full((64, 10), -12.0)
    mel[0] = 4
    rgb = np.asarray(sample.picture(mel))
    assert rgb.shape == (256, 40, 3) and rgb[-1].mean() > 200 and rgb[0].mean() < 5
