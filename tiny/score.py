"""How good is a set of tiny clips? Fréchet distance, KL and IS on a small classifier of the world's events.

The roles of PANNs CNN14 in the paper's protocol, for the tiny world: one embedding and one row of logits per clip.

    python -m tiny.score out/student --clips 512
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from data import read_json, sampling_noise
from model import LOG_MAX, LOG_MIN, Teacher, denoiser, load_unet, log_mel, many_steps, one_step
from sample import picture
from tiny import world

HERE = Path(__file__).resolve().parent


def blocks(mel):
    """Log energy of a log-mel (B, 64, frames) in blocks of 2 mels x 40 ms, offset as in VGGish: (B, 32, frames / 4)."""
    return (F.avg_pool2d(mel.exp()[:, None], (2, 4))[:, 0] + 0.01).log()


class Classifier(nn.Module):
    """Log-mel (B, 64, 256) -> (embedding (B, 128) after its ReLU, logits (B, 28), one for each of LABELS)."""

    def __init__(self, labels=len(world.LABELS)):
        super().__init__()
        chans = [1, 16, 32, 64, 64]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(chans, chans[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in chans[1:])
        self.embed = nn.Linear(4 * chans[-1], 128)
        self.head = nn.Linear(128, labels)

    def forward(self, mel):
        return self.of_blocks(blocks(mel))

    def of_blocks(self, x):
        x = (x[:, None] + 2) / 2.5                                  # (B, 1, 32, 64)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if i else x                      # (B, 64, 4, 8) in the end
        x = x.flatten(1, 2)
        e = F.relu(self.embed(x.amax(-1) + x.mean(-1)))             # pools time as CNN14 does
        return e, self.head(e)


@torch.no_grad()
def features(classifier, mels, batch=64):
    """Embeddings (n, 128) and logits (n, labels) of log-mels (n, 64, 256)."""
    parts = [classifier(m) for m in mels.split(batch)]
    return torch.cat([e for e, _ in parts]), torch.cat([z for _, z in parts])


def frechet(x, y):
    """Fréchet distance of two samples (n, d) and (m, d) under a Gaussian fit, covariances over n - 1.

    tr (Sx Sy)^(1/2) is the nuclear norm of X Y^T, with X, Y the centred samples over sqrt(n - 1): no matrix square
    root is taken, so it is exact for n < d as well.
    """
    x, y = x.double(), y.double()
    dm = x.mean(0) - y.mean(0)
    x, y = ((a - a.mean(0)) / (len(a) - 1) ** 0.5 for a in (x, y))
    cross = torch.linalg.matrix_norm(x @ y.T, "nuc")
    return float(dm @ dm + x.square().sum() + y.square().sum() - 2 * cross)


def scores(reference, generated):
    """FD, KL(reference || generated) paired by row, and IS, from two (embeddings, logits) of the same captions."""
    (re, rz), (ge, gz) = reference, generated
    p, q = rz.double().softmax(-1), gz.double().softmax(-1)
    kl = (p * (p.clamp(min=1e-12).log() - (q + 1e-6).log())).sum(-1).mean()
    inception = (q * (q.log() - q.mean(0).log())).sum(-1).mean().exp()
    return {"FD": frechet(re, ge), "KL": float(kl), "IS": float(inception)}


def load_classifier():
    net = Classifier()
    net.load_state_dict(load_file(HERE / "classifier.safetensors"))
    return net.float().eval()


def real(descriptions, seed):
    """Descriptions rendered with a seed: log-mels (n, 64, 256)."""
    wavs = torch.stack([torch.from_numpy(world.render(np.random.default_rng((seed, i)), events, join)[0])
                        for i, (_, events, join) in enumerate(descriptions)])
    return torch.cat([log_mel(w, 64).clamp(LOG_MIN, LOG_MAX) for w in wavs.split(64)])


@torch.no_grad()
def generate(teacher, captions, latents, name, batch=32, seed=0):
    """Log-mels (n, 64, 256) of captions; latents(z_T, text) is the system. Caption i gets noise i of the seed.

    They are scored before the vocoder: it would take longer than everything else.
    """
    mels = []
    for i in tqdm(range(0, len(captions), batch), desc=name):
        texts = captions[i:i + batch]
        z_T = torch.stack([sampling_noise(seed, i + k, teacher.latent_shape) for k in range(len(texts))])
        mels.append(teacher.decode(latents(z_T.to(teacher.device), teacher.encode_text(texts))).cpu())
    return torch.cat(mels)


def report(teacher, student_folder, clips=512, steps=25, seed=0):
    """Score real audio, the teacher at many steps and at one, and a student, on the first of the held-out captions.

    The reference is real audio of the same captions. Prints a table, returns it, and writes scores.json and spectrograms.png beside the student.
    """
    held = world.captions()[1]
    held = held[::max(1, len(held) // clips)][:clips]               # singles, seen pairs and unseen pairs alike
    captions = [text for text, _, _ in held]
    unet, about = load_unet(teacher.folder).to(teacher.device), read_json(Path(student_folder) / "swiftaudio.json")
    student, null = load_unet(student_folder, "").to(teacher.device), teacher.encode_text([""])
    guidance = teacher.defaults["sample"]["guidance"]
    systems = {
        f"teacher, {steps} steps": lambda z, y: many_steps(denoiser(unet), z, y, null, teacher, steps, guidance),
        "student before (teacher, 1 step)": lambda z, y: one_step(denoiser(unet), z, y, teacher),
        f"student after {about['step']} steps": lambda z, y: one_step(denoiser(student), z, y, teacher, about["parameterization"]),
    }
    classifier = load_classifier()
    reference, sounds = features(classifier, real(held, 1)), {"real audio, rendered again": real(held, 2)}
    for name, latents in systems.items():
        sounds[name] = generate(teacher, captions, latents, name, seed=seed)
    table = {name: scores(reference, features(classifier, mels)) for name, mels in sounds.items()}
    print(f"\n{'N = ' + str(len(held)) + ' held-out captions':36s}" + "".join(f"{k:>8s}" for k in ("FD", "KL", "IS")))
    for name, row in table.items():
        print(f"{name:36s}" + "".join(f"{row[k]:8.2f}" for k in ("FD", "KL", "IS")))
    out = Path(student_folder).parent
    (out / "scores.json").write_text(json.dumps({"clips": len(held), "seed": seed, "systems": table}, indent=2) + "\n")
    sheet(captions, sounds).save(out / "spectrograms.png")
    print(f"{out / 'scores.json'}  {out / 'spectrograms.png'}")
    return table


def sheet(captions, sounds, rows=6):
    """Mel spectrograms side by side: a column a system, a row a caption."""
    picked, width, height = np.linspace(0, len(captions) - 1, min(rows, len(captions))).astype(int), 384, 144
    image = Image.new("RGB", (width * len(sounds), height * len(picked) + 20), "white")
    draw = ImageDraw.Draw(image)
    for column, (name, mels) in enumerate(sounds.items()):
        draw.text((column * width + 8, 4), name, "black")
        for row, i in enumerate(picked):
            tile = picture(mels[i]).resize((width - 8, height - 24))
            image.paste(tile, (column * width + 4, row * height + 40))
            draw.text((column * width + 8, row * height + 24), captions[i], "black")
    return image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score a tiny student on held-out captions: FD, KL and IS.")
    parser.add_argument("student", nargs="?", default="out/student")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25, help="of the teacher")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    report(Teacher("tiny"), args.student, args.clips, args.steps, args.seed)
