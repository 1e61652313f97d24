"""Score a tiny student on held-out captions: Fréchet distance (FD), KL and IS.

    python -m tiny.score out/student                    # beside the shipped rows
    python -m tiny.score out/student --list second      # to choose by; third: to confirm a choice
    python -m tiny.score out/student --kind unseen      # events that no training caption pairs
    python -m tiny.score out/student --all              # those rows measured again
    python -m tiny.score out/student --diversity 8      # how far apart are a caption's eight clips?
    python -m tiny.score out0/student out1/student      # mean and spread, of runs of several seeds

A small classifier of the world's events plays the part of PANNs CNN14 in the paper's protocol: one
embedding and one row of logits a clip. Log-mels are scored, before the vocoder, which would take
longer than everything else. The reference is real audio of the same captions, and for "FD to
teacher" the teacher's clips of another noise. Two draws of one system are not at FD 0, since 512
clips are few for 128 dimensions: the first row of FD, the teacher's of FD to teacher are floors.
"""
import json

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import extras.teacher
import model
from data import Parser, cli, number, read_json, replace_file, replace_text, require
from extras.audio import log_mel
from extras.metrics import frechet, load_classifier, scores
from extras.publish import write_card
from model import LOG_MAX, LOG_MIN, TINY
from sample import picture
from tiny import world
from train import fingerprint

HERE = TINY.parent
DIGITS = {"FD": 1, "KL": 2, "IS": 1, "FD to teacher": 1}       # of each metric, as printed
STEPS = 25                                      # of the teacher
FLOOR_ROW, TEACHER_ROW = "real audio, rendered again", f"teacher, {STEPS} steps"
BEFORE_ROW = "student before training"
# Seeds of rendered audio. The floor, real audio scored like a system, has one for each noise seed.
REFERENCE, FLOOR, DIVERSE = 1, 2, 3
TEACHER_SEED = 100                              # of the noise of the teacher's reference clips


# ---- sounds ------------------------------------------------------------------------------------

def held_out(clips, name="first", kind="all"):
    """So many captions of a held-out list of world.LISTS: [(number, caption, events, join)].

    Evenly spread, so that single events, seen and unseen pairs are all there, or of one kind. A
    caption's number, its place among those of all lists, is also that of its noise and rendering.
    """
    held, numbers = world.held_out(name), world.KINDS[kind]
    clips, first = min(clips, len(numbers)), world.LISTS.index(name) * len(held)
    return [(first + n, *held[n]) for n in (numbers[k * len(numbers) // clips]
                                            for k in range(clips))]


def real(rows, seed):
    """Render rows of held_out() with a seed: log-mels (n, 64, 256)."""
    wavs = [world.render(np.random.default_rng((seed, n)), events, join)[0]
            for n, _, events, join in rows]
    parts = torch.from_numpy(np.stack(wavs)).split(64)
    return torch.cat([log_mel(part, 64).clamp(LOG_MIN, LOG_MAX) for part in parts])


@torch.no_grad()
def generate(system, rows, name, seed=0, batch=32):
    """Make log-mels (n, 64, 256) of the captions of rows."""
    mels = []
    for i in tqdm(range(0, len(rows), batch), desc=name):
        numbers, captions, _, _ = zip(*rows[i:i + batch])
        x0 = system.latents(system.noise(numbers, seed), system.encode_text(captions))
        # on a CPU the VAE decodes eight clips at a time in 0.6 of the time of 32 at once
        mels += [system.decoder.decode(part) for part in x0.split(8)]
    return torch.cat(mels)


@torch.no_grad()
def features(classifier, mels, batch=64):
    """Embeddings (n, 128) and logits (n, labels) of log-mels (n, 64, 256)."""
    embeddings, logits = zip(*(classifier(part) for part in mels.split(batch)))
    return torch.cat(embeddings), torch.cat(logits)


# ---- systems: in fp32 on the CPU, as everything shipped was measured ----------------------------

def load_teacher(steps, guidance=None):
    """Load the tiny teacher, to sample in `steps` steps; guidance None: its own."""
    return extras.teacher.load_teacher("tiny", steps, guidance, precision="fp32", device="cpu")


def load_untrained(t):
    """Load what a student is before training: the teacher's UNet, unguided, one step at t."""
    return model.System(TINY, model.load_unet(TINY), {}, None, "fp32", "cpu", t)


def compared(t):
    """What a student whose one step is at t is compared with: {name: System}."""
    return {TEACHER_ROW: load_teacher(STEPS), BEFORE_ROW: load_untrained(t)}


def load_student(name, decoder="vae"):
    """Load a student of the tiny teacher: (its folder, its swiftaudio.json, its System)."""
    folder, part, about = model.open_student(name)
    weights = about.get("identity", {}).get("teacher's weights")    # under whatever name
    require(not part and (about["teacher"] == "tiny"
                          or weights == fingerprint(model.load_unet(TINY))),
            f"{name}: is no student that train.py made of the tiny teacher (its teacher: "
            f"{about.get('teacher')}); score it with extras.eval")
    return folder, about, model.load_student(name, "tiny", decoder=decoder, precision="fp32",
                                             device="cpu")


# ---- scores ------------------------------------------------------------------------------------

def scored(rows, mels):
    """The metrics of a system's clips (n, 64, 256) of these rows, by what is shipped of them."""
    shipped, numbers = load_file(HERE / "reference.safetensors"), [n for n, *_ in rows]
    *target, teacher = (shipped[key][numbers].float()       # (n, 128), (n, 28), (n, 128)
                        for key in ("embeddings", "logits", "teacher"))
    heard = features(load_classifier(), mels)
    return {**scores(target, heard),
            "FD to teacher": frechet(teacher, heard[0]) if len(rows) > 1 else None}


def measure(systems, rows, seed=0):
    """Score systems {name: System} on rows of held_out(): {name: row}."""
    return {name: scored(rows, generate(system, rows, name, seed))
            for name, system in systems.items()}


def summary(found):
    """The mean of several seeds' rows, with "std", the standard deviations; one row is itself."""
    if len(found) == 1:
        return found[0]
    columns = {key: np.array([row[key] for row in found], float) for key in DIGITS}
    return {**{key: column.mean() for key, column in columns.items()},
            "std": {key: column.std(ddof=1) for key, column in columns.items()},
            "seeds": found}


def baselines(rows, seeds, t):
    """Measure the floor, which is the same captions rendered again, and compared(t).

    {name: summary of the seeds}.
    """
    found, systems = {}, compared(t)
    for seed in seeds:
        again = {FLOOR_ROW: scored(rows, real(rows, FLOOR + seed))}
        for name, row in {**again, **measure(systems, rows, seed)}.items():
            found.setdefault(name, []).append(row)
    return {name: summary(of_seeds) for name, of_seeds in found.items()}


def write_baselines(home=HERE):
    """Write what scoring needs and no student changes: of all held-out lists."""
    classifier, heard, seeds = load_classifier(), [], [0, 1, 2]
    t = model.read_settings(TINY)["train"]["student_t"]
    content = {"N": 512, "noise_seeds": seeds, "student_t": t, "render_seeds": {
        "reference": REFERENCE, FLOOR_ROW: [FLOOR + seed for seed in seeds]}}
    lists = {name: held_out(512, name) for name in world.LISTS}
    for name, rows in lists.items():
        clips = generate(load_teacher(STEPS), rows, f"reference, {name} list", TEACHER_SEED)
        audio, made = (features(classifier, mels) for mels in (real(rows, REFERENCE), clips))
        heard.append({"embeddings": audio[0], "logits": audio[1], "teacher": made[0]})
    heard = {key: torch.cat([part[key] for part in heard]).half() for key in heard[0]}
    replace_file(home / "reference.safetensors", lambda path: save_file(heard, path))
    for name, rows in lists.items():
        first = name == "first"                             # which results are reported by
        table = baselines(rows, seeds if first else seeds[:1], t)
        content["systems" if first else f"{name} list"] = table
        print(show(table, len(rows)))
    replace_text(home / "baselines.json", json.dumps(content, indent=2) + "\n")


def diversity(systems, rows, each=8, seed=0):
    """{name: mean distance between the embeddings of `each` clips of a caption}, over the rows."""
    many = [(i * each + k, *row[1:]) for i, row in enumerate(rows) for k in range(each)]
    sounds = {"real audio": real(many, DIVERSE)}
    sounds |= {name: generate(system, many, name, seed) for name, system in systems.items()}
    found = {}
    for name, mels in sounds.items():
        e = features(load_classifier(), mels)[0].view(len(rows), each, -1)  # (captions, each, 128)
        found[name] = (torch.cdist(e, e).sum() / (len(rows) * each * (each - 1))).item()
    return found


# ---- what is shown -----------------------------------------------------------------------------

def cells(row):
    """A row's metrics in words, such as "20.7 +- 2.3", or "-" where there is none."""
    def cell(key, digits):
        if row[key] is None:
            return "-"
        std = f" +- {row['std'][key]:.{digits}f}" if "std" in row else ""
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


def sheet(systems, rows, seed):
    """Mel spectrograms side by side: a row a caption, six of rows; real audio, then systems."""
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(6, len(rows))).astype(int)]
    columns = {FLOOR_ROW: real(rows, FLOOR + seed)}
    for name, system in systems.items():
        columns[name] = generate(system, rows, f"picture: {name}", seed)
    width, height = 400, 144                    # the longest caption takes 383
    image = Image.new("RGB", (width * len(columns), height * len(rows) + 20), "white")
    draw = ImageDraw.Draw(image)
    for i, (name, mels) in enumerate(columns.items()):
        x = i * width + 8
        draw.text((x, 4), name, "black")
        for j, ((_, caption, _, _), mel) in enumerate(zip(rows, mels)):
            y = j * height + 24
            draw.text((x, y), caption, "black")
            image.paste(picture(mel).resize((width - 16, height - 24)), (x, y + 16))
    return image


# ---- the command -------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("student", nargs="*", default=["out/student"], help="folder of train.py, or several")
    add("--clips", type=number(int, 1), default=512, help="how many held-out captions, up to 512")
    add("--seed", type=number(int), default=0, help="of the noise; of several, the first's")
    add("--list", choices=world.LISTS, default="first",
        help="held-out captions to report by, to choose by, or to confirm a choice")
    add("--kind", choices=world.KINDS, default="all",
        help="captions whose two events training pairs (seen) or never does (unseen)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true",
                      help="measure the rows above the student's again")
    what.add_argument("--diversity", type=number(int, 2), metavar="K",
                      help="K clips of each of CLIPS / K captions: how far apart are they?")
    args = p.parse_args(argv)
    require(not args.diversity or args.diversity <= args.clips,
            f"--diversity {args.diversity} needs as many --clips, not {args.clips}")
    require(len(args.student) == 1 or not (args.all or args.diversity),
            "--all and --diversity go with one student")
    return args


def report(args):
    """Score a student: print the table, write scores.json, spectrograms.png and the model card."""
    folder, about, system = load_student(*args.student)
    student, t = {f"student after {about['step']} steps": system}, about.get("timestep")
    rows, whole = held_out(args.clips, args.list, args.kind), len(world.KINDS["all"])
    others = {}
    if args.all:
        others = baselines(rows, [args.seed], t)
    elif len(rows) == whole:
        shipped = read_json(HERE / "baselines.json")
        others = shipped["systems" if args.list == "first" else f"{args.list} list"]
        if t != shipped["student_t"]:       # they are for the default t
            others |= measure({BEFORE_ROW: load_untrained(t)}, rows, args.seed)
    table = {**others, **measure(student, rows, args.seed)}
    image = sheet({**compared(t), **student}, rows, args.seed)

    print("\n" + show(table, len(rows)))
    found = {"clips": len(rows), "list": args.list, "kind": args.kind, "seed": args.seed,
             "systems": table}
    if "decoder" in model.small_parts(folder):
        _, _, fast = load_student(*args.student, "fast")
        exact, mels = (generate(s, rows, name, args.seed)
                       for s, name in ((system, "VAE"), (fast, "small decoder")))
        row, error = scored(rows, mels), (mels - exact).abs().mean().item()
        found["small decoder"] = {**row, "log-mel error": error}
        print(show({"student, small decoder": row}, len(rows)).splitlines()[1])
        print(f"the small decoder's log-mels differ from the VAE's by {error:.3f} nepers")
    if not others:
        print(f"The other rows are shipped for N = {whole}; --all measures them here.")
    out = folder.parent
    replace_text(out / "scores.json", json.dumps(found, indent=2) + "\n")
    replace_file(out / "spectrograms.png", lambda path: image.save(path, "PNG"))
    metrics = [name + " " + ", ".join(map(" ".join, zip(DIGITS, cells(row))))
               for name, row in table.items()]
    kind = "" if args.kind == "all" else f", {args.kind} pairs of events"
    write_card(folder, f"{len(rows)} held-out captions of the tiny world ({args.list} list{kind}): "
               + "; ".join(metrics))
    print(f"{out / 'scores.json'}  {out / 'spectrograms.png'}  {folder / 'README.md'}")


def report_diversity(args):
    """Print how far apart several clips of one caption are: real ones, teacher's and student's."""
    systems = {"student": load_student(*args.student)[2], "teacher": load_teacher(STEPS)}
    rows = held_out(args.clips // args.diversity, args.list, args.kind)
    found = diversity(systems, rows, args.diversity, args.seed)
    print(f"{len(rows)} captions, {args.diversity} clips each: "
          + ", ".join(f"{name} {distance:.2f}" for name, distance in found.items())
          + f", student / teacher {found['student'] / found['teacher']:.3f}")


def report_seeds(args):
    """Print the mean and spread of students of several seeds, each with noise of its own."""
    rows, found = held_out(args.clips, args.list, args.kind), []
    for seed, name in enumerate(args.student, args.seed):
        found.append(measure({name: load_student(name)[2]}, rows, seed)[name])
    print(show({f"{len(found)} students": summary(found)}, len(rows)))


def main(argv=None):
    args = parse_args(argv)
    several = report_seeds if len(args.student) > 1 else report
    (report_diversity if args.diversity else several)(args)


if __name__ == "__main__":
    cli(main)
