"""Captions in, everything random about a training sample, and what all commands share.

Sample n of a run has the same caption, noise and timesteps however the batch is split over
micro-batches and processes, and whether or not the run was interrupted: all of it is a function
of (seed, n), so there is no state to save.
"""
import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
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
    """Run a command: what the user gave wrong, or the file system refuses, ends it in one line.

    main may return an exit code. torchrun's process group is destroyed here, once main() has freed
    its networks: a DDP that is the last to hold it can deadlock (docs/LOG.md, 2026-11-21).
    """
    for stream in sys.stdout, sys.stderr:               # a terminal may lack the prompt's letters
        stream.reconfigure(errors="replace")
    try:
        code = main()
    except (InputError, OSError) as e:
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.barrier()                                  # none leaves while another still saves
        dist.destroy_process_group()
    if code:
        sys.exit(code)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the defaults that say something."""

    def _get_help_string(self, action):
        empty = str(action.default) in ("None", "False", "[]")
        return action.help if empty else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and complains in one line."""

    def __init__(self, description, **kw):
        wide = functools.partial(HelpFormatter, max_help_position=32)
        super().__init__(description=description.split("\n\n")[0], formatter_class=wide,
                         allow_abbrev=False, **kw)

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def number(kind, low=0, high=math.inf):
    """Return an argparse type: an int or a float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            finite = "" if math.isfinite(value) else " and finite"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}{finite}")
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
        os.chmod(temporary, 0o644)                      # safetensors leaves files private
        os.replace(temporary, path)
    except Exception as e:                              # each library has its own error
        folder, full = Path(path).parent, ""
        if folder.is_dir() and shutil.disk_usage(folder).free < 2**20:
            full = "; the disk is full"
        with contextlib.suppress(OSError):              # it may be another user's
            temporary.unlink()
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: not saved ({reason}){full}. What was there before is intact")


def replace_text(path, text):
    """replace_file() for text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---- captions ------------------------------------------------------------------------------------

NAMES = ("caption", "captions", "text", "prompt", "description", "sentence")  # first match wins
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "eval", "evaluation"}


def read_rows(path, column=None):
    """Read the rows of a .csv, .tsv, .txt, .json or .jsonl file: dicts, or strings for bare text.

    Raises InputError where the file is missing, not UTF-8 or not what its ending says.
    """
    path = Path(path)
    kind, known = path.suffix.lower(), ".csv, .tsv, .txt, .json or .jsonl"
    require(path.is_file(), f"{path}: no such file; pass a {known} file")
    require(kind in known.replace(",", "").split(), f"{path}: unknown ending {kind!r}; use {known}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[:e.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; convert it (iconv -t utf-8)")
    if kind in (".csv", ".tsv"):
        return csv_rows(path, text, "\t" if kind == ".tsv" else ",")
    return text.rstrip("\n").split("\n") if kind == ".txt" else json_rows(path, text, column)


def csv_rows(path, text, delimiter):
    """Decode a table with a header; InputError where cells or quotes do not add up."""
    csv.field_size_limit(10 ** 9)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, rows = [], []
    try:
        for cells in filter(None, table):
            header = header or cells
            others = [c for c in ";\t|," if len(header) == 1 and c in header[0]]
            require(not others, f"{path}: its columns are separated by {''.join(others)!r}, where "
                                f"a {path.suffix} has {delimiter!r}; convert it")
            require(len(cells) <= len(header), f"{path}: row {len(rows)} has {len(cells)} cells, "
                    f"the header {len(header)}; put quotes around text that holds {delimiter!r}")
            rows.append(dict(itertools.zip_longest(header, cells)))
    except csv.Error as e:
        raise InputError(f"{path}: row {len(rows)}: a quote is opened and not closed ({e})")
    return rows[1:]


def json_rows(path, text, column):
    """Decode one JSON document, or JSON lines: the rows that hold captions.

    A document is a list, an object of captions by id, or an object with such a list in it.
    """
    try:
        values = [json.loads(text)]
    except json.JSONDecodeError as whole:
        values = []
        for n, line in enumerate(text.split("\n"), 1):
            try:
                values += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as e:
                n, e = (n, e) if values else (whole.lineno, whole)
                raise InputError(f"{path}: line {n} is not JSON ({e.msg})")

    def captioned(row):
        return isinstance(row, dict) and (column in row or bool(caption_columns(tuple(row))))

    whole = values[0] if len(values) == 1 else None
    if not isinstance(whole, dict) or path.suffix.lower() != ".json":
        return whole if isinstance(whole, list) else values
    tables = {k: v for k, v in whole.items()
              if isinstance(v, list) and any(isinstance(row, dict) for row in v)}
    found = {k: v for k, v in tables.items() if any(map(captioned, v))}
    if captioned(whole) and not found:
        return values                                   # one row
    several = [*found] or [k for k in whole if k.lower() in SPLITS]
    require(len(several) < 2, f"{path}: holds captions in each of {', '.join(several[:9])}; write "
                              "the one to use to a file of its own")
    if tables:
        return next(iter((found or tables).values()))
    by_id = ([v for v in whole.values() if isinstance(v, kind)] for kind in (list, dict, str))
    return next(filter(None, by_id), [])


@functools.lru_cache
def caption_columns(names):
    """Which of a row's keys hold captions: one of NAMES, or all of caption_1, caption_2, ..."""
    numbered = [n for n in names if re.fullmatch(r"captions?_?\d+", str(n).lower())]
    named = [n for name in NAMES for n in names if str(n).lower() == name]
    return numbered or named[:1]


def read_captions(path, column=None, limit=None):
    """Read the distinct captions of a file, in its order, and count what was left out.

    column: their column or key, if its name is unusual. limit: keep the first so many.
    Returns (captions, {"rows", "empty", "duplicates"}). Raises InputError naming file and row.
    """
    rows, found = read_rows(path, column), []
    for n, row in enumerate(rows, 1):
        if isinstance(row, dict):
            columns = [column] if column else caption_columns(tuple(row))
            looked_for = repr(column) if column else "named like " + ", ".join(NAMES)
            require(columns and columns[0] in row, f"{path}: row {n} has no column {looked_for}; "
                    f"it has {', '.join(map(str, row))}; say which with --caption_column")
            row = [row[name] for name in columns]
        cells = row if isinstance(row, list) else [row]
        cells = [c for cell in cells for c in (cell if isinstance(cell, list) else [cell])]
        found += [" ".join(c.split()) if isinstance(c, str) else "" for c in cells]
    captions = list(dict.fromkeys(filter(None, found)))
    require(captions, f"{path}: holds no caption ({len(rows)} rows read)")
    empty = found.count("")
    counts = {"rows": len(rows), "empty": empty, "duplicates": len(found) - empty - len(captions)}
    return captions[:limit], counts


# ---- randomness ----------------------------------------------------------------------------------

@functools.lru_cache(2)
def order(count, seed, epoch):
    """The order of captions in an epoch: a permutation of range(count)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def caption_at(captions, seed, n):
    """The caption of sample n of a run: every caption once before any comes again."""
    epoch, i = divmod(n, len(captions))
    return captions[order(len(captions), seed, epoch)[i]]


def draw_sample(seed, n, shape, t_min, t_max, T):
    """The random numbers of sample n of a run.

    Returns z_T, eps, eps_lora of `shape`; t uniform in [t_min, t_max) for eq. 3 (SwiftBrush's
    range by default); t_lora uniform in [0, T] for eq. 8; u in [0, 1), which drops the caption.
    """
    rng = np.random.default_rng((seed, 1, n))
    noises = rng.standard_normal((3, *shape), dtype=np.float32)
    t, t_lora = rng.integers(t_min, t_max), rng.integers(0, T + 1)
    return (*noises, t, t_lora, rng.random(1, dtype=np.float32)[0])


def draw_batch(numbers, *args):
    """draw_sample() for several samples, stacked into tensors."""
    columns = zip(*(draw_sample(args[0], n, *args[1:]) for n in numbers))
    return [torch.from_numpy(np.stack(column)) for column in columns]


def sampling_noise(numbers, seed, shape):
    """z_T (B, *shape) of clips with these numbers: one seed gives all prompts the same noise."""
    rows = [np.random.default_rng((seed, 2, k)).standard_normal(shape, dtype=np.float32)
            for k in numbers]
    return torch.from_numpy(np.stack(rows))
