"""Real audio of held-out captions, written as sample.py writes a system's clips.

    python -m tiny.listen --prompts docs/listen.txt --out "out_listen/real audio"
    python -m tiny.listen --sounds ESC-10 --prompts WORLD/heldout.csv --out real

To hear it beside teacher and students: extras.listen. The tiny world's real audio is its synthesis;
that of a recorded world (python -m tiny.make --sounds) is cut from the takes that were held out.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Parser, cli, number, require
from extras.audio import log_mel
from sample import add_clips, read_prompts, write_clips
from tiny import world
from tiny.recorded import HELD_OUT, TRAINING, Recordings
from tiny.score import FLOOR


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    own = "--prompts", "--out", "--seed", "--overwrite"     # of sample.py's flags
    add_clips(lambda name, **kw: add(name, **kw) if name in own else None)
    add("--sounds", type=Path, help="folder of recordings, in place of the synthesis")
    add("--trained", action="store_true", help="takes that were trained on, not held out")
    add("--draw", type=number(int), default=0, help="of what the words leave open")
    p.set_defaults(prompt=[], n=1, batch_size=64)
    args = p.parse_args(argv)
    prompts, source = read_prompts(args), world.SYNTHESIS
    if args.sounds:
        source = Recordings(args.sounds, TRAINING if args.trained else HELD_OUT)
    rows = [row for name in world.LISTS for row in source.held_out(name)]
    known = {row[0]: (n, row[1:]) for n, row in enumerate(rows)}
    for prompt in prompts:
        require(prompt in known, f"{args.prompts}: {prompt!r} is no held-out caption")

    def render(captions, _):
        wavs = np.stack([source.render(np.random.default_rng((FLOOR + args.draw, n)), *row)[0]
                         for n, row in map(known.get, captions)])
        return log_mel(torch.from_numpy(wavs), 64), wavs

    write_clips(args, prompts, lambda: SimpleNamespace(
        noise=lambda numbers, seed: None, make=render, about={}))


if __name__ == "__main__":
    cli(main)
