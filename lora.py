"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a UNet, by hand.

An adapted layer keeps its frozen weight and its name, so that the network with its adapters off is
the network it was, bit for bit: one UNet is both the teacher and the LoRA teacher.
"""
import contextlib
import json
import math

import torch
from safetensors.torch import save
from torch import nn

from data import replace_file, replace_text, require

# Which layers get an adapter. Attention's q and v are SwiftBrush's choice (arXiv 2312.05239).
TARGETS = {
    "qv": lambda name, module: name.endswith((".to_q", ".to_v")),
    "attention": lambda name, module: name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")),
    "all": lambda name, module: True,                               # convolutions too
}


class LoRA:
    """y = W x + b + (alpha / rank) B A x, with W and b frozen, A random and B zero at first."""

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.switch["on"] else y


TWINS = {kind: type(f"LoRA{kind.__name__}", (LoRA, kind), {}) for kind in (nn.Linear, nn.Conv2d)}


def inject(network, targets="qv", rank=64, alpha=128):
    """Freeze a network, give its layers of TARGETS[targets] adapters; return their weights."""
    network.requires_grad_(False)
    found = [module for name, module in network.named_modules()
             if type(module) in TWINS and TARGETS[targets](name, module)]
    require(found, f"no layer of this network matches targets={targets!r}")
    network.lora_switch = {"on": True}                              # one for all of its layers
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
        layer.scale, layer.switch = alpha / rank, network.lora_switch
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
    """Switch every adapter off inside; these blocks nest.

    Only for forward passes without gradient, which checkpointing does not run again later.
    """
    before, network.lora_switch["on"] = network.lora_switch["on"], False
    try:
        yield
    finally:
        network.lora_switch["on"] = before


def save_lora(network, folder, rank, alpha):
    """Write what PEFT and diffusers load: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": {},
              "alpha_pattern": {}, "target_modules": sorted(lora_layers(network))}
    replace_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    # diffusers looks for alpha in the file's own metadata and would take alpha = rank without it
    about = json.dumps({f"base_model.model.{k}": v for k, v in config.items()})
    state = {k: w.detach().contiguous() for k, w in lora_weights(network).items()}
    replace_file(folder / "adapter_model.safetensors", lambda path: path.write_bytes(save(
        state, {"format": "pt", "lora_adapter_metadata": about})))
