"""The small decoder: distilled, resumed, read by plain diffusers, used in the VAE's place."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused, write_checkpoint
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

import model
import sample
import train
from data import InputError, caption_at, draw_batch, read_captions
from extras import eval as evaluate
from losses import one_step
from model import LOG_MAX, LOG_MIN, TINY, image_to_mel
from recipes import decoder
from tiny import score

SMALL = {"decoder_block_out_channels": [8] * 4, "num_decoder_blocks": [1, 1, 1, 0],
         "out_channels": 1}


@pytest.fixture(scope="module")
def trained(captions, tmp_path_factory):
    """A student of a teacher whose settings have a small decoder."""
    teacher = write_checkpoint(tmp_path_factory.mktemp("teacher"))
    (teacher / "swiftaudio.json").write_text(json.dumps({"seconds": 0.64, "decoder": SMALL}))
    out = tmp_path_factory.mktemp("run")
    train.main([str(f) for f in (
        "--teacher", teacher, "--captions", captions, "--out_dir", out, "--max_steps", 1,
        "--batch_size", 2, "--grad_accum", 1, "--lora_rank", 2, "--device", "cpu")])
    return out / "student"


@pytest.fixture
def student(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "student")


def distil(student, *flags):
    decoder.main([str(f) for f in ("--student", student, "--clips", 8, "--batch_size", 2,
                                   "--device", "cpu", *flags)])
    return load_file(student / "decoder/diffusion_pytorch_model.safetensors")


def test_2n_steps_are_n_a_resume_and_n(trained, student, tmp_path, monkeypatch):
    other = shutil.copytree(trained, tmp_path / "other")
    whole = distil(other, "--max_steps", 6, "--save_every", 2)

    save_file_of = decoder.save_file
    calls = []

    def dies_at_the_second(*args):          # after checkpoint.pt of step 4, before the weights
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file_of(*args)

    monkeypatch.setattr(decoder, "save_file", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        distil(student, "--max_steps", 6, "--save_every", 2)
    monkeypatch.undo()
    resumed = distil(student, "--max_steps", 6, "--save_every", 3)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and whole.keys() == resumed.keys()
    steps = [[json.loads(line)["step"] for line in (s / "decoder/metrics.jsonl").open()]
             for s in (other, student)]
    assert steps == [[2, 4, 6], [2, 4, 6]]
    (student / "decoder/diffusion_pytorch_model.safetensors").unlink()
    again = distil(student, "--max_steps", 6)               # finished: written again
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_run_is_that_of_its_flags_and_of_its_student(student, captions, monkeypatch):
    """Two steps by hand: which clips of which captions, from where, at which rate."""
    about = json.loads((student / "swiftaudio.json").read_text())
    about["timestep"] = 500
    about["flags"]["max_captions"] = 5
    (student / "swiftaudio.json").write_text(json.dumps(about))
    seen, loss = [], decoder.decoder_loss
    monkeypatch.setattr(decoder, "decoder_loss", lambda *both: seen.append(
        [x.detach().clone() for x in both]) or loss(*both))
    distil(student, "--seed", 3, "--clips", 6, "--batch_size", 3, "--max_steps", 2, "--lr", 1e-3)

    home = Path(about["teacher"])
    shape, (alpha, sigma) = model.latent_shape(home, 0.64), model.noise_schedule(
        model.load_scheduler(home))
    texts, vae = read_captions(captions)[0][:5], AutoencoderKL.from_pretrained(home / "vae")
    z_T = draw_batch(range(6), 3, shape, 0, 1, 999)[0]
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
    checkpoint = torch.load(student / "decoder/checkpoint.pt", weights_only=True)
    group, = checkpoint["opts"]["decoder"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3 * 2 / 50 / 2)      # warm-up, and half way to zero


def test_it_learns_the_vae_s_picture(tmp_path):
    """Of the tiny world, whose UNet is a student of itself: a complete model in one folder."""
    student = shutil.copytree(TINY, tmp_path / "student")
    distil(student, "--captions", TINY.parent / "heldout.csv", "--clips", 16, "--batch_size", 4,
           "--max_steps", 40)
    mels = []
    for which in ("vae", "fast"):
        system = model.load_student(str(student), decoder=which, precision="fp32", device="cpu")
        with torch.no_grad():
            text = system.encode_text(["rain falls", "a dog barks", "a bell rings", "wind blows"])
            mels.append(system.decoder.decode(system.latents(system.noise(range(4), 7), text)))
    spread = (mels[0] - mels[0].median()).abs().mean()
    assert (mels[1] - mels[0]).abs().mean() < 0.6 * spread
    assert not (student / "decoder/README.md").exists()


def test_the_tiny_world_scores_it_beside_the_vae(tmp_path, capsys):
    student = shutil.copytree(TINY / "unet", tmp_path / "out/student")
    (student / "swiftaudio.json").write_text(json.dumps(
        {"teacher": "tiny", "step": 0}))
    distil(student, "--captions", TINY.parent / "heldout.csv", "--clips", 4, "--max_steps", 2)
    score.main([str(student), "--clips", "4"])
    found = json.loads((tmp_path / "out/scores.json").read_text())
    row = found["small decoder"]
    assert row["FD"] > found["systems"]["student after 0 steps"]["FD"] > 0
    assert 1 < row["log-mel error"] < 10                    # after two steps
    said = capsys.readouterr().out
    assert f"student, small decoder            {row['FD']:6.1f}" in said
    assert f"differ from the VAE's by {row['log-mel error']:.3f} nepers" in said


def test_plain_diffusers_reads_the_folder(student):
    distil(student, "--max_steps", 2)
    network = AutoencoderTiny.from_pretrained(student / "decoder")
    system = model.load_student(str(student), decoder="fast", precision="fp32", device="cpu")
    x0 = torch.randn(2, *system.shape)
    with torch.no_grad():
        image = network.decode(x0).sample
    assert image.shape == (2, 1, 64, 64)
    assert torch.allclose(image_to_mel(image), system.decoder.decode(x0), atol=1e-4)
    assert [k for k in SMALL if network.config[k] != SMALL[k]] == []


def test_its_size_is_taesd_s_without_settings():
    config = decoder.new_decoder({}).config
    assert config.decoder_block_out_channels == (64,) * 4
    assert config.num_decoder_blocks == (3, 3, 3, 1) and config.out_channels == 3


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


def test_sample_uses_it_and_says_so(student, tmp_path, monkeypatch):
    distil(student, "--max_steps", 2)
    for which in ("vae", "fast"):
        sample.main(["--student", str(student), "--prompt", "a dog", "--out",
                     str(tmp_path / which), "--decoder", which, "--device", "cpu"])
    rows = [json.loads((tmp_path / which / "manifest.json").read_text())[0]
            for which in ("vae", "fast")]
    assert "decoder" not in rows[0] and rows[1]["decoder"] == str(student / "decoder")
    wavs = [(tmp_path / which / "a-dog_seed0_0.wav").read_bytes() for which in ("vae", "fast")]
    assert wavs[0] != wavs[1] and len(wavs[0]) == len(wavs[1])


def test_eval_takes_it_for_another_system(student, tmp_path):
    distil(student, "--max_steps", 2)
    prompts, made = {"1.wav": "a dog"}, {}
    for which, out in (("vae", "a"), ("fast", "b")):
        args = evaluate.parse_args(["audiocaps", "--captions", "list.csv", "--reference", ".",
                                    "--out", out, "--student", str(student), "--decoder", which,
                                    "--device", "cpu"])
        system = sample.open_system(args)
        made[which] = evaluate.generate(prompts, tmp_path / out, args, system)
    assert made["vae"]["sha256"] != made["fast"]["sha256"] and "decoder" in made["fast"]
    with pytest.raises(InputError, match="another system"):
        evaluate.generate(prompts, tmp_path / "a", args, system)


def test_what_cannot_be_is_one_line(student, captions, tmp_path, plain):
    says = lambda *flags, says: refused("sample.py", "--student", student, "--prompt", "a",
                                        "--decoder", "fast", *flags, cwd=tmp_path, says=says)
    says(says=[f"{student}/decoder: not there", f"python -m recipes.decoder --student {student}"])
    says("--teacher", "tiny", "--teacher_steps", 2, says=["--decoder fast", "--teacher_steps"])

    def stops(*flags, says):
        with pytest.raises(InputError) as stopped:
            distil(student, "--max_steps", 2, *flags)
        for word in says:
            assert word in str(stopped.value) and "\n" not in str(stopped.value)

    stops("--clips", 1, says=["--clips 1", "--batch_size 2"])
    stops("--captions", "no.csv", says=["no.csv", "no such file"])
    stops("--student", "some/model", says=["some/model", "must be a folder here"])
    wide = AutoencoderTiny(latent_channels=8, num_encoder_blocks=(0,) * 4)
    wide.save_pretrained(tmp_path / "wide")
    stops("--init", tmp_path / "wide", says=[str(tmp_path / "wide"), "does not fit"])
    assert not (student / "decoder").exists()               # nothing was written until here

    distil(student, "--max_steps", 2)
    before = (student / "decoder/checkpoint.pt").read_bytes()
    stops("--max_steps", 2, "--seed", 1, says=["--seed", "remove"])
    (tmp_path / "others.txt").write_text("a cat\nthe rain\n")
    stops("--max_steps", 2, "--captions", tmp_path / "others.txt", says=["captions' text"])
    weights = student / "diffusion_pytorch_model.safetensors"
    state, about = load_file(weights), (student / "swiftaudio.json").read_text()
    save_file({**state, "conv_in.weight": -state["conv_in.weight"]}, weights)
    stops("--max_steps", 2, says=["--student", "remove"])       # of as many steps, but another
    save_file(state, weights)
    assert (student / "decoder/checkpoint.pt").read_bytes() == before
    about = json.loads(about)
    del about["flags"]
    (student / "swiftaudio.json").write_text(json.dumps(about))
    stops("--max_steps", 2, says=["--captions"])
    (student / "decoder/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    says(says=[f"{student}/decoder: cannot be loaded"])


def test_captions_of_its_own_may_have_their_own_column(student, tmp_path):
    path = tmp_path / "others.csv"
    path.write_text("said\na cat\nthe rain\n")
    with pytest.raises(InputError, match="--caption_column"):
        distil(student, "--max_steps", 1, "--captions", path)
    distil(student, "--max_steps", 1, "--captions", path, "--caption_column", "said")


def test_a_decoder_without_its_checkpoint_is_kept(student):
    """Such as one that came with a published student."""
    distil(student, "--max_steps", 2)
    (student / "decoder/checkpoint.pt").unlink()
    before = (student / "decoder/diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a decoder but no checkpoint"):
        distil(student, "--max_steps", 2)
    assert (student / "decoder/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_settings_that_are_no_decoder_are_one_line():
    with pytest.raises(InputError, match="'width'"):
        decoder.new_decoder({"decoder": {"width": 8}})


def test_it_starts_from_another_decoder(student, tmp_path):
    network = AutoencoderTiny(num_encoder_blocks=(0,) * 4, encoder_block_out_channels=(4,) * 4,
                              decoder_block_out_channels=(6,) * 4, num_decoder_blocks=(1,) * 4)
    network.save_pretrained(tmp_path / "init")
    found = distil(student, "--init", tmp_path / "init", "--max_steps", 1, "--lr", 0)
    assert all(torch.equal(found[k], w) for k, w in network.state_dict().items())


def test_a_step_that_is_not_finite_keeps_the_last_decoder(student):
    before = distil(student, "--max_steps", 2, "--save_every", 1)
    path = student / "decoder/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["weights"]["decoder"][0].data.fill_(math.nan)
    state["step"] = 1
    torch.save(state, path)
    with pytest.raises(InputError, match="loss is not finite"):
        distil(student, "--max_steps", 2, "--save_every", 1)
    after = load_file(student / "decoder/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
