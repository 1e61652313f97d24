"""Train a vocoder on log-mels that went through a teacher's VAE: a stage of tiny.make.

The VAE blurs what its latents cannot hold, so many sounds fit a mel, and a vocoder that regresses
learns their mean, of rain a hum. Ours has noise as an input and learns to sample: it is trained by
the energy distance of spectra, |x - y| - |x - x'| / 2 of two of its samples x, x' and a recording
y, least when both are of one distribution. Then discriminators of spectrograms join (Vocos,
arXiv 2306.00814, feature matching as in MelGAN, arXiv 1910.06711).
"""
import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import model
from data import replace_file, replace_text
from extras.audio import log_mel, mel_filters
from extras.fast import fold_upsampling
from tiny.world import CLIPS_SEED

CONFIG = dict(num_mels=64, width=192, hidden=512, blocks=6, noise=8, n_fft=640, hop_size=160)
SIZES = (2048, 1024, 512, 256, 128)             # of spectra, in samples


def stft(wav, size):
    """Real and imaginary parts (B, 2, bins, frames) of waveforms (B, N), a quarter window apart."""
    spectrum = torch.stft(wav, size, size // 4, size, torch.hann_window(size), return_complex=True)
    return torch.stack([spectrum.real, spectrum.imag], 1)


def spectra(wav):
    """Magnitudes of waveforms (B, N) at all SIZES, and their log-mel."""
    return [(stft(wav, size).square().sum(1) + 1e-8).sqrt() for size in SIZES], log_mel(wav, 64)


def distance(x, y, real):
    """How far two spectra() are apart: L1 of logarithms, and of magnitudes in units of `real`'s."""
    total = (x[1].clamp(min=-9) - y[1].clamp(min=-9)).abs().mean()
    for a, b, unit in zip(x[0], y[0], real[0]):
        relative = (a - b).abs().mean((1, 2)) / (unit.mean((1, 2)) + 0.05)
        log = ((a + 1e-4) / (b + 1e-4)).log().abs().mean()
        total = total + (log + relative.mean()) / len(SIZES)
    return total


def new_vocoder():
    """A vocoder that at first makes of a mel sound of its level, with phases of its own."""
    torch.manual_seed(0)
    net = model.FrameVocoder(**CONFIG)
    bins, bank = CONFIG["n_fft"] // 2 + 1, mel_filters(64, "cpu").numpy().astype(float)
    centres = (bank * np.arange(len(bank))[:, None]).sum(0) / bank.sum(0) / (len(bank) - 1)
    weight = np.stack([np.interp(np.linspace(0, 1, bins), centres, one) for one in np.eye(64)], 1)
    with torch.no_grad():
        net.prior.weight.copy_(torch.from_numpy(weight))
        net.prior.bias.copy_(torch.from_numpy(weight @ -np.log(bank.sum(0)) - 1.0))
        for mixer in net.mixers:
            mixer[3].weight.mul_(1 / len(net.mixers))
        net.head.weight.mul_(torch.tensor([2.0, 0.3, 0.3]).repeat_interleave(bins)[:, None])
        net.head.bias.copy_(torch.cat([6.28 * torch.rand(bins), torch.zeros(bins),
                                       torch.full((bins,), -1.0)]))
    return net


class Discriminator(nn.Module):
    """Judge waveforms (B, N) by a compressed complex spectrogram: what each layer makes of it."""

    def __init__(self, size, width=16):
        super().__init__()
        self.size, sizes = size, (3, width, width, 2 * width, 2 * width)
        layer = lambda i, o, kernel, stride: nn.utils.parametrizations.weight_norm(nn.Conv2d(
            i, o, kernel, stride, (kernel[0] // 2, kernel[1] // 2)))
        self.layers = nn.ModuleList(layer(i, o, (5, 3), (2, 1 + (n == 3)))
                                    for n, (i, o) in enumerate(zip(sizes, sizes[1:])))
        self.last = layer(2 * width, 1, (3, 3), 1)

    def forward(self, wav):
        spectrum = stft(wav, self.size) / self.size ** 0.5
        magnitude = spectrum.square().sum(1, keepdim=True) + 1e-6
        x, found = torch.cat([magnitude ** 0.15, spectrum * magnitude ** -0.35], 1), []
        for conv in self.layers:
            x = F.leaky_relu(conv(x), 0.1)
            found.append(x)
        return [*found, self.last(x)]


def train(plan, fit, steps=1300, size=3, lr=1e-3, adversary=False):
    """Train the vocoder of a plan of tiny.make, by its fit(), and save it in fp16.

    adversary: go on, with the discriminators.
    """
    clips, folder = plan.source.clips(plan.clips, True), plan.teacher / "vocoder"
    latents = np.load(plan.build / "teacher_latents.npy", mmap_mode="r")
    vae = model.load_part(plan.teacher, "vae", model.pretrained(model.AutoencoderKL))
    fold_upsampling(vae.decoder)
    net = new_vocoder()
    if adversary:
        net.load_state_dict(load_file(folder / "model.safetensors"))
    judges = nn.ModuleList(map(Discriminator, (1024, 512, 128)))
    opt = torch.optim.AdamW(judges.parameters(), 3e-4, betas=(0.8, 0.99))

    def loss(step):
        rng = np.random.default_rng((0, 7 + adversary, step))
        rows = rng.integers(plan.clips, size=size)
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
        mean, std = torch.from_numpy(latents[:, rows]).float()
        z = mean + std * normal(*mean.shape)
        with torch.no_grad():
            mel = model.image_to_mel(vae.decode(z).sample).transpose(1, 2)
        wav = torch.from_numpy(np.stack(
            [plan.source.clip(clips, i, CLIPS_SEED)[0] for i in rows]))
        real = spectra(wav)
        # at first the nearest sound, of one sample
        apart = 1 if adversary else min(1, max(0, 2 * step / steps - 0.5))
        x, *other = [net(mel, normal(size, mel.shape[1], 2 * net.bins))
                     for _ in range(1 + (apart > 0))]
        found = [spectra(made) for made in (x, *other)]
        value = sum(distance(one, real, real) for one in found) / len(found)
        if other:
            value = value - apart / 2 * distance(*found, real)
        if adversary:
            judge = judges[step % len(judges)]
            true, false = judge(wav), judge(x.detach())
            opt.zero_grad()
            (F.relu(1 - true[-1]).mean() + F.relu(1 + false[-1]).mean()).backward()
            opt.step()
            false, true = judge(x), [t.detach() for t in judge(wav)]
            match = sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(false, true[:-1]))
            value = value + 0.5 * match - 0.1 * false[-1].mean()
        return value

    kept = [w.detach() for w in judges.parameters()] if adversary else ()
    fit(plan, "vocoder2" if adversary else "vocoder", list(net.parameters()), steps, lr, loss,
        kept=kept)
    folder.mkdir(exist_ok=True)
    (folder / "griffin_lim.py").unlink(missing_ok=True)
    weights = {name: w.half() for name, w in net.state_dict().items()}
    replace_file(folder / "model.safetensors", lambda path: save_file(weights, path))
    replace_text(folder / "config.json", json.dumps(CONFIG, indent=2) + "\n")
