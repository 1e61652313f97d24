"""What others see of a student and of a run.

    python -m extras.publish card out/student       # README.md, the model card of a hub
    python -m extras.publish tensorboard out        # events of the run's metrics.jsonl
"""
import re
import shlex
from pathlib import Path

from data import InputError, Parser, cli, read_json, read_rows, replace_text, require
from model import cause

CARD = """---
license: {licence}
{base}pipeline_tag: text-to-audio
---

A one-step text-to-audio student of {teacher}, made with SwiftAudio (arXiv 2606.31259): a clip in
one UNet pass.

- Sample: `python sample.py --student FOLDER --prompt "a dog barks"`
- Trained: `{command}`, {step} steps
- Licence: that of the teacher, of which this is an adaptation
{decoder}- Metrics: {metrics}
"""

# A path, or a flag's, of this machine: its folders are nobody's business, its last name stays.
ABSOLUTE = re.compile(r"^(--\w+=)?(?:/|\w:[/\\]).*?([^/\\]*)[/\\]*$")


def write_card(folder, metrics=None):
    """Write README.md beside a student's swiftaudio.json; without metrics, keep those it has."""
    path, about = Path(folder) / "README.md", read_json(Path(folder) / "swiftaudio.json")
    require({"teacher", "step"} <= set(about), f"{folder}: is no student of train.py")
    card = path.read_text("utf-8", "replace") if path.exists() else ""
    require(not card or "made with SwiftAudio" in card, f"{path}: would be replaced; move it away")
    if metrics is None and f", {about['step']} steps\n" in card:       # this very student's
        metrics = card.rpartition("- Metrics: ")[2].strip()
    name = ABSOLUTE.sub(r"\1\2", about["teacher"]).removeprefix("./")      # of train.public()
    words = shlex.split(about.get("command", "python train.py"))
    small = Path(folder, "decoder/config.json").exists()
    licence = "cc-by-nc-sa-4.0" if re.search("auffusion|swiftaudio", name.lower()) else "other"
    replace_text(path, CARD.format(
        licence="mit" if name == "tiny" else licence, teacher=name, step=about["step"],
        base=f"base_model: {name}\n" if "/" in name else "",
        command=shlex.join(ABSOLUTE.sub(r"\1\2", word) for word in words),
        decoder="- Small decoder: `--decoder fast`\n" if small else "",
        metrics=metrics or "not measured; see extras/eval.py"))
    return path


def write_events(folder):
    """Write the means in a run's metrics.jsonl as TensorBoard's events beside it."""
    lines = read_rows(Path(folder) / "metrics.jsonl")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as e:                              # a broken one raises anything
        raise InputError(f"TensorBoard cannot be used here ({cause(e)}); pip install tensorboard")
    board = SummaryWriter(folder, purge_step=0)         # hides the events of an earlier call
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float):
                board.add_scalar(name, value, line["step"])
    board.close()
    return folder


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("what", choices=("card", "tensorboard"))
    p.add_argument("folder", help="card: of a student; tensorboard: of its run")
    args = p.parse_args(argv)
    print(write_card(args.folder) if args.what == "card" else write_events(args.folder))


if __name__ == "__main__":
    cli(main)
