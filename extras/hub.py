"""Where a model is: in a folder here, or on the Hugging Face hub."""
import re
from pathlib import Path

import huggingface_hub

from extras.cli import InputError, read_json

TINY = Path(__file__).resolve().parent.parent / "tiny/teacher"


def find(name, skip=()):
    """Return the local folder of a model: "tiny", a folder, or a name on the Hugging Face hub.

    Of a hub model only the files that are read here are downloaded, none that matches `skip`.
    """
    if name == "tiny":
        return TINY
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise InputError(f"{name}: no such folder, and not a name on the hub (user/model)")
    parts = ["unet/*", "vae/*", "text_encoder*", "tokenizer/*", "scheduler/*", "vocoder/*",
             "condition_*", "config.json", "swiftaudio.json", "diffusion_pytorch_model.*",
             "decoder/*.json", "decoder/*.safetensors"]
    variants = "*.*.safetensors", "*.*.bin"             # such as model.fp16.safetensors
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=parts,
                                                      ignore_patterns=[*variants, *skip]))
    except Exception as e:
        raise InputError(f"{name}: not a folder here, and the hub did not give it "
                         f"({type(e).__name__}: no network, or an unknown name?); download it "
                         "elsewhere and pass its folder instead")


def full_name(teacher):
    """Name a teacher the same wherever it is named from: "tiny", an absolute folder, a hub name."""
    local = teacher != "tiny" and Path(teacher).is_dir()
    return str(Path(teacher).resolve()) if local else teacher


def read_settings(folder):
    """Read a folder's own swiftaudio.json, {"seconds": ..., "train": {flag: value}, ...}, or {}."""
    path = Path(folder) / "swiftaudio.json"
    return read_json(path) if path.exists() else {}


def open_student(name):
    """Find a student's UNet: (folder, subfolder, its swiftaudio.json or the like)."""
    if name == "out/student" and not Path(name).exists():
        raise InputError("out/student: no student there yet; train one (python train.py --teacher "
                         "tiny) or pass --student")
    folder = find(name)
    if (folder / "swiftaudio.json").exists() and (folder / "config.json").exists():
        return folder, "", read_json(folder / "swiftaudio.json")
    if (folder / "unet").is_dir():          # a complete model, such as the paper authors' own
        return folder, "unet", {"teacher": name, "parameterization": "eps"}
    raise InputError(f"{name}: neither a student of train.py (config.json and swiftaudio.json) nor "
                     "a complete model (unet/, ...)")


def check_fit(config, folder):
    """InputError where a student's UNet config does not fit the teacher in a folder."""
    path = Path(folder) / "unet/config.json"
    theirs = read_json(path) if path.exists() else {}
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if theirs.get(key, config[key]) != config[key]:
            raise InputError(f"the student does not fit its teacher {folder}: {key} {config[key]}, "
                             f"the teacher has {theirs[key]}; pass the right --teacher")
