"""Captions in, everything random about a training sample, and what all commands share.

Sample n of a run has the same caption, noise and timesteps however the batch is split over
micro-batches and processes, interrupted or not: all of it is a function of (seed, n).
"""
import argparse
import contextlib
import csv
import functools
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ---- what all commands share: errors of one line, flags with bounds, files that are whole --------

class InputError(Exception):
    """Something the user gave is wrong; the message is one line that says what to do."""


def require(fine, message):
    """InputError with this message, unless all is fine."""
    if not fine:
        raise InputError(message)


def cli(main):
    """Run a command: what is wrong with its input or the files ends it in one line, exit code 1.

    torchrun's process group is destroyed here, once main() has freed its networks: a DDP that is
    the last to hold it can deadlock (docs/LOG.md, 2026-11-21). main may return an exit code.
    """
    for stream in sys.stdout, sys.stderr:               # a terminal may lack the prompt's letters
        stream.reconfigure(errors="replace")
    try:
        code = main()
    except (InputError, OSError, torch.OutOfMemoryError) as e:
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.barrier()                                  # none leaves while another still saves
        dist.destroy_process_group()
    if code:
        sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and complains in one line."""

    def __init__(self, description, **kw):
        wide = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=32)
        super().__init__(description=description.split("\n\n")[0], formatter_class=wide,
                         allow_abbrev=False, **kw)

    def format_help(self):
        return re.sub(r"\s+\(default:\s+(None|False|\[\])\)", "", super().format_help())

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def number(kind, low=0, high=1e38):
    """Return an argparse type: an int or a float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be between {low} and {high:g}")
        return value

    parse.__name__ = kind.__name__                      # argparse names it in "invalid int value"
    return parse


def read_json(path):
    """Read a JSON file; InputError where it is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: is not JSON ({e})")


def replace_file(path, save):
    """Call save(temporary path), then rename: a killed program leaves the old file or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        save(temporary)
        temporary.chmod(0o644)                          # safetensors leaves files private
        temporary.replace(path)
    except Exception as e:                              # each library has its own error
        reason = " ".join(str(e).split())[:200]
        with contextlib.suppress(OSError):              # no such folder, or another user's file
            if shutil.disk_usage(temporary.parent).free < 2**20:
                reason = "the disk is full"
            temporary.unlink()
        raise InputError(f"{path}: not saved ({reason}). What was there before is intact")


def replace_text(path, text):
    """replace_file() for text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- captions ------------------------------------------------------------------------------------

NAMES = ("caption", "captions", "text", "prompt", "description", "sentence")  # first match wins
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "eval", "evaluation"}


def read_rows(path, column=None):
    """Rows of a .csv, .tsv, .txt, .json or .jsonl file: dicts, or strings where text is bare."""
    path = Path(path)
    kind, known = path.suffix.lower(), ".csv, .tsv, .txt, .json or .jsonl"
    require(path.is_file(), f"{path}: no such file; pass a {known} file")
    require(kind in known.replace(",", "").split(), f"{path}: unknown ending {kind!r}; use {known}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[:e.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; convert it (iconv -t utf-8)")
    if kind in (".csv", ".tsv"):
        return csv_rows(path, text, "\t" if kind == ".tsv" else ",")
    return text.rstrip("\n").split("\n") if kind == ".txt" else json_rows(path, text, column)


def csv_rows(path, text, delimiter):
    """Decode a table with a header; InputError where cells or quotes do not add up."""
    rows = []
    try:
        for cells in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True,
                                skipinitialspace=True):
            rows += [cells] if cells else []
    except csv.Error as e:
        raise InputError(f"{path}: row {len(rows)}: a quote is misplaced or not closed ({e})")
    names, *rows = rows or [[]]
    others = [c for c in ";\t|," if len(names) == 1 and c in names[0]]
    require(not others, f"{path}: its columns are separated by {''.join(others)!r}, where a "
            f"{path.suffix} has {delimiter!r}; convert it")
    require(not any(n and names.count(n) > 1 for n in names), f"{path}: one name twice: {names}")
    for n, cells in enumerate(rows, 1):
        require(len(cells) <= len(names), f"{path}: row {n} has {len(cells)} cells, the header "
                f"{len(names)}; put quotes around text that holds {delimiter!r}")
    return [dict(zip(names, cells + [None] * len(names))) for cells in rows]


def json_rows(path, text, column):
    """Decode JSON lines, or a list, an object of captions by id, or one with such a list in it."""
    values, at, text, decode = [], 0, text.strip(), json.JSONDecoder().raw_decode
    try:
        while at < len(text):
            value, at = decode(text, at)
            values.append(value)
            at = json.decoder.WHITESPACE.match(text, at).end()
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: line {e.lineno} is not JSON ({e.msg})")
    whole = values[0] if len(values) == 1 else None
    if not isinstance(whole, dict) or path.suffix.lower() != ".json":
        return whole if isinstance(whole, list) else values
    lists = [k for k, rows in whole.items() if isinstance(rows, list) and any(
        isinstance(row, dict) and (column in row or caption_columns(row)) for row in rows)]
    if not lists and (column in whole or caption_columns(whole)):
        return values                                   # one row
    lists = lists or [k for k in whole if k.lower() in SPLITS]
    require(len(lists) < 2, f"{path}: holds captions in each of {', '.join(lists[:9])}; write the "
                            "one to use to a file of its own")
    by_id = [whole[k] for k in lists or whole]
    rows = [v for v in by_id if isinstance(v, dict)] if list not in map(type, by_id) else []
    return flat(rows or [v for v in by_id if isinstance(v, (list, str))])


def flat(values):
    """The values, with the members of a list in its place."""
    return [x for v in values for x in (v if isinstance(v, list) else [v])]


def caption_columns(names):
    """Which of a row's keys hold captions: one of NAMES, or all of caption_1, caption_2, ..."""
    known = {str(name).lower(): name for name in names}
    numbered = [name for key, name in known.items() if re.fullmatch(r"captions?_?\d+", key)]
    return numbered or [known[key] for key in NAMES if key in known][:1]


def read_captions(path, column=None, limit=None):
    """Read the distinct captions of a file, in its order, and count what was left out.

    column: their column or key. limit: keep the first `limit`. InputError names file and row.
    """
    rows, found = read_rows(path, column), []
    for n, row in enumerate(rows, 1):
        if isinstance(row, dict):
            columns = [column] if column else caption_columns(row)
            require(columns and columns[0] in row, f"{path}: row {n} has {list(row)} "
                    f"but no {column or 'caption'!r}; rename one, or train with --caption_column")
            row = [row[name] for name in columns]
        found += [" ".join(c.split()) if isinstance(c, str) else "" for c in flat(flat([row]))]
    full = [caption for caption in found if caption]
    captions = list(dict.fromkeys(full))
    require(captions, f"{path}: holds no caption ({len(rows)} rows read)")
    return captions[:limit], {"rows": len(rows), "empty": len(found) - len(full),
                              "duplicates": len(full) - len(captions)}


# ---- randomness ----------------------------------------------------------------------------------

@functools.lru_cache(2)
def order(count, seed, epoch):
    """The order of captions in an epoch: a permutation of range(count)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def caption_at(captions, seed, n):
    """The caption of sample n of a run: every caption once before any comes again."""
    epoch, i = divmod(n, len(captions))
    return captions[order(len(captions), seed, epoch)[i]]


def draw_batch(numbers, seed, shape, t_min, t_max, T):
    """Draw the random numbers of samples of a run: a tensor (B, ...) of each.

    z_T, eps, eps_lora of `shape`; t uniform in [t_min, t_max) for eq. 3 (SwiftBrush's range by
    default); t_lora uniform in [0, T] for eq. 8; u in [0, 1), which drops the caption.
    """
    generators = [np.random.default_rng((seed, 1, n)) for n in numbers]
    rows = [(*rng.standard_normal((3, *shape), dtype=np.float32), rng.integers(t_min, t_max),
             rng.integers(0, T + 1), rng.random(1, dtype=np.float32)[0]) for rng in generators]
    return [torch.from_numpy(np.stack(column)) for column in zip(*rows)]


def sampling_noise(numbers, seed, shape):
    """z_T (B, *shape) of clips with these numbers: one seed gives all prompts the same noise."""
    rows = [np.random.default_rng((seed, 2, k)).standard_normal(shape, np.float32) for k in numbers]
    return torch.from_numpy(np.stack(rows))
