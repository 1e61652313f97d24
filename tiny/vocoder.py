"""The tiny teacher's vocoder: Griffin-Lim, because nothing has to be trained for it.

A convolutional vocoder answers a steady spectrum with a signal that repeats every frame of 10 ms,
so that it cannot hold a tone between multiples of 100 Hz unless it is trained at length. The tiny
world is full of such tones (LOG.md, 2026-11-20).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.audio_utils import mel_filter_bank

RATE, HOP, WIN, N_FFT = 16000, 160, 1024, 2048          # Auffusion's front end: extras/audio.py


class GriffinLim(nn.Module):
    """Find phases by Griffin and Lim (1984), with the momentum of Perraudin et al. (2013).

    steps: iterations of the phase. forward: log-mel (B, frames, num_mels) -> waveform (B, N).
    """
    dtype = torch.float32

    def __init__(self, num_mels, steps):
        super().__init__()
        self.steps = steps
        bank = mel_filter_bank(N_FFT // 2 + 1, num_mels, 0.0, RATE / 2, RATE, norm="slaney",
                               mel_scale="slaney")
        self.bank = torch.tensor(bank, dtype=torch.float32)     # no buffer: half() would round it

    def forward(self, log_mel):
        bank = self.bank.to(log_mel.device)                                 # (F, M)
        mel = log_mel.float().transpose(1, 2).exp()                         # (B, M, T)
        window = torch.hann_window(WIN, device=mel.device)
        magnitude = bank @ mel                                              # (B, F, T)
        for _ in range(30):         # non-negative magnitudes of these mels: NMF's KL updates
            ratio = mel / (bank.T @ magnitude + 1e-8)
            magnitude = magnitude * (bank @ ratio) / (bank.sum(1, keepdim=True) + 1e-8)

        generator = torch.Generator().manual_seed(0)                        # same in any batch
        phase = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=generator)
        spec = torch.polar(magnitude, phase.to(mel.device).expand_as(magnitude))
        before, length = 0, (mel.shape[-1] - 1) * HOP
        for _ in range(self.steps):
            wav = torch.istft(spec, N_FFT, HOP, WIN, window, length=length)
            now = torch.stft(wav, N_FFT, HOP, WIN, window, return_complex=True)
            spec, before = torch.polar(magnitude, (now + 0.99 * (now - before)).angle()), now
        return F.pad(wav, (HOP // 2, HOP // 2)).clamp(-1, 1)
