import math

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from data import InputError
from extras.audio import (
    encode_audio,
    log_mel,
    mel_to_image,
    peak_normalize,
    read_audio,
    resample,
)
from extras.teacher import load_teacher
from model import LOG_MAX, LOG_MIN


def slaney(f):
    high = 15 + 27 * np.log(np.maximum(f, 1e-9) / 1000) / np.log(6.4)
    return np.where(f < 1000, f * 3 / 200, high)


def reference_log_mel(wav, n_mels):
    x = np.pad(wav.astype(np.float64), 944, mode="reflect")
    window = np.zeros(2048)
    window[512:1536] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([x[i:i + 2048] * window for i in range(0, len(x) - 2047, 160)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)

    grid = np.linspace(0, 8000, 200001)
    edges = np.interp(np.linspace(0, slaney(8000.0), n_mels + 2), slaney(grid), grid)
    f = np.fft.rfftfreq(2048, 1 / 16000)
    bank = [np.maximum(0, np.minimum((f - a) / (b - a), (c - f) / (c - b))) * 2 / (c - a)
            for a, b, c in zip(edges, edges[1:], edges[2:])]
    return np.log(np.maximum(np.stack(bank) @ magnitude.T, 1e-5))


@pytest.mark.parametrize("n_mels", [64, 256])
def test_a_log_mel_equals_numpy(n_mels):
    t = np.arange(16000) / 16000
    noise = 0.01 * np.random.default_rng(0).standard_normal(16000)
    wav = 0.4 * np.sin(2 * np.pi * (300 + 3000 * t) * t) * np.exp(-t) + noise
    wav[12000:] = 0                                     # silence is the floor
    mine = log_mel(torch.from_numpy(wav)[None].float(), n_mels)[0].numpy()
    assert mine.shape == (n_mels, 100)
    np.testing.assert_allclose(mine, reference_log_mel(wav, n_mels), atol=2e-3)


def test_the_image_of_a_mel_has_its_highest_bin_on_top_and_a_peak_is_095():
    mel = torch.linspace(LOG_MIN, LOG_MAX, 12).view(1, 3, 4)
    image = mel_to_image(mel)
    assert image.shape == (1, 3, 3, 4) and image.min() == -1 and image.max() == 1
    assert image[0, 0, 0, -1] == 1
    assert mel_to_image(mel + 100).max() == 1                           # what is too loud is white
    wav = peak_normalize(torch.tensor([[0.1, -0.5], [0.0, 0.0]]))       # silence stays
    assert wav.tolist() == [[pytest.approx(0.19), pytest.approx(-0.95)], [0, 0]]


def test_latents_do_not_depend_on_loudness_and_have_the_scale_of_the_unet(plain):
    system = load_teacher(str(plain), 1, precision="fp32", device="cpu")
    vae = system.decoder.vae
    wav = torch.randn(2, 10240, generator=torch.Generator().manual_seed(0))
    x0 = encode_audio(system, wav)
    assert x0.shape == (2, *system.shape)
    torch.testing.assert_close(encode_audio(system, 0.01 * wav), x0, rtol=1e-3, atol=1e-4)

    image = mel_to_image(log_mel(0.95 * wav / wav.abs().amax(1, keepdim=True), 64))
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-4)

    system.decoder.vae = AutoencoderTiny()
    torch.testing.assert_close(encode_audio(system, wav), x0, rtol=1e-3, atol=1e-4)     # own VAE


def sine(hertz, rate):
    return (2 * math.pi * hertz * torch.arange(rate, dtype=torch.float64) / rate).sin()


@pytest.mark.parametrize("old, new", [(22051, 16000), (15999, 48000)])      # hardly a divisor
def test_resampling_keeps_a_sine_at_rare_rates(old, new):
    out = resample(sine(997, old), old, new)            # taps as long as `old` would not fit
    assert len(out) == new
    assert (out - sine(997, new))[100:-100].abs().max() < 2e-3


def torchaudio_s(wav, old, new):
    """torchaudio.functional.resample() written out, with its defaults."""
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cut = 0.99 * min(old, new)
    width = math.ceil(6 * old / cut)
    t = torch.arange(-width, width + old, dtype=wav.dtype) / old
    t = ((t - torch.arange(new)[:, None] / torch.tensor(new, dtype=wav.dtype)) * cut).clamp(-6, 6)
    bank = torch.sinc(t) * (t * math.pi / 12).cos() ** 2 * cut / old
    out = F.conv1d(F.pad(wav, (width, width + old))[None, None], bank[:, None], stride=old)
    return out[0].T.reshape(-1)[:math.ceil(len(wav) * new / old)]


@pytest.mark.parametrize("old, new", [(44100, 16000), (16000, 48000), (22050, 16000), (401, 400)])
def test_resampling_is_torchaudio_s(old, new):
    x = torch.randn(5001, dtype=torch.float64)
    torch.testing.assert_close(resample(x, old, new), torchaudio_s(x, old, new), rtol=0, atol=1e-12)
    float32 = resample(x.float(), old, new)
    torch.testing.assert_close(float32.double(), torchaudio_s(x, old, new), rtol=0, atol=3e-6)
    try:
        from torchaudio.functional import resample as theirs
    except (ImportError, OSError):                      # not there, or built for another torch
        return
    torch.testing.assert_close(resample(x, old, new), theirs(x, old, new), rtol=0, atol=1e-12)


def test_audio_is_the_first_channel_without_its_mean_cut_and_padded(tmp_path):
    left = np.full(3 * 16000, 0.25, np.float32)
    left[::2] = 0.75
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], 1), 16000, "FLOAT")
    assert torch.equal(read_audio(tmp_path / "a.wav"), torch.tensor([0.25, -0.25]).repeat(24000))
    mixed = read_audio(tmp_path / "a.wav", mix=True)
    assert torch.equal(mixed, torch.tensor([0.375, 0.125]).repeat(24000))
    soundfile.write(tmp_path / "short.wav", left[:100], 16000, "FLOAT")
    wav = read_audio(tmp_path / "short.wav")
    assert len(wav) == 32000 and wav[:100].abs().min() == 0.25 and not wav[100:].any()


def test_audio_of_another_rate_is_resampled_and_cut(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.5 * sine(997, 44100).repeat(3).numpy(), 44100, "FLOAT")
    wav = read_audio(tmp_path / "a.wav", 2.5)
    assert len(wav) == 40000
    assert (wav[:16000] - 0.5 * sine(997, 16000))[100:-100].abs().max() < 2e-3
    assert len(read_audio(tmp_path / "a.wav", 2.5, 48000)) == 120000


def test_unusable_audio_is_named(tmp_path):
    sound = np.full(3 * 16000, 0.25, np.float32)
    (tmp_path / "cut.wav").write_bytes(b"RIFF....WAVEfmt ")
    soundfile.write(tmp_path / "empty.wav", sound[:0], 16000)
    soundfile.write(tmp_path / "nan.wav", sound * np.nan, 16000, "FLOAT")
    for name, says in (("cut", "cannot be read as audio"), ("empty", "holds no sound"),
                       ("nan", "not numbers"), ("missing", "cannot be read as audio")):
        with pytest.raises(InputError, match=f"{name}.wav: .*{says}"):
            read_audio(tmp_path / f"{name}.wav")
