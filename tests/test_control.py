"""Weights in prompts scale attention's probabilities; an edited recording's noise makes it."""
import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused

import sample
from data import InputError, sampling_noise
from extras import control
from extras.audio import encode_audio, log_mel, peak_normalize, read_audio
from extras.control import invert, invert_recording, parse_weights, reweighted, token_weights
from losses import guided, one_step
from model import TINY, denoiser, load_student, load_teacher, load_unet, noise_schedule


def go(out, *flags, main=control.main):
    """Run the command line, of extras.control or of sample.py; the rows of its manifest."""
    main([str(f) for f in ("--device", "cpu", "--precision", "fp32", "--out", out, *flags)])
    return json.loads((out / "manifest.json").read_text("utf-8"))


# ---- how weights are written --------------------------------------------------------------------

@pytest.mark.parametrize("prompt, words, weights", [
    ("a dog", "a dog", [1] * 5),
    ("a (dog:2)", "a dog", [1, 1, 2, 2, 2]),
    ("(a:2) b 1:2", "a b 1:2", [2] + [1] * 6),
    ("(a:b: 3 )", "a:b", [3] * 3),
    ("(a :.5)b", "a b", [0.5, 0.5, 1]),
    ("(a:0)(b:1.25)", "ab", [0, 1.25]),
    ("(:2)x", "x", [1])])
def test_weights_are_read(prompt, words, weights):
    assert parse_weights(prompt) == (words, weights)


@pytest.mark.parametrize("prompt", [
    "(a:101)", "a (dog", "a ((dog", "a dog)", "a 1:2)", "(dog:x)", "(dog)", "(a:2) (b:-1)",
    "((a:2) b:2)", "(a:inf)", "(a:)", "(a:1.2.3)"])
def test_broken_weights_are_named(prompt):
    with pytest.raises(InputError, match="prompts.txt: .*at most 100; no other brackets") as e:
        parse_weights(prompt, "prompts.txt")
    assert repr(prompt) in str(e.value) and "(rain:1.5)" in str(e.value)


def test_a_token_has_the_weight_of_its_first_letter(plain):
    system = load_student(plain, precision="fp32", device="cpu")
    rows = token_weights(system, ["a dog", "a"], [[1, 1, 2, 3, 4], [0.5]])
    assert rows.shape == (2, 77)                            # start, a, dog, end, ...
    assert rows[0, :5].tolist() == [1, 1, 2, 1, 1] and rows[1, :4].tolist() == [1, 0.5, 1, 1]
    assert rows[:, 5:].eq(1).all()


# ---- what they do -------------------------------------------------------------------------------

@pytest.fixture
def layer_and_input(plain):
    unet = load_unet(plain)
    layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    x, text = torch.randn(2, 6, layer.to_q.in_features), torch.randn(2, 77, 24)
    return unet, layer, x, text, torch.rand(2, 77) * 3


def attention(layer, x, text, w):
    """Cross-attention written out, its probabilities multiplied by w (B, tokens)."""
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
               for y in (layer.to_q(x), layer.to_k(text), layer.to_v(text)))
    p = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) * w[:, None, None]
    return layer.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def test_the_weight_of_a_token_is_that_of_its_probability(layer_and_input):
    unet, layer, x, text, w = layer_and_input
    expected = attention(layer, x, text, w)
    with reweighted(unet, w):
        assert torch.allclose(layer(x, text), expected, atol=1e-5)
    unweighted = layer(x, text)                             # it ends with the block
    assert torch.allclose(unweighted, attention(layer, x, text, torch.ones(2, 77)), atol=1e-5)
    assert not torch.allclose(unweighted, expected, atol=1e-3)
    with reweighted(unet, torch.ones(2, 77)):
        assert torch.equal(layer(x, text), unweighted)
    with pytest.raises(ZeroDivisionError), reweighted(unet, w):
        1 / 0
    assert torch.equal(layer(x, text), unweighted)


def test_the_unconditional_half_of_a_guided_batch_keeps_its_own(layer_and_input):
    unet, layer, x, text, w = layer_and_input
    unweighted, expected = layer(x, text), attention(layer, x, text, w)
    with reweighted(unet, w[:1]):
        both = layer(x[:1].expand(2, -1, -1), text[:1].expand(2, -1, -1))
    assert torch.allclose(both[0], expected[0], atol=1e-5)
    assert torch.allclose(both[1], unweighted[0], atol=1e-5)

    # the same through losses.guided: text first, the empty caption second
    eps, t, z = denoiser(unet), torch.tensor([999, 999]), torch.randn(2, 4, 8, 8)
    null = torch.randn(1, 77, 24)
    with reweighted(unet, w):
        whole, cond = guided(eps, null, 3)(z, t, text), eps(z, t, text)
    uncond = eps(z, t, null.expand_as(text))
    torch.testing.assert_close(whole, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)


# ---- clips of weighted prompts ------------------------------------------------------------------

def test_weights_act_on_their_own_clip_only(plain, tmp_path):
    def wavs(*prompts, names, main=control.main):
        go(tmp_path / "w", "--student", plain, "--prompt", *prompts, "--overwrite", main=main)
        return [soundfile.read(tmp_path / f"w/{name}_seed0_0.wav", dtype="int16")[0].astype(int)
                for name in names]

    words, = wavs("a dog", names=["a-dog"], main=sample.main)
    one, = wavs("a (dog:1.0)", names=["a-dog-1-0"])
    assert np.array_equal(words, one)
    a, b = wavs("a dog", "a (dog:3)", names=["a-dog", "a-dog-3"])
    alone, = wavs("a (dog:3)", names=["a-dog-3"])
    assert np.abs(a - words).max() <= 2 and np.abs(b - alone).max() <= 2
    assert np.abs(b - a).max() > 2
    rows = json.loads((tmp_path / "w/manifest.json").read_text("utf-8"))
    assert [(row["prompt"], row.get("words")) for row in rows] == [
        ("a dog", None), ("a (dog:1.0)", "a dog"), ("a (dog:3)", "a dog")]


def test_an_app_needs_no_command_line(plain):
    """A teacher's many steps too; weights are gone again behind the call."""
    system = load_teacher(plain, 10, 2, precision="fp32", device="cpu")
    z_T = system.noise([0], 0)
    mel, wavs = control.make_weighted(system, ["a (dog:3)"], z_T)
    with reweighted(system.unet, token_weights(system, ["a dog"], [[1, 1, 3, 3, 3]])):
        assert torch.equal(system.make(["a dog"], z_T)[0], mel)
    assert mel.shape == (1, 64, 64) and wavs.shape == (1, 10240)
    assert not torch.equal(system.make(["a dog"], z_T)[0], mel)


def test_broken_weights_name_where_they_are_before_anything_is_loaded(tmp_path):
    refused("extras.control", "--student", "nowhere", "--prompt", "a (dog:", cwd=tmp_path,
            says=["--prompt", "'a (dog:'", "(rain:1.5)"])
    (tmp_path / "p.txt").write_text("rain\na dog)\n")
    refused("extras.control", "--student", "nowhere", "--prompts", "p.txt", cwd=tmp_path,
            says=["p.txt", "'a dog)'"])
    for flags in (["--prompt", "(:2)"], ["--prompt", "rain", "( :2)"], []):
        refused("extras.control", "--student", "nowhere", *flags, cwd=tmp_path,
                says=["empty prompt"])


def test_words_that_are_not_read_are_told(plain, tmp_path, capsys):
    """Of the prompt's words, without its brackets and numbers."""
    go(tmp_path, "--student", plain, "--prompt", "(" + "dog " * 74 + "barks:2)")
    line, = (s for s in capsys.readouterr().out.splitlines() if s.startswith("warning"))
    assert line.startswith("warning: 81 tokens, 77 fit; cut:") and line.endswith("rks'")


# ---- edits --------------------------------------------------------------------------------------

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
    row, = go(tmp_path / "near", *ALARM, "--init", recording, "--init_prompt", "an alarm beeps",
              "--strength", 0)
    assert int(re.search(r"all but (\d+)%", capsys.readouterr().out)[1]) < 40
    assert (row["strength"], row["init"], row["init_prompt"], row["steps"]) == (
        0, str(recording), "an alarm beeps", 1)
    assert "init" not in go(tmp_path / "free", *ALARM)[0]

    original, off = log_mel(peak_normalize(read_audio(recording, 2.56)[None]), 64), []
    for folder in ("near", "free"):
        wav = soundfile.read(tmp_path / folder / "an-alarm-beeps_seed0_0.wav", dtype="float32")[0]
        off.append((log_mel(torch.from_numpy(wav)[None], 64) - original).abs().mean())
    assert off[0] < off[1] / 1.5


@pytest.mark.parametrize("strength, of_recording", [(0, 1), (0.6, 0.8), (1, 0)])
def test_strength_mixes_noise_of_unit_variance(tmp_path, monkeypatch, strength, of_recording):
    """z_T = sqrt(1 - s^2) start + s z: as wide as in training, and at 1 the seed's own noise."""
    start, seen = torch.full((1, 4, 8, 32), 7.0), []

    def make_weighted(system, prompts, z_T):
        seen.append(z_T)
        return torch.zeros(2, 64, 256), np.zeros((2, 40960))

    asked = []
    monkeypatch.setattr(control, "invert_recording",
                        lambda *args: asked.append(args) or (start, 0.1))
    monkeypatch.setattr(control, "make_weighted", make_weighted)
    go(tmp_path, *ALARM, "--init", "a.wav", "--init_prompt", "a dog barks", "--strength", strength,
       "--n", 2, "--seed", 3)
    assert asked == [("a.wav", "a dog barks", asked[0][2], 3)]
    z = sampling_noise([0, 1], 3, (4, 8, 32))
    torch.testing.assert_close(seen[0], of_recording * start + strength * z)


def test_bad_recordings_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    flags = [*ALARM, "--device", "cpu"]
    for name in ("none.wav", "text.wav"):
        refused("extras.control", *flags, "--init", name, cwd=tmp_path,
                says=[name, "cannot be read as audio"])
    for more, says in ((["--init", "x.wav", "--strength", 2],
                        "--strength: 2 must be between 0 and 1"),
                       (["--init", "x.wav", "--teacher_steps", 10],
                        "--init does not go with --teacher_steps"),
                       (["--init_prompt", "a dog"], "--init_prompt goes with --init")):
        refused("extras.control", *flags, *more, cwd=tmp_path, says=[says])
    assert [p.name for p in tmp_path.iterdir()] == ["text.wav"]


def test_inversion_finds_noise(plain):
    """Of a clip that the student itself made, from another start."""
    system = load_student(plain, precision="fp32", device="cpu")
    text, (alpha, sigma) = system.encode_text(["a dog"]), noise_schedule(system.scheduler)
    x0, start = torch.randn(2, 1, *system.shape, generator=torch.Generator().manual_seed(0))

    def latents(z):
        return one_step(denoiser(system.unet), z, text, alpha, sigma)

    x0 = latents(x0)
    _, before = invert(latents, x0, start, steps=1)
    z, after = invert(latents, x0, start)
    assert after < before / 2 and 0.5 < z.std() < 2
    assert not z.requires_grad and not after.requires_grad


def test_inversion_of_a_linear_model_is_exact():
    """Where x0 = 2 z, the noise is x0 / 2; each clip of a batch by itself."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():                                   # an app may be in such a block
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


@pytest.mark.parametrize("seconds", [0.64, 2.56, 3.84])     # less than read_audio gives at least
def test_a_recording_is_fitted_and_its_first_noise_is_no_clip_s(recording, monkeypatch, seconds):
    system, seen = load_student("tiny", seconds=seconds, precision="fp32", device="cpu"), {}

    def look(latents, x0, z_T):
        seen.update(x0=x0, z_T=z_T)
        return z_T, 0.5 * x0.var()[None]

    monkeypatch.setattr(control, "invert", look)
    z_T, left = invert_recording(recording, "a dog", system, 0)
    assert torch.equal(z_T, seen["z_T"]) and left == pytest.approx(0.5)
    assert seen["x0"].shape == z_T.shape == (1, *system.shape)
    wav, length = read_audio(recording, 60), round(seconds * 16000)
    fitted = torch.nn.functional.pad(wav, (0, max(0, length - len(wav))))[:length]
    assert math.isclose(len(fitted) / 16000, seconds)
    # the mean that is taken off is the whole file's, as is the filter's reach at the cut
    torch.testing.assert_close(seen["x0"], encode_audio(system, fitted[None]), rtol=0, atol=1e-3)
    assert not any(torch.equal(z_T[0], z) for z in sampling_noise(range(8), 0, system.shape))
