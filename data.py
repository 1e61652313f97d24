"""Captions in, and everything random about a training sample: a function of (seed, number of the sample).

No state to save: sample n of a run has the same caption, noise and timesteps however the batch is split over
micro-batches and processes, and whether or not the run was interrupted before it.
"""
import csv
import functools
import io
import json
import os
from pathlib import Path

import numpy as np
import torch


class InputError(SystemExit):
    """Something the user gave is wrong. Left alone, it ends the program with its one line and exit code 1."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def read_json(path):
    """The content of a JSON file; InputError where it is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: is not JSON ({e})")


def write(path, save):
    """save(temporary path), then rename: `path` is the old file or the new one, whole, if the program is killed."""
    temporary = Path(f"{path}.tmp")
    try:
        save(temporary)
        os.chmod(temporary, 0o644)                      # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    except Exception as e:                              # a full disk is an OSError, RuntimeError or SafetensorError
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: not saved ({str(e).strip()[:120]}); is the disk full? What was there before is whole")


NAMES = ("caption", "captions", "text", "prompt", "description", "sentence")      # usual column names, first match wins


def read_captions(path, column=None, limit=None):
    """Read captions from a .csv, .tsv, .txt (a caption a line), .json or .jsonl file.

    column: the column or key; by default one of NAMES, or all of caption_1, caption_2, ... limit: keep the first so many.
    Returns (distinct captions in file order, {"rows", "empty", "duplicates", "columns"}).
    Raises InputError, naming file and row, where the file is missing, empty, not UTF-8 or lacks the column.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; pass --captions FILE (.csv, .tsv, .txt, .json, .jsonl)")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: line {data[:e.start].count(10) + 1} is not UTF-8; convert it (iconv -t utf-8)")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(10 ** 9)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
        header = next(reader, [])
        columns = pick_columns(path, header, column)
        at = [header.index(c) for c in columns]
        rows = [[row[i] if i < len(row) else "" for i in at] for row in reader if row]
    elif kind == ".txt":
        columns, rows = [], [[line] for line in text.splitlines()]
    elif kind in (".json", ".jsonl"):
        columns, rows = json_rows(path, text, kind, column)
    else:
        raise InputError(f"{path}: unknown kind of file {kind or '(no ending)'!r}; use .csv, .tsv, .txt, .json or .jsonl")
    found = [" ".join(c.split()) for row in rows for c in row]
    captions = list(dict.fromkeys(c for c in found if c))
    if not captions:
        raise InputError(f"{path}: holds no caption ({len(rows)} rows read)")
    empty = found.count("")
    report = {"rows": len(rows), "empty": empty, "duplicates": len(found) - empty - len(captions), "columns": columns}
    return captions[:limit], report


def pick_columns(path, header, column):
    """Names of the columns that hold captions: the given one, one of NAMES, or caption_1, caption_2, ..."""
    if column:
        if column not in header:
            raise InputError(f"{path}: has no column {column!r}; its columns: {', '.join(map(str, header))}")
        return [column]
    numbered = [h for h in header if h.lower().rstrip("0123456789").rstrip("_") == "caption" and h[-1:].isdigit()]
    named = [h for name in NAMES for h in header if h.lower() == name]
    if not named and not numbered:
        raise InputError(f"{path}: no column named like {', '.join(NAMES)}; its columns: {', '.join(map(str, header))}; "
                         "say which with --caption_column")
    return numbered or named[:1]


def json_rows(path, text, kind, column):
    """Captions of a JSON list, an object of lists, or JSON lines; items are strings or objects with a caption key."""
    if kind == ".json":
        try:
            items = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"{path}: line {e.lineno} is not JSON ({e.msg})")
        if isinstance(items, dict):                     # {"captions": [...]}, or AudioCaps-like {"data": [{...}]}
            items = next((v for v in items.values() if isinstance(v, list)), [])
        items = items if isinstance(items, list) else []
    else:
        items = []
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    items.append(json.loads(line))
                except json.JSONDecodeError as e:
                    raise InputError(f"{path}: line {n} is not JSON ({e.msg})")
    rows, columns = [], []
    for n, item in enumerate(items, 1):
        if isinstance(item, dict):
            if not all(c in item for c in columns) or not columns:
                columns = pick_columns(f"{path}: item {n}", list(item), column)
            item = [c for k in columns for c in (item[k] if isinstance(item[k], list) else [item[k]])]
        rows.append([c if isinstance(c, str) else "" for c in (item if isinstance(item, list) else [item])])
    return columns, rows


@functools.lru_cache(2)
def order(count, seed, epoch):
    """The order of captions in an epoch: a permutation of range(count)."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def caption_at(captions, seed, n):
    """The caption of sample n of a run."""
    epoch, i = divmod(n, len(captions))
    return captions[order(len(captions), seed, epoch)[i]]


def draw_sample(seed, n, shape, t_min, t_max, T):
    """The random numbers of sample n: noises z_T, eps, eps_lora of `shape`, timesteps t, t_lora, and u in [0, 1).

    t is uniform in [t_min, t_max), as SwiftBrush has it; t_lora, of eq. 8, in [0, T].
    """
    rng = np.random.default_rng((seed, 1, n))
    noises = rng.standard_normal((3, *shape), dtype=np.float32)
    return (*noises, rng.integers(t_min, t_max), rng.integers(0, T + 1), rng.random(1, dtype=np.float32)[0])


def draw_batch(numbers, *args):
    """draw_sample for several samples, stacked into tensors."""
    return [torch.from_numpy(np.stack(column)) for column in zip(*(draw_sample(args[0], n, *args[1:]) for n in numbers))]


def sampling_noise(seed, k, shape):
    """z_T of clip k under a seed, whatever the prompt and the batch: one seed gives several prompts the same noise."""
    return torch.from_numpy(np.random.default_rng((seed, 2, k)).standard_normal(shape, dtype=np.float32))
