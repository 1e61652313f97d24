"""The small decoder and vocoder: distilled, resumed, used in the place of the teacher's."""
import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from conftest import VOCODER, write_checkpoint
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from runs import call, edit, metrics, read_checkpoint, refuses
from safetensors.torch import load_file, save_file

import model
import sample
import train
from data import InputError, caption_at, draw_batch, read_captions
from extras import bench, eval, export
from extras.audio import distance, spectra
from extras.publish import write_card
from extras.random_teacher import write_vocoder
from losses import one_step
from model import LOG_MAX, LOG_MIN, TINY, image_to_mel
from recipes import decoder, vocoder
from tiny import score

SMALL = {"decoder_block_out_channels": [8] * 4, "num_decoder_blocks": [1, 1, 1, 0],
         "out_channels": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(captions, tmp_path_factory):
    """A run of a teacher whose settings have a small decoder and vocoder."""
    teacher = write_checkpoint(tmp_path_factory.mktemp("teacher"))
    own = {"seconds": 0.64, "decoder": SMALL, "train": {"captions": str(captions)},
           "vocoder": {"width": 16, "hidden": 16, "blocks": 1}}
    (teacher / "swiftaudio.json").write_text(json.dumps(own))
    out = tmp_path_factory.mktemp("run")
    call(train.main, "--teacher", teacher, "--captions", captions, "--out_dir", out, *runs.SMALL,
         "--max_steps", 1, "--lora_rank", 2)
    return teacher, out


@pytest.fixture
def student(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "run") / "student"


def distil(student, *flags):
    call(decoder.main, "--student", student, "--clips", 8, "--batch_size", 2, "--max_steps", 2,
         "--device", "cpu", *flags)
    return load_file(student / "decoder" / WEIGHTS)


def test_a_run_is_that_of_its_flags_and_of_its_student(trained, student, captions, monkeypatch):
    """Two steps by hand: which clips of which captions, from where, at which rate."""
    edit(student / "swiftaudio.json", timestep=500)
    seen, loss = [], decoder.decoder_loss
    monkeypatch.setattr(decoder, "decoder_loss", lambda *both: seen.append(
        [x.detach().clone() for x in both]) or loss(*both))
    distil(student, "--seed", 3, "--clips", 6, "--batch_size", 3, "--lr", 1e-3)

    home, texts = trained[0], read_captions(captions)[0]
    alpha, sigma = model.noise_schedule(model.load_scheduler(home))
    vae = AutoencoderKL.from_pretrained(home / "vae")
    z_T = draw_batch(range(6), 3, model.latent_shape(home, 0.64), 0, 1, 999)[0]
    torch.manual_seed(3)
    network = decoder.new_decoder({"decoder": SMALL})
    with torch.no_grad():
        text = model.TextEncoder(home)([caption_at(texts, 3, n) for n in range(6)])
        x0 = one_step(model.denoiser(model.load_unet(student, "")), z_T, text, alpha, sigma,
                      500).half().float()
        images = vae.decode(x0 / vae.config.scaling_factor).sample[:, :1]
        rows = [caption_at(range(6), 3, n) for n in range(6)]
        first = network.decoder(x0[rows[:3]] / network.config.scaling_factor)
    for (_, target), part in zip(seen, (rows[:3], rows[3:]), strict=True):
        torch.testing.assert_close(target, images[part], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(seen[0][0], first, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(images[rows[:3]], images[rows[3:]], rtol=1e-2, atol=3e-2)
    group, = read_checkpoint(student / "decoder")["opts"]["decoder"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3 * 2 / 50 / 2)      # warm-up, and half way to zero


def test_it_learns_the_vae_s_picture_and_the_tiny_world_scores_it(tmp_path, capsys, monkeypatch):
    """The tiny teacher's UNet as a student of itself."""
    monkeypatch.setattr(score, "sheet", lambda *args: Image.new("RGB", (1, 1)))
    student = shutil.copytree(TINY / "unet", tmp_path / "out/student")
    (student / "swiftaudio.json").write_text('{"teacher": "tiny", "step": 0}')
    distil(student, "--captions", TINY.parent / "heldout.csv", "--max_steps", 40)
    score.main([str(student), "--clips", "4"])
    row = json.loads((tmp_path / "out/scores.json").read_text())["small decoder"]
    assert row["FD"] > 0 and 0.1 < row["log-mel error"] < 2.5   # 4.0 after 2 steps, 3.2 after 20
    said = capsys.readouterr().out
    assert f"differ from the VAE's by {row['log-mel error']:.3f} ne" in said
    assert "N = 4 held-out" in said and "N = 512; --all measures them" in said


def test_plain_diffusers_reads_the_folder_and_sample_uses_it_and_says_so(student, tmp_path):
    distil(student)
    network = AutoencoderTiny.from_pretrained(student / "decoder")
    assert [k for k in SMALL if network.config[k] != SMALL[k]] == []
    assert str(student) not in (student / "decoder/config.json").read_text()
    system = model.load_student(str(student), decoder="fast", precision="fp32", device="cpu")
    x0 = torch.randn(2, *system.shape)
    with torch.no_grad():
        image = network.decode(x0).sample
    assert image.shape == (2, 1, 64, 64)
    assert torch.allclose(image_to_mel(image), system.decoder.decode(x0), atol=1e-4)

    for which in ("vae", "fast"):
        call(sample.main, "--student", student, "--prompt", "a dog", "--out", tmp_path / which,
             "--decoder", which, "--device", "cpu")
    rows = [sample.read_manifest(tmp_path / which)[0] for which in ("vae", "fast")]
    assert "decoder" not in rows[0] and rows[1]["decoder"] == str(student / "decoder")
    wavs = [(tmp_path / which / rows[0]["file"]).read_bytes() for which in ("vae", "fast")]
    assert wavs[0] != wavs[1] and len(wavs[0]) == len(wavs[1])


def test_the_loss_by_hand():
    """A flat picture, and one that is louder in every second frame: blocks hold two of each."""
    a, b = torch.full((1, 3, 4, 8), 0.5), torch.full((1, 1, 4, 8), 0.5)
    b[..., ::2] = 0.7
    quiet, loud = (math.exp((v / 2 + 0.5) * (LOG_MAX - LOG_MIN) + LOG_MIN) for v in (0.5, 0.7))
    energies = math.log((quiet + loud) / 2 + 0.01) - math.log(quiet + 0.01)
    assert decoder.decoder_loss(a, b).item() == pytest.approx(0.1 + 0.1 * energies, rel=1e-5)
    b[..., :, :] = 0.5
    b[..., :2, :4] = 0.7                    # one block of four: 2 mels x 4 frames
    energies = math.log(loud + 0.01) - math.log(quiet + 0.01)
    found = decoder.decoder_loss(a, b).item()
    assert found == pytest.approx(0.2 / 4 + 0.1 * energies / 4, rel=1e-5)


def test_its_size_is_taesd_s_without_settings():
    config = decoder.new_decoder({}).config
    assert config.decoder_block_out_channels == (64,) * 4
    assert config.num_decoder_blocks == (3, 3, 3, 1) and config.out_channels == 3
    with pytest.raises(InputError, match="'width'"):
        decoder.new_decoder({"decoder": {"width": 8}})


def test_a_student_of_another_machine_is_told_where_things_are(trained, student, monkeypatch):
    """Its teacher, and captions, which may be in the folder that one is in."""
    (student.parent / "paths.json").unlink()
    monkeypatch.chdir(student.parent)
    Path("mine.csv").write_text("said\na cat\nthe rain\n")
    flags = ["--captions", "./mine.csv", "--teacher", shutil.copytree(trained[0], "teacher")]
    with pytest.raises(InputError, match="no such folder, .*as --teacher"):
        distil(student, *flags[:2], "--caption_column", "said")
    Path("teacher/swiftaudio.json").write_text(json.dumps({"seconds": 0.64, "decoder": SMALL}))
    with pytest.raises(InputError, match="--captions FILE is needed: .* brings none"):
        distil(student, *flags[2:])
    with pytest.raises(InputError, match="--caption_column"):
        distil(student, *flags)
    distil(student, *flags, "--caption_column", "said")


def test_what_cannot_be_is_one_line(trained, student, captions, tmp_path, monkeypatch):
    stops = functools.partial(refuses, distil, student)
    stops("--clips", 1, says="--clips 1: .* --batch_size 2")
    stops("--student", "some/model", says="some/model: must be a folder here")
    wide = shutil.copytree(trained[0], tmp_path / "wide")
    (wide / "swiftaudio.json").write_text(json.dumps({"decoder": {"latent_channels": 8}}))
    stops("--teacher", wide, "--captions", captions, says="wide/.*not fit its VAE: .*4, 8.*4, 4")
    with monkeypatch.context() as patch:
        for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").items():
            patch.setenv(name, value)
        stops(says="one process; start it without torchrun")
    assert not (student / "decoder").exists()               # nothing was written until here

    distil(student)
    before = (student / "decoder/checkpoint.pt").read_bytes()
    stops("--clips", 6, says="clips 8, not 6")
    (tmp_path / "others.txt").write_text("a cat\nthe rain\n")
    stops("--captions", tmp_path / "others.txt", says="captions' text")
    state = load_file(student / WEIGHTS)
    save_file({**state, "conv_in.weight": -state["conv_in.weight"]}, student / WEIGHTS)
    stops(says="student's weights")                         # of as many steps, but another
    assert (student / "decoder/checkpoint.pt").read_bytes() == before
    (student / "decoder/checkpoint.pt").unlink()            # as one of a published student
    stops(says="but no checkpoint to resume from")


# ---- the small vocoder ---------------------------------------------------------------------------

def distil_vocoder(student, *flags):
    """The losses of a run of recipes.vocoder."""
    call(vocoder.main, "--student", student, "--clips", 4, "--batch_size", 1, "--max_steps", 2,
         "--device", "cpu", *flags)
    return [line["loss"] for line in metrics(student / "vocoder")]


def test_the_vocoder_learns(student):
    losses = distil_vocoder(student, "--max_steps", 30, "--lr", 2e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_fast_has_the_small_parts_that_are_there(trained, student, captions, tmp_path):
    """Also in eval's hash, on the card, and in what is exported."""
    load = functools.partial(model.load_student, precision="fp32", device="cpu")
    refuses(load, student, decoder="fast", says="no small decoder or vocoder; recipes/ make")
    made, args = {"vae": load(student)}, SimpleNamespace(teacher_steps=None)
    distil_vocoder(student)
    made["vocoder"] = load(student, decoder="fast")
    assert "- Small vocoder: `--decoder fast`" in write_card(student).read_text()
    x0 = torch.randn(2, *made["vae"].shape)
    mel = made["vae"].decoder.decode(x0)
    assert torch.equal(made["vocoder"].decoder.decode(x0), mel)
    wavs = [system.decoder.vocode(mel) for system in made.values()]
    assert wavs[0].shape == wavs[1].shape and not torch.allclose(*wavs, atol=1e-2)
    _, run, takes, _ = export.parts(made["vocoder"])["vocoder"]
    assert takes == ["mel"] and torch.equal(run(mel), wavs[1])

    distil(student)
    made["both"] = load(student, decoder="fast")
    assert "- Small decoder and vocoder: `--decoder fast`" in write_card(student).read_text()
    assert type(made["both"].decoder.vae) is AutoencoderTiny
    assert torch.equal(made["both"].decoder.vocode(mel), wavs[1])
    new = {"vae": set(), "vocoder": {"vocoder/config.json", "vocoder/model.safetensors"}}
    new["both"] = new["vocoder"] | {"decoder/config.json", f"decoder/{WEIGHTS}"}
    files = {kind: {*eval.files_of(system, args)} for kind, system in made.items()}
    assert {kind: {str(path.relative_to(student)) for path in files[kind] - files["vae"]}
            for kind in new} == new
    refuses(distil_vocoder, student, says="vocoder: holds a run with decoder's weights")

    another = shutil.copytree(trained[0], tmp_path / "another")
    write_vocoder(another / "vocoder", VOCODER | {"upsample_initial_channel": 16})
    shutil.rmtree(student / "decoder")
    refuses(distil_vocoder, student, "--teacher", another, says="holds a run with vocoder's files")
    shutil.copytree(student, another, dirs_exist_ok=True)
    (another / "swiftaudio.json").write_text("{}")
    refuses(distil_vocoder, another, "--captions", captions, says="its vocoder/ is its own")


@pytest.mark.parametrize("own, says", [({"n_fft": 500}, "n_fft is no multiple of 160"), (8, "8 is"),
                                       ({"depth": 3}, "'depth'"), ({"noise": True}, "'noise'")])
def test_settings_that_are_no_vocoder_s(own, says):
    refuses(vocoder.new_vocoder, 64, own, says=f"swiftaudio.json .*its vocoder .*{says}")


def test_the_vocoder_s_work_and_loss():
    """A clip of 10.24 s has 1,024 frames; silence is off by all of a waveform's L1."""
    net, config = vocoder.new_vocoder(256, {})
    assert not config["noise"]
    assert 16 * bench.flops(lambda _: net(torch.zeros(1, 64, 256))) == pytest.approx(0.0294, 0.01)
    wav = torch.sin(torch.arange(4096) / 3)[None]
    spectral = distance(spectra(0 * wav), spectra(wav))
    assert vocoder.vocoder_loss(0 * wav, wav).item() == pytest.approx(0.1 + spectral.item(), 1e-3)
    assert vocoder.vocoder_loss(wav, wav) < 1e-3 < spectral
