"""Where a model is found, its text in both layouts, sampling, the Python API, and bad folders."""
import json
import shutil
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import VOCODER
from huggingface_hub.utils import filter_repo_objects
from runs import change_unet, edit, refuses, write_student
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModel

import model
import train
from extras.audio import mel_to_image
from extras.random_teacher import write_vocoder
from extras.teacher import load_teacher
from losses import one_step
from model import TINY, Decoder, TextEncoder, denoiser, load_scheduler, load_unet


@pytest.fixture(scope="module")
def student(plain, tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("run") / "student", plain)


# ---- text, in both layouts ---------------------------------------------------------------------

def test_text_of_the_adapter_layout(adapter, tmp_path):
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
    assert not any(p.requires_grad for p in encode_text.parameters())

    folder = shutil.copytree(adapter, tmp_path / "renamed")
    path = folder / "condition_config.json"
    listed, = json.loads(path.read_text())
    for name in ("text_encoder_name", "condition_adapter_name"):    # its folders' names are free
        (folder / listed[name]).rename(folder / name)
        refuses(TextEncoder, folder, says=f"{listed[name]}: is missing")
        listed[name] = name
        path.write_text(json.dumps([listed]))
    assert torch.equal(TextEncoder(folder)(["a dog"]), encode_text(["a dog"]))
    for several in ([listed] * 2, [], [{"condition_adapter_name": "condition_adapter_0"}]):
        path.write_text(json.dumps(several))
        refuses(TextEncoder, folder, says="must list one text_encoder_name")


def test_the_text_encoder_is_not_rounded_to_the_dtype_of_its_config(broken, plain):
    edit(broken / "text_encoder/config.json", dtype="float16")
    assert CLIPTextModel.from_pretrained(broken / "text_encoder").dtype == torch.float16
    rounded, exact = TextEncoder(broken)(["dog"]), TextEncoder(plain)(["dog"])
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact)


def test_words_that_do_not_fit_or_were_never_seen_are_told(plain):
    long = "dog " * 74 + "barks"
    found = TextEncoder(plain).unread([long, "fine", "犬"])      # CLIP knows every word, in pieces
    assert list(found) == [long]
    assert found[long] == f"{long[:80]!r}: 81 tokens, 77 fit"
    unread = TextEncoder(TINY).unread
    prompt = "a Dog barks, in a cathedral"
    found = unread(["a dog barks twice", "", "rain falls", prompt])
    assert found == {prompt: f"{prompt!r}: the teacher has never seen 'in', 'cathedral'"}
    for huge in ("x" * 10_000, "dog " * 2500, "zebra " * 2000):
        why, = unread([huge]).values()
        assert ("never seen" in why or "24 fit" in why) and len(why) < 400
    refuses(unread, ["rain", "a dog \ud83d barks"], says="half a character")
    assert unread([]) == {}


# ---- the schedule, and sampling against diffusers' pipeline -------------------------------------

@pytest.mark.parametrize("changes, says", [
    ({"prediction_type": "v_prediction"}, "PNDMScheduler.* prediction_type v_prediction"),
    ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "alpha_T.* = 0;.* above 0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler.* = 0;"),
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


# ---- the Python API ------------------------------------------------------------------------------

def test_waveforms_of_prompts(plain):
    """What test_sample.py compares with WAVs; a prompt that comes twice has two clips."""
    system = load_teacher(plain, 10, precision="fp32", device="cpu")
    wavs = system(["rain", "a dog", "rain"], seed=2, k=1)
    assert wavs.shape == (3, 10240) and wavs.dtype == np.float32 and np.abs(wavs).max() <= 1
    for wav, (prompt, k) in zip(wavs, (("rain", 1), ("a dog", 1), ("rain", 2))):
        assert np.abs(system(prompt, seed=2, k=k)[0] - wav).max() < 1e-3
    assert np.abs(wavs[0] - wavs[2]).max() > 0.01


@pytest.mark.parametrize("t", [999, 625])
def test_a_student_is_eq_1(plain, tmp_path, t):
    folder = write_student(tmp_path / "s", plain, parameterization="eps", timestep=t)
    system = model.load_student(str(folder), precision="fp32", device="cpu")
    z_T, text = system.noise([0, 3], 7), TextEncoder(plain)(["dog", "a cat"])
    expected = one_step(denoiser(load_unet(folder, "")), z_T, text,
                        *model.noise_schedule(load_scheduler(plain)), t)
    assert expected.dtype == torch.float32
    assert torch.equal(system.latents(z_T, system.encode_text(["dog", "a cat"])), expected)
    assert system.folder == plain and system.seconds == 0.64 and system.shape == (4, 8, 8)
    assert system.about == {"student": str(folder), "folder": str(folder), "steps": 1,
                            "dtype": "torch.float32"}


def test_a_system_has_the_length_and_the_precision_that_are_asked_for(student, tf32, monkeypatch):
    monkeypatch.setattr(model, "sampling_dtype", lambda device: torch.bfloat16)
    system = model.load_student(student, seconds=1.28, device="cpu")
    assert system.shape == (4, 8, 16) and system(["a dog"]).shape == (1, 20480)
    assert system.about["dtype"] == "torch.bfloat16"
    refuses(model.load_student, student, seconds=1.3, says="--seconds 1.3")

    mels = []                           # the UNet and the VAE in bf16, what is between in fp32
    for precision, dtype in (("auto", torch.bfloat16), ("fp32", torch.float32)):
        system = model.load_student(student, precision=precision, device="cpu")
        assert [switch.allow_tf32 for switch in tf32] == 2 * [precision == "auto"]
        mel, wavs = system.make(["dog", "a cat"], system.noise([0, 3], 7))
        assert system.unet.dtype == system.decoder.vae.dtype == dtype
        assert mel.dtype == torch.float32 and wavs.dtype == np.float32 and wavs.shape == (2, 10240)
        mels.append(mel)
    assert 0 < (mels[0] - mels[1]).abs().mean() < 0.1 * mels[1].std()


def test_what_cannot_be_loaded_or_is_not_finite(student, plain, tmp_path, monkeypatch):
    load = model.load_student
    refuses(load, "./nowhere", says="nowhere: no such folder")
    refuses(load, plain / "vae", says="neither a student of train.py")
    lost = write_student(tmp_path / "lost", plain)
    edit(lost / "swiftaudio.json", teacher=str(tmp_path / "gone"))
    refuses(load, lost, says="gone: no such folder.*pass another, as --teacher if")
    (tmp_path / "paths.json").write_text(json.dumps({"teacher": str(plain)}))
    assert load(lost, device="cpu").folder == plain         # moved, and paths.json says where to
    for wrong in ({"decoder": "small"}, {"precision": "fp16"}):
        with pytest.raises(KeyError):
            load(student, device="cpu", **wrong)
    refuses(load, student, decoder="fast", says="no small decoder or vocoder; recipes/ make")
    refuses(load, student, device="quantum", says="--device quantum: not usable here")
    refuses(load, student, TINY, says="cross_attention_dim is 24, .* need 128")
    state = load_file(lost / "diffusion_pytorch_model.safetensors")
    state["conv_out.bias"][0] = torch.nan
    save_file(state, lost / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    refuses(load(lost, device="cpu"), ["rain"], says=f"{lost}.*not finite")
    monkeypatch.chdir(tmp_path)
    refuses(load, says="out/student: no student there yet")


# ---- finding a model ---------------------------------------------------------------------------

NOT_READ = [
    "README.md", ".gitattributes", "big.ckpt", "model_index.json", "checkpoint.pt", "x/config.json",
    "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.bin", "text_encoder/model.fp16.safetensors",
    "diffusion_pytorch_model.non_ema.safetensors", "decoder/checkpoint.pt"]


@pytest.fixture
def hub(plain, adapter, student, tmp_path, monkeypatch):
    """A hub with three models, which downloads into a folder."""
    there = {"me/teacher-1.5": plain, "me/older": adapter, "me/student": student}

    def download(name, **patterns):
        source, folder = there[name], tmp_path / name
        files = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        for file in filter_repo_objects([*files, *NOT_READ], **patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)       # of NOT_READ, there is none
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def test_what_training_reads_is_downloaded(hub, captions):
    flags = ["--captions", str(captions), "--device", "cpu", "--teacher"]
    run = train.start(train.parse_args([*flags, "me/teacher-1.5"]))
    for part in ("vae", "vocoder"):
        assert [p.name for p in (hub / "me/teacher-1.5" / part).iterdir()] == ["config.json"]
    assert run.shape == (4, 8, 8) and run.folder == hub / "me/teacher-1.5"


def test_what_sampling_reads_is_downloaded(hub, student, adapter):
    flags = dict(precision="fp32", device="cpu")
    there = model.load_student("me/student", "me/teacher-1.5", **flags)
    assert [p.name for p in (hub / "me/teacher-1.5/unet").iterdir()] == ["config.json"]
    assert np.array_equal(there(["rain"]), model.load_student(student, **flags)(["rain"]))
    for complete in (load_teacher("me/older", 1, **flags),
                     model.load_student("me/older", **flags)):
        assert complete.folder == hub / "me/older" and complete(["rain"]).any()


def test_names_and_folders(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/model").mkdir(parents=True)
    assert model.find("tiny", model.TO_HEAR) == TINY and model.find(plain, model.TO_HEAR) == plain
    assert model.find("user/model", model.TO_HEAR) == Path("user/model")
    for name in ("./nowhere", "nowhere", "a/b/c", "~/x", "a/", "me/model"):
        says = refuses(model.find, name, model.TO_HEAR, says="no such folder, nor found on the hub")
        assert "Error: " in says and "; pass another" in says       # and what the hub said


def test_settings(broken):
    path = broken / "swiftaudio.json"
    assert model.read_settings(broken) == {"seconds": 0.64}
    assert model.latent_shape(broken) == (4, 8, 8)
    for content, says in (("{", "is not JSON"), ("[1]", "must be an object"),
                          ('{"seconds": "x"}', "must be an object")):
        path.write_text(content)
        refuses(model.read_settings, broken, says=f"swiftaudio.json: {says}")
    path.unlink()
    assert model.read_settings(broken) == {} and model.latent_shape(broken) == (4, 8, 128)


# ---- what can be wrong with a model -------------------------------------------------------------

def load_all(folder):
    TextEncoder(folder), load_scheduler(folder), Decoder(folder), load_unet(folder)


@pytest.mark.parametrize("part, file, missing", [
    ("unet", "diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model.safetensors", "no file named diffusion_pytorch_model"),
    ("text_encoder", "model.safetensors", "no file named .*model.safetensors"),
    ("vocoder", "vocoder.pt", "vocoder.pt"),
    ("tokenizer", "vocab.json", ""),
    ("scheduler", "scheduler_config.json", "scheduler_config.json")])
def test_a_part_that_is_missing_cut_short_or_a_pointer(broken, part, file, missing):
    path = broken / part / file
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    refuses(load_all, broken, says=f"{broken}/{part}: cannot be loaded .*Error")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuses(load_all, broken, says=f"{broken}/{part}: .*{file} is Git LFS's pointer")
    path.unlink()
    refuses(load_all, broken, says=f"{broken}/{part}.*{missing}")
    shutil.rmtree(broken / part)
    refuses(load_all, broken, says=f"{part}: is missing")


def test_what_a_library_does_not_say_of_weights(broken, monkeypatch):
    name = "diffusion_pytorch_model{}.safetensors".format
    shutil.copy(broken / "unet" / name(""), broken / "unet" / name(".fp16"))
    load_unet(broken)                                       # both are there
    (broken / "unet" / name("")).unlink()
    refuses(load_unet, broken, says=f"in fp16 only, {name('.fp16')}; rename it without .fp16")
    monkeypatch.setattr("os.access", lambda path, mode: False)      # as chmod 0 for any but root
    refuses(load_unet, broken, says="unet: cannot be loaded .config.json: permission denied")


def test_weights_that_lack_a_tensor_are_refused(broken):
    """The libraries would leave it random."""
    for part, load in (("unet", load_unet), ("vae", Decoder), ("text_encoder", TextEncoder)):
        path = next((broken / part).glob("*.safetensors"))
        whole, state = path.read_bytes(), load_file(path)
        name, _ = state.popitem()
        save_file(state, path, {"format": "pt"})
        refuses(load, broken, says=f"{part}: cannot be loaded .*lacks weights, .*'{name}'")
        path.write_bytes(whole)
    path = broken / "vocoder/vocoder.pt"
    generator = torch.load(path)["generator"]
    bias = generator.pop("conv_pre.bias")
    for other, says in (({}, "Missing"), ({"conv_pre.bias": bias, "odd": bias}, "Unexpected")):
        torch.save({"generator": {**generator, **other}}, path)
        refuses(Decoder, broken, says=f"vocoder: cannot be loaded .*{says} key")


OTHER_VOCODER = {**VOCODER, "upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4]}


@pytest.mark.parametrize("change, says", [
    (lambda f: [shutil.copytree(TINY / part, f / part, dirs_exist_ok=True) for part in (
        "text_encoder", "tokenizer")], "cross_attention_dim is 24, .* 128"),
    (lambda f: change_unet(f, f / "unet", in_channels=9), "in_channels is 9, .* 4"),
    (lambda f: change_unet(f, f / "unet", out_channels=8), "out_channels is 8, .* 4"),
    (lambda f: change_unet(f, f / "unet", time_cond_proj_dim=8), "time_cond_proj_dim is 8, "),
    (lambda f: edit(f / "vae/config.json", shift_factor=0.1), "shift_factor is 0.1, "),
    (lambda f: edit(f / "tokenizer/tokenizer_config.json", pad_token=None), "and pad_token None; "),
    (lambda f: edit(f / "tokenizer/vocab.json", zebra=192), "has 193 tokens .* at most the 192 "),
    (lambda f: write_vocoder(f / "vocoder", OTHER_VOCODER), "upsample_rates is 256, .* 160"),
    (lambda f: edit(f / "vocoder/config.json", sampling_rate=22050), "sampling_rate is 22050, ")])
def test_parts_that_do_not_fit_each_other(broken, captions, change, says):
    model.check_fit(broken, load_unet(broken), TextEncoder(broken))
    change(broken)
    refuses(load_teacher, broken, 10, device="cpu", says=f"{broken}: .*{says}")
    flags = ["--teacher", broken, "--captions", captions, "--device", "cpu"]
    refuses(train.start, train.parse_args([*map(str, flags)]), says=f"{broken}: .*{says}")
