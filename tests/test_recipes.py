"""ARC and energy scoring on a teacher's own clips: losses, loops, clips, and what they refuse."""
import functools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused, run
from diffusers import PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import model
import train
from data import InputError, caption_at, draw_batch, read_captions, sampling_noise
from losses import diffuse, guided, one_step
from model import denoiser, load_unet, many_steps
from recipes import arc, energy
from recipes.arc import Discriminator, relativistic_loss
from recipes.clips import draw_more
from recipes.energy import energy_loss

pytestmark = pytest.mark.usefixtures("loaded_once")
SMALL = ["--max_steps", 2, "--batch_size", 4, "--lr", 1e-3, "--guidance", 2, "--grad_accum", 1,
         "--clips", 8, "--log_every", 1, "--device", "cpu"]
ARC, ENERGY = [arc, "--d_first", 0], [energy]
FULL = {"arc": [arc, "--ema", 0.9, "--d_first", 3], "energy": [energy, "--samples", 3]}


def strings(*flags):
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def clips(plain, captions, tmp_path_factory):
    """The file of clips that all runs here share."""
    out = tmp_path_factory.mktemp("clips")
    energy.main(strings("--teacher", plain, "--captions", captions, "--out_dir", out, *SMALL,
                        "--max_steps", 1, "--patch", 1))
    return out / "clips.safetensors"


@pytest.fixture(scope="module")
def student(plain, captions, tmp_path_factory):
    """A student of train.py."""
    out = tmp_path_factory.mktemp("start")
    train.main(strings("--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps",
                       1, "--batch_size", 4, "--grad_accum", 1, "--lora_rank", 4, "--lora_lr", 0.01,
                       "--lr", 0.01, "--warmup", 0,
                       "--guidance", 2, "--student_t", 625, "--device", "cpu"))
    return out / "student"


@pytest.fixture
def go(plain, captions, clips, tmp_path):
    """Run a recipe in this process: (checkpoint, saved student, lines of metrics)."""
    where = ["--teacher", plain, "--captions", captions]

    def go(recipe, *flags, out=tmp_path / "out", first=where):
        go.code = recipe.main(strings(*first, "--out_dir", out, "--cache", clips, *SMALL, *flags))
        saved = load_file(out / "student/diffusion_pytorch_model.safetensors")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / "checkpoint.pt", weights_only=True), saved, lines
    return go


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the losses --------------------------------------------------------------------------------

def test_the_relativistic_loss_is_log_2_at_equal_scores_and_falls_with_the_preference():
    scores = noise(3, 7)
    torch.testing.assert_close(relativistic_loss(scores, scores), torch.full((3,), math.log(2)))
    expected = -torch.sigmoid(torch.tensor([2.0, -1.0])).log().mean()
    found = relativistic_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found, expected[None])


def test_the_energy_score_of_two_gaussians_is_its_closed_form():
    """x ~ N(m, s^2), y ~ N(0, r^2): 2 E|x - y| - E|x - x'| by the folded normal's mean."""
    def folded(mean, std):
        a = mean / std
        return (std * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
                + mean * math.erf(a / math.sqrt(2)))

    for m, s, r in ((0.0, 1.0, 1.0), (0.7, 0.5, 1.2), (2.0, 1.5, 0.3)):
        x = m + s * noise(2, 40000, 1, 1, 4, seed=1)
        y = r * noise(40000, 1, 1, 4, seed=2)
        expected = 2 * folded(m, math.hypot(s, r)) - folded(0, s * math.sqrt(2))
        assert energy_loss(x, y, 1).mean().item() == pytest.approx(expected, abs=0.015)


def test_the_energy_score_by_hand_of_patches_and_of_more_samples():
    x, y = noise(3, 2, 4, 8, 12, seed=3), noise(2, 4, 8, 12, seed=4)
    root = math.sqrt(4 * 8 * 4)

    def length(d):
        return sum((d[:, :, w:w + 4].norm() / root for w in (0, 4, 8))) / 3

    for b in range(2):
        near = sum(length(x[k, b] - y[b]) for k in range(3)) / 3
        apart = (length(x[0, b] - x[1, b]) + length(x[0, b] - x[2, b])
                 + length(x[1, b] - x[2, b])) / 3
        assert energy_loss(x, y, 4)[b].item() == pytest.approx((2 * near - apart).item(), abs=1e-5)


def train_gaussian(step, steps=1500, size=512):
    """Move a student x0 = mean + std z by a loss of its clips; the mean and spread it ends with."""
    torch.manual_seed(0)
    student = torch.tensor([2.0, 0.3], requires_grad=True)
    opt = torch.optim.Adam([student], 0.01, betas=(0.5, 0.99))
    for i in range(steps):
        z, y = torch.randn(2, size, 1, 1, 4), 0.5 + 1.2 * torch.randn(size, 1, 1, 4)
        opt.zero_grad()
        step(student[0] + student[1] * z, y).backward()
        opt.step()
    return student.tolist()


def test_the_energy_score_alone_brings_a_gaussian_student_to_the_teacher():
    mean, std = train_gaussian(lambda x, y: energy_loss(x, y, 1).mean())
    assert mean == pytest.approx(0.5, abs=0.06) and abs(std) == pytest.approx(1.2, abs=0.06)


def test_the_relativistic_loss_alone_brings_a_gaussian_student_to_the_teacher():
    """With a discriminator of mean and spread, a quadratic, and ARC's R1 and R2."""
    D = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([D], 0.02, betas=(0.5, 0.99))

    def score(x, D=D):
        return D[0] * x.flatten(1) + D[1] * x.flatten(1).square()

    def step(x, y):
        opt.zero_grad()
        fake, near = x[0].detach(), 0.05 * torch.randn_like(y)
        penalty = sum((score(c + near) - score(c)).square().mean() for c in (y, fake))
        (relativistic_loss(score(y), score(fake)).mean() + 10 * penalty).backward()
        opt.step()
        frozen = D.detach().clone()
        return relativistic_loss(score(x[0], frozen), score(y, frozen)).mean()

    mean, std = train_gaussian(step)
    assert mean == pytest.approx(0.5, abs=0.1) and abs(std) == pytest.approx(1.2, abs=0.1)


# ---- the teacher's clips -----------------------------------------------------------------------

def first_step(plain, captions, clips, unet, seed=0, *how):
    """What the first step of a run draws, and the networks it starts from."""
    s = SimpleNamespace(shape=model.latent_shape(plain), encode=model.TextEncoder(plain),
                        unet=unet, captions=read_captions(captions)[0])
    s.alpha, s.sigma = model.noise_schedule(model.load_scheduler(plain))
    s.z_T = draw_batch(range(4), seed, s.shape, 20, 981, 999)[0]
    places = [caption_at(range(8), seed, n) for n in range(4)]
    s.text = s.encode([caption_at(s.captions, seed, n) for n in places])
    s.y = load_file(clips)["clips"][places].float()
    s.make = lambda z: one_step(denoiser(s.unet), z, s.text, s.alpha, s.sigma, *how)
    return s


@pytest.fixture
def step(plain, captions, clips):
    return first_step(plain, captions, clips, load_unet(plain))


def test_the_clips_are_the_guided_teacher_s_from_T_and_from_noise_of_their_own(step, plain, clips):
    made = load_file(clips)["clips"]
    assert made.shape == (8, *step.shape) and made.dtype == torch.float16
    eps = guided(denoiser(step.unet), step.encode([""]), 2)
    text = step.encode([caption_at(step.captions, 0, n) for n in range(4, 8)])
    z_T = torch.from_numpy(np.stack([
        np.random.default_rng((0, 4, n)).standard_normal(step.shape, dtype=np.float32)
        for n in range(4, 8)]))
    assert not torch.equal(z_T, sampling_noise(range(4, 8), 0, step.shape))
    seen, config = [], plain / "scheduler"
    for spacing, first in (("leading", 901), ("trailing", 999)):
        scheduler = PNDMScheduler.from_pretrained(config, timestep_spacing=spacing)
        expected = many_steps(lambda x, t, text: seen.append(int(t[0])) or eps(x, t, text), z_T,
                              text, scheduler, 10)
        assert seen[0] == first
        close = torch.isclose(made[4:].float(), expected, rtol=1e-2, atol=1e-2).all()
        assert close == (spacing == "trailing")
        seen.clear()


def test_making_clips_goes_on_where_it_stopped(go, clips, tmp_path):
    some, cache = tmp_path / "some.safetensors", load_file(clips)
    flags = [energy, "--patch", 1, "--cache", some, "--max_steps", 1]
    go(*flags, "--clips", 4, out=tmp_path / "a")
    assert len(load_file(some)["clips"]) == 4
    go(*flags, out=tmp_path / "b")
    equal(load_file(some), cache)
    some.write_bytes(clips.read_bytes())
    go(*flags, "--clips", 4, out=tmp_path / "c")        # fewer than there are: all of them stay
    equal(load_file(some), cache)


def test_clips_that_are_not_finite_are_not_kept(go, tmp_path):
    with pytest.raises(InputError, match="--teacher .* makes clips that are not finite"):
        go(*ENERGY, "--guidance", 1e30, "--cache", tmp_path / "new/clips.safetensors")
    assert not (tmp_path / "new/clips.safetensors").exists()
    assert not (tmp_path / "out/student").exists()


def test_the_same_teacher_and_captions_are_known_wherever_they_are(go, plain, captions, tmp_path):
    """On resume and in the file of clips, which would be refused."""
    go(*ARC)
    folder = shutil.copytree(plain, tmp_path / "renamed")
    text = tmp_path / "renamed.txt"
    text.write_text("\n".join(read_captions(captions)[0]))
    first = ["--teacher", folder, "--captions", text]
    assert go(*ARC, "--max_steps", 3, first=first)[0]["step"] == 3


# ---- a step is the method ----------------------------------------------------------------------

def norm_of(parameters):
    return pytest.approx(torch.stack([p.grad.norm() for p in parameters]).norm().item(), rel=1e-3)


def test_energy_is_its_loss_of_new_noise(go, step):
    step.unet.requires_grad_(True)
    more, _ = draw_more(range(4), 0, 3, step.shape)
    loss = energy_loss(torch.stack([step.make(z) for z in more]), step.y, 2).mean()
    loss.backward()
    line = go(*ENERGY, "--samples", 3, "--patch", 2)[2][0]
    assert line["energy"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_student"] == norm_of(step.unet.parameters())


@pytest.mark.parametrize("recipe", [arc, energy])
def test_a_run_from_a_student_is_at_its_t_and_of_its_own_seed(go, plain, captions, student, recipe,
                                                              tmp_path):
    """The clips too, in as many steps as --clip_steps says."""
    cache = tmp_path / "clips.safetensors"
    line, = go(recipe, "--seed", 3, "--clip_steps", 12, "--cache", cache, "--max_steps", 1,
               first=["--init", student])[2]
    s = first_step(plain, captions, cache, load_unet(student, ""), 3, 625)
    with torch.no_grad():
        if recipe is energy:
            more, _ = draw_more(range(4), 3, 2, s.shape)
            expected = energy_loss(torch.stack([s.make(z) for z in more]), s.y).mean()
        else:
            torch.manual_seed(3)
            D = Discriminator(load_unet(plain), False, torch.autocast("cpu", enabled=False))
            more, t = draw_more(range(4), 3, 3, s.shape, 50, 700)
            made, real = (D(diffuse(clip, t, more[0], s.alpha, s.sigma), t, s.text)
                          for clip in (s.make(s.z_T), s.y))
            expected = relativistic_loss(made, real).mean()
    assert line[recipe.__name__[8:]] == pytest.approx(expected.item(), rel=1e-5)

    text = s.encode([caption_at(s.captions, 3, n) for n in range(4)])
    scheduler = PNDMScheduler.from_pretrained(plain / "scheduler", timestep_spacing="trailing")
    eps = guided(denoiser(load_unet(plain)), s.encode([""]), 2)
    clips = many_steps(eps, draw_more(range(4), 3, 1, s.shape, stream=4)[0][0], text, scheduler, 12)
    made = load_file(cache)["clips"][:4].float()
    torch.testing.assert_close(made, clips, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("recipe", [arc, energy])
def test_the_optimizer_s_flags_are_those_of_train_py(go, plain, recipe):
    """AdamW's first step by hand, from its own state."""
    checkpoint, saved, _ = go(recipe, "--max_steps", 1, "--beta1", 0.6, "--beta2", 0.7,
                              "--weight_decay", 5, "--grad_clip", 1e-3, "--ema", 0.05, "--warmup",
                              2, *(["--d_first", 0] if recipe is arc else []))
    for opt in checkpoint["opts"].values():
        m, v = (torch.cat([s[key].flatten() for s in opt["state"].values()])
                for key in ("exp_avg", "exp_avg_sq"))
        g = m / 0.4
        assert g.norm().item() == pytest.approx(1e-3, rel=1e-2)
        torch.testing.assert_close(v, 0.3 * g.square())
    group, = checkpoint["opts"]["student"]["param_groups"]
    assert group["lr"] == 5e-4
    before, after, ema = (torch.cat([w.detach().flatten() for w in ws]) for ws in (
        load_unet(plain).parameters(), *(checkpoint["weights"][k] for k in ("student", "ema"))))
    m, v = (torch.cat([s[key].flatten() for s in checkpoint["opts"]["student"]["state"].values()])
            for key in ("exp_avg", "exp_avg_sq"))
    g, root = m / 0.4, (v / 0.3).sqrt()
    torch.testing.assert_close(after, before * (1 - 5e-4 * 5) - 5e-4 * g / (root + 1e-8),
                               rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ema, 0.05 * before + 0.95 * after)


def test_arc_compares_both_clips_at_one_t_and_noise(go, step, plain):
    step.unet.requires_grad_(True)
    torch.manual_seed(0)
    D = Discriminator(load_unet(plain), False, torch.autocast("cpu", enabled=False))
    more, t = draw_more(range(4), 0, 3, step.shape, 100, 300)
    assert ((100 <= t) & (t < 300)).all()
    clips, other = (step.make(step.z_T), step.y), step.text.roll(1, 0)
    made, real = (diffuse(clip, t, more[0], step.alpha, step.sigma) for clip in clips)
    score = functools.partial(D, t=t, text=step.text)
    loss = relativistic_loss(score(made), score(real)).mean()
    loss.backward()                             # through D and the whole student
    D.zero_grad()
    made = made.detach()
    d = (relativistic_loss(score(real), score(made)).mean()
         + 0.5 * relativistic_loss(score(real), D(real, t, other)).mean()
         + 7e4 * (score(real + 0.05 * more[1]) - score(real)).square().mean()
         + 3e4 * (score(made + 0.05 * more[2]) - score(made)).square().mean())
    d.backward()
    assert not torch.equal(other, step.text)
    checkpoint, _, (line, _) = go(*ARC, "--contrast", 0.5, "--r1", 7e4, "--r2", 3e4, "--d_t_min",
                                  100, "--d_t_max", 300)
    assert line["arc"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["d"] == pytest.approx(d.item(), rel=1e-4)
    assert line["grad_student"] == norm_of(step.unet.parameters())
    assert line["grad_d"] == norm_of(D.parameters())            # and not the student's part of it
    assert line["d_right"] == pytest.approx((score(real) > score(made)).float().mean().item())
    assert len(checkpoint["weights"]["d"]) == len(list(D.parameters()))


def test_encode_gives_the_unet_s_own_maps(step):
    unet, seen = step.unet, []
    for block in unet.down_blocks:
        block.resnets[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    t = torch.tensor([20, 300, 500, 980])
    maps = arc.encode(unet, step.z_T, t, step.text)
    again, seen[:] = list(seen), []
    unet(step.z_T, t, step.text)
    equal(again, seen)
    assert [m.shape[1:] for m in maps] == [(16, 8, 8), (32, 4, 4), (32, 4, 4)]
    equal(maps[-1], seen[-1])


# ---- the discriminator and the flags -----------------------------------------------------------

@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_d_learns_its_heads_alone(go, plain, frozen):
    before = load_unet(plain)
    learned = go(*ARC, "--d_frozen", int(frozen))[0]["weights"]["d"]
    heads = 3 * 6                               # weight and bias of two convolutions and a norm
    assert len(learned) == heads if frozen else len(learned) > heads
    assert frozen or not torch.equal(learned[0], next(before.parameters()))


def test_the_student_waits_for_d(go, plain):
    checkpoint = go(arc, "--d_first", 2, "--weight_decay", 0)[0]
    equal(checkpoint["weights"]["student"], list(p.detach() for p in load_unet(plain).parameters()))


def test_a_flag_of_arc_does_something(go, tmp_path):
    """The others are in the equation above."""
    flags = {"a": [], "b": ["--seed", 0], "c": ["--d_lr", 0.01], "d": ["--student_t", 500]}
    lines = {name: go(*ARC, *more, out=tmp_path / name)[2][1] for name, more in flags.items()}
    a, b, c, d = ([lines[name][k] for k in ("arc", "d", "grad_d")] for name in flags)
    assert a == b and a != c and a != d


def test_flags_of_a_student_s_own_run_hold_unless_given(student, captions):
    args = energy.parse_args(strings("--init", student))
    assert (args.guidance, args.student_t, args.samples) == (2, 625, 2)
    assert args.captions == str(captions) and args.out_dir == "out_energy"
    assert arc.parse_args(strings("--init", student)).out_dir == "out_arc"
    assert "lora_rank" not in args and "tv_weight" not in args      # VSD's, which it does not have
    given = energy.parse_args(strings("--init", student, "--guidance", 3))
    assert given.guidance == 3


def test_a_teacher_brings_defaults_of_a_recipe_s_own(broken):
    tiny = arc.parse_args(strings("--teacher", "tiny", "--lr", 3))
    assert (tiny.student_t, tiny.max_steps, tiny.d_first, tiny.guidance, tiny.lr) == (
        625, 385, 20, 2, 3)
    assert train.parse_args(strings("--teacher", "tiny")).max_steps == 480
    (broken / "swiftaudio.json").write_text('{"energy": {"d_first": 2}}')
    arc.parse_args(strings("--teacher", broken, "--captions", "c.csv"))
    with pytest.raises(InputError, match="swiftaudio.json: unrecognized arguments: --d_first"):
        energy.parse_args(strings("--teacher", broken, "--captions", "c.csv"))


# ---- resuming, processes, memory ---------------------------------------------------------------

@pytest.mark.parametrize("recipe", FULL)
def test_2n_steps_equal_n_resume_n(go, student, recipe, tmp_path, monkeypatch):
    """And a run that a signal stops behind its third step."""
    flags = [*FULL[recipe], "--keep_every", 3]
    whole = go(*flags, "--max_steps", 4, out=tmp_path / "whole", first=["--init", student])
    go(*flags, "--max_steps", 2, first=["--init", student])
    with monkeypatch.context() as patch:
        end = train.end_step
        patch.setattr(train, "end_step", lambda run, *a: run.caught.fill_(15) and end(run, *a))
        assert go(*flags, "--max_steps", 4, first=["--init", student])[0]["step"] == 3
        assert go.code == 143
    parts = go(*flags, "--max_steps", 4, first=["--init", student])
    for key in ("step", "weights", "opts"):
        equal(parts[0][key], whole[0][key])
    equal(parts[1], whole[1])
    equal(*(load_file(tmp_path / name / "student-3/diffusion_pytorch_model.safetensors")
            for name in ("out", "whole")))
    for ours, theirs in zip(parts[2], whole[2], strict=True):
        assert {**ours, "samples_per_s": 0} == {**theirs, "samples_per_s": 0}
    UNet2DConditionModel.from_pretrained(tmp_path / "out/student")
    about = json.loads((tmp_path / "out/student/swiftaudio.json").read_text())
    assert about["timestep"] == 625 and about["step"] == 4


DIVIDED = [*ARC, "--contrast", 0, "--max_steps", 1]     # "another caption" is of a forward pass
SUMS = {"arc": ("arc", "d", "grad_student", "grad_d"), "energy": ("energy", "grad_student")}


def same_sums(line, large, keys=SUMS["arc"]):
    for key in keys:
        assert line[key] == pytest.approx(large[key], rel=2e-3), key


@pytest.mark.parametrize("recipe", SUMS)
def test_accumulation_equals_the_large_batch(go, tmp_path, recipe):
    flags = DIVIDED if recipe == "arc" else [*ENERGY, "--max_steps", 1]
    (large,) = go(*flags)[2]
    (parts,) = go(*flags, "--batch_size", 2, "--grad_accum", 2, out=tmp_path / "b")[2]
    same_sums(parts, large, SUMS[recipe])


@pytest.mark.slow
def test_two_processes_equal_the_large_batch(go, plain, captions, clips, tmp_path):
    """They have no file of clips yet: one makes it, both learn from it."""
    (large,) = go(*DIVIDED)[2]
    code, output = run("recipes.arc", "--teacher", plain, "--captions", captions, "--out_dir",
                       tmp_path / "c", *SMALL, *DIVIDED[1:], "--batch_size", 2, ranks=2,
                       cwd=tmp_path)
    assert code == 0, output
    torch.testing.assert_close(load_file(tmp_path / "c/clips.safetensors"), load_file(clips),
                               rtol=1e-2, atol=1e-2)
    same_sums(json.loads((tmp_path / "c/metrics.jsonl").read_text()), large)


def test_checkpointing_and_bf16_run(go, tmp_path):
    whole = go(*ARC)[2]
    saving = go(*ARC, "--checkpointing", out=tmp_path / "b")[2]
    for key in ("grad_student", "grad_d"):
        assert saving[1][key] == pytest.approx(whole[1][key], rel=1e-3)
    for frozen in (0, 1):
        half = go(*ARC, "--precision", "bf16", "--d_frozen", frozen, out=tmp_path / str(frozen))[2]
        assert half[0]["arc"] == pytest.approx(whole[0]["arc"], rel=0.3)
        assert half[0]["arc"] != whole[0]["arc"]


# ---- bad input ---------------------------------------------------------------------------------

def test_refusals(plain, adapter, broken, captions, clips, student, tmp_path):
    path = broken / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_in.weight": -weights["conv_in.weight"]}, path, {"format": "pt"})
    base, teacher = ["--captions", captions, "--cache", clips, *SMALL], ["--teacher", plain]
    for recipe, flags, says in (
            ("energy", [*teacher, "--r1", 1], ["unrecognized", "--r1"]),
            ("arc", [*teacher, "--samples", 2], ["unrecognized", "--samples"]),
            ("arc", [*teacher, "--lora_rank", 2], ["unrecognized", "--lora_rank"]),
            ("energy", [*teacher, "--tv_weight", 1], ["unrecognized", "--tv_weight"]),
            ("energy", [*teacher, "--samples", 1], ["--samples", "between 2"]),
            ("arc", [*teacher, "--batch_size", 1], ["--batch_size 1", "--contrast 0"]),
            ("energy", [*teacher, "--clips", 3], ["--clips 3", "--batch_size 4"]),
            ("energy", [*teacher, "--patch", 3], ["--patch 3", "8"]),
            ("arc", [*teacher, "--d_t_min", 700], ["--d_t_min 700", "--d_t_max 700"]),
            ("arc", [*teacher, "--d_t_max", 1001], ["--d_t_max 1001", "1000"]),
            ("energy", ["--init", student, "--teacher", broken], [str(student), str(broken)]),
            ("energy", [*teacher, "--guidance", 3], [str(clips), "guidance 2.0", "3.0"]),
            ("energy", [*teacher, "--clip_steps", 5], [str(clips), "clip_steps 10", "5"]),
            ("energy", ["--teacher", broken], [str(clips), "teacher's weights"]),
            ("energy", ["--teacher", adapter], [str(clips), "text encoder's weights"]),
            ("arc", [*teacher, "--seed", 1], [str(clips), "seed 0"]),
            ("energy", [*teacher, "--max_captions", 9], [str(clips), "captions' text"]),
            ("energy", [*teacher, "--cache", captions], [str(captions), "no file of clips"]),
            ("energy", [*teacher, "--out_dir", student.parent], [str(student.parent), "--recipe"])):
        kept = clips.read_bytes()
        refused(f"recipes.{recipe}", *base, "--out_dir", tmp_path / "out", *flags, cwd=tmp_path,
                says=says)
        assert clips.read_bytes() == kept and not (tmp_path / "out/student").exists()


def test_a_folder_with_another_run_stays_as_it_is(go, tmp_path, plain, captions):
    before = go(*ENERGY)[1]
    with pytest.raises(InputError, match="holds a run with --recipe energy, this one has arc"):
        go(*ARC)
    with pytest.raises(InputError, match="holds a run with --recipe energy, this one has None"):
        train.main(strings("--teacher", plain, "--captions", captions, "--out_dir",
                           tmp_path / "out", "--device", "cpu", "--lora_rank", 4))
    equal(load_file(tmp_path / "out/student/diffusion_pytorch_model.safetensors"), before)


def test_a_step_s_batch_may_be_cut_otherwise_on_resume_where_it_is_the_same_step(go, tmp_path):
    cut = ["--batch_size", 2, "--grad_accum", 2, "--max_steps", 3]
    go(*ENERGY)
    assert go(*ENERGY, *cut)[0]["step"] == 3
    go(*ARC, out=tmp_path / "arc")
    with pytest.raises(InputError, match="captions a forward pass 4, this one has 2"):
        go(*ARC, *cut, out=tmp_path / "arc")
