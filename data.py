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
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout


# ---- what all commands share: errors of one line, flags with bounds, files that are whole --------
class InputError(Exception):
    """Something the user gave is wrong; the message is one line that says what to do."""


def require(fine, message):
    """InputError with this message, unless all is fine."""
    if not fine:
        raise InputError(message)


class Display:
    """A standard stream that drops what cannot be shown: a closed pipe or terminal, a full log."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")   # None: closed before the start
        self.stream.reconfigure(errors="replace")       # a terminal may lack the prompt's letters

    def write(self, *text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(*text) if text else self.stream.flush()

    flush = write

    def __getattr__(self, name):
        return getattr(self.stream, name)


def cli(main):
    """Run a command: what is wrong with its input or the files ends it in one line, exit code 1."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is getattr(sys, f"__{name}__"):           # a notebook has its own
            setattr(sys, name, Display(getattr(sys, name)))
    try:
        code = main()
    except (InputError, OSError, torch.OutOfMemoryError) as e:
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    if torch.distributed.is_initialized():
        # none leaves while another saves; a DDP that is the last to hold the group can deadlock
        torch.distributed.barrier()                     # (docs/LOG.md, 2026-11-21)
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and complains in one line."""

    def __init__(self, description, **kw):
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kw)

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
    temporary = Path(f"{path}.{os.urandom(4).hex()}.tmp")       # as two programs may write one file
    try:
        save(temporary)
        try:
            temporary.replace(path)
        except OSError:                                 # a virus scanner, a network drive: again
            time.sleep(1)
            temporary.replace(path)
    except Exception as e:                              # each library has its own error
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: not saved, kept as it was ({' '.join(str(e).split())[:200]})")


def replace_text(path, text):
    """replace_file() for text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def locked(path, wait=True):
    """For `with`: let one process at a time write here; without locks on the file system, any."""
    lock = FileLock(f"{path}.lock", timeout=-1 if wait else 0, is_singleton=True)
    try:
        return lock.acquire()
    except Timeout:
        raise InputError(f"{path.parent}: another process writes there; choose another folder")
    except (OSError, NotImplementedError):              # as of some clusters
        return contextlib.nullcontext()


# ---- captions ------------------------------------------------------------------------------------
NAMES = ("caption", "captions", "text", "prompt", "description", "sentence")  # first match wins


def read_rows(path, column=None):
    """Rows of a .csv, .tsv, .txt, .json or .jsonl file: dicts, or strings where text is bare.

    None stands for a row of a table that is not whole: too few cells, or the header again.
    """
    path = Path(path)
    kind, known = path.suffix.lower(), ".csv, .tsv, .txt, .json or .jsonl"
    require(kind in known.replace(",", "").split(), f"{path}: unknown ending {kind!r}; use {known}")
    try:
        text = path.read_text("utf-8").replace("\ufeff", "")   # a BOM, or one of each file in `cat`
    except UnicodeDecodeError as e:
        line = e.object[:e.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; convert it (iconv -t utf-8)")
    require("\0" not in text, f"{path}: holds NUL bytes; it is no text")
    if kind in (".csv", ".tsv"):
        return csv_rows(path, text, "\t" if kind == ".tsv" else ",")
    return text.rstrip("\n").split("\n") if kind == ".txt" else json_rows(path, text, column)


def csv_rows(path, text, delimiter):
    """Decode a table with a header; InputError where cells or quotes do not add up."""
    table, rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True,
                                 skipinitialspace=True), []
    try:
        rows.extend(table)
    except csv.Error as e:
        raise InputError(f"{path}: row {len(rows) + 1}: a quote is misplaced or not closed ({e})")
    names = table.fieldnames or []
    require(len(set(names)) == len(names), f"{path}: one name twice: {names}")
    for n, row in enumerate(rows, 1):
        require(None not in row, f"{path}: row {n} has more cells than the header, {len(names)}; "
                f"put quotes around text that holds {delimiter!r}")
    return [None if None in row.values() or [*row.values()] == names else row for row in rows]


def json_rows(path, text, column):
    """Decode JSON lines, a list, or an object: a row, or with one list of rows in it."""
    values, at, decode, space = [], 0, json.JSONDecoder().raw_decode, re.compile(r"\s*")
    try:
        while (at := space.match(text, at).end()) < len(text):
            value, at = decode(text, at)
            values.append(value)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: line {e.lineno} is not JSON ({e.msg})")
    whole = values[0] if len(values) == 1 else None
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or path.suffix.lower() == ".jsonl":
        return values
    lists = [name for name, rows in whole.items() if isinstance(rows, list) and any(
        isinstance(row, dict) and (column in row or caption_columns(row)) for row in rows)]
    require(len(lists) < 2, f"{path}: holds captions in each of {', '.join(lists[:9])}; write the "
            "one to use to a file of its own")
    return whole[lists[0]] if lists else values


def caption_columns(row):
    """Which of a row's keys hold captions: one of NAMES, or all of caption_1, caption_2, ..."""
    known = {str(name).strip().lower(): name for name in row}
    numbered = [name for key, name in known.items() if re.fullmatch(r"captions?_?\d+", key)]
    return numbered or [known[key] for key in NAMES if key in known][:1]


def row_captions(row, where, column=None):
    """The captions of a row of read_rows(), "" where a cell holds none; where: for InputError."""
    if isinstance(row, dict):
        columns = [column] if column else caption_columns(row)
        require(columns and columns[0] in row, f"{where} has {list(row)[:20]} but no "
                f"{column or 'caption'!r}; rename one, or train with --caption_column")
        cells = [c for name in columns for c in (
            row[name] if isinstance(row[name], list) else [row[name]])]
    else:
        cells = [row]
        require(isinstance(row, str), f"{where} is no caption, but {json.dumps(row)[:60]}")
    found = [" ".join(c.split()) if isinstance(c, str) else "" for c in cells]
    for caption in found:
        require(not re.fullmatch(r"""\[\s*(['"].*['"]\s*)?\]""", caption), f"{where} holds a list "
                f"as text, {caption[:60]}; write each caption to a row or a column of its own")
    return found


def read_captions(path, column=None, limit=None):
    """Read a file's distinct captions, the first `limit`, in its order; count what is left out."""
    rows = read_rows(path, column)
    found = [caption for n, row in enumerate(rows, 1) if row is not None
             for caption in row_captions(row, f"{path}: row {n}", column)]
    captions = list(dict.fromkeys(filter(None, found)))
    require(captions, f"{path}: holds no caption ({len(rows)} rows read)")
    empty = found.count("")
    return captions[:limit], {"rows": len(rows), "not whole": rows.count(None), "empty": empty,
                              "duplicates": len(found) - empty - len(captions)}


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

    z_T, eps, eps_lora of `shape`; uniform t in [t_min, t_max) for eq. 3 (SwiftBrush's range),
    t_lora in [0, T] for eq. 8, u in [0, 1), which drops the caption.
    """
    generators = [np.random.default_rng((seed, 1, n)) for n in numbers]
    rows = [(*rng.standard_normal((3, *shape), dtype=np.float32), rng.integers(t_min, t_max),
             rng.integers(0, T + 1), rng.random(1, dtype=np.float32)[0]) for rng in generators]
    return [torch.from_numpy(np.stack(column)) for column in zip(*rows)]


def sampling_noise(numbers, seed, shape):
    """z_T (B, *shape) of clips with these numbers: one seed gives all prompts the same noise."""
    rows = [np.random.default_rng((seed, 2, k)).standard_normal(shape, np.float32) for k in numbers]
    return torch.from_numpy(np.stack(rows))
