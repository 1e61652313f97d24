"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a UNet, by hand.

An adapted layer keeps its frozen weight and its name, so that the network with its adapters off is
the network it was, bit for bit: one UNet is both the teacher and the LoRA teacher.

    inject(unet, "qv", rank=64, alpha=128)
    with torch.no_grad(), lora_disabled(unet):
        eps_teacher = unet(x, t, text).sample
    eps_lora = unet(x, t, text).sample
"""
import contextlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from data import replace_file, replace_text, require

# Which layers get an adapter. Attention's q and v are SwiftBrush's choice (arXiv 2312.05239).
TARGETS = {
    "qv": lambda name, module: name.endswith((".to_q", ".to_v")),
    "attention": lambda name, module: name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")),
    "linear": lambda name, module: isinstance(module, nn.Linear),
    "all": lambda name, module: True,                               # convolutions too
}


class LoRA:
    """y = W x + b + (alpha / rank) B A x, with W and b frozen, A random and B zero at first."""

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.enabled else y


TWINS = {kind: type(f"LoRA{kind.__name__}", (LoRA, kind), {}) for kind in (nn.Linear, nn.Conv2d)}


def inject(network, targets="qv", rank=64, alpha=128):
    """Freeze a network, give the layers of TARGETS[targets] adapters, and return their weights.

    In place, and no weight is copied. The defaults are train.py's.
    """
    network.requires_grad_(False)
    found = [module for name, module in network.named_modules()
             if type(module) in TWINS and TARGETS[targets](name, module)]
    require(found, f"no layer of this network matches targets={targets!r}")
    for layer in found:
        kw = dict(bias=False, device=layer.weight.device, dtype=torch.float32)
        layer.__class__ = TWINS[type(layer)]
        if isinstance(layer, nn.Linear):
            layer.lora_A = nn.Linear(layer.in_features, rank, **kw)
            layer.lora_B = nn.Linear(rank, layer.out_features, **kw)
        else:                                                       # A has its size, B is 1 x 1
            layer.lora_A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride,
                                     layer.padding, **kw)
            layer.lora_B = nn.Conv2d(rank, layer.out_channels, 1, **kw)
        layer.scale, layer.enabled = alpha / rank, True
        nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))   # as loralib and PEFT do
        nn.init.zeros_(layer.lora_B.weight)                         # so that it starts as the base
    return list(lora_weights(network).values())


def lora_layers(network):
    """The adapted layers: {name: layer}."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LoRA)}


def lora_weights(network):
    """The adapters' weights under PEFT's names: {base_model.model.<layer>.lora_A.weight: w}."""
    return {f"base_model.model.{k}": w for k, w in network.named_parameters() if ".lora_" in k}


@contextlib.contextmanager
def lora_disabled(network):
    """Switch every adapter off inside, and back to what it was afterwards; these blocks nest.

    Only for whole forward passes without gradient: activation checkpointing runs the forward
    again during backward, with whatever is switched on then.
    """
    before = {m: m.enabled for m in lora_layers(network).values()}
    try:
        for m in before:
            m.enabled = False
        yield
    finally:
        for m, enabled in before.items():
            m.enabled = enabled


def save_lora(network, folder, rank, alpha):
    """Write adapter_config.json and adapter_model.safetensors, which both libraries load.

    PeftModel.from_pretrained(unet, folder), or unet.load_lora_adapter(folder,
    weight_name="adapter_model.safetensors", prefix="base_model.model").
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(lora_layers(network)),
              "rank_pattern": {}, "alpha_pattern": {}}              # diffusers 0.36 wants them
    replace_text(folder / "adapter_config.json",
                 json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n")
    # diffusers looks for alpha in the file's own metadata and would take alpha = rank without it
    about = json.dumps({f"base_model.model.{k}": v for k, v in config.items()})
    state = {k: w.detach().contiguous() for k, w in lora_weights(network).items()}
    replace_file(folder / "adapter_model.safetensors", lambda path: path.write_bytes(save(
        state, {"format": "pt", "lora_adapter_metadata": about})))
