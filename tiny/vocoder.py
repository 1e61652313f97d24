"""Train a vocoder on log-mels that went through a teacher's VAE: a stage of tiny.make.

Many sounds fit a mel that the VAE blurred, and a vocoder that regresses learns their mean, of rain
a hum. Ours takes noise and learns to sample, by the energy distance of spectra (arXiv 2008.01160):
|x - y| - |x - x'| / 2, of two of its samples x, x' and a recording y, is least when all are of one
distribution.
"""
import json

import numpy as np
import torch
from safetensors.torch import save_file

import model
from extras.audio import distance, spectra
from recipes.vocoder import new_vocoder


def train(source, fit, steps, size=3, lr=1e-3):
    """Train a source's vocoder by tiny.make's fit()."""
    clips, folder = source.clips(source.number), source.teacher / "vocoder"
    latents = np.load(source.build / "teacher_latents.npy", mmap_mode="r")
    vae = model.load_part(source.teacher, "vae", model.pretrained(model.AutoencoderKL))
    torch.manual_seed(0)
    net, config = new_vocoder(64, dict(width=192, hidden=512, blocks=6), noise=True)

    def loss(step):
        rng = np.random.default_rng((0, 7, step))
        rows = rng.integers(source.number, size=size)
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
        mean, std = torch.from_numpy(latents[:, rows]).float()
        mel = model.image_to_mel(vae.decode(mean + std * normal(*mean.shape)).sample).mT
        wav = torch.from_numpy(np.stack([source.clip(clips, i)[0] for i in rows]))
        made = [net(mel, normal(size, mel.shape[1], 2 * net.bins)) for _ in range(2)]
        x, other, y = map(spectra, (*made, wav))
        return (distance(x, y) + distance(other, y) - distance(x, other)) / 2

    fit(source, "vocoder", list(net.parameters()), steps, lr, loss)
    (folder / "griffin_lim.py").unlink(missing_ok=True)
    save_file(net.half().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
