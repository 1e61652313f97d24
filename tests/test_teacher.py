"""The teacher in many steps: diffusers' pipeline, eq. 1 in one, and what its command refuses."""
import diffusers
import pytest
import torch
from runs import edit, refuses, write_student

from data import InputError
from extras import control
from extras.teacher import load_teacher
from losses import guided, one_step
from model import TINY, Decoder, TextEncoder, denoiser, load_scheduler, load_unet, noise_schedule
from recipes.clips import many_steps
from sample import read_manifest


def go(*flags):
    control.main(["--device", "cpu", *map(str, flags)])


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
    mine = many_steps(eps, z, encode_text(["dog", "a cat"]), scheduler, 10)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    again = many_steps(eps, z, encode_text(["dog", "a cat"]), scheduler, 10)
    assert torch.equal(again, mine)                             # PNDM's history is not kept


@pytest.mark.parametrize("steps, changes, says", [
    *((n, {}, f"starts at t = {t}, not just below 999") for n, t in (
        (2, 501), (6, 831), (9, 889), (1000, 1000))),       # PNDM as it is, "leading": 901 for 10
    (100, {"_class_name": "LCMScheduler"}, "not with this scheduler; try others .ValueError"),
    *((n, {"skip_prk_steps": False, "timestep_spacing": "trailing"}, "not with this scheduler; try")
      for n in (2, 3))])
def test_numbers_of_steps_that_a_scheduler_does_not_have(broken, steps, changes, says):
    edit(broken / "scheduler/scheduler_config.json", **changes)
    scheduler, seen = load_scheduler(broken), []
    eps = lambda x, t, text: seen.append(int(t[0])) or x
    sample = lambda steps: many_steps(eps, torch.ones(2, 4, 8, 8), None, scheduler, steps)
    refuses(sample, steps, says=f"{steps} steps: .*{says}")
    assert changes or not seen
    assert sample(10).isfinite().all() and seen[-1] < 100


def test_one_step_of_the_teacher_is_eq_1_guided(plain):
    """The teacher's own UNet and guidance, no scheduler."""
    for given, guidance in ((None, 7.5), (3, 3), (1, 1)):
        system = load_teacher(plain, 1, given, precision="fp32", device="cpu")
        z_T, text = system.noise([0, 3], 7), system.encode_text(["dog", "a cat"])
        eps = guided(denoiser(load_unet(plain)), system.encode_text([""]), guidance)
        expected = one_step(eps, z_T, text, *noise_schedule(load_scheduler(plain)))
        assert torch.equal(system.latents(z_T, text), expected)
        assert system.about == {"teacher": str(plain), "steps": 1, "guidance": guidance,
                                "dtype": "torch.float32"}


def test_the_command(plain, tmp_path):
    """The teacher by its name, or as the one that a student names."""
    folder = write_student(tmp_path / "s", plain, parameterization="eps")
    go("--student", folder, "--prompt", "rain", "--teacher_steps", 11, "--guidance", 2,
       "--out", tmp_path)
    go("--teacher", plain, "--prompt", "wind", "--teacher_steps", 10, "--out", tmp_path)
    go("--teacher", "tiny", "--prompt", "rain falls", "--teacher_steps", 2, "--out", tmp_path)
    rows = read_manifest(tmp_path)
    assert [(row["steps"], row["guidance"], row["teacher"]) for row in rows] == [
        (11, 2, str(plain)), (10, 7.5, str(plain)), (2, 2, str(TINY))]


@pytest.mark.parametrize("flags, says", [
    (["--guidance", 3], "--guidance goes with --teacher_steps"),
    (["--teacher_steps", 10, "--decoder", "fast"], "fast does not go with --teacher_steps"),
    (["--teacher_steps", 10], "--teacher is needed: "),
    (["--teacher_steps", 2, "--teacher"], "2 steps: .*another number")])
def test_what_does_not_go_together(plain, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    flags += [plain] if flags[-1] == "--teacher" else []
    with pytest.raises(InputError, match=says):
        go("--prompt", "a", "--student", plain, *flags)
    assert not [*tmp_path.iterdir()]
