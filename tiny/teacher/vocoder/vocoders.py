"""Vocoders of our own, which model.py loads from here: a model brings no code."""
import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.audio_utils import mel_filter_bank

RATE, HOP, WIN, N_FFT = 16000, 160, 1024, 2048          # as tiny/world.py makes mels


class GriffinLim(nn.Module):
    """A vocoder that needs no training: docs/LOG.md, 2026-11-20, says why.

    It finds phases as Griffin and Lim (1984), with the momentum of Perraudin et al. (2013).
    """
    dtype = torch.float32

    def __init__(self, num_mels, steps):
        super().__init__()
        self.steps = steps
        bank = mel_filter_bank(N_FFT // 2 + 1, num_mels, 0.0, RATE / 2, RATE, "slaney", "slaney")
        self.bank = torch.tensor(bank, dtype=torch.float32)     # no buffer: half() would round it

    def forward(self, log_mel):                                         # (B, T, M)
        bank = self.bank.to(log_mel.device)                             # (F, M)
        mel = log_mel.float().transpose(1, 2).exp()                     # (B, M, T)
        window, before = torch.hann_window(WIN, device=mel.device), 0
        magnitude = bank @ mel                                          # (B, F, T)
        for _ in range(30):         # non-negative magnitudes of these mels: NMF's KL updates
            ratio = mel / (bank.T @ magnitude + 1e-8)
            magnitude = magnitude * (bank @ ratio) / (bank.sum(1, keepdim=True) + 1e-8)
        # random phases, the same in any batch
        turns = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0))
        spec = torch.polar(magnitude, 2 * math.pi * turns.to(mel.device).expand_as(magnitude))
        for _ in range(self.steps):
            wav = torch.istft(spec, N_FFT, HOP, WIN, window)
            now = torch.stft(wav, N_FFT, HOP, WIN, window, return_complex=True)
            spec, before = torch.polar(magnitude, (now + 0.99 * (now - before)).angle()), now
        return F.pad(wav, (HOP // 2, HOP // 2)).clamp(-1, 1)


class FrameVocoder(nn.Module):
    """ConvNeXt blocks at the frame rate, then an inverse STFT, as in Vocos (arXiv 2306.00814).

    Bins turn at their own rate, so that steady tones go on. With `noise` white noise joins, in each
    bin as loud as the network says, for mels do not determine rain. Nothing is complex, for ONNX.
    """

    def __init__(self, num_mels, width, hidden, blocks, noise, n_fft, hop_size):
        super().__init__()
        self.hop, self.n_fft, self.bins, self.noisy = hop_size, n_fft, n_fft // 2 + 1, noise
        self.first = nn.Conv1d(num_mels, width, 7, padding=3)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 7, padding=3, groups=width)
                                   for _ in range(blocks))
        self.mixers = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(blocks))
        self.norm, self.prior = nn.LayerNorm(width), nn.Linear(num_mels, self.bins)
        self.head = nn.Linear(width, (2 + noise) * self.bins)
        window = torch.hann_window(n_fft, dtype=torch.float64)
        eye = torch.eye(self.bins, dtype=torch.complex128)
        bases = torch.fft.irfft(torch.cat([eye, 1j * eye]), n_fft) * window
        self.inverse = (bases * hop_size / window.square().sum()).float()   # no buffer: half()

    dtype = property(lambda self: self.head.weight.dtype)

    def istft(self, spectrum):
        """Real and imaginary parts (B, T, 2 bins) -> (B, T * hop), the ends faded by the window."""
        frames = (spectrum @ self.inverse.to(spectrum.device)).unflatten(2, (-1, self.hop))
        more = frames.shape[2] - 1
        wav = sum(F.pad(frames[:, :, i], (0, 0, i, more - i)) for i in range(more + 1)).flatten(1)
        return wav[:, more * self.hop // 2:][:, :spectrum.shape[1] * self.hop]

    def draw(self, frames):
        """White noise (1, frames, 2 bins), the same in any batch."""
        return torch.randn(1, frames, 2 * self.bins, generator=torch.Generator().manual_seed(0))

    def forward(self, mel, noise=None):                 # (B, T, M), (1 or B, T, 2 bins)
        x = self.first((mel + 4).transpose(1, 2) / 4)
        for conv, mixer in zip(self.convs, self.mixers):
            x = x + mixer(conv(x).transpose(1, 2)).transpose(1, 2)
        phase, *loud = self.head(self.norm(x.transpose(1, 2))).float().split(self.bins, 2)
        turns = torch.outer(torch.arange(mel.shape[1]) * self.hop, torch.arange(self.bins))
        phase = phase + (turns % self.n_fft).to(mel.device) * (2 * math.pi / self.n_fft)
        loud = [(self.prior(mel) + one).clamp(max=6).exp().repeat(1, 1, 2) for one in loud]
        parts = [torch.cat([phase.cos(), phase.sin()], 2)]
        if self.noisy:
            parts.append((self.draw(mel.shape[1]) if noise is None else noise).to(mel.device))
        return self.istft(sum(a * b for a, b in zip(loud, parts))).clamp(-1, 1)


def load(path, config):
    """Load the one in a folder whose config.json is this: GriffinLim or FrameVocoder."""
    if "griffin_lim" in config:
        return GriffinLim(config["num_mels"], config["griffin_lim"])
    vocoder = FrameVocoder(**config)
    vocoder.load_state_dict(load_file(path / "model.safetensors"))
    return vocoder.float().eval()
