"""Audio in: Auffusion's mel front end, files and resampling."""
import functools
import math

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers.audio_utils import mel_filter_bank

from data import InputError, require
from model import HOP, LOG_MAX, LOG_MIN, RATE, load_part, pretrained

# ---- waveform -> log-mel -> image ----------------------------------------------------------------

@functools.lru_cache
def mel_filters(n_mels, device):
    """Slaney mel filters (N_FFT / 2 + 1, n_mels) over 0..8000 Hz, librosa's default."""
    bank = mel_filter_bank(N_FFT // 2 + 1, n_mels, 0.0, RATE / 2, RATE, "slaney", "slaney")
    return torch.tensor(bank, dtype=torch.float32, device=device)

WIN, N_FFT = 1024, 2048                                 # Auffusion's front end, in samples


def log_mel(wav, n_mels=256):
    """Waveforms (B, N) at 16 kHz -> natural-log mel magnitudes (B, n_mels, N // HOP), lowest first.

    The waveform is taken as it is: Auffusion peak-normalizes it first.
    """
    pad = (N_FFT - HOP) // 2
    wav = F.pad(wav[:, None].float(), (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(WIN, device=wav.device)      # 64 ms, zero-padded to 128
    spec = torch.stft(wav, N_FFT, HOP, WIN, window, center=False, return_complex=True)
    magnitude = (spec.real ** 2 + spec.imag ** 2 + 1e-9).sqrt()
    return (mel_filters(n_mels, wav.device).T @ magnitude).clamp(min=1e-5).log()


def spectra(wav):
    """Magnitudes of waveforms (B, N) at five resolutions, their logarithms and square roots."""
    found = [torch.stft(wav, n, n // 4, n, torch.hann_window(n, device=wav.device),
                        return_complex=True) for n in (2048, 1024, 512, 256, 128)]
    powers = [one.real ** 2 + one.imag ** 2 + 1e-4 for one in found]
    return [one for power in powers for one in (power.log() / 2, power ** 0.25)]


def distance(x, y):
    """Between spectra(): a norm of whole frames, as each bin alone does not show common beats."""
    return sum(((a - b).square().mean(1) + 1e-8).sqrt().mean() for a, b in zip(x, y)) / len(x)


def peak_normalize(wav):
    """Scale each of waveforms (B, N) to a peak of 0.95; silence stays silence."""
    return 0.95 * wav / wav.abs().amax(-1, keepdim=True).clamp(min=1e-8)


def mel_to_image(mel):
    """Log-mel (B, n_mels, frames) -> the VAE's image (B, 3, n_mels, frames), highest bin on top."""
    x = ((mel - LOG_MIN) / (LOG_MAX - LOG_MIN)).clamp(0, 1) * 2 - 1
    return x.flip(1)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def encode_audio(system, wav):
    """Waveforms (B, N) at 16 kHz -> latents (B, 4, h, w) of the peak-normalized clips."""
    vae = system.decoder.vae
    if not isinstance(vae, AutoencoderKL):      # the small decoder, whose encoder is unused
        vae = load_part(system.folder / "vae", pretrained(AutoencoderKL)).to(vae.device, vae.dtype)
    image = mel_to_image(log_mel(peak_normalize(wav), system.shape[1] * 8))
    return vae.encode(image.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor


# ---- files ---------------------------------------------------------------------------------------

def resample(wav, old, new):
    """Waveform (N,) at `old` Hz -> (ceil(N new / old),) at `new` Hz.

    A Hann-windowed sinc of 6 zero crossings, cut off at 0.99 of the lower Nyquist frequency, which
    are torchaudio's defaults.
    """
    if old == new:
        return wav
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cut = 0.99 * min(1, new / old)
    reach = math.ceil(6 / cut)
    # one filter for each of the `new` places of an output sample behind an input sample
    behind = (torch.arange(new) * old % new)[:, None] / torch.tensor(new, dtype=torch.float64)
    t = ((torch.arange(-reach, reach + 1) - behind) * cut).clamp(-6, 6)
    bank = (torch.sinc(t) * (t * math.pi / 12).cos() ** 2 * cut).to(wav)    # (new, 2 reach + 1)
    around = F.pad(wav, (reach, reach)).unfold(0, 2 * reach + 1, 1)         # (N, 2 reach + 1)
    parts = torch.arange(math.ceil(len(wav) * new / old)).split(2 ** 16)
    return torch.cat([(around[n * old // new] * bank[n % new]).sum(1) for n in parts])


def read_file(path):
    """Read a sound file: (samples (N, channels) in fp32, rate in Hz)."""
    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as e:
        raise InputError(f"{path}: cannot be read as audio ({e})")
    require(len(wav), f"{path}: holds no sound")
    require(np.isfinite(wav).all(), f"{path}: holds samples that are not numbers")
    return wav, rate


def read_audio(path, seconds=10.0, rate=RATE, mix=False):
    """First channel of a file (N,), minus its mean, at `rate`, cut to `seconds`, 2 s at least.

    mix: the mean of the channels in its place, with its DC.
    """
    wav, found = read_file(path)
    wav = torch.from_numpy(wav.mean(1) if mix else wav[:, 0].copy())
    wav = resample(wav if mix else wav - wav.mean(), found, rate)[:round(seconds * rate)]
    return F.pad(wav, (0, max(0, 2 * rate - len(wav))))
