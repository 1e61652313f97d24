"""Audio in: Auffusion's mel front end, files, resampling, and a picture of a spectrogram."""
import functools
import math

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.audio_utils import mel_filter_bank

from extras.cli import InputError
from model import HOP, LOG_MAX, LOG_MIN, RATE

WIN, N_FFT = 1024, 2048                                 # 64 ms Hann window, zero-padded to 128 ms


# ---- waveform -> log-mel -> image --------------------------------------------------------------

@functools.lru_cache
def mel_filters(n_mels, device):
    """Slaney mel filters (N_FFT / 2 + 1, n_mels) over 0..8000 Hz, librosa's default."""
    bank = mel_filter_bank(N_FFT // 2 + 1, n_mels, 0.0, RATE / 2, RATE, norm="slaney",
                           mel_scale="slaney")
    return torch.tensor(bank, dtype=torch.float32, device=device)


def log_mel(wav, n_mels=256):
    """Waveforms (B, N) at 16 kHz -> natural-log mel magnitudes (B, n_mels, N // HOP), lowest first.

    The waveform is taken as it is: Auffusion peak-normalizes it first.
    """
    pad = (N_FFT - HOP) // 2
    wav = F.pad(wav[:, None].float(), (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(WIN, device=wav.device)
    spec = torch.stft(wav, N_FFT, HOP, WIN, window, center=False, return_complex=True)
    magnitude = (spec.real ** 2 + spec.imag ** 2 + 1e-9).sqrt()
    return (mel_filters(n_mels, wav.device).T @ magnitude).clamp(min=1e-5).log()


def peak_normalize(wav):
    """Scale each of waveforms (B, N) to a peak of 0.95; silence stays silence."""
    return 0.95 * wav / wav.abs().amax(-1, keepdim=True).clamp(min=1e-8)


def mel_to_image(mel):
    """Log-mel (B, n_mels, frames) -> the VAE's image (B, 3, n_mels, frames), highest bin on top."""
    x = ((mel - LOG_MIN) / (LOG_MAX - LOG_MIN)).clamp(0, 1) * 2 - 1
    return x.flip(1)[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def encode_audio(pipe, wav):
    """Waveforms (B, N) at 16 kHz -> latents (B, 4, h, w) of the peak-normalized clips."""
    image = mel_to_image(log_mel(peak_normalize(wav), pipe.num_mels))
    x0 = pipe.vae.encode(image.to(pipe.vae.dtype)).latent_dist.mode()
    return x0.float() * pipe.vae.config.scaling_factor


def picture(mel):
    """Log-mel (n_mels, frames) -> an RGB image at least 256 pixels high, low frequencies below."""
    x = np.clip((np.asarray(mel) - LOG_MIN) / (LOG_MAX - LOG_MIN), 0, 1)[::-1]
    colors = np.array([(0, 0, 4), (60, 15, 110), (150, 40, 125), (235, 90, 95), (253, 180, 110),
                       (252, 253, 190)])
    stops = np.linspace(0, 0.9, len(colors))
    rgb = np.stack([np.interp(x, stops, colors[:, c]) for c in range(3)], -1).astype(np.uint8)
    scale = max(1, 256 // rgb.shape[0])
    return Image.fromarray(rgb.repeat(scale, 0).repeat(scale, 1))


# ---- files -------------------------------------------------------------------------------------

def resample(wav, old, new):
    """Waveform (N,) at `old` Hz -> (ceil(N new / old),) at `new` Hz.

    A Hann-windowed sinc of 6 zero crossings, cut off at 0.99 of the lower Nyquist frequency, which
    are torchaudio's defaults.
    """
    if old == new:
        return wav
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cut = 0.99 * min(old, new)
    reach = math.ceil(6 * old / cut)
    # one filter for each of the `new` phases of an output sample between `old` input samples
    t = torch.arange(-reach, reach + old, dtype=torch.float64) / old
    t = t - torch.arange(new, dtype=torch.float64)[:, None] / new
    t = (t * cut).clamp(-6, 6)
    bank = torch.sinc(t) * (t * math.pi / 12).cos() ** 2 * cut / old        # (new, 2 reach + old)
    wav_padded = F.pad(wav, (reach, reach + old))[None, None]
    out = F.conv1d(wav_padded, bank.to(wav)[:, None], stride=old)
    return out[0].T.reshape(-1)[:math.ceil(len(wav) * new / old)]


def read_audio(path, seconds=10.0, rate=RATE):
    """First channel of a file (N,), minus its mean, at `rate`, cut to `seconds`, 2 s at least."""
    try:
        wav, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as e:
        raise InputError(f"{path}: cannot be read as audio ({e})")
    if not len(wav):
        raise InputError(f"{path}: holds no sound")
    if not np.isfinite(wav).all():
        raise InputError(f"{path}: holds samples that are not numbers")
    wav = torch.from_numpy(wav[:, 0].copy())
    wav = resample(wav - wav.mean(), found, rate)[:round(seconds * rate)]
    return F.pad(wav, (0, max(0, 2 * rate - len(wav))))
