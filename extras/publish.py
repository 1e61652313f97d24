"""A student's folder: a diffusers UNet, how to run it, and the card that a model hub shows."""
import json
import re
from pathlib import Path

from safetensors.torch import save_file

from extras.cli import read_json, replace_file, replace_text
from extras.hub import full_name

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


def write_card(folder, metrics=None):
    """Write README.md beside a student's swiftaudio.json; without metrics, keep those it has."""
    path, about = Path(folder) / "README.md", read_json(Path(folder) / "swiftaudio.json")
    card = path.read_text() if path.exists() else ""
    if metrics is None and f", {about['step']} steps\n" in card:       # this very student's
        metrics = card.rpartition("- Metrics: ")[2].strip()
    small = "- Small decoder: `--decoder fast`\n"
    small = small if Path(folder, "decoder/config.json").exists() else ""
    teacher = about["teacher"]
    name = Path(teacher).name if Path(teacher).is_absolute() else teacher
    auffusion = re.search("auffusion|swiftaudio", name.lower())
    replace_text(path, CARD.format(
        licence="mit" if name == "tiny" else "cc-by-nc-sa-4.0" if auffusion else "other",
        base=f"base_model: {name}\n" if "/" in name else "", teacher=name, step=about["step"],
        command=about.get("command", "python train.py"),
        decoder=small, metrics=metrics or "not measured; see eval.py"))


def write_student(folder, student, ema, pipe, step, config, command):
    """Write a student after `step` steps into a folder; each file is replaced whole.

    ema: an average of its parameters to write in their place, or []. config: the run's flags.
    """
    weights = dict(student.named_parameters())
    weights = {name: w.detach().contiguous() for name, w in zip(weights, ema or weights.values())}
    about = {"teacher": full_name(config["teacher"]),
             "timestep": config["student_t"] or pipe.T,
             "parameterization": config["parameterization"], "seconds": pipe.seconds,
             "step": step, "flags": config, "command": command}
    folder.mkdir(exist_ok=True)
    replace_file(folder / "diffusion_pytorch_model.safetensors",
                 lambda path: save_file(weights, path, {"format": "pt"}))
    replace_text(folder / "config.json", student.to_json_string())
    replace_text(folder / "swiftaudio.json", json.dumps(about, indent=2) + "\n")
    write_card(folder)
