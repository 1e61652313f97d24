"""The tiny teacher's vocoder, which model.py loads from here."""
import math

import torch
import torch.nn.functional as F
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
