"""What one step keeps of the teacher's semantics, measured on the tiny world (the paper's section IV-C3 and its future work).

    python -m tiny.control sweep       # attention to one of two events, times 0 to 4: is it heard?
    python -m tiny.control refine      # "a dog barks" -> "a dog barks while rain falls": does the dog stay?
    python -m tiny.control edit        # one event of a recording replaced: inversion beside mixing
    python -m tiny.control length      # clips longer and shorter than those of training

Heard: the classifier's probability of the event, in the mean over captions. Each takes about a minute.
"""
import argparse

import numpy as np
import torch
from PIL import Image

import sample
from model import invert
from tiny import score, world


def show(*mels):
    """A row of mel spectrograms (64, frames)."""
    tiles = [sample.picture(m).resize((384, 128)) for m in mels]
    image = Image.new("RGB", (388 * len(tiles), 132), "white")
    for i, tile in enumerate(tiles):
        image.paste(tile, (388 * i, 2))
    return image


class System:
    """A tiny student: captions with weights to log-mels, and how likely the classifier hears an event in them."""

    def __init__(self, student, seconds=None):
        args = sample.parse_args(["--student", student, "--prompt", "-", "--device", "cpu", *(["--seconds", str(seconds)] if seconds else [])])
        self.teacher, self.latents, _ = sample.open_system(args)
        self.classifier = score.load_classifier()

    def noise(self, n, seed=0):
        return sample.noise(self.teacher, range(n), seed)

    @torch.no_grad()
    def mels(self, captions, z_T):
        texts, weights = zip(*map(sample.parse_weights, captions))
        weights = self.teacher.token_weights(texts, weights)
        return torch.cat([self.teacher.decode(self.latents(z, self.teacher.encode_text(texts[i * 32:i * 32 + 32]), w)).cpu()
                          for i, (z, w) in enumerate(zip(z_T.split(32), weights.split(32)))])

    def heard(self, mels, events):
        """The largest probability of each clip's event, whatever its adverb: (n,)."""
        p = score.features(self.classifier, mels)[1].sigmoid()
        return torch.stack([row[[label.startswith(e + " ") for label in world.LABELS]].max() for row, e in zip(p, events)])


def pairs(n):
    """n held-out descriptions of two events at once: [(first event, its words, join, second event, its words)]."""
    both = [(text, events, join) for text, events, join in world.captions()[1] if join in ("and", "while", "with")]
    both = [both[k * len(both) // n] for k in range(n)]
    return [(events[0][0], text.partition(f" {join} ")[0], join, events[1][0], text.partition(f" {join} ")[2]) for text, events, join in both]


def sweep(student, figure):
    system, rows = System(student), pairs(128)
    z_T, results = system.noise(len(rows)), {}
    print("| weight | event of that weight | the other event |\n|---|---|---|")
    for w in (0, 0.5, 1, 1.5, 2, 3, 4):
        mels = system.mels([f"({a}:{w}) {join} {b}" for _, a, join, _, b in rows], z_T)
        first, second = (system.heard(mels, [r[k] for r in rows]) for k in (0, 3))
        results[w] = mels, first
        print(f"| {w} | {first.mean():.2f} | {second.mean():.2f} |")
    if figure:
        k = int((results[2][1] - results[0][1]).argmax())
        print(f"{figure}: weight 0, 1, 2, 4 of the first event in {rows[k][1:3] + rows[k][4:]}")
        show(*(results[w][0][k] for w in (0, 1, 2, 4))).save(figure)


def refine(student, figure):
    system, rng, n = System(student), np.random.default_rng(0), 100
    events = [world.NAMES[i % len(world.NAMES)] for i in range(n)]
    added = [str(rng.choice([e for e in world.NAMES if e != event])) for event in events]
    words = [world.phrase(e, 0, str(rng.choice(world.EVENTS[e][3]))) for e in events]
    longer = [f"{w} while {world.phrase(e, 0, world.EVENTS[e][3][0])}" for w, e in zip(words, added)]
    before, after, other = (system.mels(c, system.noise(n, seed)) for c, seed in ((words, 0), (longer, 0), (longer, 1)))
    loud = before > before.flatten(1).quantile(0.9, 1)[:, None, None]
    far = [((m - before).abs() * loud).sum() / loud.sum() for m in (after, other)]
    print(f"{n} pairs. Where the clip is loudest (a tenth of its spectrogram), log-mel moves by {far[0]:.2f} with the same noise, {far[1]:.2f} with another\n"
          f"heard before: first {system.heard(before, events).mean():.2f}, added {system.heard(before, added).mean():.2f}; "
          f"after: first {system.heard(after, events).mean():.2f}, added {system.heard(after, added).mean():.2f}")
    if figure:
        k = int((system.heard(after, events) * system.heard(after, added)).argmax())
        swapped = longer[k].replace(words[k], world.phrase("cat", 0, "twice"))
        print(f"{figure}: {words[k]!r}, {longer[k]!r}, {swapped!r}")
        show(before[k], after[k], system.mels([swapped], system.noise(n)[k:k + 1])[0]).save(figure)


def edit(student, figure):
    """Single events with a count, as recordings; each is edited into the next event that can be counted."""
    system, counted = System(student), [e for e in world.NAMES if "twice" in world.EVENTS[e][3]]
    rows = [(e, counted[(i + 1) % len(counted)], a) for i, e in enumerate(counted) for a in ("once", "twice") for _ in range(4)]
    wav = torch.stack([torch.from_numpy(world.render(np.random.default_rng((7, i)), ((e, 0, a),), "")[0]) for i, (e, _, a) in enumerate(rows)])
    source, target = ([world.phrase(r[k], 0, r[2]) for r in rows] for k in (0, 1))
    x0, z_T, fresh, teacher = system.teacher.encode_audio(wav), system.noise(len(rows)), system.noise(len(rows), 1), system.teacher
    recording = teacher.decode(x0)
    unit = x0 / x0.std((1, 2, 3), keepdim=True)
    noises = {"unrelated noise": z_T}
    for r in (0.1, 0.2, 0.3, 0.5):
        noises[f"mixed, {r}"] = r * unit + (1 - r * r) ** 0.5 * z_T
    for name, words in (("its caption", source), ("no words", [""] * len(rows))):
        text = teacher.encode_text(words)
        inverted, _ = invert(lambda z: system.latents(z, text), x0, z_T)
        for s in (0, 0.2, 0.4, 0.7):
            noises[f"inverted with {name}, strength {s}"] = (1 - s * s) ** 0.5 * inverted + s * fresh
    loudness = lambda mels: mels.exp().square().sum(1).log()
    print(f"{len(rows)} recordings of one event, replaced by another\n| noise | off the recording, its own caption | new event heard | old event heard | loudness over time, correlation |\n"
          "|---|---|---|---|---|")
    for name, z in noises.items():
        same, new = system.mels(source, z), system.mels(target, z)
        a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (loudness(new), loudness(recording)))
        print(f"| {name} | {(same - recording).abs().mean():.2f} | {system.heard(new, [r[1] for r in rows]).mean():.2f} "
              f"| {system.heard(new, [r[0] for r in rows]).mean():.2f} | {(a * b).mean():.2f} |", flush=True)


def length(student, figure):
    """Heard in windows of 2.56 s (or of the whole clip, if shorter): a steady event shall fill them all, a counted one a single one."""
    steady, counted = ([e for e in world.NAMES if (n in world.EVENTS[e][3])] for n in ("quickly", "twice"))
    print("| seconds | steady event, of windows | two counted events, windows each |\n|---|---|---|")
    for seconds in (0.64, 1.28, 2.56, 5.12, 10.24, 20.48):
        system, window = System(student, seconds), min(256, round(seconds * 100))
        def heard(captions, *events):                                                                # (windows, captions) for each of events
            windows = system.mels(captions, system.noise(len(captions))).split(window, 2)
            return [torch.stack([system.heard(m, e) for m in windows]) for e in events]
        one, n = [steady[i % len(steady)] for i in range(48)], 48
        fills = heard([world.phrase(e, 0, "quickly") for e in one], one)[0].mean()
        first, second = ([counted[(i + k * (1 + i // 4 % 3)) % len(counted)] for i in range(n)] for k in (0, 1))
        both = [f"{world.phrase(a, 0, 'twice')} and {world.phrase(b, 0, 'twice')}" for a, b in zip(first, second)]
        print(f"| {seconds:g} | {fills:.2f} | {(sum(heard(both, first, second)) / 2).sum(0).mean():.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sweep", "refine", "edit", "length"))
    parser.add_argument("--student", default="out/student")
    parser.add_argument("--figure", help="sweep, refine: a picture to write")
    args = parser.parse_args()
    globals()[args.what](args.student, args.figure)
