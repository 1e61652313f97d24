"""What tells two clips apart: a UNet's encoder, and ARC's discriminator on top of it."""
import torch
from torch import nn


def encode(unet, x, t, text):
    """The maps [(B, C, h, w)] at the end of each level of a UNet's encoder, and in its middle."""
    dtype = next(unet.parameters()).dtype
    x, text = x.to(dtype), text.to(dtype)
    emb = unet.time_embedding(unet.time_proj(t).to(dtype))
    x, maps = unet.conv_in(x), []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        x, states = block(x, emb, **({"encoder_hidden_states": text} if attends else {}))
        maps.append(states[-2] if block.downsamplers else states[-1])
    return [*maps, unet.mid_block(x, emb, encoder_hidden_states=text)]


class Discriminator(nn.Module):
    """Scores (B, n) of noised clips: the higher, the more like the teacher's own.

    As in ARC, the teacher's UNet up to its middle, fine-tuned, with new heads: here one per level.
    frozen: only the heads learn, on the teacher's features (LADD, arXiv 2403.12015).
    """

    def __init__(self, unet, frozen):
        super().__init__()
        self.unet = unet.requires_grad_(not frozen)
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(self.unet, unused)
        widths = unet.config.block_out_channels
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 1, 1))
            for width in (*widths, widths[-1]))

    def forward(self, x, t, text):
        maps = encode(self.unet, x, t, text)
        with torch.autocast(x.device.type, enabled=False):      # R1 and R2 are small differences
            scores = [head(m.float()).flatten(1) for head, m in zip(self.heads, maps)]
        return torch.cat(scores, 1)
