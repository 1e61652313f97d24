"""A listening page: one self-contained file of the clips in folders that sample.py wrote.

    python -m extras.listen samples                         # players and spectrograms
    python -m extras.listen ours theirs --blind             # a listening test (the paper's app. B)
"""
import base64
import io
import json
from pathlib import Path

import soundfile

from data import Parser, cli, replace_text, require
from extras.audio import read_file
from sample import read_manifest


def embed(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def embed_clip(path, blind):
    """What the page has of a clip: FLAC, which browsers play, its seconds, and its picture."""
    (sound, rate), flac = read_file(path), io.BytesIO()
    soundfile.write(flac, sound, rate, format="FLAC")
    return {"sound": embed(flac.getvalue(), "audio/flac"), "seconds": len(sound) / rate,
            "png": None if blind else embed(path.with_suffix(".png").read_bytes(), "image/png")}


def page_data(folders, blind):
    """What the page shows: systems are folders, a row is a (prompt, seed, clip)."""
    names, rows = [Path(folder).resolve().name for folder in folders], {}
    require(len(set(names)) == len(names), "two folders have the same name, which names the "
            f"system: {', '.join(names)}; rename one")
    for column, folder in enumerate(folders):
        clips = read_manifest(folder)
        require(clips, f"{folder}: holds no manifest.json of sample.py")
        for clip in clips:
            row = rows.setdefault((clip["prompt"], clip["seed"], clip["k"]), {})
            row[column] = embed_clip(Path(folder) / clip["file"], blind)
    return {"blind": blind, "systems": names,
            "rows": [{"prompt": prompt, "seed": seed, "k": k, "clips": clips}
                     for (prompt, seed, k), clips in rows.items()]}


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="of sample.py: one for each system")
    p.add_argument("--blind", action="store_true", help="a test: systems and order hidden")
    p.add_argument("--intro", default="", help="what the page says first")
    p.add_argument("--out", help="file to write; default: listen.html in the first folder")
    args = p.parse_args(argv)
    out = Path(args.out or Path(args.folders[0]) / "listen.html")
    template = Path(__file__).with_name("listen.html").read_text("utf-8")
    known = json.dumps({"intro": args.intro, **page_data(args.folders, args.blind)})
    known = known.replace("<", "\\u003c")               # no </script> inside
    replace_text(out, template.replace("/*DATA*/", known))
    print(out)


if __name__ == "__main__":
    cli(main)
