"""The decoder with folded upsampling is the same decoder, and makes the same clips."""
import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

import sample
from extras import fast
from extras.fast import fold_upsampling


def test_folded_upsampling_is_the_same_decoder(plain):
    """Against diffusers' own decoder, edges included."""
    vae, folded = (AutoencoderKL.from_pretrained(plain / "vae").eval() for _ in range(2))
    fold_upsampling(folded.decoder)
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in folded.modules()) == 3
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        a, b = vae.decode(z).sample, folded.decode(z).sample
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max()) and a.std() > 1e-3


def test_folded_upsampling_of_the_small_decoder():
    torch.manual_seed(0)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        before = small.decode(z).sample
        fold_upsampling(small.decoder)
        after = small.decode(z).sample
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in small.modules()) == 2
    assert not any(isinstance(m, nn.Upsample) for m in small.modules())
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max()) and before.std() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_keeps_precision_and_whether_it_learns(bias):
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias)
    for learns in (True, False):
        conv.requires_grad_(learns)
        up = fast.folded(conv.to(torch.bfloat16))
        assert {w.dtype for w in up.parameters()} == {torch.bfloat16}
        assert {w.requires_grad for w in up.parameters()} == {learns}
        assert up.weight.shape == (3, 5, 4, 4) and (up.bias is not None) == bias
    x = torch.randn(1, 3, 6, 4, dtype=torch.bfloat16)
    expected = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(up(x), expected, rtol=0, atol=0.03)


def test_the_same_clips_as_sample_py(plain, tmp_path, monkeypatch, capsys):
    folded = []
    monkeypatch.setattr(fast, "fold_upsampling", lambda d: (folded.append(d), fold_upsampling(d)))
    flags = ["--student", plain, "--prompt", "a dog", "dog " * 80, "--device", "cpu", "--precision",
             "fp32", "--out"]
    for main, name in ((sample.main, "plain"), (fast.main, "folded")):
        main([str(f) for f in (*flags, tmp_path / name)])
        assert capsys.readouterr().out.count("warning:") == 1
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in folded[0].modules()) == 3
    rows = [json.loads((tmp_path / name / "manifest.json").read_text("utf-8"))
            for name in ("plain", "folded")]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    for row in rows[0]:
        a, b = (soundfile.read(tmp_path / name / row["file"], dtype="int16")[0].astype(int)
                for name in ("plain", "folded"))
        assert a.any() and np.abs(a - b).max() <= 2
    refused("extras.fast", *flags, "folded", cwd=tmp_path, says=["exists; pass --overwrite"])
