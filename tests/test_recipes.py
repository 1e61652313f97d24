"""Distilling on a teacher's own clips: losses, a step, the clips, what is refused."""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from conftest import refused
from diffusers import DDIMScheduler, LCMScheduler, PNDMScheduler, UNet2DConditionModel
from runs import call, change_teacher, metrics, noise, of, read_checkpoint, same
from safetensors import safe_open
from safetensors.torch import load_file

import model
import recipes.clips
import train
from data import InputError, caption_at, draw_batch, read_captions, sampling_noise
from losses import diffuse, guided, one_step
from model import denoiser, load_unet
from recipes import arc, consistency, energy
from recipes.arc import Discriminator, relativistic_loss
from recipes.clips import draw_more, many_steps
from recipes.consistency import consistency_loss, ddim_timesteps
from recipes.energy import energy_loss

pytestmark = pytest.mark.usefixtures("loaded_once")
SMALL = [*runs.SMALL, "--max_steps", 1, "--clips", 8]


@pytest.fixture(scope="module")
def clips(plain, captions, tmp_path_factory):
    """The file of clips that most runs here share."""
    out = tmp_path_factory.mktemp("clips")
    call(energy.main, "--teacher", plain, "--captions", captions, "--out_dir", out, *SMALL)
    return out / "clips.safetensors"


@pytest.fixture(scope="module")
def student(words, tmp_path_factory):
    """A student of train.py."""
    out = tmp_path_factory.mktemp("start")
    train.main(words(out, "--max_steps", 1, "--lr", 0.01, "--student_t", 625))
    return out / "student"


@pytest.fixture
def go(plain, captions, clips, tmp_path):
    """Run a recipe in this process: (its checkpoint, lines of metrics)."""
    where = ["--teacher", plain, "--captions", captions]

    def go(recipe, *flags, out=tmp_path / "out", first=where):
        call(recipe.main, *first, "--out_dir", out, "--cache", clips, *SMALL, *flags)
        return read_checkpoint(out), metrics(out)
    return go


# ---- the losses ----------------------------------------------------------------------------------

def test_the_relativistic_loss_falls_with_the_preference():
    expected = -torch.sigmoid(torch.tensor([2.0, -1.0])).log().mean()
    found = relativistic_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found, expected[None])


def test_the_energy_score_by_hand_of_patches_and_of_more_samples():
    x, y = noise(3, 2, 4, 8, 12, seed=3), noise(2, 4, 8, 12, seed=4)
    root = math.sqrt(4 * 8 * 3)

    def length(d):
        return sum((d[:, :, w:w + 3].norm() / root for w in (0, 3, 6, 9))) / 4

    for b in range(2):
        near = sum(length(x[k, b] - y[b]) for k in range(3)) / 3
        apart = (length(x[0, b] - x[1, b]) + length(x[0, b] - x[2, b])
                 + length(x[1, b] - x[2, b])) / 3
        assert energy_loss(x, y, 3)[b].item() == pytest.approx((2 * near - apart).item(), abs=1e-5)
    x.zero_().requires_grad_()                          # clips that agree have a gradient, too
    energy_loss(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


# ---- the teacher's clips -------------------------------------------------------------------------

@pytest.mark.parametrize("seed, steps", [(0, 10), (3, 12)])
def test_the_clips_are_the_guided_teacher_s_from_T_and_from_noise_of_their_own(
        go, plain, captions, seed, steps, tmp_path):
    cache, words = tmp_path / "clips.safetensors", read_captions(captions)[0]
    given = ["--seed", seed, "--clip_steps", steps] if seed else []     # else: by default
    go(energy, "--cache", cache, "--clips", 6, *given)
    made, shape, numbers = load_file(cache)["clips"], model.latent_shape(plain), range(4, 6)
    assert made.shape == (6, *shape) and made.dtype == torch.float16
    encode = model.TextEncoder(plain)
    eps = guided(denoiser(load_unet(plain)), encode([""]), 2)
    text = encode([caption_at(words, seed, n) for n in numbers])
    z_T = torch.from_numpy(np.stack([
        np.random.default_rng((seed, 4, n)).standard_normal(shape, np.float32) for n in numbers]))
    assert not torch.equal(z_T, sampling_noise(numbers, seed, shape))
    scheduler = PNDMScheduler.from_pretrained(plain / "scheduler", timestep_spacing="trailing")
    expected = many_steps(eps, z_T, text, scheduler, steps)
    torch.testing.assert_close(made[4:].float(), expected, rtol=1e-2, atol=1e-2)


def test_a_kill_loses_the_last_hundred_clips_at_most(go, monkeypatch, tmp_path):
    made, cache = [], tmp_path / "clips.safetensors"

    def killed(eps, z_T, *more):
        made.append(z_T)
        if len(made) == 4:
            raise KeyboardInterrupt
        return z_T

    monkeypatch.setattr(recipes.clips, "many_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        go(energy, "--batch_size", 60, "--clips", 270, "--cache", cache)
    same(load_file(cache)["clips"], torch.cat(made[:3]).half())


def test_two_runs_share_a_file_of_clips(go, clips, monkeypatch, tmp_path):
    """This one goes on from 4 clips; before its next are made the other makes 8, then it 10."""
    cache, made, held = tmp_path / "new/clips.safetensors", [], []
    go(energy, "--cache", cache, "--clips", 4, out=tmp_path / "first")
    assert len(load_file(cache)["clips"]) == 4

    def interrupted(*args):
        made.append(len(args[1]))
        if len(made) == 1:
            with torch.enable_grad():
                go(energy, "--cache", cache, out=tmp_path / "other")
            return 1 + many_steps(*args)                # dropped: the other's are there
        return many_steps(*args)

    locked = recipes.clips.locked
    monkeypatch.setattr(recipes.clips, "many_steps", interrupted)
    monkeypatch.setattr(recipes.clips, "locked", lambda path: held.append(path) or locked(path))
    go(energy, "--cache", cache, "--clips", 10)
    assert made == [4, 4, 2] and held == [cache, cache]
    same(load_file(cache)["clips"][:8], load_file(clips)["clips"])
    go(energy, "--cache", cache, "--clips", 4, out=tmp_path / "last")   # fewer: all of them stay
    assert len(load_file(cache)["clips"]) == 10


def test_clips_that_are_not_finite_are_not_kept(go, tmp_path):
    with pytest.raises(InputError, match="--teacher .* makes clips that are not finite"):
        go(energy, "--guidance", 1e30, "--cache", tmp_path / "new/clips.safetensors")
    assert not (tmp_path / "new/clips.safetensors").exists()
    assert not (tmp_path / "out/student").exists()


# ---- a step is the method ------------------------------------------------------------------------

def norm_of(parameters):
    return pytest.approx(torch.stack([p.grad.norm() for p in parameters]).norm().item(), rel=1e-3)


@pytest.fixture(params=["from the teacher", "from a student"])
def step(request, plain, captions, clips, student, tmp_path):
    """What the first step of a run draws, and the networks it starts from.

    From a student it is at the student's t, and of another seed with clips of its own.
    """
    new = request.param == "from a student"
    s = SimpleNamespace(new=new, seed=3 if new else 0, shape=model.latent_shape(plain),
                        t=625 if new else None, captions=read_captions(captions)[0])
    s.flags = ["--seed", 3, "--cache", tmp_path / "clips.safetensors"] if new else []
    s.cache = s.flags[-1] if new else clips
    s.first = ["--captions", captions, *(["--init", student] if new else ["--teacher", plain])]
    s.unet = (load_unet(student, "") if new else load_unet(plain)).requires_grad_(True)
    s.alpha, s.sigma = model.noise_schedule(model.load_scheduler(plain))
    s.z_T = draw_batch(range(4), s.seed, s.shape, 20, 981, 999)[0]
    s.places = [caption_at(range(8), s.seed, n) for n in range(4)]
    s.text = model.TextEncoder(plain)([caption_at(s.captions, s.seed, n) for n in s.places])
    s.make = lambda z: one_step(denoiser(s.unet), z, s.text, s.alpha, s.sigma, s.t)
    s.real = lambda: load_file(s.cache)["clips"][s.places].float()
    return s


def test_energy_is_its_loss_of_new_noise(go, step):
    samples, patch, given = (3, 2, ["--samples", 3, "--patch", 2]) if step.new else (2, 4, [])
    line, = go(energy, *step.flags, *given, first=step.first)[1]
    more, _ = draw_more(range(4), step.seed, samples, step.shape)
    x = torch.stack([step.make(z) for z in more])
    loss = energy_loss(x, step.real(), patch).mean()
    loss.backward()
    assert line["energy"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["grad_student"] == norm_of(step.unet.parameters())
    assert line["x0_std"] == pytest.approx(x[0].std((1, 2, 3)).mean().item(), rel=1e-4)


def test_arc_compares_both_clips_at_one_t_and_noise(go, step, plain):
    contrast, r1, r2, low, high = (0.5, 7e4, 3e4, 100, 300) if step.new else (1, 1, 1, 50, 700)
    given = ["--contrast", contrast, "--r1", r1, "--r2", r2, "--d_t_min", low, "--d_t_max", high]
    line, = go(arc, *step.flags, *(given if step.new else []), first=step.first)[1]
    torch.manual_seed(step.seed)
    D = Discriminator(load_unet(plain), False, torch.autocast("cpu", enabled=False))
    more, t = draw_more(range(4), step.seed, 3, step.shape, low, high)
    assert ((low <= t) & (t < high)).all()
    made, real = (diffuse(clip, t, more[0], step.alpha, step.sigma)
                  for clip in (step.make(step.z_T), step.real()))
    score = lambda x, text=step.text: D(x, t, text)
    loss = relativistic_loss(score(made), score(real)).mean()
    loss.backward()                             # through D and the whole student
    D.zero_grad()
    made = made.detach()
    d = (relativistic_loss(score(real), score(made)).mean()
         + contrast * relativistic_loss(score(real), score(real, step.text.roll(1, 0))).mean()
         + r1 * (score(real + 0.05 * more[1]) - score(real)).square().mean()
         + r2 * (score(made + 0.05 * more[2]) - score(made)).square().mean())
    d.backward()
    assert line["arc"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["d"] == pytest.approx(d.item(), rel=1e-4)
    assert line["grad_student"] == norm_of(step.unet.parameters())
    assert line["grad_d"] == norm_of(D.parameters())            # and not the student's part of it
    assert line["d_right"] == pytest.approx((score(real) > score(made)).float().mean().item())


def test_encode_gives_the_unet_s_own_maps(plain):
    unet, seen = load_unet(plain), []
    x, t, text = noise(4, 4, 8, 8), torch.tensor([20, 300, 500, 980]), noise(4, 77, 24)
    maps = arc.encode(unet, x, t, text)
    first, second = unet.down_blocks
    for layer in (first.attentions[-1], second.resnets[-1], unet.mid_block):
        layer.register_forward_hook(lambda module, args, out: seen.append(
            out[0] if isinstance(out, tuple) else out))
    unet(x, t, text)
    same(maps, seen)
    assert [m.shape[1:] for m in maps] == [(16, 8, 8), (32, 4, 4), (32, 4, 4)]


def test_d_learns_from_the_start_and_the_student_when_it_is_told_to(go, plain, tmp_path):
    """And of a frozen D its three heads: weight and bias of two convolutions and a norm."""
    before = [w.detach() for w in load_unet(plain).parameters()]
    weights = go(arc, "--d_first", 1, "--weight_decay", 0)[0]["weights"]
    same(weights["student"], before)
    assert not torch.equal(weights["d"][0], before[0]) and len(weights["d"]) > 3 * 6
    frozen = go(arc, "--d_frozen", 1, out=tmp_path / "frozen")[0]["weights"]
    assert len(frozen["d"]) == 3 * 6


def test_checkpointing_and_bf16_run(go, tmp_path, monkeypatch):
    whole, enabled = go(arc)[1][0], []
    enable = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing",
                        lambda unet: enabled.append(enable(unet)))
    saving, = go(arc, "--checkpointing", out=tmp_path / "b")[1]
    assert len(enabled) == 2                                # the student's and D's
    for key in ("grad_student", "grad_d"):
        assert saving[key] == pytest.approx(whole[key], rel=1e-3)
    half, = go(arc, "--precision", "bf16", "--d_frozen", 1, out=tmp_path / "c")[1]
    assert half["arc"] == pytest.approx(whole["arc"], rel=0.3) and half["arc"] != whole["arc"]


# ---- flags and bad input -------------------------------------------------------------------------

def test_a_teacher_brings_defaults_of_a_recipe_s_own(broken):
    settings = json.loads((model.TINY / "swiftaudio.json").read_text())
    for recipe in (arc, consistency, energy):
        name = recipe.__name__.removeprefix("recipes.")
        args = vars(recipe.parse_args(["--teacher", "tiny", "--lr", "3"]))
        assert args["lr"] == 3 and args["decay"] and args["out_dir"] == f"out_{name}"
        assert "lora_rank" not in args and "tv_weight" not in args      # VSD's, which it has not
        assert settings[name].items() - {"lr": settings[name]["lr"]}.items() <= args.items()
    (broken / "swiftaudio.json").write_text('{"energy": {"d_first": 2}}')
    call(arc.parse_args, "--teacher", broken, "--captions", "c.csv")
    with pytest.raises(InputError, match="swiftaudio.json: unrecognized arguments: --d_first"):
        call(energy.parse_args, "--teacher", broken, "--captions", "c.csv")


def test_refusals(plain, broken, captions, clips, tmp_path):
    change_teacher(broken)
    with safe_open(clips, "pt") as file:
        assert set(json.loads(file.metadata()["about"])) == {   # and no path
            "teacher's weights", "text encoder's weights", "alpha_T", "captions' text", "guidance",
            "clip_steps", "seed", "latents"}
    kept, teacher = clips.read_bytes(), ["--teacher", plain]
    for recipe, flags, says in (
            ("arc", [*teacher, "--batch_size", 1], ["--batch_size 1", "--contrast 0"]),
            ("arc", [*teacher, "--d_t_min", 700], ["--d_t_min 700", "--d_t_max 700"]),
            ("consistency", [*teacher, "--ode_steps", 500], ["--ode_steps 500", "at most 499"]),
            ("consistency", [*teacher, "--student_t", 625], ["--student_t 625", "999"]),
            ("energy", [*teacher, "--patch", 3], ["--patch 3", "8"]),
            ("energy", [*teacher, "--clips", 3], ["--clips 3", "--batch_size 4"]),
            ("energy", [*teacher, "--guidance", 3], [str(clips), "guidance 2.0", "3.0"]),
            ("energy", ["--teacher", broken], [str(clips), "teacher's weights"]),
            ("energy", [*teacher, "--cache", captions], [str(captions), "no file of clips"])):
        refused(f"recipes.{recipe}", "--captions", captions, "--cache", clips, *SMALL, "--out_dir",
                tmp_path / "out", *flags, cwd=tmp_path, says=says)
        assert clips.read_bytes() == kept and not (tmp_path / "out/student").exists()


def test_another_recipe_is_no_resume_nor_a_batch_cut_otherwise_whose_captions_are_compared(go):
    go(arc)
    with pytest.raises(InputError, match="holds a run with recipe arc, not energy"):
        go(energy)
    with pytest.raises(InputError, match="captions a forward pass 4, not 2"):
        go(arc, "--batch_size", 2, "--grad_accum", 2)


# ---- latent consistency -------------------------------------------------------------------------

SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DDIM = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                     timestep_spacing="trailing")
ALPHA, SIGMA = model.noise_schedule(DDIM)


def ddim(steps):
    scheduler = copy.deepcopy(DDIM)
    scheduler.set_timesteps(steps)
    return scheduler


def of_lcm(student, target, teacher, x, t, text, guidance, steps, kind):
    """The loss of a step of LCM by diffusers' schedulers, as its script of training takes them.

    Networks are called a sample at a time, with a text and with the empty one: text[0], text[1:].
    """
    lcm, scheduler = LCMScheduler(**SCHEDULE), ddim(steps)

    def f(net, x, t, words):
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(t)
        eps = net(x, torch.tensor([t]), words).sample
        return c_skip * x + c_out * (x - SIGMA[t] * eps) / ALPHA[t]

    losses = []
    for x_t, at, words in zip(x.split(1), t.tolist(), text[1:].split(1)):
        with torch.no_grad():
            cond, uncond = (teacher(x_t, torch.tensor([at]), w).sample for w in (words, text[:1]))
            w = guidance - 1                            # LCM's: cond + w (cond - uncond)
            x_s = scheduler.step(cond + w * (cond - uncond), at, x_t).prev_sample
            goal = f(target, x_s, max(0, at - 1000 // steps), words)
        d = f(student, x_t, at, words) - goal
        loss = d.square() if kind == "l2" else (d.square() + 0.001 ** 2).sqrt() - 0.001
        losses.append(loss.mean())
    return torch.stack(losses)


def test_the_grid_is_ddim_s_and_reaches_T_where_its_steps_do_not_divide_it():
    assert ddim_timesteps(50, 999).tolist() == [0, *ddim(50).timesteps.flip(0).tolist()]
    assert ddim_timesteps(3, 999).tolist() == [0, 332, 665, 999]


MEAN, STD = 0.8, 0.6


def spread(t):
    """Standard deviation of x_t, of clips N(MEAN, STD^2)."""
    return (of(ALPHA, t) ** 2 * STD ** 2 + of(SIGMA, t) ** 2).sqrt()


def gaussian(x, t, text):
    """The exact denoiser of clips N(MEAN, STD^2)."""
    return of(SIGMA, t) * (x - of(ALPHA, t) * MEAN) / spread(t) ** 2


def implied(f):
    """The eps of which `consistency_function` makes the clip f(x, t)."""
    return lambda x, t, text: (x - of(ALPHA, t) * f(x, t)) / of(SIGMA, t)


def exact(x, t):
    """Where the probability flow ends: x's distance from the mean in standard deviations stays."""
    zero = torch.zeros_like(t)
    return of(ALPHA, zero) * MEAN + spread(zero) * (x - of(ALPHA, t) * MEAN) / spread(t)


def mean_loss(eps, steps, last=True):
    """consistency_loss of the Gaussian teacher at all t of a grid; last: that from t to 0 too."""
    grid, kept = ddim_timesteps(steps, 999), slice(0 if last else 1, None)
    s, t = grid[:-1], grid[1:]
    x = diffuse(MEAN + STD * noise(steps, 1, 32, 32), t, noise(steps, 1, 32, 32, seed=1), ALPHA,
                SIGMA)
    loss, _ = consistency_loss(eps, eps, gaussian, x[kept], t[kept], s[kept], None, ALPHA, SIGMA,
                               "l2")
    return loss.mean().item()


def test_a_gaussian_s_own_consistency_function_has_the_least_loss_and_less_in_more_steps():
    few, more, many = (mean_loss(implied(exact), steps) for steps in (10, 50, 250))
    assert many < more / 10 < few / 100 and many < 1e-6
    for wrong in (gaussian, implied(lambda x, t: 1.1 * exact(x, t)), implied(lambda x, t: 0 * x)):
        assert mean_loss(wrong, 50) > 20 * more
    # one clip for all agrees with itself everywhere; only what is known at t = 0 rules it out
    assert mean_loss(implied(lambda x, t: 0 * x), 50, last=False) < 1e-10


@pytest.mark.parametrize("seed, ode_steps, kind, ema, given", [
    (3, 2, "l2", 0.9, ["--seed", 3, "--ode_steps", 2, "--loss", "l2", "--lr", 0.01]),
    (0, 50, "huber", 0, [])])
def test_steps_of_a_run_are_lcm_s(go, plain, broken, captions, seed, ode_steps, kind, ema, given,
                                  tmp_path):
    """Its flags, --init, what it draws, and in the second step the target, which lags behind.

    In two steps of DDIM half of all pairs reach 0, and the others begin at T.
    """
    first = load_unet(plain)
    for w in first.parameters():
        w.data += 0.02 * noise(*w.shape)
    first.save_pretrained(broken / "unet")
    cache = tmp_path / "clips.safetensors"
    flags = [*given, "--init", broken, "--guidance", 3, "--ema", ema, "--cache", cache]
    weights = go(consistency, *flags)[0]["weights"]
    lines = go(consistency, *flags, "--max_steps", 2)[1]
    encode, words = model.TextEncoder(plain), read_captions(captions)[0]
    teacher, made = load_unet(plain), load_file(cache)["clips"].float()
    start = [[w.detach() for w in first.parameters()]] * 2
    then = [weights[name] for name in ("student", "ema")]
    assert all(map(torch.equal, *then)) == (ema == 0)       # then it is the student itself
    for n, both in enumerate((start, then)):
        student, target = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        for net, values in zip((student, target), both):
            for w, value in zip(net.parameters(), values, strict=True):
                w.data.copy_(value)
        numbers = range(4 * n, 4 * n + 4)
        noises, i = draw_more(numbers, seed, 1, (4, 8, 8), 1, ode_steps + 1)
        t = ddim(ode_steps).timesteps.flip(0)[i - 1]
        assert len(t.unique()) > 1
        rows = [caption_at(range(8), seed, k) for k in numbers]
        text = encode(["", *(caption_at(words, seed, k) for k in rows)])
        x = diffuse(made[rows], t, noises[0], ALPHA, SIGMA)
        loss = of_lcm(student, target, teacher, x, t, text, 3, ode_steps, kind).mean()
        loss.backward()
        assert lines[n]["consistency"] == pytest.approx(loss.item(), rel=2e-3)
        assert lines[n]["grad_student"] == norm_of(student.parameters())
