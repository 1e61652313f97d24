"""A world of recordings: tiny/world.py's captions of ten classes, and crops of a folder of sounds.

The folder is ESC-10's (https://github.com/karolpiczak/ESC-10, CC BY 3.0): a folder a class, or
ESC-50's: audio/ and meta/esc50.csv. Either way a file is named FOLD-..., and fold 5 is held out.
"""
import functools
from pathlib import Path

import numpy as np

from data import read_json, read_rows, require
from extras.audio import read_audio
from tiny.world import JOINS, RATE, N, World

WORDS = read_json(Path(__file__).with_name("esc10.json"))   # synonyms mean the same recordings
EVENTS, CLASSES = WORDS["events"], WORDS["classes"]     # as ESC-10 and, if it differs, ESC-50 say
TRAINING, HELD_OUT, FRAME = "1234", "5", 800    # folds; 50 ms
LESS = {"": (0, 12), "softly": (9, 14), "loudly": (0, 4)}       # dB, of the loudest frame


def files(folder):
    """Find the sounds of the ten classes: {event: paths}, sorted; InputError where one has none."""
    if (table := folder / "meta/esc50.csv").exists():
        found = [(row.get("category", ""), folder / "audio" / row.get("filename", ""))
                 for row in filter(None, read_rows(table))]
    else:
        found = [(path.parent.name, path) for path in folder.glob("*/*.*")]
    sounds = {event: sorted(path for name, path in found if name.lstrip("0123456789 -").replace(
        "_", " ").lower() in names) for event, names in CLASSES.items()}
    require(all(sounds.values()), f"{folder}: no sounds of {[e for e in EVENTS if not sounds[e]]}; "
            "needed is a folder a class, as in ESC-10, or ESC-50's audio/ and meta/esc50.csv")
    return sounds


def levels(wav):
    """RMS of each 50 ms (n,) of a waveform (N,), without its DC."""
    return wav[:len(wav) // FRAME * FRAME].reshape(-1, FRAME).std(1)


def take(path, rng):
    """Read a take (N,), with noise of its own background where it was silenced or faded out."""
    wav = read_audio(path).numpy()
    wav, n = np.pad(wav, (0, max(0, N - len(wav)))), max(N, len(wav))
    loud = levels(wav)
    require(loud.max() > 1e-3, f"{path}: is silent; remove it")
    # a frame at its quietest otherwise, but 30 to 50 dB below the loudest
    known = np.flatnonzero(loud > 1e-3 * loud.max())
    i = known[np.argsort(loud[known])[len(known) // 10]]
    level = np.clip(loud[i], 0.003 * loud.max(), 0.03 * loud.max())
    # white noise, filtered by it, has its spectrum
    noise = rng.standard_normal(n) * level / loud[i] / FRAME ** 0.5
    frame = wav[i * FRAME:(i + 1) * FRAME]
    spectrum = np.fft.rfft(noise) * np.fft.rfft(frame - frame.mean(), n)
    missing = np.sqrt(np.clip(1 - (loud / level) ** 2, 0, 1))
    where = np.interp(np.arange(n), (np.arange(len(loud)) + 0.5) * FRAME, missing)
    return (wav + where * np.fft.irfft(spectrum, n)).astype(np.float32)


@functools.cache
def load(folder, folds):
    """Read the takes of some folds, {event: waveforms}, once; a pickled source has none of them."""
    found, rng = {}, np.random.default_rng(0)
    for event, paths in files(folder).items():
        mine = [path for path in paths if path.name.split("-")[0] in tuple(folds)]
        require(mine, f"{folder}: of {event}, no file is named FOLD-..., with FOLD one of {folds}")
        found[event] = [take(path, rng) for path in mine]
    return found


class Recordings(World):
    """A source of clips as tiny.world's: crops of the recordings of some folds of a folder."""

    def __init__(self, folder, folds=TRAINING, home=None):
        super().__init__(WORDS, home or folder, 16000, (60, 324, 128), 0.4, 2000)
        self.teacher, self.labels, self.of = self.home, self.names, (folder, folds)
        load(*self.of)

    def crop(self, rng, event, adverb, n):
        """Crop a take's n samples around a moment with sound, as loud as the adverb says."""
        wav = (takes := load(*self.of)[event])[rng.integers(len(takes))]
        loud = levels(wav)
        moment = FRAME * rng.choice(np.flatnonzero(loud > 0.3 * loud.max()))
        start = int(np.clip(moment - rng.integers(n), 0, len(wav) - n))
        x = wav[start:start + n] / levels(wav[start:start + n]).max()
        edge = np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * RATE)     # of 10 ms
        return 0.25 * 10 ** (-rng.uniform(*LESS[adverb]) / 20) * x * np.minimum(edge, 1)

    def render(self, rng, events, join):
        out, ordered = np.zeros(N, np.float32), join in JOINS[3:]
        n = N // (1 + ordered)
        for i, (event, _, adverb) in enumerate(events):
            out[n * i * ordered:][:n] += self.crop(rng, event, adverb, n)
        return out / max(1, np.abs(out).max()), [self.labels.index(event) for event, _, _ in events]
