"""The tiny world: what can sound, how it is described, and what it sounds like.

Twelve sound events with attributes, alone or in pairs ("a dog barks twice while rain falls
softly"), are written as captions and synthesised with numpy. Nothing is recorded: a caption and a
seed give a clip of 2.56 s at 16 kHz. To add an event, add a line to synthesis.json and a function
to SOUNDS, then run `python -m tiny.make`.
"""
import functools
import itertools
from pathlib import Path

import numpy as np

from data import read_json

RATE, SECONDS = 16000, 2.56
N = int(RATE * SECONDS)

# event: [subjects, verb, gerund, adverbs]; the first subject is the plain one, and what the words
# leave open is drawn at random. No training caption has an unseen pair, in either order.
WORDS = read_json(Path(__file__).with_name("synthesis.json"))
COUNTS = ("once", "twice", "three times")
JOINS = ("and", "while", "with", "followed by", "then")     # the last two: one after the other


# ---- sounds ------------------------------------------------------------------------------------
# Each takes (rng, subject, adverb, seconds) and returns samples (n,), of any length up to that
# many seconds.

def envelope(n, attack, decay):
    t = np.arange(n) / RATE
    return np.minimum(t / attack, 1) * np.exp(-np.maximum(t - attack, 0) / decay)


def harmonics(f0, weights):
    """Sum the harmonics of a frequency track f0 (n,) in Hz, leaving out those above 7.5 kHz."""
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    return sum(w * np.sin(k * phase) * (k * f0 < 7500) for k, w in enumerate(weights, 1))


def band(rng, n, low, high, order=2):
    """Noise (n,) of unit variance between two frequencies, with soft edges."""
    f = np.fft.rfftfreq(n, 1 / RATE) + 1
    shape = 1 / np.sqrt((1 + (low / f) ** (2 * order)) * (1 + (f / high) ** (2 * order)))
    x = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * shape, n)
    return x / (x.std() + 1e-9)


def repeat(rng, adverb, gap, one):
    """Play the sound one() once, twice or three times, about `gap` seconds apart."""
    times = COUNTS.index(adverb) + 1
    starts = [int(i * gap * rng.uniform(0.97, 1.03) * RATE) for i in range(times)]
    parts = [one() for _ in range(times)]
    out = np.zeros(max(s + len(p) for s, p in zip(starts, parts)))
    for s, p in zip(starts, parts):
        out[s:s + len(p)] += p
    return out


def dog(rng, subject, adverb, seconds):
    f0 = (rng.uniform(300, 380), rng.uniform(520, 640), rng.uniform(160, 210))[subject]

    def bark():
        n = int(rng.uniform(0.17, 0.21) * RATE)
        t = np.linspace(0, 1, n)
        voice = harmonics(f0 * (1 + 0.5 * np.sin(np.pi * t) - 0.2 * t), 0.8 ** np.arange(12))
        return (voice + 0.5 * band(rng, n, 500, 3000)) * envelope(n, 0.015, 0.06)

    return 0.35 * repeat(rng, adverb, 0.36, bark)


def cat(rng, subject, adverb, seconds):
    f0 = (rng.uniform(480, 560), rng.uniform(850, 980))[subject]

    def meow():
        n = int(rng.uniform(0.42, 0.5) * RATE)
        t = np.linspace(0, 1, n)
        track = f0 * (1 + 0.45 * np.sin(np.pi * t ** 0.7))
        return harmonics(track, (0.5, 1, 0.7, 0.3, 0.2)) * np.sin(np.pi * t) ** 0.6

    return 0.3 * repeat(rng, adverb, 0.6, meow)


def bird(rng, subject, adverb, seconds):
    gap = (0.4 if adverb == "slowly" else 0.14) * rng.uniform(0.95, 1.05)
    f0 = rng.uniform(3200, 3800)
    out = np.zeros(int(seconds * RATE))
    for start in np.arange(rng.uniform(0, gap), seconds - 0.1, gap):
        n = int(0.07 * RATE)
        t = np.linspace(0, 1, n)
        i = int(start * RATE)
        out[i:i + n] += harmonics(f0 * (1 + 0.5 * t), (1, 0.15)) * np.sin(np.pi * t)
    return 0.35 * out


def rain(rng, subject, adverb, seconds):
    n = int(seconds * RATE)
    if adverb == "softly":
        return 0.05 * band(rng, n, 1500, 5000)
    return 0.25 * band(rng, n, 500, 7000, 1)


def wind(rng, subject, adverb, seconds):
    n = int(seconds * RATE)
    cycles = rng.uniform(0.4, 0.8) * np.arange(n) / RATE + rng.random()
    swell = 1 + 0.6 * np.sin(2 * np.pi * cycles)
    if adverb == "softly":
        return swell * (0.07 * band(rng, n, 150, 450))
    return swell * (0.22 * band(rng, n, 300, 900))


def siren(rng, subject, adverb, seconds):
    t = np.arange(int(seconds * RATE)) / RATE
    rate = rng.uniform(0.7, 0.9) if adverb == "slowly" else rng.uniform(2.8, 3.2)
    f0 = 950 + 350 * np.sin(2 * np.pi * (rate * t + rng.random()))
    return 0.25 * harmonics(f0, (1, 0.4, 0.25, 0.1))


def bell(rng, subject, adverb, seconds):
    f0 = (rng.uniform(700, 800), rng.uniform(1400, 1600), rng.uniform(330, 390))[subject]
    # partials: multiple of f0, amplitude, decay in seconds
    partials = ((1, 1, 0.25), (2.0, 0.6, 0.2), (2.76, 0.5, 0.12), (4.1, 0.3, 0.08),
                (5.4, 0.2, 0.05))

    def strike():
        n = int(0.9 * RATE)
        t = np.arange(n) / RATE
        ring = sum(w * np.sin(2 * np.pi * f0 * k * t) * np.exp(-t / d) * (f0 * k < 7500)
                   for k, w, d in partials)
        return ring * np.minimum(t / 0.003, 1) * np.minimum((n - np.arange(n)) / 800, 1)

    return 0.25 * repeat(rng, adverb, 0.4, strike)


def clock(rng, subject, adverb, seconds):
    gap = (0.5 if adverb == "slowly" else 0.17) * rng.uniform(0.96, 1.04)
    f0 = rng.uniform(2200, 2600)
    out = np.zeros(int(seconds * RATE))
    for i, start in enumerate(np.arange(rng.uniform(0, gap), seconds - 0.06, gap)):
        n = int(0.05 * RATE)
        t = np.arange(n) / RATE
        f = f0 * (1 if i % 2 else 0.8)
        j = int(start * RATE)
        click = np.sin(2 * np.pi * f * t) + 0.5 * rng.standard_normal(n)
        out[j:j + n] += click * np.exp(-t / 0.008)
    return 0.5 * out


def engine(rng, subject, adverb, seconds):
    n = int(seconds * RATE)
    f0 = rng.uniform(42, 50) if adverb == "slowly" else rng.uniform(95, 115)
    cycles = rng.uniform(1, 2) * np.arange(n) / RATE + rng.random()
    track = f0 * (1 + 0.03 * np.sin(2 * np.pi * cycles))
    return 0.12 * harmonics(track, 0.88 ** np.arange(24)) + 0.04 * band(rng, n, 80, 900)


def alarm(rng, subject, adverb, seconds):
    f0 = rng.uniform(1900, 2100)
    n = int(0.16 * RATE)
    edge = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / 80)
    return 0.3 * repeat(rng, adverb, 0.3, lambda: harmonics(np.full(n, f0), (1, 0, 0.4)) * edge)


def hammer(rng, subject, adverb, seconds):
    metal = subject == 2 or (subject == 0 and rng.random() < 0.5)
    # modes: frequency in Hz, decay in seconds
    modes = ((190, 0.05), (410, 0.03), (830, 0.015))
    if metal:
        modes = ((1150, 0.12), (2730, 0.09), (4420, 0.05))

    def blow():
        n = int(0.25 * RATE)
        t = np.arange(n) / RATE
        ring = sum(np.sin(2 * np.pi * f * rng.uniform(0.98, 1.02) * t) * np.exp(-t / d)
                   for f, d in modes)
        hit = rng.standard_normal(n) * np.exp(-t / 0.004)
        return (ring + hit) * np.minimum((n - np.arange(n)) / 400, 1)

    return 0.35 * repeat(rng, adverb, 0.38, blow)


def thunder(rng, subject, adverb, seconds):
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    claps = (0.02, *rng.uniform(0.2, 0.6, 2) * seconds)
    roll = sum(np.exp(-np.maximum(t - s, 0) / 0.5) * (t > s)
               * np.minimum(np.maximum(t - s, 0) / 0.05, 1) for s in claps)
    low, loud = (70, 0.07) if adverb == "softly" else (180, 0.28)
    return loud * roll * band(rng, n, 30, low)


SOUNDS = {sound.__name__: sound for sound in (
    dog, cat, bird, rain, wind, siren, bell, clock, engine, alarm, hammer, thunder)}


def render(rng, events, join):
    """Synthesise a description: waveform (N,) float32 with peak 0.95, and indices of its LABELS."""
    out, labels = np.zeros(N), []
    ordered = join in ("followed by", "then")
    for i, (event, subject, adverb) in enumerate(events):
        subjects, _, _, adverbs = WORDS["events"][event]
        adverb = adverb or str(rng.choice(adverbs))
        if subject == 0 and event != "hammer":  # the plain subject may be any; a hammer draws later
            subject = int(rng.integers(len(subjects)))
        seconds = SECONDS / 2 if ordered else SECONDS
        x = SOUNDS[event](rng, subject, adverb, seconds)[:int(seconds * RATE)]
        fade = min(320, len(x))                 # 20 ms, so that cut sounds end without a click
        x[-fade:] *= np.linspace(1, 0, fade)
        start = int(i * N / 2) if ordered else 0
        room = int(seconds * RATE) - len(x)
        start += int(rng.integers(room + 1) * (0.8 if ordered else 1))
        out[start:start + len(x)] += x
        labels.append(LABELS.index(f"{event} {adverb}"))
    return (0.95 * out / np.abs(out).max()).astype(np.float32), labels


# ---- captions, of these events or others --------------------------------------------------------

# Lists of held-out captions: to report, to choose by, and to confirm, which chooses nothing.
LISTS = ("first", "second", "third")


class World:
    """Captions of events and pairs of them, made to sound by render(); tiny.make writes to home.

    number, train: how many clips and captions to train on. held: how many held-out captions have a
    single event, a pair of training's, an unseen one. single: share of single events among clips.
    without: events that the UNet is not trained on.
    """

    without = ()

    def __init__(self, words, home, number, held, single, train):
        self.events = events = words["events"]
        self.unseen = [tuple(pair.split()) for pair in words["unseen"]]
        self.number, self.held, self.single, self.train = number, held, single, train
        self.home, self.build, self.teacher = home, home / "build", home / "teacher"
        self.labels = [f"{e} {a}" for e in events for a in events[e][3]]
        self.names, self.pairs = list(events), list(itertools.combinations(events, 2))
        self.seen = [p for p in self.pairs if not {p, p[::-1]} & {*self.unseen}]
        # places in three_kinds(): training pairs the two events too (seen), or it never does
        one, two, three = itertools.accumulate(held)
        self.kinds = {"all": range(three), "seen": range(one, two), "unseen": range(two, three)}

    def clip(self, descriptions, index, seed=1000):
        """Render one of a list of (caption, events, join). No scored clip has the first seed."""
        return self.render(np.random.default_rng((seed, index)), *descriptions[index][1:])

    def phrase(self, event, subject, adverb, gerund=False):
        """Put one event into words: phrase("dog", 0, "twice") is "a dog barks twice"."""
        subjects, verb, gerund_form, _ = self.events[event]
        who, _, where = subjects[subject].partition(" on ")
        words = [who, gerund_form if gerund else verb, where and f"on {where}", adverb]
        return " ".join(filter(None, words))

    def caption(self, rng, events, join):
        """Put one or two (event, subject, adverb) into words; verb forms vary where both fit."""
        free = join in ("", "and")
        gerund = rng.random() < 0.3 if free else join in ("with", "followed by")
        first = self.phrase(*events[0], gerund=gerund and free)
        return f"{first} {join} {self.phrase(*events[1], gerund=gerund)}" if join else first

    def describe(self, rng, pairs, share_single, taken=()):
        """Draw one (caption, events, join) whose caption is not in `taken`.

        events: one or two (event, subject, adverb), join: the word between two.
        """
        def attributes(event):
            subjects, _, _, adverbs = self.events[event]
            return event, int(rng.integers(len(subjects))), str(rng.choice(["", *2 * adverbs]))

        while True:
            if rng.random() < share_single:
                events, join = (attributes(str(rng.choice(self.names))),), ""
            else:
                first, second = pairs[rng.integers(len(pairs))]
                if rng.random() < 0.5:
                    first, second = second, first
                events, join = (attributes(first), attributes(second)), str(rng.choice(JOINS))
            text = self.caption(rng, events, join)
            if text not in taken:
                return text, events, join

    def distinct(self, rng, number, pairs, share_single, taken=()):
        """Draw `number` descriptions with different captions."""
        found = {}
        while len(found) < number:
            one = self.describe(rng, pairs, share_single, taken)
            found.setdefault(one[0], one)
        return list(found.values())

    def three_kinds(self, rng, taken=()):
        """A list of captions to test by: single events, seen pairs, unseen pairs."""
        return [one for number, pairs, single in zip(
            self.held, (None, self.seen, self.unseen), (1.0, 0.0, 0.0))
            for one in self.distinct(rng, number, pairs, single, taken)]

    @functools.cache
    def captions(self):
        """The captions: (training, first held-out), distinct (caption, events, join)."""
        rng = np.random.default_rng(0)
        held = self.three_kinds(rng)
        taken = {text for text, _, _ in held}
        return self.distinct(rng, self.train, self.seen, self.single, taken), held

    def held_out(self, name="first"):
        """A list of held-out captions, one of LISTS; no caption is in two of them.

        Single events of later lists may be among students' captions, as few are possible; pairs
        never are. The teacher was trained on about half of the later lists' captions.
        """
        train, held = self.captions()
        taken = {text for text, events, _ in train if len(events) > 1}
        for seed in range(1, LISTS.index(name) + 1):
            taken |= {text for text, _, _ in held}
            held = self.three_kinds(np.random.default_rng(seed), taken)
        return held

    def clips(self, number, seen=True):
        """Descriptions of the teacher's training clips (seen), or of the classifier's (any pair).

        Captions repeat, but none is of the first held-out list.
        """
        rng = np.random.default_rng((0, int(seen)))
        held = {text for text, _, _ in self.captions()[1]}
        return [self.describe(rng, self.seen if seen else self.pairs, self.single, held)
                for _ in range(number)]


SYNTHESIS = World(WORDS, Path(__file__).resolve().parent, 30000, (32, 352, 128), 0.2, 6000)
SYNTHESIS.render = render
LABELS, KINDS = SYNTHESIS.labels, SYNTHESIS.kinds           # what the classifier tells apart
captions, held_out, clips = SYNTHESIS.captions, SYNTHESIS.held_out, SYNTHESIS.clips
