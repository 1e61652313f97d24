"""From latents to sound, as published but faster to run: weights that fold into others."""
import pickle
import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from extras.cli import InputError, read_json
from tiny.vocoder import GriffinLim


@torch.no_grad()
def folded(conv):
    """Return one layer for "repeat every pixel, then convolve 3 x 3".

    A transposed convolution equals it: taps that fall on the same pixel add up, so that 16 do for
    36.
    """
    w = conv.weight                                                         # (out, in, 3, 3)
    for dim in (2, 3):
        a, b, c = w.unbind(dim)
        w = torch.stack([c, b + c, a + b, a], dim)                          # (out, in, 4, 4)
    bias = conv.bias is not None
    up = nn.ConvTranspose2d(w.shape[1], w.shape[0], 4, 2, 1, bias=bias)
    up.weight.copy_(w.transpose(0, 1))
    if bias:
        up.bias.copy_(conv.bias)
    return up


def fold_upsampling(decoder):
    """Fold each upsampling of a decoder, in place: of an AutoencoderKL or an AutoencoderTiny."""
    for block in getattr(decoder, "up_blocks", []):
        if block.upsamplers:
            block.upsamplers[0] = folded(block.upsamplers[0].conv)
    layers = getattr(decoder, "layers", [])
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Upsample):
            layers[i], layers[i + 1] = nn.Identity(), folded(layers[i + 1])


def load_vocoder(path):
    """Load a vocoder: log-mels (B, frames, num_mels) -> waveforms (B, frames * HOP) in [-1, 1].

    HiFi-GAN (arXiv 2010.05646) as published: config.json, and vocoder.pt with {"generator":
    state_dict}, whose weight norm is folded in. Or Griffin-Lim, which has no weights, where
    config.json is {"num_mels": ..., "griffin_lim": steps}.
    """
    config = read_json(path / "config.json")
    if "griffin_lim" in config:
        return GriffinLim(config["num_mels"], config["griffin_lim"])
    if str(config["resblock"]) != "1":
        raise InputError(f"{path}/config.json: only HiFi-GAN's resblock 1 is supported")
    try:
        stored = torch.load(path / "vocoder.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}/vocoder.pt: holds more than tensors or is damaged, and was not "
                         "run; get the file anew")

    # transformers has the network under other names, without weight norm
    state = {re.sub(r"^ups\.", "upsampler.", k): v.float() for k, v in stored["generator"].items()}
    for k in [k for k in state if k.endswith("weight_v")]:
        g, v = state.pop(k[:-1] + "g"), state.pop(k)
        state[k[:-2]] = g * F.normalize(v, dim=(1, 2))                      # w = g v / |v|
    sizes = ("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel",
             "resblock_kernel_sizes", "resblock_dilation_sizes")
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=config["num_mels"], normalize_before=False, **{k: config[k] for k in sizes}))
    for layer in vocoder.upsampler:             # and without Auffusion's odd kernel - rate
        extra = layer.kernel_size[0] - layer.stride[0]
        layer.padding, layer.output_padding = (extra // 2 + extra % 2,), (extra % 2,)
    vocoder.load_state_dict({**state, "mean": vocoder.mean, "scale": vocoder.scale})
    return vocoder
