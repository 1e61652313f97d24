"""Real audio of held-out captions, written as sample.py writes a system's clips.

    python -m tiny.listen --prompts docs/listen.txt --out "out_listen/real audio"

To hear it beside teacher and students: extras.listen. The tiny world's real audio is its synthesis.
"""
from types import SimpleNamespace

import numpy as np

from data import Parser, cli, number, require
from sample import read_prompts, write_clips
from tiny import world
from tiny.score import FLOOR, held_out, real


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--prompts", required=True, help="file of captions of tiny.world's held-out lists")
    add("--out", default="samples", help="folder for WAV, PNG and manifest.json")
    add("--seed", type=number(int), default=0, help="of what the words leave open")
    add("--overwrite", action="store_true", help="replace files that exist")
    p.set_defaults(prompt=[], n=1, batch_size=64)
    args = p.parse_args(argv)
    prompts, clips = read_prompts(args), len(world.KINDS["all"])
    known = {row[1]: row for name in world.LISTS for row in held_out(clips, name)}
    for prompt in prompts:
        require(prompt in known, f"{args.prompts}: {prompt!r} is no held-out caption")

    def render(captions, _):
        rows, seed = [known[caption] for caption in captions], FLOOR + args.seed
        wavs = [world.render(np.random.default_rng((seed, n)), events, join)[0]
                for n, _, events, join in rows]
        return real(rows, seed), np.stack(wavs)

    write_clips(args, prompts, lambda: SimpleNamespace(
        noise=lambda numbers, seed: None, make=render, about={}))


if __name__ == "__main__":
    cli(main)
