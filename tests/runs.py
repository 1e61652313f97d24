"""What short runs of train.py leave, and teachers and students of other settings."""
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from data import InputError
from model import load_unet

LOSSES = {"vsd", "tv", "lora", "x0_std", "grad_student", "grad_lora"}
SMALL = ["--max_steps", 2, "--batch_size", 4, "--grad_accum", 1, "--lr", 1e-3, "--guidance", 2,
         "--log_every", 1, "--device", "cpu"]


def read_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def result(out):
    """All that a run leaves and that must be reproducible."""
    checkpoint = read_checkpoint(out)
    return {"saved": load_file(out / "student/diffusion_pytorch_model.safetensors"),
            "adapters": load_file(out / "lora/adapter_model.safetensors"),
            **{key: checkpoint[key] for key in ("step", "weights", "opts")}}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curves(out):
    return [{k: v for k, v in line.items() if k != "samples_per_s"} for line in metrics(out)]


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))


def change_teacher(folder):
    unet = load_unet(folder)
    unet.conv_in.weight.data += 1
    unet.save_pretrained(folder / "unet")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuses(load, *args, says, **kw):
    with pytest.raises(InputError, match=says) as e:
        load(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def change_unet(teacher, folder, **config):
    """Write a random UNet of a teacher's settings, or of others."""
    torch.manual_seed(1)
    known = {**load_unet(teacher).config, **config}
    UNet2DConditionModel.from_config(known).save_pretrained(folder)


def write_student(folder, teacher, **more):
    """Write a student as train.py does, with random weights."""
    change_unet(teacher, folder)
    about = {"teacher": str(teacher), "timestep": 999, "seconds": 0.64}
    (folder / "swiftaudio.json").write_text(json.dumps({**about, **more}))
    return folder
