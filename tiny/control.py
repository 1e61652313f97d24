"""What one step keeps of the teacher's semantics, measured on the tiny world.

    python -m tiny.control sweep       # attention to one of two events, times 0 to 4: is it heard?
    python -m tiny.control refine      # "a dog barks" -> "... while rain falls": does the dog stay?
    python -m tiny.control edit        # an event of a recording replaced: inversion beside mixing
    python -m tiny.control length      # clips longer and shorter than those of training

After the paper's section IV-C3 and its future work. Heard: the classifier's probability of the
event, in the mean over captions. Each takes about a minute.
"""
import numpy as np
import torch
from PIL import Image

from data import Parser, cli, require
from extras.audio import encode_audio
from extras.control import invert, parse_weights, reweighted, token_weights
from extras.metrics import load_classifier
from model import load_student, open_student
from sample import picture
from tiny import score, world


def load(student, seconds=None):
    """Load a student of the tiny teacher, or its own UNet in one step: a System."""
    require(score.is_of_tiny(open_student(student)[2]),
            f"{student}: is no student of the tiny teacher")
    return load_student(student, "tiny", seconds, device="cpu")


@torch.no_grad()
def make(system, captions, z_T, batch=32):
    """Make log-mels (n, 64, frames) of captions such as "(rain:2) falls"."""
    texts, weights = zip(*map(parse_weights, captions))
    weights, mels = token_weights(system, texts, weights), []
    for i in range(0, len(texts), batch):
        part = slice(i, i + batch)
        with reweighted(system.unet, weights[part]):
            x0 = system.latents(z_T[part], system.encode_text(texts[part]))
        mels.append(system.decoder.decode(x0))
    return torch.cat(mels)


def heard(mels, events):
    """The largest probability of each clip's event, whatever its adverb: (n,)."""
    p = score.features(load_classifier(), mels)[1].sigmoid()                # (n, labels)
    return torch.stack([row[[label.startswith(event + " ") for label in world.LABELS]].max()
                        for row, event in zip(p, events)])


def row_of(*mels):
    """A row of mel spectrograms (64, frames) as one picture."""
    image = Image.new("RGB", (388 * len(mels), 132), "white")
    for i, mel in enumerate(mels):
        image.paste(picture(mel).resize((384, 128)), (388 * i, 2))
    return image


def pairs(n):
    """Pick n held-out captions of two events at once.

    Returns [(first event, its words, the word between, second event, its words)].
    """
    both = [row for row in world.held_out() if row[2] in ("and", "while", "with")]
    rows = [(*row, row[0].split(f" {row[2]} ")) for row in both]
    return [(first[0], a, join, second[0], b) for _, (first, second), join, (a, b) in (
        rows[k * len(rows) // n] for k in range(n))]


# ---- the measurements --------------------------------------------------------------------------

def sweep(student, figure=None):
    """Weight the words of the first of two events: are it and the other one heard?"""
    system, rows, results = load(student), pairs(128), {}
    z_T = system.noise(range(len(rows)), 0)
    print("| weight | event of that weight | the other event |\n|---|---|---|")
    for w in (0, 0.5, 1, 1.5, 2, 3, 4):
        mels = make(system, [f"({a}:{w}) {join} {b}" for _, a, join, _, b in rows], z_T)
        first, second = (heard(mels, [row[k] for row in rows]) for k in (0, 3))
        results[w] = mels, first
        print(f"| {w} | {first.mean():.2f} | {second.mean():.2f} |")
    if figure:                                  # of the caption that the weight changes most
        k = int((results[2][1] - results[0][1]).argmax())
        _, a, join, _, b = rows[k]
        print(f"{figure}: weight 0, 1, 2, 4 of {a!r} in \"{a} {join} {b}\"")
        row_of(*(results[w][0][k] for w in (0, 1, 2, 4))).save(figure)


def refine(student, figure=None):
    """Add a second event to a caption, with the same noise: does the first one stay as it was?"""
    system, rng, n = load(student), np.random.default_rng(0), 100
    events = [world.NAMES[i % len(world.NAMES)] for i in range(n)]
    added = [str(rng.choice([e for e in world.NAMES if e != event])) for event in events]
    words = [world.phrase(e, 0, str(rng.choice(world.EVENTS[e][3]))) for e in events]
    longer = [f"{w} while {world.phrase(e, 0, world.EVENTS[e][3][0])}"
              for w, e in zip(words, added)]
    z_T, z_other = (system.noise(range(n), seed) for seed in (0, 1))
    before, after = (make(system, captions, z_T) for captions in (words, longer))
    other = make(system, longer, z_other)
    loud = before > before.flatten(1).quantile(0.9, 1)[:, None, None]
    same, another = (((mels - before).abs() * loud).sum() / loud.sum() for mels in (after, other))
    print(f"{n} pairs. Where the clip is loudest (a tenth of its spectrogram), log-mel moves by "
          f"{same:.2f} with the same noise, {another:.2f} with another")
    for name, mels in (("before", before), ("after", after)):
        print(f"heard {name}: first {heard(mels, events).mean():.2f}, "
              f"added {heard(mels, added).mean():.2f}")
    if figure:                                  # of the pair that is heard best
        k = int((heard(after, events) * heard(after, added)).argmax())
        swapped = longer[k].replace(words[k], world.phrase("cat", 0, "twice"))
        print(f"{figure}: {words[k]!r}, {longer[k]!r}, {swapped!r}")
        row_of(before[k], after[k], make(system, [swapped], z_T[k:k + 1])[0]).save(figure)


def loudness(mels):
    """Log energy over time of log-mels (n, 64, frames), standardised: (n, frames)."""
    x = mels.exp().square().sum(1).log()
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def noises_of(system, x0, source):
    """Noise from which to edit recordings with latents x0 and captions `source`: {how: z_T}."""
    z_T, fresh = (system.noise(range(len(source)), seed) for seed in (0, 1))
    unit = x0 / x0.std((1, 2, 3), keepdim=True)
    found = {"unrelated noise": z_T}
    for r in (0.1, 0.2, 0.3, 0.5):
        found[f"mixed, {r}"] = r * unit + (1 - r * r) ** 0.5 * z_T
    for name, words in (("its caption", source), ("no words", [""] * len(source))):
        text = system.encode_text(words)
        inverted, _ = invert(lambda z: system.latents(z, text), x0, z_T)
        for s in (0, 0.2, 0.4, 0.7):
            found[f"inverted with {name}, strength {s}"] = (1 - s * s) ** 0.5 * inverted + s * fresh
    return found


def edit(student):
    """Replace the event of a recording by the next one that can be counted."""
    system, counted = load(student), [e for e in world.NAMES if "twice" in world.EVENTS[e][3]]
    rows = [(e, counted[(i + 1) % len(counted)], adverb)
            for i, e in enumerate(counted) for adverb in ("once", "twice") for _ in range(4)]
    old, new, adverbs = zip(*rows)
    wavs = [world.render(np.random.default_rng((7, i)), ((e, 0, adverb),), "")[0]
            for i, (e, _, adverb) in enumerate(rows)]
    x0 = encode_audio(system, torch.from_numpy(np.stack(wavs)))
    recording = system.decoder.decode(x0)
    source, target = ([world.phrase(e, 0, adverb) for e, adverb in zip(events, adverbs)]
                      for events in (old, new))
    print(f"{len(rows)} recordings of one event, replaced by another")
    print("| noise | off the recording, its own caption | new event heard | old event heard "
          "| loudness over time, correlation |\n|---|---|---|---|---|")
    for name, z_T in noises_of(system, x0, source).items():
        same, other = make(system, source, z_T), make(system, target, z_T)
        alike = (loudness(other) * loudness(recording)).mean()
        print(f"| {name} | {(same - recording).abs().mean():.2f} | {heard(other, new).mean():.2f} "
              f"| {heard(other, old).mean():.2f} | {alike:.2f} |", flush=True)


def length(student, n=48):
    """Make clips of other lengths: a steady event shall fill them, a counted one come once."""
    steady, counted = ([e for e in world.NAMES if adverb in world.EVENTS[e][3]]
                       for adverb in ("quickly", "twice"))
    one = [steady[i % len(steady)] for i in range(n)]
    first, second = ([counted[(i + k * (1 + i // 4 % 3)) % len(counted)] for i in range(n)]
                     for k in (0, 1))
    single, a, b = ([world.phrase(e, 0, adverb) for e in events] for events, adverb in (
        (one, "quickly"), (first, "twice"), (second, "twice")))
    both = [f"{a} and {b}" for a, b in zip(a, b)]
    print("| seconds | steady event, of windows | two counted events, windows each |")
    print("|---|---|---|")
    for seconds in (0.64, 1.28, 2.56, 5.12, 10.24, 20.48):
        system = load(student, seconds)
        z_T, window = system.noise(range(n), 0), round(100 * min(2.56, seconds))
        parts, two = (make(system, captions, z_T).split(window, 2) for captions in (single, both))
        fills = torch.stack([heard(part, one) for part in parts]).mean()
        come = torch.stack([(heard(part, first) + heard(part, second)) / 2 for part in two])
        print(f"| {seconds:g} | {fills:.2f} | {come.sum(0).mean():.2f} |", flush=True)


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("what", choices=("sweep", "refine", "edit", "length"), help="what to measure")
    p.add_argument("--student", default="out/student", help="a student of the tiny teacher")
    p.add_argument("--figure", help="a picture to write, of sweep or refine")
    args = p.parse_args(argv)
    if args.what in ("edit", "length"):
        require(not args.figure, "--figure goes with sweep or refine")
        return edit(args.student) if args.what == "edit" else length(args.student)
    (sweep if args.what == "sweep" else refine)(args.student, args.figure)


if __name__ == "__main__":
    cli(main)
