"""The decoder with folded upsampling is the same decoder, and makes the same clips."""
import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from diffusers import AutoencoderKL, AutoencoderTiny
from runs import call
from torch import nn

import sample
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


def test_the_same_clips_as_sample_py(plain, tmp_path, monkeypatch):
    folded = []
    monkeypatch.setattr(fast, "fold_upsampling", lambda d: (folded.append(d), fold_upsampling(d)))
    flags = ["--student", plain, "--prompt", "a dog", "--device", "cpu", "--precision", "fp32",
             "--out"]
    call(sample.main, *flags, tmp_path / "plain")
    call(fast.main, *flags, tmp_path / "folded")
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in folded[0].modules()) == 3
    rows, again = (sample.read_manifest(tmp_path / name) for name in ("plain", "folded"))
    assert rows == again
    a, b = (soundfile.read(tmp_path / name / rows[0]["file"], dtype="int16")[0].astype(int)
            for name in ("plain", "folded"))
    assert a.any() and np.abs(a - b).max() <= 2
    refused("extras.fast", *flags, "folded", cwd=tmp_path, says=["exists; pass --overwrite"])
