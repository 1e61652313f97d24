"""Where a model is found, its text in both layouts, sampling as diffusers does, and bad folders."""
import json
import shutil
import types

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import write_checkpoint
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModel

from extras.audio import mel_to_image
from extras.cli import InputError
from extras.device import pick_device
from extras.hub import TINY, find, read_settings
from losses import guided, one_step
from model import LOG_MAX, LOG_MIN, Pipeline, denoiser, load_unet, many_steps


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- text, in both layouts ---------------------------------------------------------------------

def test_text_of_the_plain_layout(plain):
    pipe = Pipeline(plain)
    ids = pipe.tokenizer("dog", return_tensors="pt").input_ids[0].tolist()
    padded = torch.tensor([ids + [pipe.tokenizer.pad_token_id] * (77 - len(ids))])
    expected = CLIPTextModel.from_pretrained(plain / "text_encoder")(padded).last_hidden_state
    torch.testing.assert_close(pipe.encode_text(["dog"]), expected)
    both = pipe.encode_text(["dog", ""])
    assert both.shape == (2, 77, 24) and not torch.equal(both[0], both[1])


def test_text_of_the_adapter_layout(adapter):
    pipe = Pipeline(adapter)
    ids = pipe.tokenizer("a dog", return_tensors="pt").input_ids
    hidden = CLIPTextModel.from_pretrained(adapter / "text_encoder_0")(ids).last_hidden_state
    state = torch.load(adapter / "condition_adapter_0/condition_adapter.pt")
    hidden = F.pad(hidden, (0, 0, 0, 77 - ids.shape[1]))
    projected = hidden @ state["proj.weight"].T + state["proj.bias"]
    expected = F.layer_norm(projected, (24,), state["norm.weight"], state["norm.bias"])
    both = pipe.encode_text(["a dog", "a much longer dog"])
    torch.testing.assert_close(both[:1], expected, rtol=1e-4, atol=1e-5)
    assert pipe.encode_text([""]).abs().max() == 0


def test_the_older_layout_s_folders_are_those_its_config_names(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "renamed")
    (folder / "text_encoder_0").rename(folder / "words")
    (folder / "condition_adapter_0").rename(folder / "behind")
    path = folder / "condition_config.json"
    listed, = json.loads(path.read_text())
    names = {"text_encoder_name": "words", "condition_adapter_name": "behind"}
    path.write_text(json.dumps([{**listed, **names}]))
    expected = Pipeline(adapter).encode_text(["a dog"])
    assert torch.equal(Pipeline(folder).encode_text(["a dog"]), expected)

    for name in names:
        path.write_text(json.dumps([{**listed, **names, name: "elsewhere"}]))
        with pytest.raises(InputError, match="lacks elsewhere/") as e:
            Pipeline(folder)
        assert "\n" not in str(e.value)


def test_several_text_encoders_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, "adapter")
    path = folder / "condition_config.json"
    listed = json.loads(path.read_text())
    for broken in (listed * 2, [], [{"condition_adapter_name": "condition_adapter_0"}]):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match="must list one text_encoder_name"):
            Pipeline(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_text_encoder_is_not_rounded_to_the_dtype_of_its_config(broken, plain, key):
    path = broken / "text_encoder/config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    path.write_text(json.dumps({**config, key: "float16"}))
    assert CLIPTextModel.from_pretrained(broken / "text_encoder").dtype == torch.float16
    rounded, exact = Pipeline(broken).encode_text(["dog"]), Pipeline(plain).encode_text(["dog"])
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact)


# ---- the schedule, and sampling against diffusers' pipeline -------------------------------------

def test_the_schedule(plain):
    pipe, theirs = Pipeline(plain), diffusers.PNDMScheduler.from_pretrained(plain / "scheduler")
    assert pipe.T == 999 and pipe.alpha.shape == pipe.sigma.shape == (1000,)
    torch.testing.assert_close(pipe.alpha ** 2, theirs.alphas_cumprod)
    torch.testing.assert_close(pipe.sigma ** 2, 1 - theirs.alphas_cumprod)
    assert not any(p.requires_grad for p in pipe.parameters()) and not pipe.vae.training


@pytest.mark.parametrize("guidance", [1, 4.5])
def test_many_steps_equal_the_pipeline(plain, guidance):
    pipe, unet = Pipeline(plain), load_unet(plain)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.StableDiffusionPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=unet,
        scheduler=diffusers.PNDMScheduler.from_pretrained(plain / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(["dog", "a cat"], latents=z, num_inference_steps=10,
                      guidance_scale=guidance, output_type="latent").images
    eps = guided(denoiser(unet), pipe.encode_text([""]), guidance)
    mine = many_steps(eps, z, pipe.encode_text(["dog", "a cat"]), pipe, 10)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    again = many_steps(eps, z, pipe.encode_text(["dog", "a cat"]), pipe, 10)
    assert torch.equal(again, mine)                             # PNDM's history is not kept


def test_one_step_of_the_teacher_is_eq_1(plain):
    pipe, unet = Pipeline(plain), load_unet(plain)
    z, text = torch.randn(2, 4, 8, 8), pipe.encode_text(["dog", "a cat"])
    eps = guided(denoiser(unet), pipe.encode_text([""]), 3)
    expected = one_step(eps, z, text, pipe.alpha, pipe.sigma)
    assert torch.equal(many_steps(eps, z, text, pipe, 1), expected)


def test_too_few_steps_are_refused_where_they_would_not_start_from_noise(plain):
    pipe = Pipeline(plain)                                      # PNDM, "leading" spacing
    for steps, first in ((2, 501), (6, 831), (9, 889)):
        with pytest.raises(InputError, match=f"{steps} steps: .* t = {first}, where"):
            pipe.scheduler_of(steps)
    assert pipe.scheduler_of(10).timesteps[0] == 901
    assert Pipeline("tiny").scheduler_of(2).timesteps.tolist() == [999, 499]    # "trailing"


# ---- latents to audio --------------------------------------------------------------------------

def test_decoding_undoes_the_image_of_a_mel(plain):
    """With a VAE that returns one image whatever it is given, also if that is too bright."""
    pipe = Pipeline(plain)
    mel = torch.rand(2, 64, 16) * (LOG_MAX - LOG_MIN) + LOG_MIN
    given = []

    def decode_to(image):
        pipe.vae.decode = lambda z: given.append(z) or types.SimpleNamespace(sample=image)
        return pipe.decode(torch.ones(2, 4, 8, 2))

    torch.testing.assert_close(decode_to(mel_to_image(mel)), mel, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[0], torch.ones(2, 4, 8, 2) / 0.18215)
    harsh = decode_to(3 * mel_to_image(mel))
    assert harsh.max() == pytest.approx(LOG_MAX) and harsh.min() == pytest.approx(LOG_MIN)


def test_a_length_that_is_no_multiple(plain):
    assert Pipeline(plain).latent_shape == (4, 8, 8)
    assert Pipeline(plain, seconds=10.24).latent_shape == (4, 8, 128)
    with pytest.raises(InputError, match="--seconds 1.0: not a multiple of 0.08 s"):
        Pipeline(plain, seconds=1.0)


# ---- finding a model ---------------------------------------------------------------------------

TEACHER = [
    "condition_config.json", "condition_adapter_0/condition_adapter.pt",
    "scheduler/scheduler_config.json", "text_encoder_0/config.json",
    "text_encoder_0/model.safetensors", "text_encoder_0/vocab.json", "text_encoder/config.json",
    "text_encoder/pytorch_model.bin", "tokenizer/merges.txt", "tokenizer/vocab.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.bin", "vocoder/config.json", "vocoder/vocoder.pt"]
STUDENT = ["config.json", "swiftaudio.json", "diffusion_pytorch_model.safetensors"]
OTHERS = [
    "README.md", ".gitattributes", "big.ckpt", "x.png", "model_index.json",
    "safety_checker/config.json", "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
    "text_encoder/model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
    "assets/config.json", "feature_extractor/preprocessor_config.json"]


@pytest.fixture
def hub(plain, monkeypatch):
    """A hub with one repository; what is downloaded of it goes into the list."""
    asked, downloaded = [], []

    def download(name, **patterns):
        asked.append(name)
        downloaded[:] = filter_repo_objects(TEACHER + STUDENT + OTHERS, **patterns)
        return str(plain)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked, downloaded


def test_only_files_that_are_read_are_downloaded(hub, plain):
    asked, downloaded = hub
    assert find("someone/model-1.5") == plain and asked == ["someone/model-1.5"]
    assert downloaded == TEACHER + STUDENT


def test_a_student_s_teacher_comes_without_its_unet_s_weights(hub):
    find("someone/model", skip=["unet/diffusion*"])
    assert "unet/config.json" in hub[1]
    assert set(TEACHER) - set(hub[1]) == {"unet/diffusion_pytorch_model.safetensors"}


def test_names_and_folders(hub, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/model").mkdir(parents=True)
    assert find("tiny") == TINY and find(plain) == plain and find("user/model").is_dir()
    for name in ("./nowhere", "nowhere", "/no/where", "a/b/c", "~/x", "a/", "../x"):
        with pytest.raises(InputError, match="no such folder"):
            find(name)
    assert not hub[0]                                           # the hub was not asked


def test_no_network_and_no_such_name(monkeypatch):
    def fail(*args, **kw):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="someone/model: .*ConnectionError.* pass its folder"):
        find("someone/model")


def test_settings(plain, tmp_path):
    assert read_settings(plain) == {"seconds": 0.64} and read_settings(tmp_path) == {}
    (tmp_path / "swiftaudio.json").write_text("{")
    with pytest.raises(InputError, match="swiftaudio.json: is not JSON"):
        read_settings(tmp_path)


def test_a_device_that_is_not_there():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device quantum: not usable here") as e:
        pick_device("quantum")
    assert "\n" not in str(e.value)


# ---- what can be wrong with a model -------------------------------------------------------------

@pytest.mark.parametrize("part", ["vae", "vocoder", "tokenizer", "text_encoder", "scheduler"])
def test_missing_part(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(InputError, match=f"lacks {part}/"):
        Pipeline(broken)


@pytest.mark.parametrize("part, file", [
    ("unet", "diffusion_pytorch_model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "model.safetensors"), ("vocoder", "vocoder.pt"),
    ("tokenizer", "vocab.json"), ("scheduler", "scheduler_config.json")])
def test_files_that_are_cut_short_or_missing(broken, part, file):
    path = broken / part / file

    def load():
        Pipeline(broken)
        load_unet(broken)

    for damage in (lambda: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
                   path.unlink):
        damage()
        with pytest.raises(InputError) as e:
            load()
        assert f"{broken}/{part}" in str(e.value) and "\n" not in str(e.value)


def test_weights_that_lack_a_tensor_are_refused(broken):
    """The libraries would leave it random."""
    for part, load in (("unet", load_unet), ("vae", Pipeline), ("text_encoder", Pipeline)):
        path = next((broken / part).glob("*.safetensors"))
        whole = path.read_bytes()
        drop_a_tensor(path)
        with pytest.raises(InputError, match=f"{part}: .*lacks? 1 "):
            load(broken)
        path.write_bytes(whole)


def drop_a_tensor(path):
    state = load_file(path)
    state.popitem()
    save_file(state, path, {"format": "pt"})


def test_v_prediction_is_refused(broken):
    edit(broken / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(InputError, match="v_prediction"):
        Pipeline(broken)
