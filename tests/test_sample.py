"""Clips on disk: the student in one step, its teacher in many, and what can be wrong."""
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, refused, write_checkpoint
from PIL import Image
from test_listen import read_page

import sample
import train
from extras.cli import InputError
from extras.device import has_bf16, pick_device, sampling_dtype
from extras.hub import TINY
from losses import guided, one_step
from model import Pipeline, denoiser, load_unet


def train_student(plain, captions, out, *flags):
    train.main([str(f) for f in (
        "--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps", 1,
        "--batch_size", 2, "--grad_accum", 1, "--lora_rank", 2, "--device", "cpu", *flags)])
    return out / "student"


@pytest.fixture(scope="module")
def student(plain, captions, tmp_path_factory):
    return train_student(plain, captions, tmp_path_factory.mktemp("run"))


def go(*flags):
    sample.main([str(f) for f in ("--device", "cpu", *flags)])


def args_of(*flags):
    return sample.parse_args([str(f) for f in ("--prompt", "a", "--device", "cpu", *flags)])


def read(folder, name):
    return soundfile.read(folder / f"{name}.wav", dtype="int16")[0].astype(int)


def test_the_command_line(student, tmp_path, monkeypatch, capsys):
    """With nothing but defaults, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--student", str(student), "--prompt",
                                      "A dog, barking!", "rain", "--n", "2", "--seed", "3"])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "real-time factor" in output
    names = ["a-dog-barking_seed3_0", "a-dog-barking_seed3_1", "rain_seed3_0", "rain_seed3_1"]
    for name in names:
        wav, rate = soundfile.read(tmp_path / f"samples/{name}.wav", dtype="int16")
        assert rate == 16000 and wav.shape == (10240,) and wav.any()
        assert f"samples/{name}.wav" in output and f"samples/{name}.png" in output
        assert Image.open(tmp_path / f"samples/{name}.png").size == (256, 256)

    rows = json.loads((tmp_path / "samples/manifest.json").read_text())
    assert [row["file"] for row in rows] == [f"{name}.wav" for name in names]
    assert rows[1] == {
        "file": "a-dog-barking_seed3_1.wav", "prompt": "A dog, barking!", "seed": 3, "k": 1,
        "student": str(student), "folder": str(student), "steps": 1,
        "dtype": str(sampling_dtype(pick_device()))}
    refused("sample.py", "--student", student, "--prompt", "rain", "--seed", 3, cwd=tmp_path,
            says=["rain_seed3_0.wav exists", "--overwrite"])


def test_a_clip_is_the_same_alone_and_in_a_batch(student, tmp_path):
    flags = ["--student", student, "--n", 2, "--precision", "fp32"]
    go(*flags, "--prompt", "a dog", "rain", "wind blows", "--batch_size", 5,
       "--out", tmp_path / "many")
    go(*flags, "--prompt", "rain", "--batch_size", 1, "--out", tmp_path / "one")
    for k in range(2):
        many, one = (read(tmp_path / d, f"rain_seed0_{k}") for d in ("many", "one"))
        assert np.abs(many - one).max() <= 2
    assert np.abs(one - read(tmp_path / "one", "rain_seed0_0")).max() > 2


def test_files_of_prompts_overwriting_and_the_manifest(student, tmp_path):
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
    go(*flags, "--prompt", "thunder")
    assert (out / "rain_seed0_0.wav").read_bytes() == before
    rows = json.loads((out / "manifest.json").read_text())
    assert [row["file"] for row in rows] == names + ["thunder_seed0_0.wav"]
    assert [row["prompt"] for row in rows] == ["rain", "Rain!", "wind", "thunder"]


def test_a_name_for_every_clip():
    names = sample.file_names(["a b", "A  b?", "犬が吠える", "!!", "x" * 300, "a-b-2"], 1, 0)
    assert list(names.values()) == [
        "a-b_seed0_0", "a-b-2_seed0_0", "犬が吠える_seed0_0", "clip_seed0_0",
        "x" * 60 + "_seed0_0", "a-b-2-2_seed0_0"]
    assert sample.file_names(["a"], 2, 5) == {("a", 0): "a_seed5_0", ("a", 1): "a_seed5_1"}


# ---- which system it is -------------------------------------------------------------------------

def noise_and_text(pipe):
    return sample.draw_noise(pipe, [0, 3], 7), pipe.encode_text(["dog", "a cat"])


def test_a_student_is_eq_1(student, plain, captions, tmp_path):
    direct = train_student(plain, captions, tmp_path, "--parameterization", "direct")
    for folder, parameterization in ((student, "eps"), (direct, "direct")):
        pipe, latents, about = sample.open_system(
            args_of("--student", folder, "--precision", "fp32"))
        z_T, text = noise_and_text(pipe)
        expected = one_step(denoiser(load_unet(folder, "")), z_T, text, pipe.alpha, pipe.sigma,
                            parameterization)
        assert torch.equal(latents(z_T, text), expected)
        assert pipe.seconds == 0.64 and about["dtype"] == "torch.float32"


def test_one_step_of_the_teacher_is_eq_1_guided(plain):
    """--teacher_steps 1: the teacher's own UNet and guidance, no scheduler."""
    flags = ["--teacher", plain, "--teacher_steps", 1, "--precision", "fp32"]
    for more, guidance in (([], 7.5), (["--guidance", 3], 3), (["--guidance", 1], 1)):
        pipe, latents, about = sample.open_system(args_of(*flags, *more))
        z_T, text = noise_and_text(pipe)
        eps = guided(denoiser(load_unet(plain)), pipe.encode_text([""]), guidance)
        assert torch.equal(latents(z_T, text), one_step(eps, z_T, text, pipe.alpha, pipe.sigma))
        assert about == {"teacher": str(plain), "steps": 1, "guidance": guidance,
                         "dtype": "torch.float32"}


def test_the_teacher_in_many_steps(student, plain, tmp_path):
    go("--student", student, "--prompt", "rain", "--teacher_steps", 11, "--guidance", 2,
       "--out", tmp_path)
    go("--teacher", plain, "--prompt", "wind", "--teacher_steps", 10, "--out", tmp_path)
    rows = json.loads((tmp_path / "manifest.json").read_text())
    assert [(row["steps"], row["guidance"], row["teacher"]) for row in rows] == [
        (11, 2, str(plain)), (10, 7.5, str(plain))]


def test_too_few_steps_of_the_teacher_are_refused_before_anything_is_written(plain, tmp_path):
    for steps in (2, 9):
        refused("sample.py", "--teacher", plain, "--prompt", "a", "--teacher_steps", steps,
                "--device", "cpu", cwd=tmp_path, says=[f"{steps} steps", "for more"])
    refused("sample.py", "--teacher", plain, "--prompt", "a", "--teacher_steps", 1001,
            cwd=tmp_path, says=["--teacher_steps: 1001 must be between 1 and 1000"])
    assert not list(tmp_path.iterdir())


def test_two_steps_of_a_teacher_that_starts_from_noise(tmp_path):
    """The tiny teacher's DDIM with "trailing" steps, and the guidance that its folder names."""
    go("--teacher", TINY, "--prompt", "rain falls", "--teacher_steps", 2, "--out", tmp_path)
    row, = json.loads((tmp_path / "manifest.json").read_text())
    assert (row["steps"], row["guidance"]) == (2, 2)
    assert soundfile.info(tmp_path / "rain-falls_seed0_0.wav").frames == 40960


@pytest.mark.parametrize("layout", ["plain", "adapter"])
def test_a_complete_one_step_model(request, layout, tmp_path):
    go("--student", request.getfixturevalue(layout), "--prompt", "rain", "--out", tmp_path)
    assert soundfile.info(tmp_path / "rain_seed0_0.wav").frames == 10240


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_fp32_is_not_tf32(student, tf32, precision):
    _, _, about = sample.open_system(args_of("--student", student, "--precision", precision))
    assert [switch.allow_tf32 for switch in tf32] == 2 * [precision == "auto"]
    half = precision == "auto" and has_bf16(torch.device("cpu"))
    assert about["dtype"] == ("torch.bfloat16" if half else "torch.float32")


def test_half_precision_is_near_fp32(student, monkeypatch):
    """On any machine: the UNet and the VAE in bf16, what is between in fp32."""
    mels = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sample, "sampling_dtype", lambda device: dtype)
        pipe, latents, about = sample.open_system(args_of("--student", student))
        z_T, _ = noise_and_text(pipe)
        mel, wav = sample.make_clips(pipe, latents, ["dog", "a cat"], z_T)
        assert about["dtype"] == str(dtype) and pipe.vae.dtype == dtype
        assert mel.dtype == torch.float32 and wav.dtype == np.float32 and wav.shape == (2, 10240)
        mels.append(mel)
    assert 0 < (mels[0] - mels[1]).abs().mean() < 0.1 * mels[0].std()


# ---- prompts and length -------------------------------------------------------------------------

def test_weights_act_on_their_own_clip_only(student, tmp_path):
    def wavs(*prompts, names):
        go("--student", student, "--prompt", *prompts, "--out", tmp_path / "w", "--overwrite",
           "--precision", "fp32")
        return [read(tmp_path / "w", f"{name}_seed0_0") for name in names]

    plain, = wavs("a dog", names=["a-dog"])
    one, = wavs("a (dog:1.0)", names=["a-dog-1-0"])
    assert np.array_equal(plain, one)
    a, b = wavs("a dog", "a (dog:3)", names=["a-dog", "a-dog-3"])
    alone, = wavs("a (dog:3)", names=["a-dog-3"])
    assert np.abs(a - plain).max() <= 2 and np.abs(b - alone).max() <= 2
    assert np.abs(b - a).max() > 2
    rows = json.loads((tmp_path / "w/manifest.json").read_text())
    assert [row["prompt"] for row in rows] == ["a dog", "a (dog:1.0)", "a (dog:3)"]


def test_broken_weights_name_where_they_are(student, tmp_path):
    refused("sample.py", "--student", student, "--prompt", "a (dog:", cwd=tmp_path,
            says=["--prompt", "character 7", "(rain:1.5)"])
    (tmp_path / "p.txt").write_text("rain\na dog)\n")
    refused("sample.py", "--student", student, "--prompts", "p.txt", cwd=tmp_path,
            says=["p.txt", "character 6"])


def test_long_prompts_are_cut_with_a_warning(student, tmp_path, capsys):
    go("--student", student, "--prompt", "dog " * 80, "--out", tmp_path)
    assert "77 fit; cut" in capsys.readouterr().out


def test_length(student, tmp_path):
    for seconds, samples in ((0.16, 2560), (1.28, 20480)):
        out = tmp_path / str(seconds)
        go("--student", student, "--prompt", "a dog", "--seconds", seconds, "--out", out)
        assert soundfile.info(out / "a-dog_seed0_0.wav").frames == samples
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 1.3,
            "--device", "cpu", cwd=tmp_path, says=["--seconds 1.3", "0.08"])
    refused("sample.py", "--student", student, "--prompt", "a dog", "--seconds", 31,
            cwd=tmp_path, says=["--seconds: 31 must be between 0.16 and 30"])


# ---- pages --------------------------------------------------------------------------------------

def test_pages_of_what_was_made(student, tmp_path):
    prompt, ours, theirs = "a dog </script>", tmp_path / "ours", tmp_path / "theirs"
    go("--student", student, "--prompt", prompt, "--out", theirs)
    flags = ["--student", student, "--prompt", prompt, "rain", "--out", ours, "--overwrite"]
    for kind, blind in ((["--html"], False), (["--html", "blind"], True)):
        go(*flags, *kind, "--beside", theirs)
        data = read_page(ours / "listen.html")
        assert data["blind"] is blind and data["systems"] == ["ours", "theirs"]
        assert [(row["prompt"], sorted(row["clips"])) for row in data["rows"]] == [
            (prompt, ["0", "1"]), ("rain", ["0"])]


def test_pages_that_cannot_be_made_are_refused_before_anything_is_written(student, tmp_path):
    flags = ["--student", student, "--prompt", "rain", "--out", tmp_path / "ours"]
    for more, says in ((["--html", "--beside", tmp_path / "nowhere"], "nowhere: holds no manifest"),
                       (["--beside", tmp_path], "--beside goes with --html"),
                       (["--html", "loud"], "--html: invalid choice: 'loud'")):
        with pytest.raises(InputError, match=says):
            go(*flags, *more)
    assert not list(tmp_path.iterdir())


# ---- what can be wrong --------------------------------------------------------------------------

def test_bad_input(student, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, says in (
            (["--prompt", " "], "empty prompt"), ([], "empty prompt"),
            (["--prompt", "(:2)"], "empty prompt"),
            (["--prompt", "a", "--n", 0], "--n: 0 must be at least 1"),
            (["--prompt", "a", "--guidance", 3], "--guidance goes with --teacher_steps"),
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


def test_a_damaged_manifest_is_not_overwritten(student, tmp_path):
    (tmp_path / "manifest.json").write_text("[{")
    with pytest.raises(InputError, match="manifest.json: is not JSON"):
        go("--student", student, "--prompt", "a", "--out", tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "[{"


def test_a_clip_that_cannot_be_written_is_named(student, tmp_path):
    (tmp_path / "a_seed0_0.wav").mkdir()
    with pytest.raises(InputError, match="a_seed0_0.wav: not "):
        go("--student", student, "--prompt", "a", "--out", tmp_path, "--overwrite")
    assert not (tmp_path / "manifest.json").exists()


def test_the_pipeline_of_a_student_is_its_teacher_s(student, plain):
    pipe, _, about = sample.open_system(args_of("--student", student))
    assert pipe.folder == plain and about["folder"] == str(student)
    text = pipe.encode_text(["dog"])
    assert torch.equal(text, Pipeline(plain).encode_text(["dog"]))
