"""Short runs of train.py in this process, and what they leave."""
import functools
import io
import json
from collections.abc import Mapping

import torch
from safetensors.torch import load

import train
from model import load_unet

LOSSES = {"vsd", "tv", "lora", "x0_std", "grad_student", "grad_lora"}
SMALL = [
    "--max_steps", 2, "--batch_size", 4, "--grad_accum", 1, "--lr", 1e-3, "--guidance", 2,
    "--lora_rank", 4, "--log_every", 1, "--device", "cpu"]


def flags_of(out, plain, captions):
    return ["--teacher", plain, "--captions", captions, "--out_dir", out, *SMALL]


def go(plain, captions, out, *flags):
    """Train in this process; the last value of a flag given twice counts."""
    train.main([str(f) for f in (*flags_of(out, plain, captions), *flags)])
    return result(out)


def read_checkpoint(out):
    return load_checkpoint(out / "checkpoint.pt")


def load_checkpoint(file):
    """As torch.load() reads it; train.py, which trusts no file, takes twice as long."""
    return torch.load(file, weights_only=False)


class result(Mapping):
    """All that a run leaves and that must be reproducible, as it is now, read when looked at."""
    files = ("student/diffusion_pytorch_model.safetensors", "lora/adapter_model.safetensors",
             "checkpoint.pt")

    def __init__(self, out):
        self.contents = [(out / file).read_bytes() for file in self.files]

    @functools.cached_property
    def found(self):
        student, adapters, checkpoint = self.contents
        checkpoint = load_checkpoint(io.BytesIO(checkpoint))
        return {"saved": load(student), "adapters": load(adapters),
                **{k: checkpoint[k] for k in ("step", "weights", "opts")}}

    def __getitem__(self, key):
        return self.found[key]

    def __iter__(self):
        return iter(self.found)

    def __len__(self):
        return len(self.found)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))


def curves(out):
    return [{k: v for k, v in line.items() if k != "samples_per_s"} for line in metrics(out)]


def change_teacher(folder):
    unet = load_unet(folder)
    unet.conv_in.weight.data += 1
    unet.save_pretrained(folder / "unet")
