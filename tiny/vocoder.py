"""Train a vocoder on log-mels that went through a teacher's VAE: a stage of tiny.make.

Many sounds fit a mel that the VAE blurred, and a vocoder that regresses learns their mean, of rain
a hum. Ours takes noise and learns to sample, by the energy distance of spectra (arXiv 2008.01160):
|x - y| - |x - x'| / 2, of two of its samples x, x' and a recording y, is least when all are of one
distribution. Then discriminators join, whose layers are compared in the same way.
"""
import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import model
from extras.audio import mel_filters
from extras.fast import fold_upsampling

CONFIG = dict(num_mels=64, width=192, hidden=512, blocks=6, noise=True, n_fft=640, hop_size=160)


def stft(wav, size):
    """Real and imaginary parts (B, 2, bins, frames) of waveforms (B, N), a quarter window apart."""
    spectrum = torch.stft(wav, size, size // 4, size, torch.hann_window(size), return_complex=True)
    return torch.stack([spectrum.real, spectrum.imag], 1)


def spectra(wav):
    """Magnitudes of waveforms (B, N) at five resolutions, their logarithms and square roots."""
    powers = [stft(wav, size).square().sum(1) + 1e-4 for size in (2048, 1024, 512, 256, 128)]
    return [found for power in powers for found in (power.log() / 2, power ** 0.25)]


def distance(x, y):
    """Between spectra(): a norm of whole frames, as each bin alone does not show common beats."""
    return sum(((a - b).square().mean(1) + 1e-8).sqrt().mean() for a, b in zip(x, y)) / len(x)


def energy_distance(x, other, y):
    """Of y's distribution from that of two samples: all are spectra(), or alike."""
    return (distance(x, y) + distance(other, y) - distance(x, other)) / 2


def new_vocoder():
    """A vocoder that at first makes of a mel sound of about its level, with phases of its own."""
    torch.manual_seed(0)
    net, bank = model.FrameVocoder(**CONFIG), mel_filters(64, "cpu")
    rows = bank[torch.linspace(0, len(bank) - 1, net.bins).long()]
    net.prior.weight.data = rows / rows.sum(1, keepdim=True).clamp(min=1e-6)
    net.prior.bias.data = net.prior.weight @ -bank.sum(0).log() - 0.3
    net.head.bias.data[:net.bins].uniform_(-np.pi, np.pi)
    return net


class Discriminator(nn.Module):
    """Judge waveforms (B, N) by compressed complex spectrograms: what each of its layers says."""

    def __init__(self, size):
        super().__init__()
        self.size, sizes = size, (3, 16, 16, 32, 32, 1)
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, (5, 3), (2, 1), (2, 1)))
            for i, o in zip(sizes, sizes[1:]))

    def forward(self, wav):
        spectrum, found = stft(wav, self.size) / self.size ** 0.5, []
        power = spectrum.square().sum(1, keepdim=True) + 1e-6
        x = torch.cat([power ** 0.15, spectrum * power ** -0.35], 1)
        for layer in self.layers:
            found.append(layer(x))
            x = F.leaky_relu(found[-1], 0.1)
        return found


def train(source, fit, steps, size=3, lr=1e-3, adversary=False):
    """Train a source's vocoder by tiny.make's fit(); adversary: go on, with discriminators."""
    clips, folder = source.clips(source.number), source.teacher / "vocoder"
    latents = np.load(source.build / "teacher_latents.npy", mmap_mode="r")
    vae = model.load_part(source.teacher, "vae", model.pretrained(model.AutoencoderKL))
    fold_upsampling(vae.decoder)
    net = new_vocoder()
    if adversary:
        net.load_state_dict(load_file(folder / "model.safetensors"))
    judges = nn.ModuleList(map(Discriminator, (1024, 512, 128)))
    opt = torch.optim.AdamW(judges.parameters(), 3e-4, betas=(0.8, 0.99))

    def loss(step):
        rng = np.random.default_rng((0, 7 + adversary, step))
        rows = rng.integers(source.number, size=size)
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
        mean, std = torch.from_numpy(latents[:, rows]).float()
        image = vae.decode(mean + std * normal(*mean.shape)).sample
        mel = model.image_to_mel(image).transpose(1, 2)
        wav = torch.from_numpy(np.stack([source.clip(clips, i)[0] for i in rows]))
        made = [net(mel, normal(size, mel.shape[1], 2 * net.bins)) for _ in range(2)]
        value = energy_distance(*map(spectra, (*made, wav)))
        return value + against(wav, made, judges[step % len(judges)]) if adversary else value

    def against(wav, made, judge):
        """What a discriminator, after a step of its own, tells the vocoder."""
        opt.zero_grad()
        true, false = judge(wav)[-1], judge(made[0].detach())[-1]
        (F.relu(1 - true) + F.relu(1 + false)).mean().backward()
        opt.step()
        x, other, y = map(judge, (*made, wav))
        units = [layer.std().detach() for layer in y[:-1]]
        features = [[layer / unit for layer, unit in zip(of, units)] for of in (x, other, y)]
        return energy_distance(*features) - 0.1 * x[-1].mean()

    fit(source, "vocoder2" if adversary else "vocoder", list(net.parameters()), steps, lr, loss,
        kept=[w.detach() for w in judges.parameters()])
    (folder / "griffin_lim.py").unlink(missing_ok=True)
    save_file(net.half().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
