"""Latent consistency: its loss beside diffusers and closed forms, its loop, what it refuses."""
import copy

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from runs import SMALL, call, metrics, noise, of, read_checkpoint
from safetensors.torch import load_file

import model
from data import caption_at, read_captions
from losses import diffuse
from model import load_unet
from recipes import consistency
from recipes.clips import draw_more
from recipes.consistency import consistency_loss, ddim_timesteps

pytestmark = pytest.mark.usefixtures("loaded_once")
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DDIM = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                     timestep_spacing="trailing")
ALPHA, SIGMA = model.noise_schedule(DDIM)


def ddim(steps):
    scheduler = copy.deepcopy(DDIM)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.fixture
def go(plain, captions, tmp_path):
    """Run the recipe in this process: (checkpoint, lines of metrics)."""
    def go(*flags):
        call(consistency.main, "--teacher", plain, "--captions", captions, "--out_dir", tmp_path,
             *SMALL, "--clips", 8, *flags)
        return read_checkpoint(tmp_path), metrics(tmp_path)
    return go


# ---- the loss ------------------------------------------------------------------------------------

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


# ---- the loop ------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed, ode_steps, kind, ema, given", [
    (3, 2, "l2", 0.05, ["--seed", 3, "--ode_steps", 2, "--loss", "l2"]), (0, 50, "huber", 0, [])])
def test_steps_of_a_run_are_lcm_s(go, plain, broken, captions, seed, ode_steps, kind, ema, given,
                                  tmp_path):
    """Its flags, --init, what it draws, and in the second step the target, which lags behind.

    In two steps of DDIM half of all pairs reach 0, and the others begin at T.
    """
    first = load_unet(plain)
    for w in first.parameters():
        w.data += 0.02 * noise(*w.shape)
    first.save_pretrained(broken / "unet")
    flags = [*given, "--init", broken, "--guidance", 3, "--ema", ema]
    weights = go(*flags, "--max_steps", 1)[0]["weights"]
    lines = go(*flags)[1]
    encode, words = model.TextEncoder(plain), read_captions(captions)[0]
    teacher, made = load_unet(plain), load_file(tmp_path / "clips.safetensors")["clips"].float()
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
        norm = torch.stack([w.grad.norm() for w in student.parameters()]).norm()
        assert lines[n]["consistency"] == pytest.approx(loss.item(), rel=2e-3)
        assert lines[n]["grad_student"] == pytest.approx(norm.item(), rel=2e-3)
