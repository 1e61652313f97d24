"""The decoder with folded upsampling is the same decoder, and makes the same clips."""
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from extras import fast
from extras.fast import fold_upsampling

SMALL = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
             num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


@pytest.mark.parametrize("load, layers", [
    (lambda folder: AutoencoderKL.from_pretrained(folder / "vae"), 3),
    (lambda folder: AutoencoderTiny(**SMALL), 2)])
def test_folded_upsampling_is_the_same_decoder(plain, load, layers):
    """Against diffusers' own two decoders, edges included."""
    torch.manual_seed(0)
    vae = load(plain)
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        before = vae.eval().decode(z).sample
        fold_upsampling(vae.decoder)
        after = vae.decode(z).sample
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in vae.modules()) == layers
    assert not any(isinstance(m, nn.Upsample) for m in vae.modules())
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max()) and before.std() > 1e-3


def test_a_folded_layer_keeps_precision_and_whether_it_learns():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False).requires_grad_(False).to(torch.bfloat16)
    up = fast.folded(conv)
    assert [(w.shape, w.dtype, w.requires_grad) for w in up.parameters()] == [
        ((3, 5, 4, 4), torch.bfloat16, False)]
