"""What short runs of train.py leave."""
import json

import torch
from safetensors.torch import load_file

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
