"""Weights in prompts scale attention's probabilities; an edited recording's noise makes it."""
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from runs import call

import sample
from data import InputError, sampling_noise
from extras import control
from extras.audio import log_mel, peak_normalize, read_audio
from extras.control import invert, parse_weights, reweighted, token_weights
from losses import guided
from model import TINY, denoiser, load_student, load_unet


def go(out, *flags, main=control.main):
    """Run the command line, of extras.control or of sample.py; the rows of its manifest."""
    call(main, "--device", "cpu", "--precision", "fp32", "--out", out, *flags)
    return sample.read_manifest(out)


@pytest.mark.parametrize("prompt, words, weights", [
    ("a (dog:2)", "a dog", [1, 1, 2, 2, 2]),
    ("(a:b: 3 ) 1:2", "a:b 1:2", [3] * 3 + [1] * 4),
    ("(a :.5)(b:1.25)(c:0)", "a bc", [0.5, 0.5, 1.25, 0]),
    ("(:2)(x:100)", "x", [100])])
def test_weights_are_read(prompt, words, weights):
    assert parse_weights(prompt) == (words, weights)


@pytest.mark.parametrize("prompt", ["(a:101)", "a (dog", "a dog)", "(a:2) (b:-1)", "((a:2) b:2)"])
def test_broken_weights_are_named(prompt):
    with pytest.raises(InputError, match=r"p.txt: .* look like \(rain:1.5\), at most 100"):
        parse_weights(prompt, "p.txt")


def test_a_token_has_the_weight_of_its_first_letter(plain):
    system = load_student(plain, precision="fp32", device="cpu")
    rows = token_weights(system, ["a dog", "a"], [[1, 1, 2, 3, 4], [0.5]])
    assert rows.shape == (2, 77)                            # start, a, dog, end, ...
    assert rows[0, :5].tolist() == [1, 1, 2, 1, 1] and rows[1, :4].tolist() == [1, 0.5, 1, 1]
    assert rows[:, 5:].eq(1).all()


def attention(layer, x, text, w):
    """Cross-attention written out, its probabilities multiplied by w (B, tokens)."""
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
               for y in (layer.to_q(x), layer.to_k(text), layer.to_v(text)))
    p = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) * w[:, None, None]
    return layer.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def test_the_weight_of_a_token_is_that_of_its_probability(plain):
    unet = load_unet(plain)
    layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    x, text = torch.randn(2, 6, layer.to_q.in_features), torch.randn(2, 77, 24)
    w = 3 * torch.rand(2, 77)
    expected, unweighted = (attention(layer, x, text, v) for v in (w, torch.ones(2, 77)))
    with pytest.raises(ZeroDivisionError), reweighted(unet, w):
        torch.testing.assert_close(layer(x, text), expected)
        1 / 0
    torch.testing.assert_close(layer(x, text), unweighted)  # it ends with the block

    # through losses.guided: the empty caption, second in the batch, keeps its own
    eps, t, z = denoiser(unet), torch.tensor([999, 999]), torch.randn(2, 4, 8, 8)
    null = torch.randn(1, 77, 24)
    with reweighted(unet, w):
        whole, cond = guided(eps, null, 3)(z, t, text), eps(z, t, text)
    uncond = eps(z, t, null.expand_as(text))
    torch.testing.assert_close(whole, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cond, eps(z, t, text), atol=1e-3)


def test_weights_act_on_their_own_clip_only(plain, tmp_path):
    def wavs(*prompts, main=control.main):
        rows = go(tmp_path, "--student", plain, "--prompt", *prompts, "--overwrite", main=main)
        return [soundfile.read(tmp_path / row["file"], dtype="int16")[0].astype(int)
                for row in rows if row["prompt"] in prompts]

    words, = wavs("a dog", main=sample.main)
    a, b = wavs("a dog", "a (dog:3)")
    alone, = wavs("a (dog:3)")
    assert np.abs(a - words).max() <= 2 and np.abs(b - alone).max() <= 2
    assert np.abs(b - a).max() > 2
    assert [(row["prompt"], row.get("words")) for row in sample.read_manifest(tmp_path)] == [
        ("a dog", None), ("a (dog:3)", "a dog")]


def test_bad_prompts_and_recordings_are_named_before_anything_is_loaded(tmp_path):
    (tmp_path / "p.txt").write_text("rain\na dog)\n")
    rain = "--prompt", "rain", "--init"
    for flags, says in ((["--prompts", "p.txt"], "p.txt: 'a dog)'"),
                        (["--prompt", "rain", "( :2)"], "empty prompt"),
                        ([*rain, "x.wav", "--strength", 2], "--strength: 2 must be"),
                        ([*rain, "x.wav", "--teacher_steps", 10], "does not go with --teacher_st"),
                        (["--prompt", "rain", "--init_prompt", "a"], "goes with --init"),
                        ([*rain, "none.wav"], "none.wav: cannot be read as audio")):
        refused("extras.control", "--student", "nowhere", *flags, cwd=tmp_path, says=[says])
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


ALARM = ["--student", TINY, "--prompt", "an alarm beeps"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Beeps in stereo, at another rate, and longer than the tiny teacher's clips."""
    path = tmp_path_factory.mktemp("recording") / "in.wav"
    t = np.arange(3 * 48000) / 48000
    wav = np.sin(2 * np.pi * 700 * t) * (t % 0.5 < 0.2)
    soundfile.write(path, np.stack([wav, 0 * t], 1), 48000)
    return path


def test_edit_a_recording(recording, tmp_path, capsys):
    """With the tiny teacher as a one-step model, which need not be good at it."""
    about = {"init": str(recording), "init_prompt": "an alarm beeps", "strength": 0.0}
    go(tmp_path / "free", *ALARM)
    row, = go(tmp_path / "near", *ALARM, *(x for k, v in about.items() for x in (f"--{k}", v)))
    assert int(re.search(r"all but (\d+)%", capsys.readouterr().out)[1]) < 40
    assert about.items() <= row.items()

    original, off = log_mel(peak_normalize(read_audio(recording, 2.56)[None]), 64), []
    for folder in ("near", "free"):
        wav = soundfile.read(tmp_path / folder / row["file"], dtype="float32")[0]
        off.append((log_mel(torch.from_numpy(wav)[None], 64) - original).abs().mean())
    assert off[0] < off[1] / 1.5


def test_strength_mixes_noise_of_unit_variance(recording, tmp_path, monkeypatch):
    """z_T = sqrt(1 - s^2) start + s z: as wide as in training."""
    start, asked = torch.full((1, 4, 8, 32), 7.0), []

    def make_weighted(system, prompts, z_T):
        torch.testing.assert_close(z_T, 0.8 * start + 0.6 * sampling_noise([0, 1], 3, (4, 8, 32)))
        return torch.zeros(2, 64, 256), np.zeros((2, 40960))

    monkeypatch.setattr(control, "make_weighted", make_weighted)
    monkeypatch.setattr(control, "invert_recording",
                        lambda *args: asked.append(args) or (start, 0.1))
    go(tmp_path, *ALARM, "--init", recording, "--init_prompt", "a dog barks", "--strength", 0.6,
       "--n", 2, "--seed", 3)
    assert asked == [(str(recording), "a dog barks", asked[0][2], 3)]


def test_inversion_of_a_linear_model_is_exact():
    """Where x0 = 2 z, the noise is x0 / 2; each clip of a batch by itself, from a fifth of it."""
    x0, start = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []

    def latents(z):
        seen.append(z.detach().clone())
        return 2 * z

    with torch.no_grad():                                   # an app may be in such a block
        z, error = invert(latents, x0, start, steps=300, rate=0.05)
    assert error.shape == (3,) and error.max() < 1e-3 and not z.requires_grad
    torch.testing.assert_close(z, x0 / 2, rtol=0, atol=0.05)
    torch.testing.assert_close(seen[0][1], 0.2 * x0[1] / x0[1].std() + 0.98 * start[1])
