"""Score a tiny student on held-out captions: Fréchet distance (FD), KL and IS.

    python -m tiny.score out/student                    # beside its teacher's rows, as shipped
    python -m tiny.score out/student --second           # on the second list: to choose by
    python -m tiny.score out/student --kind unseen      # events that no training caption pairs
    python -m tiny.score out/student --all              # the teacher's rows measured again
    python -m tiny.score out/student --diversity 8      # how far apart are a caption's eight clips?

A small classifier of the world's events plays the part of PANNs CNN14 in the paper's protocol: one
embedding and one row of logits a clip. Log-mels are scored, before the vocoder, which would take
longer than everything else. The reference is real audio of the same captions, and for "FD to
teacher" the teacher's clips of another noise. Two draws of one system are not at FD 0, since 512
clips are few for 128 dimensions: the first row of FD, the teacher's of FD to teacher are floors.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from extras.audio import log_mel, picture
from extras.cli import InputError, Parser, number, read_json, replace_file, replace_text, run
from extras.hub import TINY, open_student
from extras.metrics import frechet, scores
from extras.publish import write_card
from losses import guided, one_step
from model import LOG_MAX, LOG_MIN, Pipeline, denoiser, load_unet, many_steps
from sample import draw_noise
from tiny import world

HERE = Path(__file__).resolve().parent
DIGITS = {"FD": 1, "KL": 2, "IS": 1, "FD to teacher": 1}       # of each metric, as printed
FLOOR_ROW, TEACHER_ROW, STEPS = "real audio, rendered again", "teacher, {} steps", 25
# Seeds of rendered audio. The floor, real audio scored like a system, has one for each noise seed.
REFERENCE, FLOOR, DIVERSE = 1, 2, 3
TEACHER_SEED = 100                              # of the noise of the teacher's reference clips


# ---- the classifier ----------------------------------------------------------------------------

def blocks(mel):
    """Log energy of a log-mel (B, 64, frames) in blocks of 2 mels x 40 ms, offset as in VGGish."""
    return (F.avg_pool2d(mel.exp()[:, None], (2, 4))[:, 0] + 0.01).log()    # (B, 32, frames / 4)


class Classifier(nn.Module):
    """Log-mel (B, 64, 256) -> embedding (B, 128) after its ReLU, logits (B, 28) of world.LABELS."""

    def __init__(self, labels=len(world.LABELS)):
        super().__init__()
        chans = [1, 16, 32, 64, 64]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(chans, chans[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in chans[1:])
        self.embed = nn.Linear(4 * chans[-1], 128)
        self.head = nn.Linear(128, labels)

    def forward(self, mel):
        return self.of_blocks(blocks(mel))

    def of_blocks(self, x):
        x = (x[:, None] + 2) / 2.5                                          # (B, 1, 32, 64)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if i else x
        x = x.flatten(1, 2)                                                 # (B, 64 x 4, 8)
        e = F.relu(self.embed(x.amax(-1) + x.mean(-1)))                     # pools time as CNN14
        return e, self.head(e)


def load_classifier():
    """Load the shipped classifier, in eval mode."""
    net = Classifier()
    net.load_state_dict(load_file(HERE / "classifier.safetensors"))
    return net.float().eval()


@torch.no_grad()
def features(classifier, mels, batch=64):
    """Embeddings (n, 128) and logits (n, labels) of log-mels (n, 64, 256)."""
    embeddings, logits = zip(*(classifier(part) for part in mels.split(batch)))
    return torch.cat(embeddings), torch.cat(logits)


# ---- sounds ------------------------------------------------------------------------------------

def held_out(clips, second=False, kind="all"):
    """So many captions of a held-out list: a list of (number, caption, events, join).

    Evenly spread, so that single events, seen and unseen pairs are all there, or of one kind. A
    caption's number, its place among those of both lists, is also that of its noise and rendering.
    """
    held = world.second_list() if second else world.captions()[1]
    numbers = world.KINDS[kind]
    clips, first = min(clips, len(numbers)), len(held) if second else 0
    return [(first + n, *held[n]) for n in (numbers[k * len(numbers) // clips]
                                            for k in range(clips))]


def real(rows, seed):
    """Render rows of held_out() with a seed: log-mels (n, 64, 256)."""
    wavs = [world.render(np.random.default_rng((seed, n)), events, join)[0]
            for n, _, events, join in rows]
    parts = torch.from_numpy(np.stack(wavs)).split(64)
    return torch.cat([log_mel(part, 64).clamp(LOG_MIN, LOG_MAX) for part in parts])


@torch.no_grad()
def generate(pipe, latents, rows, name, seed=0, batch=32):
    """Make log-mels (n, 64, 256) of the captions of rows with the system latents(z_T, text)."""
    mels = []
    for i in tqdm(range(0, len(rows), batch), desc=name):
        numbers, captions, _, _ = zip(*rows[i:i + batch])
        z_T, text = draw_noise(pipe, numbers, seed), pipe.encode_text(captions)
        # on a CPU the VAE decodes eight clips at a time in 0.6 of the time of 32 at once
        mels += [pipe.decode(x0).cpu() for x0 in latents(z_T, text).split(8)]
    return torch.cat(mels)


# ---- systems -----------------------------------------------------------------------------------

def teacher_latents(pipe, steps, guidance=None):
    """The tiny teacher as a system, in many steps; guidance None: its own."""
    if guidance is None:
        guidance = pipe.settings["sample"]["guidance"]
    eps = guided(denoiser(load_unet(pipe.folder)), pipe.encode_text([""]), guidance)
    return lambda z_T, text: many_steps(eps, z_T, text, pipe, steps)


def teacher_systems(pipe, steps):
    """What a student is compared with: {name: system}."""
    return {TEACHER_ROW.format(steps): teacher_latents(pipe, steps),
            "student before (teacher, 1 step)": teacher_latents(pipe, 1, guidance=1)}


def load_student(name, pipe):
    """Load a student of the tiny teacher: (its folder, its swiftaudio.json, the system)."""
    folder, part, about = open_student(name)
    teacher = about["teacher"]
    if part or (teacher != "tiny" and Path(teacher).resolve() != TINY):
        raise InputError(f"{name}: is no student that train.py made of the tiny teacher (its "
                         f"teacher: {teacher}); score it with eval.py")
    eps = denoiser(load_unet(folder, ""))

    def latents(z_T, text):
        return one_step(eps, z_T, text, pipe.alpha, pipe.sigma, about["parameterization"],
                        about.get("timestep"))

    return folder, about, latents


# ---- scores ------------------------------------------------------------------------------------

def reference(rows):
    """What is heard in real audio of these rows, (embeddings, logits), and in the teacher's clips.

    As shipped: (n, 128), (n, 28) and the teacher's embeddings (n, 128).
    """
    heard = load_file(HERE / "reference.safetensors")
    numbers = [n for n, *_ in rows]
    return [heard[key][numbers].float() for key in ("embeddings", "logits", "teacher")]


def scored(rows, heard):
    """The metrics of what a system's clips sound like: the (embeddings, logits) of these rows."""
    *target, teacher = reference(rows)
    return {**scores(target, heard),
            "FD to teacher": frechet(teacher, heard[0]) if len(rows) > 1 else None}


def measure(pipe, systems, rows, seed=0):
    """Score systems {name: latents(z_T, text)} on rows of held_out(): {name: row}."""
    classifier = load_classifier()
    return {name: scored(rows, features(classifier, generate(pipe, latents, rows, name, seed)))
            for name, latents in systems.items()}


def measure_decoder(pipe, latents, folder, rows, seed=0):
    """Score a student with its small decoder: (row, mean log-mel error to the VAE's, in nepers)."""
    fast = Pipeline("tiny", decoder=folder)
    exact, mels = (generate(p, latents, rows, name, seed)
                   for p, name in ((pipe, "VAE"), (fast, "small decoder")))
    return scored(rows, features(load_classifier(), mels)), (mels - exact).abs().mean().item()


def floor(rows, seed=0):
    """The scores of the same captions rendered again, the best that a system can be."""
    return {FLOOR_ROW: scored(rows, features(load_classifier(), real(rows, FLOOR + seed)))}


def summary(found):
    """The mean of several seeds' rows, with "std", the standard deviations; one row is itself."""
    if len(found) == 1:
        return found[0]
    columns = {key: np.array([row[key] for row in found], float) for key in DIGITS}
    return {**{key: column.mean() for key, column in columns.items()},
            "std": {key: column.std(ddof=1) for key, column in columns.items()},
            "seeds": found}


def baselines(pipe, rows, seeds, steps=STEPS):
    """Measure everything that no student changes: {name: summary over the seeds}."""
    systems, found = teacher_systems(pipe, steps), {}
    for seed in seeds:
        for name, row in {**floor(rows, seed), **measure(pipe, systems, rows, seed)}.items():
            found.setdefault(name, []).append(row)
    return {name: summary(of_seeds) for name, of_seeds in found.items()}


def diversity(pipe, systems, rows, each=8, seed=0):
    """{name: mean distance between the embeddings of `each` clips of a caption}, over the rows."""
    classifier = load_classifier()
    many = [row for row in rows for _ in range(each)]
    many = [(n, *row[1:]) for n, row in enumerate(many)]                    # each its own noise
    sounds = {"real audio": real(many, DIVERSE)}
    for name, latents in systems.items():
        sounds[name] = generate(pipe, latents, many, name, seed)
    found = {}
    for name, mels in sounds.items():
        e = features(classifier, mels)[0].view(len(rows), each, -1)         # (captions, each, 128)
        found[name] = (torch.cdist(e, e).sum() / (len(rows) * each * (each - 1))).item()
    return found


# ---- what is shown -----------------------------------------------------------------------------

def cells(row, sign="+-"):
    """A row's metrics in words, such as "20.7 +- 2.3", or "-" where there is none."""
    def cell(key, digits):
        if row[key] is None:
            return "-"
        std = f" {sign} {row['std'][key]:.{digits}f}" if "std" in row else ""
        return f"{row[key]:.{digits}f}{std}"

    return [cell(key, digits) for key, digits in DIGITS.items()]


def show(table, clips):
    """The table {name: row} as lines of text, means below each other."""
    title = f"N = {clips} held-out captions"
    lines = [f"{title:34s}" + "".join(f"{key:>6s}{'':8s}" for key in DIGITS)]
    for name, row in table.items():
        line = f"{name:34s}"
        for mean, gap, std in (cell.partition(" ") for cell in cells(row)):
            line += f"{mean:>6s}{gap + std:8s}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def ratios(table, steps):
    """How far the student, the last row, is from its teacher, in a sentence."""
    best, teacher = table[FLOOR_ROW], table[TEACHER_ROW.format(steps)]
    student = list(table.values())[-1]
    above = [row["FD"] - best["FD"] for row in (student, teacher)]
    away, bias = student["FD to teacher"], teacher["FD to teacher"]
    return (f"student / teacher: FD {student['FD'] / teacher['FD']:.2f}, FD above the floor of "
            f"{best['FD']:.1f} {above[0] / above[1]:.2f}, KL {student['KL'] / teacher['KL']:.2f}. "
            f"FD to teacher is {away - bias:.1f} above its floor of {bias:.1f}")


def shorten(draw, text, width):
    """Cut a text to so many pixels, ending with "..." if it was longer."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def sheet(captions, sounds):
    """Mel spectrograms side by side: a row a caption, a column a system of {name: log-mels}."""
    width, height = 384, 144
    image = Image.new("RGB", (width * len(sounds), height * len(captions) + 20), "white")
    draw = ImageDraw.Draw(image)
    for column, (name, mels) in enumerate(sounds.items()):
        x = column * width
        draw.text((x + 8, 4), name, "black")
        for row, (caption, mel) in enumerate(zip(captions, mels)):
            y = row * height + 24
            draw.text((x + 8, y), shorten(draw, caption, width - 16), "black")
            image.paste(picture(mel).resize((width - 8, height - 24)), (x + 4, y + 16))
    return image


def sample_sheet(pipe, systems, rows, seed):
    """sheet() of six of the rows, evenly spread: real audio, and the systems."""
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int)]
    sounds = {"real audio, rendered again": real(rows, FLOOR + seed)}
    for name, latents in systems.items():
        sounds[name] = generate(pipe, latents, rows, f"picture: {name}", seed)
    return sheet([caption for _, caption, _, _ in rows], sounds)


# ---- the command -------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("student", nargs="?", default="out/student", help="folder of train.py")
    add("--clips", type=number(int, 1), default=512, help="how many held-out captions, up to 512")
    add("--seed", type=number(int), default=0, help="of the noise")
    add("--second", action="store_true", help="score on the second held-out list")
    add("--kind", choices=world.KINDS, default="all",
        help="captions whose two events training pairs (seen) or never does (unseen)")
    add("--steps", type=number(int, 1, 1000),
        help=f"of the teacher, with --all or --diversity; default: {STEPS}")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true",
                      help="measure the rows of real audio and the teacher again")
    what.add_argument("--diversity", type=number(int, 2), metavar="K",
                      help="K clips of each of CLIPS / K captions: how far apart are they?")
    args = p.parse_args(argv)
    if args.steps and not (args.all or args.diversity):
        raise InputError("--steps goes with --all or --diversity: the shipped rows have 25")
    if args.diversity and args.diversity > args.clips:
        raise InputError(f"--diversity {args.diversity} needs as many --clips, not {args.clips}")
    args.steps = args.steps or STEPS
    return args


def report(pipe, args):
    """Score a student: print the table, write scores.json, spectrograms.png and the model card."""
    folder, about, latents = load_student(args.student, pipe)
    student = {f"student after {about['step']} steps": latents}
    rows = held_out(args.clips, args.second, args.kind)
    shipped = read_json(HERE / "baselines.json")
    table = {}
    if args.all:
        table = baselines(pipe, rows, [args.seed], args.steps)
    elif len(rows) == shipped["N"]:
        table = shipped["second list" if args.second else "systems"]
    missing = not table
    table = {**table, **measure(pipe, student, rows, args.seed)}
    systems = {**teacher_systems(pipe, args.steps), **student}
    image = sample_sheet(pipe, systems, rows, args.seed)

    print("\n" + show(table, len(rows)))
    if len(rows) > 1 and not missing:
        print(ratios(table, args.steps))
    found = {"clips": len(rows), "second list": args.second, "kind": args.kind,
             "seed": args.seed, "systems": table}
    if (folder / "decoder/config.json").exists():
        row, error = measure_decoder(pipe, latents, folder / "decoder", rows, args.seed)
        found["small decoder"] = {**row, "log-mel error": error}
        print(show({"student, small decoder": row}, len(rows)).splitlines()[1])
        print(f"the small decoder's log-mels differ from the VAE's by {error:.3f} nepers")
    if missing:
        print(f"The other rows are shipped for N = {shipped['N']}; --all measures them here.")
    out = folder.parent
    replace_text(out / "scores.json", json.dumps(found, indent=2) + "\n")
    replace_file(out / "spectrograms.png", lambda path: image.save(path, "PNG"))
    metrics = [name + " " + ", ".join(map(" ".join, zip(DIGITS, cells(row))))
               for name, row in table.items()]
    write_card(folder, f"{len(rows)} held-out captions of the tiny world: " + "; ".join(metrics))
    print(f"{out / 'scores.json'}  {out / 'spectrograms.png'}  {folder / 'README.md'}")


def report_diversity(pipe, args):
    """Print how far apart several clips of one caption are: real ones, teacher's and student's."""
    _, _, latents = load_student(args.student, pipe)
    systems = {"teacher": teacher_latents(pipe, args.steps), "student": latents}
    rows = held_out(args.clips // args.diversity, args.second, args.kind)
    found = diversity(pipe, systems, rows, args.diversity, args.seed)
    print(f"{len(rows)} captions, {args.diversity} clips each: "
          + ", ".join(f"{name} {distance:.2f}" for name, distance in found.items())
          + f", student / teacher {found['student'] / found['teacher']:.3f}")


def main(argv=None):
    args, pipe = parse_args(argv), Pipeline("tiny")
    if args.diversity:
        report_diversity(pipe, args)
    else:
        report(pipe, args)


if __name__ == "__main__":
    run(main)
