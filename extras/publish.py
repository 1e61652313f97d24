"""The model card of a student: the README.md that a model hub shows."""
import re
from pathlib import Path

from extras.cli import read_json, replace_text

CARD = """---
license: {licence}
{base}pipeline_tag: text-to-audio
---

A one-step text-to-audio student of {teacher}, made with SwiftAudio (arXiv 2606.31259): a clip in
one UNet pass.

- Sample: `python sample.py --student FOLDER --prompt "a dog barks"`
- Trained: `{command}`, {step} steps
- Licence: that of the teacher, of which this is an adaptation
- Metrics: {metrics}
"""


def write_card(folder, metrics=None):
    """Write README.md beside a student's swiftaudio.json; without metrics, keep those it has."""
    path, about = Path(folder) / "README.md", read_json(Path(folder) / "swiftaudio.json")
    if metrics is None and path.exists() and f", {about['step']} steps\n" in path.read_text():
        return                              # this very student's, and perhaps scored since
    teacher = about["teacher"]
    name = Path(teacher).name if Path(teacher).is_absolute() else teacher
    auffusion = re.search("auffusion|swiftaudio", name.lower())
    replace_text(path, CARD.format(
        licence="mit" if name == "tiny" else "cc-by-nc-sa-4.0" if auffusion else "other",
        base=f"base_model: {name}\n" if "/" in name else "", teacher=name, step=about["step"],
        command=about.get("command", "python train.py"),
        metrics=metrics or "not measured; see eval.py"))
