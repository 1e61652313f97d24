"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a UNet, by hand.

A wrapped layer adopts the frozen weight of the one it replaces and keeps its name, so that the network with its
adapters off is the network it was, bit for bit: one UNet is both the teacher and the LoRA teacher.

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
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import write

# Which layers get an adapter. Attention's q and v is SwiftBrush's choice (attn1 attends to itself, attn2 to the text).
TARGETS = {
    "qv": lambda name, module: name.endswith((".to_q", ".to_v")),
    "attention": lambda name, module: name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")),
    "linear": lambda name, module: isinstance(module, nn.Linear),
    "all": lambda name, module: True,
}


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen, A (rank, in) random and B (out, rank) zero at first."""

    def __init__(self, base, rank, alpha):
        nn.Module.__init__(self)                        # adopt, do not allocate
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        kw = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A, self.lora_B = nn.Linear(self.in_features, rank, False, **kw), nn.Linear(rank, self.out_features, False, **kw)
        setup(self, alpha / rank)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.enabled else y


class LoRAConv2d(nn.Conv2d):
    """The same for a convolution: A is a convolution of its kernel, stride and padding to `rank` channels, B is 1 x 1."""

    def __init__(self, base, rank, alpha):
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__ + ["_reversed_padding_repeated_twice"]:
            setattr(self, name, getattr(base, name))
        self.weight, self.bias = base.weight, base.bias
        kw = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False, **kw)
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False, **kw)
        setup(self, alpha / rank)

    def forward(self, x):
        y = self._conv_forward(x, self.weight, self.bias)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.enabled else y


def setup(layer, scale):
    layer.scale, layer.enabled = scale, True
    nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))      # as loralib and PEFT do
    nn.init.zeros_(layer.lora_B.weight)                                # so that the adapted network starts as the base


def inject(network, targets="qv", rank=64, alpha=128):
    """Freeze `network`, give the layers that `targets` names a trainable adapter, in place. Returns their parameters.

    targets: "qv", "attention", "linear" (every linear layer) or "all" (convolutions too). The defaults are the paper's.
    """
    network.requires_grad_(False)
    found = [(name, m) for name, m in network.named_modules()
             if type(m) in (nn.Linear, nn.Conv2d) and TARGETS[targets](name, m)]
    if not found:
        raise ValueError(f"no layer of this network matches targets={targets!r}")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        wrap = LoRALinear if isinstance(module, nn.Linear) else LoRAConv2d
        setattr(network.get_submodule(parent), child, wrap(module, rank, alpha))
    return lora_parameters(network)


def lora_layers(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, (LoRALinear, LoRAConv2d))}


def lora_parameters(network):
    """The adapters' parameters, the only trainable ones after inject()."""
    return [p for m in lora_layers(network).values() for p in (m.lora_A.weight, m.lora_B.weight)]


@contextlib.contextmanager
def lora_disabled(network):
    """Within, every adapter is off; afterwards each is as it was before, so that these blocks nest.

    Turn adapters off around whole forward passes whose backward does not matter: activation checkpointing runs the
    forward again during backward, with whatever is set then.
    """
    layers = list(lora_layers(network).values())
    before = [m.enabled for m in layers]
    try:
        for m in layers:
            m.enabled = False
        yield
    finally:
        for m, enabled in zip(layers, before):
            m.enabled = enabled


def lora_state(network):
    """The adapters' weights under PEFT's names: base_model.model.<layer>.lora_A.weight, ...lora_B.weight."""
    return {f"base_model.model.{name}.lora_{ab}.weight": getattr(m, f"lora_{ab}").weight.detach().cpu().contiguous()
            for name, m in lora_layers(network).items() for ab in "AB"}


def load_lora_state(network, state):
    """Put a lora_state back; KeyError where a layer's weights are missing."""
    with torch.no_grad():
        for name, m in lora_layers(network).items():
            for ab in "AB":
                getattr(m, f"lora_{ab}").weight.copy_(state[f"base_model.model.{name}.lora_{ab}.weight"])


def save_lora(network, folder, rank, alpha):
    """Write adapter_model.safetensors and adapter_config.json. Either library loads them into a UNet:

    PeftModel.from_pretrained(unet, folder), or
    unet.load_lora_adapter(folder, weight_name="adapter_model.safetensors", prefix="base_model.model").
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(lora_layers(network))}
    described = json.dumps({f"base_model.model.{k}": v for k, v in config.items()})     # where diffusers looks for alpha
    write(folder / "adapter_config.json", lambda path: path.write_text(json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n"))
    write(folder / "adapter_model.safetensors", lambda path: save_file(
        lora_state(network), path, {"format": "pt", "lora_adapter_metadata": described}))
