"""Make more captions out of a file's own: exchange what stands after a joining word.

    python -m extras.recombine audiocaps.csv --number 100000 --out more.csv
    python train.py --captions more.csv

From "a dog barks while rain falls" and "a cat meows while a bell rings" it makes "a dog barks while
a bell rings". A student learns from its teacher what it is asked for, and asking costs no audio
(what that gains and costs: docs/RESULTS.md). --out holds the file's captions and the new ones, none
twice; --exclude keeps out the test's, word for word.
"""
import csv
import io
import re
from pathlib import Path

import numpy as np

from data import read_captions
from extras.cli import InputError, Parser, number, replace_text, run

# not at "such as" or "as well as"
AS = r"(?<!such )(?<!well )as(?! well)"
CUT = re.compile(rf"(.+?) (followed by|and then|while|then|and|with|{AS}) (.+)")


def recombine(captions, number, seed=0, exclude=()):
    """Draw `number` captions that are neither in `captions` nor in `exclude`: a list.

    Each caption is cut at its first joining word; a beginning and an end that had the same word
    are joined by it. InputError where the captions do not yield so many.
    """
    cuts = [cut.groups() for cut in map(CUT.fullmatch, captions) if cut]
    ends = {}
    for _, word, after in cuts:
        ends.setdefault(word, []).append(after)
    rng, taken, new = np.random.default_rng(seed), {*captions, *exclude}, {}
    for _ in range(20 * number if cuts else 0):
        before, word, _ = cuts[rng.integers(len(cuts))]
        caption = f"{before} {word} {ends[word][rng.integers(len(ends[word]))]}"
        if caption not in taken:
            new[caption] = None
        if len(new) == number:
            return list(new)
    raise InputError(f"--number {number}: {len(new)} new captions were found, from "
                     f"{len(cuts)} that have a joining word such as \"while\"; ask for fewer")


def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("captions", help="csv, tsv, txt, json or jsonl file")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--number", type=number(int, 1), default=20000, help="of new captions")
    add("--exclude", nargs="*", default=[],
        help="files of captions that are not to come out, such as the test's")
    add("--out", type=Path, default=Path("more.csv"), help="csv file to write")
    add("--seed", type=number(int), default=0, help="of what is drawn")
    args = p.parse_args(argv)
    if args.out.suffix != ".csv":
        raise InputError(f"--out {args.out}: must end in .csv")
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists; choose another name or remove it")
    captions, _ = read_captions(args.captions, args.caption_column)
    exclude = [caption for path in args.exclude for caption in read_captions(path)[0]]
    captions += recombine(captions, args.number, args.seed, exclude)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["caption"], *([c] for c in captions)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.out, text.getvalue())
    print(f"{args.out}: {len(captions)} captions, {args.number} of them new, such as "
          f"{captions[-1]!r}")


if __name__ == "__main__":
    run(main)
