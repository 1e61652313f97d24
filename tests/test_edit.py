"""Editing: noise is found that makes a recording, and a clip that starts from it is near."""
import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused

import sample
from data import sampling_noise
from extras.audio import encode_audio, log_mel, peak_normalize, read_audio
from extras.edit import invert, invert_recording
from extras.hub import TINY
from losses import one_step
from model import Pipeline, denoiser, load_unet

ALARM = ["--student", TINY, "--prompt", "an alarm beeps", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Beeps in stereo, at another rate, and longer than the tiny teacher's clips."""
    path = tmp_path_factory.mktemp("recording") / "in.wav"
    t = np.arange(3 * 48000) / 48000
    wav = np.sin(2 * np.pi * 700 * t) * (t % 0.5 < 0.2)
    soundfile.write(path, np.stack([wav, 0 * t], 1), 48000)
    return path


def clip(folder, *flags):
    sample.main([str(f) for f in (*ALARM, "--out", folder, *flags)])
    return soundfile.read(folder / "an-alarm-beeps_seed0_0.wav", dtype="float32")[0]


def test_edit_a_recording(recording, tmp_path, capsys):
    """With the tiny teacher as a one-step model, which need not be good at it."""
    init = ["--init", recording, "--init_prompt", "an alarm beeps"]
    near, free = clip(tmp_path / "near", *init, "--strength", 0), clip(tmp_path / "free")
    assert int(re.search(r"but for (\d+)%", capsys.readouterr().out)[1]) < 40

    original = log_mel(peak_normalize(read_audio(recording, 2.56)[None]), 64)
    off = [(log_mel(torch.from_numpy(w)[None], 64) - original).abs().mean() for w in (near, free)]
    assert off[0] < off[1] / 1.5
    row, = json.loads((tmp_path / "near/manifest.json").read_text())
    assert (row["strength"], row["init"], row["init_prompt"]) == (
        0, str(recording), "an alarm beeps")


@pytest.mark.parametrize("strength, of_recording", [(0, 1), (0.6, 0.8), (1, 0)])
def test_strength_mixes_noise_of_unit_variance(tmp_path, monkeypatch, strength, of_recording):
    """z_T = sqrt(1 - s^2) start + s z: as wide as in training, and at 1 the seed's own noise."""
    start, seen = torch.full((1, 4, 8, 32), 7.0), []

    def make_clips(pipe, latents, texts, z_T, weights):
        seen.append(z_T)
        return torch.zeros(1, 64, 256), np.zeros((1, 40960))

    monkeypatch.setattr(sample, "invert_recording", lambda *args: start)
    monkeypatch.setattr(sample, "make_clips", make_clips)
    clip(tmp_path, "--init", "a.wav", "--strength", strength)
    z = sampling_noise([0], 0, (4, 8, 32))
    torch.testing.assert_close(seen[0], of_recording * start + strength * z)


def test_bad_recordings_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    for name in ("none.wav", "text.wav"):
        refused("sample.py", *ALARM, "--init", name, cwd=tmp_path,
                says=[name, "cannot be read as audio"])
    refused("sample.py", *ALARM, "--init", "x.wav", "--strength", 2, cwd=tmp_path,
            says=["--strength: 2 must be between 0 and 1"])
    refused("sample.py", *ALARM, "--init", "x.wav", "--teacher_steps", 10, cwd=tmp_path,
            says=["--init needs a one-step student"])
    refused("sample.py", *ALARM, "--init_prompt", "a dog", cwd=tmp_path,
            says=["--init_prompt goes with --init"])
    assert [p.name for p in tmp_path.iterdir()] == ["text.wav"]


def test_inversion_finds_noise(plain):
    """Of a clip that the student itself made, from another start."""
    pipe, unet = Pipeline(plain), load_unet(plain).requires_grad_(False)
    text = pipe.encode_text(["a dog"])
    x0, start = torch.randn(2, 1, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))

    def latents(z):
        return one_step(denoiser(unet), z, text, pipe.alpha, pipe.sigma)

    x0 = latents(x0)
    _, before = invert(latents, x0, start, steps=1)
    z, after = invert(latents, x0, start)
    assert after < before / 2 and 0.5 < z.std() < 2
    assert not z.requires_grad and not after.requires_grad


def test_inversion_of_a_linear_model_is_exact():
    """Where x0 = 2 z, the noise is x0 / 2; each clip of a batch by itself."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    z, error = invert(lambda z: 2 * z, x0, torch.zeros_like(x0), steps=300, rate=0.05)
    assert error.shape == (3,) and error.max() < 1e-3
    torch.testing.assert_close(z, x0 / 2, rtol=0, atol=0.05)


def test_it_starts_with_a_fifth_of_the_clip_in_the_noise():
    g, seen = torch.Generator().manual_seed(2), []
    x0, z_T = 3 * torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)

    def latents(z):
        seen.append(z.detach().clone())
        return z

    invert(latents, x0, z_T, steps=2)
    torch.testing.assert_close(seen[0], 0.2 * x0 / x0.std() + 0.98 * z_T)
    assert len(seen) == 2 and seen[0].std().item() == pytest.approx(1, abs=0.1)


def test_a_recording_is_padded_and_its_first_noise_is_no_clip_s(recording, tmp_path, monkeypatch):
    pipe, seen = Pipeline("tiny", seconds=3.84), {}

    def look(latents, x0, z_T):
        seen.update(x0=x0, z_T=z_T)
        return z_T, torch.ones(1)

    monkeypatch.setattr("extras.edit.invert", look)
    invert_recording(recording, "a dog", pipe, None, 0)
    wav = read_audio(recording, 3.84)
    assert seen["x0"].shape == seen["z_T"].shape == (1, *pipe.latent_shape)
    padded = torch.nn.functional.pad(wav, (0, round(3.84 * 16000) - len(wav)))
    assert math.isclose(len(padded) / 16000, 3.84)
    assert torch.equal(seen["x0"], encode_audio(pipe, padded[None]))
    first = sampling_noise(range(8), 0, pipe.latent_shape)
    assert not any(torch.equal(seen["z_T"][0], z) for z in first)
