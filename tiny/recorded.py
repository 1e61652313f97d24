"""A world of recordings: tiny/world.py's captions of ten classes, and crops of a folder of sounds.

    python -m tiny.make --sounds ESC-10 --out out_sounds

The folder is ESC-10's (https://github.com/karolpiczak/ESC-10, CC BY 3.0): a folder a class, or
ESC-50's: audio/ and meta/esc50.csv. Either way a file is named FOLD-..., fold 5 is held out.
"""
import numpy as np

from data import read_rows, require
from extras.audio import read_audio
from tiny.world import JOINS, RATE, SECONDS, N, World

LOUD = ("softly", "loudly")
# As world.EVENTS, but a subject's synonyms mean the same recordings.
EVENTS = {
    "dog": (("a dog", "a hound", "a pet dog", "a watchdog"), "barks", "barking", LOUD),
    "rain": (("rain", "steady rain", "cold rain", "the rain"), "falls", "falling", LOUD),
    "sea": (("the sea", "the ocean", "the surf", "a sea"), "roars", "roaring", LOUD),
    "baby": (("a baby", "an infant", "a newborn", "a small baby"), "cries", "crying", LOUD),
    "clock": (("a clock", "a watch", "a wall clock", "an old clock"), "ticks", "ticking", LOUD),
    "sneeze": (("someone", "a person", "somebody", "a human"), "sneezes", "sneezing", LOUD),
    "helicopter": (("a helicopter", "a chopper", "a big helicopter", "a rescue helicopter"),
                   "flies", "flying", LOUD),
    "chainsaw": (("a chainsaw", "a power saw", "a motor saw", "a saw"), "buzzes", "buzzing", LOUD),
    "rooster": (("a rooster", "a cock", "a cockerel", "a farm rooster"), "crows", "crowing", LOUD),
    "fire": (("a fire", "a campfire", "a bonfire", "a log fire"), "crackles", "crackling", LOUD),
}
# What the two data sets call them.
CLASSES = {
    "dog": ("dog bark", "dog"), "rain": ("rain",), "sea": ("sea waves",),
    "baby": ("baby cry", "crying baby"), "clock": ("clock tick",),
    "sneeze": ("person sneeze", "sneezing"), "helicopter": ("helicopter",),
    "chainsaw": ("chainsaw",), "rooster": ("rooster",),
    "fire": ("fire crackling", "crackling fire"),
}
UNSEEN = [
    ("dog", "rain"), ("sea", "baby"), ("clock", "chainsaw"), ("rooster", "helicopter"),
    ("fire", "sneeze"), ("dog", "clock"), ("rain", "helicopter"), ("sea", "rooster"),
    ("baby", "fire"), ("sneeze", "chainsaw"),
]
TRAINING, HELD_OUT = "1234", "5"                # folds
FRAME = 800                                     # 50 ms
# The loudest frame has RMS 0.25 and as many dB less as lie between these two.
LESS = {"": (0, 12), "softly": (9, 14), "loudly": (0, 4)}


def files(folder):
    """Find the sounds of the ten classes: {event: paths}, sorted; InputError where one has none."""
    table = folder / "meta/esc50.csv"
    if table.exists():
        found = [(row["category"], folder / "audio" / row["filename"])
                 for row in read_rows(table)]
    else:
        found = [(path.parent.name, path) for path in folder.glob("*/*")
                 if path.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3")]
    plain = lambda name: name.lstrip("0123456789 -").replace("_", " ").lower()
    sounds = {event: sorted(path for name, path in found if plain(name) in CLASSES[event])
              for event in EVENTS}
    require(all(sounds.values()), f"{folder}: no sounds of {[e for e in EVENTS if not sounds[e]]}; "
            "needed is a folder a class, as in ESC-10, or ESC-50's audio/ and meta/esc50.csv")
    return sounds


def levels(wav):
    """RMS of each 50 ms (n,) of a waveform (N,)."""
    return np.sqrt(np.square(wav[:len(wav) // FRAME * FRAME].reshape(-1, FRAME)).mean(1))


def in_background(wav, rng):
    """Put noise of a take's own background where it (N,) is digital silence, which is no sound."""
    loud = levels(wav)
    silent = loud < 1e-4
    if not silent.any() or silent.all():
        return wav
    i = np.argsort(loud)[silent.sum() + (~silent).sum() // 10]          # among the quietest
    background = wav[i * FRAME:(i + 1) * FRAME] * min(1, 0.03 * loud.max() / loud[i])
    # noise filtered by it has its spectrum and level
    spectrum = np.fft.rfft(rng.standard_normal(len(wav))) * np.fft.rfft(background, len(wav))
    where = np.interp(np.arange(len(wav)), (np.arange(len(loud)) + 0.5) * FRAME, silent)
    return wav + where * np.fft.irfft(spectrum, len(wav))


class Recordings(World):
    """A source of clips as tiny.world's: crops of the recordings of some folds of a folder."""

    def __init__(self, folder, folds=TRAINING):
        super().__init__(EVENTS, UNSEEN, held=(60, 324, 128), single=0.4, train=2000)
        self.labels = self.names
        self.takes, rng = {}, np.random.default_rng(0)
        for event, paths in files(folder).items():
            mine = [path for path in paths if path.name.split("-")[0] in tuple(folds)]
            require(mine, f"{folder}: of {event}, no file's name begins with its fold, {folds[0]}- "
                    f"to {folds[-1]}-, as in 1-100032-A.wav")
            wavs = [read_audio(path, seconds=10).numpy() for path in mine]
            self.takes[event] = [in_background(np.pad(w, (0, max(0, N - len(w)))), rng).astype(
                np.float32) for w in wavs]

    def crop(self, rng, event, adverb, n):
        """Crop a take's n samples around a moment with sound, as loud as the adverb says."""
        takes = self.takes[event]
        wav = takes[rng.integers(len(takes))]
        loud = levels(wav)
        moment = FRAME * rng.choice(np.flatnonzero(loud > 0.3 * loud.max()))
        start = int(np.clip(moment - rng.integers(n), 0, len(wav) - n))
        x = wav[start:start + n] / levels(wav[start:start + n]).max()
        edge = np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * RATE)
        return 0.25 * 10 ** (-rng.uniform(*LESS[adverb]) / 20) * x * np.minimum(edge, 1)

    def render(self, rng, events, join):
        out, ordered = np.zeros(N, np.float32), join in JOINS[3:]
        n = int(RATE * SECONDS / (1 + ordered))
        for i, (event, _, adverb) in enumerate(events):
            start = n * i * ordered
            out[start:start + n] += self.crop(rng, event, adverb, n)
        return out / max(1, np.abs(out).max()), [self.labels.index(event) for event, _, _ in events]
