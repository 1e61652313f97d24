import json
import math
import pickle
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import VOCODER, write_checkpoint
from diffusers import AutoencoderKL
from torch.nn import functional as F
from transformers import CLIPTextModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

import model
from bench import write_vocoder
from data import InputError
from model import Teacher, denoiser, image_to_mel, load_unet, load_vocoder, log_mel, many_steps, mel_to_image, needed, peak_normalize


# ---- the mel front end, against one written anew in numpy float64 ----

def slaney(f):
    return np.where(f < 1000, f * 3 / 200, 15 + 27 * np.log(np.maximum(f, 1e-9) / 1000) / np.log(6.4))


def reference_log_mel(wav, n_mels):
    x = np.pad(wav.astype(np.float64), 944, mode="reflect")
    window = np.zeros(2048)
    window[512:1536] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([x[i:i + 2048] * window for i in range(0, len(x) - 2047, 160)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    grid = np.linspace(0, 8000, 200001)
    edges = np.interp(np.linspace(0, slaney(8000.0), n_mels + 2), slaney(grid), grid)
    f = np.fft.rfftfreq(2048, 1 / 16000)
    bank = [np.maximum(0, np.minimum((f - a) / (b - a), (c - f) / (c - b))) * 2 / (c - a) for a, b, c in zip(edges, edges[1:], edges[2:])]
    return np.log(np.maximum(np.stack(bank) @ magnitude.T, 1e-5))


@pytest.mark.parametrize("n_mels", [64, 256])
def test_log_mel_equals_numpy(n_mels):
    rng = np.random.default_rng(0)
    t = np.arange(16000) / 16000
    wav = 0.4 * np.sin(2 * np.pi * (300 + 3000 * t) * t) * np.exp(-t) + 0.01 * rng.standard_normal(16000)
    mine = log_mel(torch.from_numpy(wav)[None].float(), n_mels)[0].numpy()
    assert mine.shape == (n_mels, 100)
    np.testing.assert_allclose(mine, reference_log_mel(wav, n_mels), atol=2e-3)


def test_log_mel_equals_librosa():
    librosa = pytest.importorskip("librosa")
    np.testing.assert_allclose(model.mel_filters(256, torch.device("cpu")).T.numpy(),
                               librosa.filters.mel(sr=16000, n_fft=2048, n_mels=256, fmin=0, fmax=8000), atol=1e-7)


def test_ten_seconds_are_1024_frames():
    assert log_mel(torch.zeros(1, 163840)).shape == (1, 256, 1024)
    assert log_mel(torch.zeros(1, 163840)).max() == pytest.approx(math.log(1e-5))


def test_image_of_a_mel():
    mel = torch.linspace(model.LOG_MIN, model.LOG_MAX, 12).view(1, 3, 4)
    image = mel_to_image(mel)
    assert image.shape == (1, 3, 3, 4) and image.min() == -1 and image.max() == 1
    assert image[0, 0, 0, -1] == 1                                  # row 0 is the highest bin
    torch.testing.assert_close(image_to_mel(image), mel)
    assert peak_normalize(torch.tensor([[0.1, -0.5], [0.0, 0.0]])).tolist() == [[pytest.approx(0.19), pytest.approx(-0.95)], [0, 0]]


# ---- the vocoder, against transformers' own (even parity) and convolutions written out (odd) ----

def test_vocoder_equals_speecht5(tmp_path):
    config = {**VOCODER, "upsample_kernel_sizes": [11, 8, 8, 4]}
    write_vocoder(tmp_path, config)
    mine = load_vocoder(tmp_path)
    theirs = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=64, upsample_initial_channel=32, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 8, 4],
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5]] * 2, normalize_before=False, leaky_relu_slope=0.1))
    theirs.load_state_dict({k.replace("ups.", "upsampler."): v for k, v in mine.state_dict().items()} | {"mean": torch.zeros(64), "scale": torch.ones(64)})
    mel = torch.randn(2, 64, 9)
    with torch.no_grad():
        torch.testing.assert_close(mine(mel), theirs(mel.transpose(1, 2)), rtol=1e-4, atol=1e-5)
    assert mine(mel).shape == (2, 9 * 160)


@pytest.mark.parametrize("rate, kernel", [(4, 7), (5, 10), (2, 4), (5, 11)])
def test_upsampling_of_both_parities(rate, kernel):
    config = {**VOCODER, "upsample_rates": [rate], "upsample_kernel_sizes": [kernel]}
    up = model.HiFiGAN(config).ups[0]
    x = torch.randn(1, 32, 6)
    with torch.no_grad():
        whole = F.conv_transpose1d(x, up.weight, up.bias, stride=rate)             # every tap, then cut to 6 * rate
        start = (kernel - rate) // 2 + (kernel - rate) % 2
        expected = F.pad(whole, (0, 1))[..., start:start + 6 * rate]
        expected[..., whole.shape[-1] - start:] = up.bias.view(1, -1, 1)            # beyond the last tap: the bias alone
        torch.testing.assert_close(up(x), expected)


@pytest.mark.parametrize("kind", ["1", "2"])
def test_weight_norm_is_folded(tmp_path, kind):
    config = {**VOCODER, "resblock": kind, "resblock_dilation_sizes": [[1, 3]] * 2}
    stored = write_vocoder(tmp_path, config)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(64, 32, 7))
    layer.parametrizations.weight.original0.data = stored["conv_pre.weight_g"]
    layer.parametrizations.weight.original1.data = stored["conv_pre.weight_v"]
    vocoder = load_vocoder(tmp_path)
    torch.testing.assert_close(vocoder.conv_pre.weight, layer.weight)
    assert vocoder(torch.randn(1, 64, 5)).abs().max() <= 1


def test_griffin_lim_returns_the_mel():
    """A tone between two multiples of 100 Hz, and the same clip alone and in a batch."""
    t = torch.arange(40960) / 16000
    wav = torch.stack([0.5 * torch.sin(2 * math.pi * 1234 * t), 0.5 * torch.sin(2 * math.pi * 440 * t) * torch.exp(-2 * t)])
    mel, vocoder = log_mel(wav, 64), model.GriffinLim(64, 32)
    again = vocoder(mel)
    assert again.shape == wav.shape and torch.allclose(again[1:], vocoder(mel[1:]), atol=1e-4)
    assert (log_mel(again, 64) - mel)[mel > -2].abs().mean() < 0.3
    spectrum = torch.fft.rfft(again[0]).abs()
    assert spectrum.argmax() * 16000 / 40960 == pytest.approx(1234, abs=60)       # a mel is about 60 Hz wide there


# ---- text, in both layouts ----

def test_text_of_the_plain_layout(plain):
    teacher = Teacher(plain)
    ids = teacher.tokenizer("dog", return_tensors="pt").input_ids[0].tolist()
    padded = torch.tensor([ids + [teacher.tokenizer.pad_token_id] * (77 - len(ids))])
    expected = CLIPTextModel.from_pretrained(plain / "text_encoder")(padded).last_hidden_state
    torch.testing.assert_close(teacher.encode_text(["dog"]), expected)
    assert teacher.encode_text(["dog", ""]).shape == (2, 77, 24)


def test_text_of_the_adapter_layout(adapter):
    teacher = Teacher(adapter)
    ids = teacher.tokenizer("a dog", return_tensors="pt").input_ids
    hidden = CLIPTextModel.from_pretrained(adapter / "text_encoder_0")(ids).last_hidden_state
    state = torch.load(adapter / "condition_adapter_0/condition_adapter.pt")
    hidden = F.pad(hidden, (0, 0, 0, 77 - ids.shape[1]))
    expected = F.layer_norm(hidden @ state["proj.weight"].T + state["proj.bias"], (24,), state["norm.weight"], state["norm.bias"])
    both = teacher.encode_text(["a dog", "a much longer dog"])
    torch.testing.assert_close(both[:1], expected, rtol=1e-4, atol=1e-5)
    assert teacher.encode_text([""]).abs().max() == 0


def test_prompts_that_do_not_fit_are_told(plain):
    warning, = Teacher(plain).check(["dog " * 74 + "barks", "fine"])
    assert "81 tokens, 77 fit; cut" in warning and "rks" in warning


# ---- sampling against diffusers' pipeline, and audio there and back ----

@pytest.mark.parametrize("guidance", [1, 4.5])
def test_many_steps_equal_the_pipeline(plain, guidance):
    teacher, unet = Teacher(plain), load_unet(plain)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = diffusers.StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet, safety_checker=None,
        scheduler=diffusers.PNDMScheduler.from_pretrained(plain / "scheduler"), feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(["dog", "a cat"], latents=z, num_inference_steps=6, guidance_scale=guidance, output_type="latent").images
    mine = many_steps(denoiser(unet), z, teacher.encode_text(["dog", "a cat"]), teacher.encode_text([""]), teacher, 6, guidance)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_audio_to_latents_and_back():
    """A synthesised recording through the tiny world's front end, VAE and vocoder keeps its spectrogram."""
    from tiny import world
    wav = torch.from_numpy(world.render(np.random.default_rng(3), (("siren", 0, "slowly"),), "")[0])[None]
    teacher = Teacher("tiny")
    mel = log_mel(peak_normalize(wav), 64).clamp(model.LOG_MIN, model.LOG_MAX)
    decoded = teacher.decode(teacher.encode_audio(wav))
    again = log_mel(teacher.vocode(decoded), 64)
    loud = mel > -3
    assert decoded.shape == mel.shape == again.shape
    assert (decoded - mel)[loud].abs().mean() < 0.6 and (again - mel)[loud].abs().mean() < 0.8


# ---- finding a teacher, and what can be wrong with it ----

def test_only_needed_files_are_asked_for():
    files = ["README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
             "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin",
             "tokenizer/merges.txt", "vocoder/vocoder.pt", "vocoder/config.json", "text_encoder_0/model.safetensors",
             "condition_adapter_0/condition_adapter.pt", "condition_config.json", "safety_checker/model.safetensors", "big.ckpt"]
    assert needed(files) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                             "vae/diffusion_pytorch_model.bin", "tokenizer/merges.txt", "vocoder/vocoder.pt", "vocoder/config.json",
                             "text_encoder_0/model.safetensors", "condition_adapter_0/condition_adapter.pt", "condition_config.json"]
    assert needed(["config.json", "swiftaudio.json", "diffusion_pytorch_model.safetensors", "x.png"]) == [
        "config.json", "swiftaudio.json", "diffusion_pytorch_model.safetensors"]


def test_hub_download(monkeypatch, plain):
    class Info:
        siblings = [type("F", (), {"rfilename": f}) for f in ("unet/config.json", "other.ckpt")]
    asked = {}
    monkeypatch.setattr(model.huggingface_hub, "model_info", lambda name: Info)
    monkeypatch.setattr(model.huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(plain))
    assert model.find("someone/model") == plain
    assert asked == {"name": "someone/model", "allow_patterns": ["unet/config.json"]}


def test_no_network_and_no_such_name(monkeypatch):
    def fail(*args, **kw):
        raise ConnectionError("no route")
    monkeypatch.setattr(model.huggingface_hub, "model_info", fail)
    monkeypatch.setattr(model.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="pass its folder"):
        model.find("someone/model")
    with pytest.raises(InputError, match="no such folder"):
        model.find("./nowhere")


@pytest.mark.parametrize("part", ["vae", "vocoder", "tokenizer", "text_encoder", "scheduler"])
def test_missing_part(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(InputError, match=f"lacks {part}/"):
        Teacher(broken)


def test_damaged_parts(broken):
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="unet: cannot be loaded"):
        load_unet(broken)
    (broken / "vocoder/config.json").write_text("{")
    with pytest.raises(InputError, match="vocoder/config.json: is not JSON"):
        Teacher(broken)


def test_a_vocoder_that_holds_code_is_not_run(broken):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)
    for content in (pickle.dumps(Bomb()), b"not a pickle"):
        (broken / "vocoder/vocoder.pt").write_bytes(content)
        with pytest.raises(InputError, match="vocoder.pt"):
            Teacher(broken)
    torch.save({"generator": Bomb()}, broken / "vocoder/vocoder.pt")
    with pytest.raises(InputError, match="more than tensors"):
        Teacher(broken)


def test_v_prediction_is_refused(broken):
    path = broken / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match="v_prediction"):
        Teacher(broken)


def test_several_text_encoders_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, "adapter")
    path = folder / "condition_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    with pytest.raises(InputError, match="more than one text encoder"):
        Teacher(folder)


def test_a_length_that_is_no_multiple(plain):
    assert Teacher(plain, seconds=10.24).latent_shape == (4, 8, 128)
    with pytest.raises(InputError, match="0.08 s"):
        Teacher(plain, seconds=1.0)


def test_folded_upsampling_is_the_same_decoder(plain):
    """Against diffusers' own decoder, edges included."""
    vae, folded = (AutoencoderKL.from_pretrained(plain / "vae").eval() for _ in range(2))
    model.fold_upsampling(folded.decoder)
    assert sum(isinstance(m, torch.nn.ConvTranspose2d) for m in folded.modules()) == 3
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        a, b = vae.decode(z).sample, folded.decode(z).sample
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max()) and a.std() > 1e-3
