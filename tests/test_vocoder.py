"""From a mel to sound: HiFi-GAN against one written out, Griffin-Lim, and their precision."""
import json
import math

import pytest
import torch
from conftest import VOCODER
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import model
from data import InputError
from extras.audio import log_mel
from model import TINY, Decoder, load_student, load_vocoder

# ---- HiFi-GAN (arXiv 2010.05646, figure 1), under the names of the published weights ------------

class Residual(nn.Module):
    def __init__(self, width, kernel, dilations):
        super().__init__()

        def convolutions(dilations):
            return nn.ModuleList(weight_norm(nn.Conv1d(
                width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2))
                for d in dilations)

        self.convs1, self.convs2 = convolutions(dilations), convolutions([1] * len(dilations))

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rates, width = config["upsample_rates"], config["upsample_initial_channel"]
        self.conv_pre = weight_norm(nn.Conv1d(config["num_mels"], width, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(self.rates, config["upsample_kernel_sizes"]):
            width //= 2
            self.ups.append(weight_norm(nn.ConvTranspose1d(2 * width, width, kernel, rate)))
            for sizes in zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"]):
                self.resblocks.append(Residual(width, *sizes))
        self.conv_post = weight_norm(nn.Conv1d(width, 1, 7, padding=3))

    def forward(self, mel):                                                 # (B, mels, frames)
        x, n = self.conv_pre(mel), len(self.resblocks) // len(self.ups)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates)):
            length = x.shape[-1] * rate
            # All taps, then the middle. Where the kernel is longer by an odd number, one more is
            # cut at the start, and the end lacks one, which is the bias alone.
            x = up(F.leaky_relu(x, 0.1))
            missing = length - x.shape[-1]
            start = math.ceil(-missing / 2)
            x = torch.cat([x, up.bias[:, None].expand(len(x), -1, start)], -1)
            cut = x[..., start:start + length]
            x = sum(block(cut) for block in self.resblocks[i * n:i * n + n]) / n
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))[:, 0]

    def published(self):
        """The state under the names that weight norm had when the weights were published."""
        names = {"parametrizations.weight.original0": "weight_g",
                 "parametrizations.weight.original1": "weight_v"}
        state = self.state_dict()
        for new, old in names.items():
            state = {k.replace(new, old): v for k, v in state.items()}
        return state


def write_generator(folder, **more):
    """Write a random HiFi-GAN as published; the network as written out above."""
    config = {**VOCODER, **more}
    torch.manual_seed(0)
    network = Generator(config).eval()
    for name, w in network.named_parameters():
        if name.endswith("original0"):                                      # g, the length of w
            nn.init.uniform_(w, 0.6, 1.2)
        else:
            nn.init.normal_(w, std=0.1)
    torch.save({"generator": network.published(), "steps": 3}, folder / "vocoder.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return network


KERNELS = [dict(upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 4]),      # even
           dict(upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4]),      # one odd
           dict(upsample_rates=[5, 4], upsample_kernel_sizes=[10, 7]),                  # both odd
           dict(upsample_rates=[2, 5], upsample_kernel_sizes=[5, 6])]


@pytest.mark.parametrize("kernels", KERNELS)
def test_hifigan_equals_the_network_written_out(tmp_path, kernels):
    theirs, mine = write_generator(tmp_path, **kernels), load_vocoder(tmp_path)
    mel = torch.randn(2, 64, 9)
    with torch.no_grad():
        expected, wav = theirs(mel), mine(mel.transpose(1, 2))
    assert wav.shape == (2, 9 * math.prod(kernels["upsample_rates"]))
    torch.testing.assert_close(wav, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-2 and expected.abs().max() < 0.99            # not saturated
    folded = mine.resblocks[0].convs2[1]                                    # no weight norm left
    assert {name for name, _ in folded.named_parameters()} == {"weight", "bias"}


class Bomb:
    went_off = []

    def __reduce__(self):
        return Bomb.went_off.append, (1,)


def test_a_vocoder_that_holds_code_is_not_run(broken):
    torch.save({"generator": Bomb()}, broken / "vocoder/vocoder.pt")
    with pytest.raises(InputError, match=r"vocoder: cannot be loaded \(UnpicklingError.*") as e:
        Decoder(broken)
    assert "\n" not in str(e.value) and not Bomb.went_off


# ---- Griffin-Lim ------------------------------------------------------------------------------

def test_griffin_lim_returns_the_mel():
    """A tone between two multiples of 100 Hz, and the same clip alone and in a batch."""
    t = torch.arange(40960) / 16000
    wav = torch.stack([0.5 * torch.sin(2 * math.pi * 1234 * t),
                       0.5 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-2 * t)])
    mel, vocoder = log_mel(wav, 64), load_vocoder(TINY / "vocoder")
    again = vocoder(mel.transpose(1, 2))
    assert again.shape == wav.shape
    assert torch.allclose(again[1:], vocoder(mel[1:].transpose(1, 2)), atol=1e-4)
    assert (log_mel(again, 64) - mel)[mel > -2].abs().mean() < 0.17     # 0.18 without momentum
    peak = torch.fft.rfft(again[0]).abs().argmax() * 16000 / 40960
    assert peak == pytest.approx(1234, abs=60)                  # a mel is about 60 Hz wide there


# ---- precision --------------------------------------------------------------------------------

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
