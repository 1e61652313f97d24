"""How good is a set of tiny clips? Fréchet distance, KL and IS on a small classifier of the world's events.

The roles of PANNs CNN14 in the paper's protocol, for the tiny world: one embedding and one row of logits per clip.

    python -m tiny.score out/student --clips 512
    python -m tiny.score out/student --diversity 8          # how far apart are eight clips of one caption?
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
from eval import scores
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


def held_out(clips):
    """So many of the held-out descriptions, evenly spread: single events, seen pairs and unseen pairs alike."""
    held = world.captions()[1]
    clips = min(clips, len(held))
    return [held[k * len(held) // clips] for k in range(clips)]


def measure(teacher, systems, held, seed=0):
    """({name: FD, KL, IS}, {name: log-mels}) of systems {name: latents(z_T, text)} and of the descriptions rendered again.

    The reference is real audio of the same captions, rendered with another seed.
    """
    classifier, captions = load_classifier(), [text for text, _, _ in held]
    reference, sounds = features(classifier, real(held, 1)), {"real audio, rendered again": real(held, 2)}
    for name, latents in systems.items():
        sounds[name] = generate(teacher, captions, latents, name, seed=seed)
    return {name: scores(reference, features(classifier, mels)) for name, mels in sounds.items()}, sounds


def diversity(teacher, systems, held, each=8, seed=0):
    """{name: mean distance between the embeddings of `each` clips of one caption}, over the captions of `held`."""
    classifier, many = load_classifier(), [description for description in held for _ in range(each)]
    sounds = {"real audio": real(many, 3)}
    for name, latents in systems.items():
        sounds[name] = generate(teacher, [text for text, _, _ in many], latents, name, seed=seed)
    embeddings = {name: features(classifier, mels)[0].view(len(held), each, -1) for name, mels in sounds.items()}
    return {name: (torch.cdist(e, e).sum() / (len(held) * each * (each - 1))).item() for name, e in embeddings.items()}


def show(table, clips):
    print(f"\n{'N = ' + str(clips) + ' held-out captions':36s}" + "".join(f"{k:>8s}" for k in ("FD", "KL", "IS")))
    for name, row in table.items():
        print(f"{name:36s}" + "".join("       -" if row[k] is None else f"{row[k]:8.2f}" for k in ("FD", "KL", "IS")))


def student_latents(folder, teacher):
    """A student's latents(z_T, text)."""
    unet, about = load_unet(folder, "").to(teacher.device), read_json(Path(folder) / "swiftaudio.json")
    return lambda z, y: one_step(denoiser(unet), z, y, teacher, about["parameterization"])


def teacher_latents(teacher, unet, steps):
    """The teacher's latents(z_T, text) in many steps; steps=0: in one as a student, which is the student before training."""
    null, guidance = teacher.encode_text([""]), teacher.defaults["sample"]["guidance"]
    return lambda z, y: many_steps(denoiser(unet), z, y, null, teacher, steps, guidance) if steps else one_step(denoiser(unet), z, y, teacher)


def report(teacher, student_folder, clips=512, steps=25, seed=0):
    """Score real audio, the teacher at many steps and at one, and a student, on held-out captions.

    Prints a table, returns it, and writes scores.json and spectrograms.png beside the student.
    """
    held, after = held_out(clips), read_json(Path(student_folder) / "swiftaudio.json")["step"]
    unet = load_unet(teacher.folder).to(teacher.device)
    table, sounds = measure(teacher, {
        f"teacher, {steps} steps": teacher_latents(teacher, unet, steps),
        "student before (teacher, 1 step)": teacher_latents(teacher, unet, 0),
        f"student after {after} steps": student_latents(student_folder, teacher)}, held, seed)
    show(table, len(held))
    out = Path(student_folder).parent
    (out / "scores.json").write_text(json.dumps({"clips": len(held), "seed": seed, "systems": table}, indent=2) + "\n")
    sheet([text for text, _, _ in held], sounds).save(out / "spectrograms.png")
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
    parser.add_argument("--diversity", type=int, help="so many clips of each of CLIPS / so many captions, instead of scores")
    args = parser.parse_args()
    if args.diversity:
        teacher = Teacher("tiny")
        systems = {"teacher": teacher_latents(teacher, load_unet(teacher.folder).to(teacher.device), args.steps),
                   "student": student_latents(args.student, teacher)}
        held = held_out(args.clips // args.diversity)
        spread = diversity(teacher, systems, held, args.diversity, args.seed)
        print(f"{len(held)} captions, {args.diversity} clips each: " + ", ".join(f"{k} {v:.2f}" for k, v in spread.items())
              + f", student / teacher {spread['student'] / spread['teacher']:.3f}")
    else:
        report(Teacher("tiny"), args.student, args.clips, args.steps, args.seed)
