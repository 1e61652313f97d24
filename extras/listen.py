"""Listening pages: one self-contained file of the clips in folders that sample.py wrote."""
import base64
import json
from pathlib import Path

import soundfile

from extras.cli import InputError, read_json, replace_text


def read_manifest(folder):
    """The rows of a folder's manifest.json, or [] where there is none."""
    path = Path(folder) / "manifest.json"
    rows = read_json(path) if path.exists() else []
    known = {"file", "prompt", "seed", "k"}
    if not isinstance(rows, list) or not all(known <= set(row) for row in rows):
        raise InputError(f"{path}: is not sample.py's; choose another folder")
    return rows


def check_folders(out, beside):
    """InputError where the folders to show beside `out` lack a clip, or two have the same name."""
    for folder in map(Path, beside):
        clips = read_manifest(folder)
        if not clips:
            raise InputError(f"{folder}: holds no manifest.json of sample.py")
        for clip in clips:
            for ending in (".wav", ".png"):
                path = (folder / clip["file"]).with_suffix(ending)
                if not path.exists():
                    raise InputError(f"{path}: is missing, though the manifest lists it; make it "
                                     "again")
    names = [Path(folder).resolve().name for folder in (out, *beside)]
    if len(set(names)) < len(names):
        raise InputError("--beside: two folders, --out's included, have the same name, which "
                         "names the system; rename one")


def page_data(folders, blind):
    """What the page shows: systems are folders, a row is a (prompt, seed, clip)."""
    def embed(path, kind):
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    rows = {}
    for column, folder in enumerate(folders):
        for clip in read_manifest(folder):
            wav = Path(folder) / clip["file"]
            row = rows.setdefault((clip["prompt"], clip["seed"], clip["k"]), {})
            row[column] = {"wav": embed(wav, "audio/wav"), "seconds": soundfile.info(wav).duration,
                           "png": None if blind else embed(wav.with_suffix(".png"), "image/png")}
    return {"blind": blind, "systems": [Path(folder).resolve().name for folder in folders],
            "rows": [{"prompt": prompt, "seed": seed, "k": k, "clips": clips}
                     for (prompt, seed, k), clips in rows.items()]}


def write_page(path, folders, blind):
    """Write a page of players and spectrograms, or a blind listening test (the paper's app. B)."""
    check_folders(folders[0], folders[1:])
    template = Path(__file__).with_name("listen.html").read_text("utf-8")
    known = json.dumps(page_data(folders, blind)).replace("<", "\\u003c")   # no </script> inside
    replace_text(path, template.replace("/*DATA*/", known))
