"""Where a model is found, its text in both layouts, sampling, the Python API, and bad folders."""
import json
import shutil
import types
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from conftest import write_checkpoint
from diffusers import UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPTextModel

import model
import sample
import train
from data import InputError
from extras.audio import mel_to_image
from losses import guided, one_step
from model import TINY, Decoder, TextEncoder, denoiser, load_scheduler, load_unet


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuses(load, *args, says, **kw):
    with pytest.raises(InputError, match=says) as e:
        load(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def write_student(folder, teacher, **more):
    """Write a student as train.py does, with random weights."""
    torch.manual_seed(1)
    UNet2DConditionModel.from_config(load_unet(teacher).config).save_pretrained(folder)
    about = {"teacher": str(teacher), "timestep": 999, "seconds": 0.64}
    (folder / "swiftaudio.json").write_text(json.dumps({**about, **more}))
    return folder


@pytest.fixture(scope="module")
def student(plain, tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("run") / "student", plain)


# ---- text, in both layouts ---------------------------------------------------------------------

def test_text_of_the_plain_layout(plain):
    encode_text = TextEncoder(plain)
    tokenizer = encode_text.tokenizer
    ids = tokenizer("dog", return_tensors="pt").input_ids[0].tolist()
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])
    expected = CLIPTextModel.from_pretrained(plain / "text_encoder")(padded).last_hidden_state
    torch.testing.assert_close(encode_text(["dog"]), expected)
    both = encode_text(["dog", ""])
    assert both.shape == (2, 77, 24) and not torch.equal(both[0], both[1])
    assert not any(p.requires_grad for p in encode_text.parameters())


def test_text_of_the_adapter_layout(adapter):
    encode_text = TextEncoder(adapter)
    ids = encode_text.tokenizer("a dog", return_tensors="pt").input_ids
    hidden = CLIPTextModel.from_pretrained(adapter / "text_encoder_0")(ids).last_hidden_state
    state = torch.load(adapter / "condition_adapter_0/condition_adapter.pt")
    hidden = F.pad(hidden, (0, 0, 0, 77 - ids.shape[1]))
    projected = hidden @ state["proj.weight"].T + state["proj.bias"]
    expected = F.layer_norm(projected, (24,), state["norm.weight"], state["norm.bias"])
    both = encode_text(["a dog", "a much longer dog"])
    torch.testing.assert_close(both[:1], expected, rtol=1e-4, atol=1e-5)
    assert encode_text([""]).abs().max() == 0


def test_the_older_layout_s_folders_are_those_its_config_names(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "renamed")
    (folder / "text_encoder_0").rename(folder / "words")
    (folder / "condition_adapter_0").rename(folder / "behind")
    path = folder / "condition_config.json"
    listed, = json.loads(path.read_text())
    names = {"text_encoder_name": "words", "condition_adapter_name": "behind"}
    path.write_text(json.dumps([{**listed, **names}]))
    assert torch.equal(TextEncoder(folder)(["a dog"]), TextEncoder(adapter)(["a dog"]))
    for name in names:
        path.write_text(json.dumps([{**listed, **names, name: "elsewhere"}]))
        refuses(TextEncoder, folder, says="lacks elsewhere/")
    for several in ([listed] * 2, [], [{"condition_adapter_name": "condition_adapter_0"}]):
        path.write_text(json.dumps(several))
        refuses(TextEncoder, folder, says="must list one text_encoder_name")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_text_encoder_is_not_rounded_to_the_dtype_of_its_config(broken, plain, key):
    path = broken / "text_encoder/config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    path.write_text(json.dumps({**config, key: "float16"}))
    assert CLIPTextModel.from_pretrained(broken / "text_encoder").dtype == torch.float16
    rounded, exact = TextEncoder(broken)(["dog"]), TextEncoder(plain)(["dog"])
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact)


def test_words_that_do_not_fit_are_told(plain):
    long = "dog " * 74 + "barks"
    found = TextEncoder(plain).unread([long, "fine", "犬"])      # CLIP knows every word, in pieces
    assert list(found) == [long]
    assert "81 tokens, 77 fit; cut" in found[long] and "rks" in found[long]


def test_words_that_the_teacher_never_saw_are_told():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    encode_text = types.SimpleNamespace(tokenizer=tokenizer, tokens=24)
    prompts = ["a dog barks twice", "", "rain falls", "a Dog barks, in a cathedral"]
    (prompt, why), = TextEncoder.unread(encode_text, prompts).items()
    assert prompt == prompts[3] and "'in', 'cathedral'" in why and "Dog" not in why.split("seen")[1]


# ---- the schedule, and sampling against diffusers' pipeline -------------------------------------

def test_the_schedule(plain):
    theirs = diffusers.PNDMScheduler.from_pretrained(plain / "scheduler")
    alpha, sigma = model.noise_schedule(load_scheduler(plain))
    assert alpha.shape == sigma.shape == (1000,) and alpha.dtype == torch.float32
    torch.testing.assert_close(alpha ** 2, theirs.alphas_cumprod)
    torch.testing.assert_close(sigma ** 2, 1 - theirs.alphas_cumprod)


@pytest.mark.parametrize("guidance", [1, 4.5])
def test_many_steps_equal_the_pipeline(plain, guidance):
    encode_text, unet, scheduler = TextEncoder(plain), load_unet(plain), load_scheduler(plain)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.StableDiffusionPipeline(
        vae=Decoder(plain).vae, text_encoder=encode_text.clip, tokenizer=encode_text.tokenizer,
        unet=unet, scheduler=diffusers.PNDMScheduler.from_pretrained(plain / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(["dog", "a cat"], latents=z, num_inference_steps=10,
                      guidance_scale=guidance, output_type="latent").images
    eps = guided(denoiser(unet), encode_text([""]), guidance)
    mine = model.many_steps(eps, z, encode_text(["dog", "a cat"]), scheduler, 10)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    again = model.many_steps(eps, z, encode_text(["dog", "a cat"]), scheduler, 10)
    assert torch.equal(again, mine)                             # PNDM's history is not kept


def test_steps_are_refused_where_they_would_not_start_from_noise_at_T_or_just_below(plain):
    scheduler = load_scheduler(plain)                           # PNDM, "leading" spacing
    z, seen = torch.randn(1, 4, 8, 8), []

    def eps(x, t, text):
        seen.append(t.item())
        return x

    for steps, first in ((2, 501), (6, 831), (9, 889), (1000, 1000)):   # of 0 to 999
        refuses(model.many_steps, eps, z, None, scheduler, steps,
                says=f"{steps} steps: .* t = {first}, not")
    assert not seen
    model.many_steps(eps, z, None, scheduler, 10)
    assert seen[0] == 901
    seen.clear()
    model.many_steps(eps, z, None, load_scheduler(TINY), 2)
    assert seen == [999, 499]                                   # "trailing"


@pytest.mark.parametrize("changes, says", [
    ({"prediction_type": "v_prediction"}, "PNDMScheduler.* prediction_type v_prediction"),
    ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "alpha_T.* = 0;.* above 0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler.* = 0;"),
    ({"_class_name": "FlowMatchHeunDiscreteScheduler", "prediction_type": None}, "type None"),
    ({"_class_name": "NoSuchScheduler"}, "NoSuchScheduler")])
def test_schedulers_that_this_method_cannot_use(broken, changes, says):
    edit(broken / "scheduler/scheduler_config.json", **changes)
    assert f"{broken}/scheduler: " in refuses(load_scheduler, broken, says=says)


# ---- latents to audio --------------------------------------------------------------------------

def test_decoding_undoes_the_image_of_a_mel(plain):
    """With a VAE that returns one image whatever it is given, also if that is too bright."""
    decoder = Decoder(plain)
    assert not decoder.vae.training and not any(p.requires_grad for p in decoder.parameters())
    mel = torch.rand(2, 64, 16) * (model.LOG_MAX - model.LOG_MIN) + model.LOG_MIN
    given = []

    def decode_to(image):
        decoder.vae.decode = lambda z: given.append(z) or types.SimpleNamespace(sample=image)
        return decoder.decode(torch.ones(2, 4, 8, 2))

    torch.testing.assert_close(decode_to(mel_to_image(mel)), mel, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given[0], torch.ones(2, 4, 8, 2) / 0.18215)
    harsh = decode_to(3 * mel_to_image(mel))
    assert harsh.max() == pytest.approx(model.LOG_MAX)
    assert harsh.min() == pytest.approx(model.LOG_MIN)


def test_a_length_that_is_no_multiple(plain):
    shape = model.latent_shape
    assert shape(plain) == (4, 8, 8) and shape(plain, 10.24) == (4, 8, 128)
    refuses(shape, plain, 1.0, says="--seconds 1.0: not a multiple of 0.08 s")


# ---- the Python API ------------------------------------------------------------------------------

def test_a_system_makes_what_sample_py_writes(student, plain, tmp_path):
    flags = ["--prompt", "a dog", "--n", "2", "--precision", "fp32", "--device", "cpu"]
    for name, system, more in (
            ("student", model.load_student(student, precision="fp32", device="cpu"), []),
            ("teacher", model.load_teacher(plain, 10, precision="fp32", device="cpu"),
             ["--teacher_steps", "10", "--seed", "2"])):
        sample.main([*flags, "--student", str(student), "--out", str(tmp_path / name),
                     "--batch_size", "1", *more])
        seed = 2 if more else 0
        for k in range(2):
            wav = system(["a dog"], seed=seed, k=k)
            assert wav.shape == (1, 10240) and wav.dtype == np.float32 and np.abs(wav).max() <= 1
            soundfile.write(tmp_path / "ours.wav", wav[0], model.RATE, "PCM_16")
            written = (tmp_path / name / f"a-dog_seed{seed}_{k}.wav").read_bytes()
            assert (tmp_path / "ours.wav").read_bytes() == written and wav.any()
    both = system(["a dog", "rain"], seed=2, k=1)
    assert both.shape == (2, 10240) and np.abs(both[0] - wav[0]).max() < 1e-3


@pytest.mark.parametrize("t", [999, 625])
def test_a_student_is_eq_1(plain, tmp_path, t):
    folder = write_student(tmp_path / "s", plain, parameterization="eps", timestep=t)
    system = model.load_student(str(folder), precision="fp32", device="cpu")
    z_T, text = system.noise([0, 3], 7), TextEncoder(plain)(["dog", "a cat"])
    expected = one_step(denoiser(load_unet(folder, "")), z_T, text,
                        *model.noise_schedule(load_scheduler(plain)), t)
    assert torch.equal(system.latents(z_T, system.encode_text(["dog", "a cat"])), expected)
    assert system.folder == plain and system.seconds == 0.64 and system.shape == (4, 8, 8)
    assert system.about == {"student": str(folder), "folder": str(folder), "steps": 1,
                            "dtype": "torch.float32"}


def test_one_step_of_the_teacher_is_eq_1_guided(plain):
    """The teacher's own UNet and guidance, no scheduler."""
    for given, guidance in ((None, 7.5), (3, 3), (1, 1)):
        system = model.load_teacher(plain, 1, given, precision="fp32", device="cpu")
        z_T, text = system.noise([0, 3], 7), system.encode_text(["dog", "a cat"])
        eps = guided(denoiser(load_unet(plain)), system.encode_text([""]), guidance)
        expected = one_step(eps, z_T, text, *model.noise_schedule(load_scheduler(plain)))
        assert torch.equal(system.latents(z_T, text), expected)
        assert system.about == {"teacher": str(plain), "steps": 1, "guidance": guidance,
                                "dtype": "torch.float32"}


def test_latents_have_a_gradient_to_the_noise(student, plain):
    for system in (model.load_student(student, precision="fp32", device="cpu"),
                   model.load_teacher(plain, 10, 2, precision="fp32", device="cpu")):
        text, z_T = system.encode_text(["dog"]), system.noise([0], 0).requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        w, d = torch.randn(2, *z_T.shape, generator=generator)
        gradient, = torch.autograd.grad((system.latents(z_T, text) * w).sum(), z_T)
        assert gradient.isfinite().all() and gradient.any()
        with torch.no_grad():
            ahead, behind = (system.latents(z_T + h * d, text) for h in (1e-2, -1e-2))
        slope = ((ahead - behind).double() * w).sum() / 2e-2
        assert (gradient * d).sum().item() == pytest.approx(slope.item(), rel=0.02)


def test_a_system_has_the_length_and_the_precision_that_are_asked_for(student, monkeypatch):
    monkeypatch.setattr(model, "sampling_dtype", lambda device: torch.bfloat16)
    system = model.load_student(student, seconds=1.28, device="cpu")
    assert system.shape == (4, 8, 16) and system(["a dog"]).shape == (1, 20480)
    assert system.about["dtype"] == "torch.bfloat16"
    refuses(model.load_student, student, seconds=1.3, says="--seconds 1.3")

    mels = []                           # the UNet and the VAE in bf16, what is between in fp32
    for precision, dtype in (("fp32", torch.float32), ("auto", torch.bfloat16)):
        system = model.load_student(student, precision=precision, device="cpu")
        mel, wavs = system.make(["dog", "a cat"], system.noise([0, 3], 7))
        assert system.unet.dtype == system.decoder.vae.dtype == dtype
        assert mel.dtype == torch.float32 and wavs.dtype == np.float32 and wavs.shape == (2, 10240)
        mels.append(mel)
    assert 0 < (mels[0] - mels[1]).abs().mean() < 0.1 * mels[0].std()


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_fp32_is_not_tf32(student, tf32, precision):
    model.load_student(student, precision=precision, device="cpu")
    assert [switch.allow_tf32 for switch in tf32] == 2 * [precision == "auto"]


def test_what_cannot_be_loaded(student, plain, tmp_path):
    load, other = model.load_student, write_checkpoint(tmp_path / "other", dim=32)
    refuses(load, "./nowhere", says="nowhere: no such folder")
    refuses(load, plain / "vae", says="neither a student of train.py")
    lost = write_student(tmp_path / "lost", plain)
    edit(lost / "swiftaudio.json", teacher=str(tmp_path / "gone"))
    refuses(load, lost, says="gone: no such folder.*as the teacher of .*lost, pass --teacher")
    refuses(load, write_student(tmp_path / "x0", plain, parameterization="direct"),
            says="x0: predicts no eps")
    for wrong in ({"decoder": "small"}, {"precision": "fp16"}):
        with pytest.raises(KeyError):
            load(student, device="cpu", **wrong)
    refuses(load, student, decoder="fast", says="decoder: not there; .*recipes.decoder")
    refuses(load, student, device="quantum", says="--device quantum: not usable here")
    refuses(load, student, other, says="cross_attention_dim 24, the teacher has 32")
    refuses(load_unet, student, "", fits=other, says="does not fit its teacher")
    assert load_unet(student, "", fits=plain).config.cross_attention_dim == 24


def test_a_student_that_is_not_finite_makes_nothing(plain, tmp_path):
    folder = write_student(tmp_path / "s", plain)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"][0] = torch.nan
    save_file(state, path, {"format": "pt"})
    refuses(model.load_student(folder, device="cpu"), ["rain"], says=f"{folder}.*not finite")
    refuses(sample.main, ["--student", str(folder), "--prompt", "rain", "--device", "cpu", "--out",
                          str(tmp_path / "o")], says="not finite")
    assert not (tmp_path / "o").exists()


# ---- finding a model ---------------------------------------------------------------------------

TEACHER = [
    "condition_config.json", "condition_adapter_0/condition_adapter.pt",
    "scheduler/scheduler_config.json", "text_encoder_0/config.json",
    "text_encoder_0/model.safetensors", "text_encoder_0/vocab.json", "text_encoder/config.json",
    "text_encoder/pytorch_model.bin", "tokenizer/merges.txt", "tokenizer/vocab.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vocoder/config.json", "swiftaudio.json"]
TO_SOUND = ["vae/diffusion_pytorch_model.bin", "vocoder/vocoder.pt"]
OF_STUDENT = [
    "config.json", "diffusion_pytorch_model.safetensors", "decoder/config.json",
    "decoder/diffusion_pytorch_model.safetensors"]
OTHERS = [
    "README.md", ".gitattributes", "big.ckpt", "x.png", "model_index.json", "checkpoint.pt",
    "safety_checker/config.json", "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
    "text_encoder/model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
    "decoder/checkpoint.pt", "assets/config.json", "feature_extractor/preprocessor_config.json"]


@pytest.mark.parametrize("files, skip, downloaded", [
    (model.TO_TRAIN, (), TEACHER),
    (model.TO_HEAR, (), TEACHER + TO_SOUND),
    (model.TO_HEAR, ["unet/diffusion*"], set(TEACHER + TO_SOUND)
     - {"unet/diffusion_pytorch_model.safetensors"}),
    (model.STUDENT, (), [*OF_STUDENT, "swiftaudio.json", "unet/config.json",
                   "unet/diffusion_pytorch_model.safetensors"]),
    (model.SETTINGS, (), ["swiftaudio.json"])])
def test_only_files_that_are_read_are_downloaded(plain, monkeypatch, files, skip, downloaded):
    def download(name, **patterns):
        assert name == "someone/model-1.5"
        found.update(filter_repo_objects(TEACHER + TO_SOUND + OF_STUDENT + OTHERS, **patterns))
        return str(plain)

    found = set()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model.find("someone/model-1.5", files, skip) == plain and found == set(downloaded)


@pytest.fixture
def hub(plain, student, tmp_path, monkeypatch):
    """A hub with two models, which downloads into a folder beside it."""
    there = {"someone/teacher": plain, "someone/student": student}

    def download(name, **patterns):
        source, folder = there[name], tmp_path / name
        files = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def test_training_needs_no_vae_and_no_vocoder(hub, captions):
    run = train.start(train.parse_args([
        "--teacher", "someone/teacher", "--captions", str(captions), "--device", "cpu"]))
    for part in ("vae", "vocoder"):
        assert [p.name for p in (hub / "someone/teacher" / part).iterdir()] == ["config.json"]
    assert run.shape == (4, 8, 8) and run.folder == hub / "someone/teacher"


def test_a_student_of_the_hub_needs_no_unet_of_its_teacher(hub, student):
    flags = dict(precision="fp32", device="cpu")
    there = model.load_student("someone/student", "someone/teacher", **flags)
    assert [p.name for p in (hub / "someone/teacher/unet").iterdir()] == ["config.json"]
    assert np.array_equal(there(["rain"]), model.load_student(student, **flags)(["rain"]))


def test_names_and_folders(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/model").mkdir(parents=True)
    assert model.find("tiny", model.TO_HEAR) == TINY and model.find(plain, model.TO_HEAR) == plain
    assert model.find("user/model", model.TO_HEAR) == Path("user/model")
    for name in ("./nowhere", "nowhere", "/no/where", "a/b/c", "~/x", "a/", "../x"):
        refuses(model.find, name, model.TO_HEAR, says="no such folder")


def test_what_the_hub_says_is_told(monkeypatch):
    def fail(*args, **kw):
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            "Cannot find an appropriate\ncached snapshot folder: unet/config.json is missing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refuses(model.find, "someone/model", model.TO_HEAR, says="LocalEntryNotFoundError: Cannot find "
            "an appropriate cached snapshot folder: unet/config.json is missing.*pass a folder")


def test_settings(plain, tmp_path):
    assert model.read_settings(plain) == {"seconds": 0.64} and model.read_settings(tmp_path) == {}
    (tmp_path / "swiftaudio.json").write_text("{")
    refuses(model.read_settings, tmp_path, says="swiftaudio.json: is not JSON")


# ---- what can be wrong with a model -------------------------------------------------------------

def load_all(folder):
    TextEncoder(folder), load_scheduler(folder), Decoder(folder), load_unet(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "vocoder", "tokenizer", "text_encoder",
                                  "scheduler"])
def test_missing_part(broken, part):
    shutil.rmtree(broken / part)
    refuses(load_all, broken, says=f"lacks {part}/")


@pytest.mark.parametrize("part, file, missing", [
    ("unet", "diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("text_encoder", "model.safetensors", "no file named .*model.safetensors"),
    ("vocoder", "vocoder.pt", "vocoder.pt"),
    ("tokenizer", "vocab.json", ""),
    ("scheduler", "scheduler_config.json", "scheduler_config.json")])
def test_files_that_are_cut_short_or_missing(broken, part, file, missing):
    path = broken / part / file
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    refuses(load_all, broken, says=f"{broken}/{part}")
    path.unlink()
    refuses(load_all, broken, says=f"{broken}/{part}.*{missing}")


def test_weights_with_other_keys_are_named(broken):
    path = broken / "vocoder/vocoder.pt"
    generator = torch.load(path)["generator"]
    bias = generator.pop("conv_pre.bias")
    torch.save({"generator": generator}, path)
    refuses(Decoder, broken, says="vocoder: cannot be loaded .*Missing key.*conv_pre.bias")
    torch.save({"generator": {**generator, "conv_pre.bias": bias, "extra": bias}}, path)
    refuses(Decoder, broken, says="vocoder: cannot be loaded .*Unexpected key.*extra")


def test_weights_that_lack_a_tensor_are_refused(broken):
    """The libraries would leave it random."""
    for part, load in (("unet", load_unet), ("vae", Decoder), ("text_encoder", TextEncoder)):
        path = next((broken / part).glob("*.safetensors"))
        whole, state = path.read_bytes(), load_file(path)
        name, _ = state.popitem()
        save_file(state, path, {"format": "pt"})
        refuses(load, broken, says=f"{part}: cannot be loaded .*lacks weights, .*'{name}'")
        path.write_bytes(whole)
