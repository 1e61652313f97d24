"""Write README.md into a student's folder, the model card that a hub shows.

    python -m extras.publish out/student
"""
import re
import shlex
from pathlib import Path

from data import Parser, cli, read_json, replace_text, require
from model import small_parts
from train import public


def write_card(folder, metrics=None):
    """Write README.md beside a student's swiftaudio.json; without metrics, keep those it has."""
    path, about = Path(folder) / "README.md", read_json(Path(folder) / "swiftaudio.json")
    require({"teacher", "step"} <= set(about), f"{folder}: is no student of train.py")
    card = path.read_text("utf-8", "replace") if path.exists() else ""
    require(not card or "made with SwiftAudio" in card, f"{path}: would be replaced; move it away")
    if metrics is None and f", {about['step']} steps\n" in card:       # this very student's
        metrics = card.partition("- Metrics: ")[2].strip()
    name = public(about["teacher"]).removeprefix("./")
    command = shlex.join(map(public, shlex.split(about.get("command", "python train.py"))))
    small = " and ".join(small_parts(Path(folder)))
    licence = "cc-by-nc-sa-4.0" if re.search("auffusion|swiftaudio", name.lower()) else "other"
    template = Path(__file__).with_name("card.md").read_text("utf-8")
    replace_text(path, template.format(
        licence="mit" if name == "tiny" else licence, teacher=name, step=about["step"],
        base=f"base_model: {name}\n" if "/" in name else "", command=command,
        decoder=f"- Small {small}: `--decoder fast`\n" if small else "",
        metrics=metrics or "not measured; see extras/eval.py"))
    return path


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("folder", help="of a student")
    print(write_card(p.parse_args(argv).folder))


if __name__ == "__main__":
    cli(main)
