"""From a mel to sound: HiFi-GAN against one written out, Griffin-Lim, and their precision."""
import math

import pytest
import torch
from conftest import VOCODER
from runs import refuses
from torch.nn import functional as F

import model
from extras.audio import log_mel
from extras.random_teacher import write_vocoder
from model import TINY, Decoder, load_student, load_vocoder


def hifigan(mel, s, config):
    """HiFi-GAN (arXiv 2010.05646, figure 1) of mels (B, mels, frames) and the published weights."""
    def weight(name):                                   # under weight norm
        g, v = s[f"{name}.weight_g"], s[f"{name}.weight_v"]
        return g * v / v.square().sum((1, 2), keepdim=True).sqrt()

    def conv(x, name, dilation=1):
        w = weight(name)
        padding = dilation * (w.shape[2] - 1) // 2
        return F.conv1d(x, w, s[f"{name}.bias"], padding=padding, dilation=dilation)

    x, n = conv(mel, "conv_pre"), len(config["resblock_kernel_sizes"])
    for i, rate in enumerate(config["upsample_rates"]):
        length = x.shape[-1] * rate
        # All taps, then the middle. Where the kernel is longer by an odd number, one more is
        # cut at the start, and the end lacks one, which is the bias alone.
        bias = s[f"ups.{i}.bias"]
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), weight(f"ups.{i}"), bias, rate)
        missing = length - x.shape[-1]
        start = math.ceil(-missing / 2)
        x = torch.cat([x, bias[:, None].expand(len(x), -1, start)], -1)[..., start:start + length]
        blocks = []
        for j, dilations in enumerate(config["resblock_dilation_sizes"], i * n):
            y = x
            for k, d in enumerate(dilations):
                z = conv(F.leaky_relu(y, 0.1), f"resblocks.{j}.convs1.{k}", d)
                y = y + conv(F.leaky_relu(z, 0.1), f"resblocks.{j}.convs2.{k}")
            blocks.append(y)
        x = sum(blocks) / n
    return torch.tanh(conv(F.leaky_relu(x, 0.01), "conv_post"))[:, 0]


KERNELS = [dict(upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 4]),      # even
           dict(upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4]),      # one odd
           dict(upsample_rates=[5, 4], upsample_kernel_sizes=[10, 7]),                  # both odd
           dict(upsample_rates=[2, 5], upsample_kernel_sizes=[5, 6])]


@pytest.mark.parametrize("kernels", KERNELS)
def test_hifigan_equals_the_network_written_out(tmp_path, kernels):
    torch.manual_seed(0)
    write_vocoder(tmp_path, {**VOCODER, **kernels})
    state, mel = torch.load(tmp_path / "vocoder.pt")["generator"], 0.3 * torch.randn(2, 64, 9)
    network = load_vocoder(tmp_path)
    with torch.no_grad():
        expected = hifigan(mel, state, {**VOCODER, **kernels})
        wav = network(mel.transpose(1, 2))
    assert wav.shape == (2, 9 * math.prod(kernels["upsample_rates"]))
    torch.testing.assert_close(wav, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-2 and expected.abs().max() < 0.99            # not saturated
    folded = network.resblocks[0].convs2[1]                                 # no weight norm left
    assert {name for name, _ in folded.named_parameters()} == {"weight", "bias"}


class Bomb:
    went_off = []

    def __reduce__(self):
        return Bomb.went_off.append, (1,)


def test_a_vocoder_that_holds_code_is_not_run(broken):
    torch.save({"generator": Bomb()}, broken / "vocoder/vocoder.pt")
    refuses(Decoder, broken, says="vocoder: cannot be loaded .UnpicklingError")
    assert not Bomb.went_off


def test_griffin_lim_returns_the_mel(tmp_path):
    """A tone between two multiples of 100 Hz, and the same clip alone and in a batch."""
    t = torch.arange(40960) / 16000
    wav = torch.stack([0.5 * torch.sin(2 * math.pi * 1234 * t),
                       0.5 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-2 * t)])
    (tmp_path / "config.json").write_text('{"num_mels": 64, "griffin_lim": 32}')
    mel, vocoder = log_mel(wav, 64), load_vocoder(tmp_path)
    again = vocoder(mel.transpose(1, 2))
    assert again.shape == wav.shape
    assert torch.allclose(again[1:], vocoder(mel[1:].transpose(1, 2)), atol=1e-4)
    assert (log_mel(again, 64) - mel)[mel > -2].abs().mean() < 0.17     # 0.18 without momentum
    peak = torch.fft.rfft(again[0]).abs().argmax() * 16000 / 40960
    assert peak == pytest.approx(1234, abs=60)                  # a mel is about 60 Hz wide there


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32),
                                             (torch.float16, torch.float16)])
def test_the_vocoder_s_precision(plain, monkeypatch, dtype, expected):
    """bf16 is too coarse for HiFi-GAN."""
    monkeypatch.setattr(model, "sampling_dtype", lambda device: dtype)
    system = load_student(plain, device="cpu")
    kinds = [{p.dtype for p in part.parameters()} for part in (
        system.decoder.vae, system.decoder.vocoder, system.encode_text)]
    assert kinds == [{dtype}, {expected}, {torch.float32}]
    wav = system.decoder.vocode(torch.zeros(1, 64, 8))
    assert wav.dtype == torch.float32 and wav.shape == (1, 8 * 160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_griffin_lim_stays_fp32(dtype):
    """A decoder in half precision, as on a GPU, has the same Griffin-Lim."""
    mel = torch.randn(1, 64, 16).clamp(max=2)
    half, full = Decoder(TINY, dtype), Decoder(TINY)
    assert torch.equal(half.vocode(mel), full.vocode(mel))
