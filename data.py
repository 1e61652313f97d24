"""Captions in, and everything random about a training sample as a function of (seed, its number).

So there is no state to save: sample n of a run has the same caption, noise and timesteps however
the batch is split over micro-batches and processes, and whether or not the run was interrupted.
"""
import csv
import functools
import io
import json
import re
from pathlib import Path

import numpy as np
import torch

from extras.cli import InputError

# ---- captions ----------------------------------------------------------------------------------

NAMES = ("caption", "captions", "text", "prompt", "description", "sentence")  # first match wins


def read_rows(path):
    """Read the rows of a .csv, .tsv, .txt, .json or .jsonl file: dicts, or strings for bare text.

    A .json file holds a list, an object with a list in it such as {"data": [...]}, or JSON lines.
    Raises InputError where the file is missing, not UTF-8 or not what its ending says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; pass a .csv, .tsv, .txt, .json or .jsonl file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[:e.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8; convert it (iconv -t utf-8)")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(10 ** 9)
        delimiter = "\t" if kind == ".tsv" else ","
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    if kind == ".txt":
        return text.splitlines()
    if kind in (".json", ".jsonl"):
        return json_rows(path, text)
    raise InputError(f"{path}: unknown ending {kind!r}; use .csv, .tsv, .txt, .json or .jsonl")


def json_rows(path, text):
    """Decode one JSON document, or JSON lines."""
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
    whole = values[0] if len(values) == 1 else None
    if isinstance(whole, dict) and path.suffix == ".json" and not caption_columns(tuple(whole)):
        whole = next((v for v in whole.values() if isinstance(v, list)), None)  # {"data": [...]}
    return whole if isinstance(whole, list) else values


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
    rows, found = read_rows(path), []
    for n, row in enumerate(rows, 1):
        if isinstance(row, dict):
            columns = [column] if column else caption_columns(tuple(row))
            if not columns or columns[0] not in row:
                looked_for = repr(column) if column else "named like " + ", ".join(NAMES)
                raise InputError(f"{path}: row {n} has no column {looked_for}; it has "
                                 f"{', '.join(map(str, row))}; say which with --caption_column")
            row = [row[name] for name in columns]
        cells = row if isinstance(row, list) else [row]
        cells = [c for cell in cells for c in (cell if isinstance(cell, list) else [cell])]
        found += [" ".join(c.split()) if isinstance(c, str) else "" for c in cells]
    captions = list(dict.fromkeys(filter(None, found)))
    if not captions:
        raise InputError(f"{path}: holds no caption ({len(rows)} rows read)")
    empty = found.count("")
    counts = {"rows": len(rows), "empty": empty, "duplicates": len(found) - empty - len(captions)}
    return captions[:limit], counts


# ---- randomness --------------------------------------------------------------------------------

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
