"""Latent consistency: its loss beside diffusers and closed forms, its loop, what it refuses."""
import copy
import json

import pytest
import torch
from conftest import refused, run
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file

import model
import sample
import train
from data import InputError, caption_at, read_captions
from losses import diffuse, guided
from model import denoiser, load_unet
from recipes import consistency
from recipes.clips import draw_more
from recipes.consistency import consistency_function, consistency_loss

pytestmark = pytest.mark.usefixtures("loaded_once")
SMALL = ["--max_steps", 2, "--batch_size", 4, "--lr", 1e-3, "--guidance", 2, "--grad_accum", 1,
         "--clips", 8, "--log_every", 1, "--device", "cpu"]
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DDIM = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                     timestep_spacing="trailing")
ALPHA, SIGMA = model.noise_schedule(DDIM)


def strings(*flags):
    return [str(flag) for flag in flags]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(values, t):
    return values[t].view(-1, 1, 1, 1)


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope="module")
def where(plain, captions, tmp_path_factory):
    """The flags of a teacher, captions and the file of clips that all runs here share."""
    clips = tmp_path_factory.mktemp("clips") / "clips.safetensors"
    return ["--teacher", plain, "--captions", captions, "--cache", clips]


@pytest.fixture
def go(where, tmp_path):
    """Run the recipe in this process: (checkpoint, saved student, lines of metrics)."""
    def go(*flags, out=tmp_path / "out"):
        go.code = consistency.main(strings(*where, "--out_dir", out, *SMALL, *flags))
        saved = load_file(out / "student/diffusion_pytorch_model.safetensors")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / "checkpoint.pt", weights_only=True), saved, lines
    return go


# ---- the loss ----------------------------------------------------------------------------------

def of_lcm(student, target, teacher, x, t, text, guidance, steps, kind):
    """The loss of a step of LCM by diffusers' schedulers, as its script of training takes them.

    Networks are called a sample at a time, with a text and with the empty one: text[0], text[1:].
    """
    lcm, ddim = LCMScheduler(**SCHEDULE), copy.deepcopy(DDIM)
    ddim.set_timesteps(steps)

    def f(net, x, t, words):
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(t)
        eps = net(x, torch.tensor([t]), words).sample
        return c_skip * x + c_out * (x - SIGMA[t] * eps) / ALPHA[t]

    losses = []
    for x_t, at, words in zip(x.split(1), t.tolist(), text[1:].split(1)):
        with torch.no_grad():
            cond, uncond = (teacher(x_t, torch.tensor([at]), w).sample for w in (words, text[:1]))
            w = guidance - 1                            # LCM's: cond + w (cond - uncond)
            x_s = ddim.step(cond + w * (cond - uncond), at, x_t).prev_sample
            goal = f(target, x_s, max(0, at - 1000 // steps), words)
        d = f(student, x_t, at, words) - goal
        loss = d.square() if kind == "l2" else (d.square() + 0.001 ** 2).sqrt() - 0.001
        losses.append(loss.mean())
    return torch.stack(losses)


def other(unet, seed):
    """A copy of a UNet whose weights are a little off."""
    unet, generator = copy.deepcopy(unet), torch.Generator().manual_seed(seed)
    for w in unet.parameters():
        w.data += 0.02 * torch.randn(w.shape, generator=generator)
    return unet.requires_grad_(True)


@pytest.mark.parametrize("kind, guidance", [("huber", 3.5), ("l2", 1)])
def test_loss_and_gradient_are_those_of_diffusers_step_of_lcm(plain, kind, guidance):
    teacher = load_unet(plain).requires_grad_(True)
    student, target = other(teacher, 1), other(teacher, 2)
    text = model.TextEncoder(plain)(["", "a", "b", "c", "d"])
    x, t = noise(4, 4, 8, 8), torch.tensor([999, 519, 39, 19])
    expected = of_lcm(student, target, teacher, x, t, text, guidance, 50, kind)
    expected.sum().backward()
    gradient = [w.grad.clone() for w in student.parameters()]
    student.zero_grad()

    s = torch.tensor([979, 499, 19, 0])
    loss, x0 = consistency_loss(
        denoiser(student), denoiser(target), guided(denoiser(teacher), text[:1], guidance), x, t, s,
        text[1:], ALPHA, SIGMA, kind)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    off = torch.stack([(w.grad - g).norm() for w, g in zip(student.parameters(), gradient)]).norm()
    assert off < 2e-3 * torch.stack([g.norm() for g in gradient]).norm()
    equal(x0, consistency_function(denoiser(student), x, t, text[1:], ALPHA, SIGMA))
    assert all(w.grad is None for net in (target, teacher) for w in net.parameters())


def test_lcm_s_scalings_are_eq_1_but_at_0():
    scheduler = LCMScheduler(**SCHEDULE)
    for t, bound in ((999, 3e-9), (19, 7e-6)):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert 0 < c_skip < bound and 0 < 1 - c_out < bound
    x = noise(2, 4, 8, 8)
    assert scheduler.get_scalings_for_boundary_condition_discrete(0) == (1, 0)
    equal(consistency_function(lambda x, t, y: x, x, torch.tensor([0, 0]), None, ALPHA, SIGMA), x)


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
    t = torch.arange(1, steps + 1) * 1000 // steps - 1
    s, kept = torch.cat([torch.zeros(1, dtype=int), t[:-1]]), slice(0 if last else 1, None)
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


def test_the_teacher_s_own_ddim_steps_to_0_have_no_loss():
    """In diffusers' words; then the student in one step is the teacher in all of them."""
    ddim = copy.deepcopy(DDIM)
    ddim.set_timesteps(10)

    def sampled(x, t):
        clips = []
        for clip, start in zip(x.split(1), t):
            for at in ddim.timesteps[ddim.timesteps <= start]:
                clip = ddim.step(gaussian(clip, at[None], None), at, clip).prev_sample
            clips.append(clip)
        return torch.cat(clips)

    assert mean_loss(implied(sampled), 10) < 1e-9 < mean_loss(implied(exact), 10) / 100


# ---- the loop ----------------------------------------------------------------------------------

def test_steps_of_a_run_are_lcm_s(go, plain, captions, where, tmp_path):
    """Its flags, what it draws, and in the second step the target that lags behind."""
    flags = ["--ode_steps", 20, "--loss", "l2", "--guidance", 3, "--seed", 3, "--ema", 0.05,
             "--cache", tmp_path / "clips.safetensors"]
    first, _, (line,) = go(*flags, "--max_steps", 1)
    lines = [line, go(*flags)[2][1]]
    encode, words = model.TextEncoder(plain), read_captions(captions)[0]
    teacher, made = load_unet(plain), load_file(tmp_path / "clips.safetensors")["clips"].float()
    ddim = copy.deepcopy(DDIM)
    ddim.set_timesteps(20)
    start = [[w.detach() for w in teacher.parameters()]] * 2
    then = [first["weights"][name] for name in ("student", "ema")]
    for n, weights in enumerate((start, then)):
        student, target = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        for net, values in zip((student, target), weights):
            for w, value in zip(net.parameters(), values, strict=True):
                w.data.copy_(value)
        noises, i = draw_more(range(4 * n, 4 * n + 4), 3, 1, (4, 8, 8), 1, 21)
        t = ddim.timesteps.flip(0)[i - 1]
        rows = [caption_at(range(8), 3, k) for k in range(4 * n, 4 * n + 4)]
        text = encode(["", *(caption_at(words, 3, k) for k in rows)])
        x = diffuse(made[rows], t, noises[0], ALPHA, SIGMA)
        loss = of_lcm(student, target, teacher, x, t, text, 3, 20, "l2").mean()
        loss.backward()
        norm = torch.stack([w.grad.norm() for w in student.parameters()]).norm()
        assert lines[n]["consistency"] == pytest.approx(loss.item(), rel=2e-3)
        assert lines[n]["grad_student"] == pytest.approx(norm.item(), rel=2e-3)


def test_all_timesteps_of_the_grid_are_learned_and_the_last_is_T(go, monkeypatch):
    """Of 3 steps, which do not divide 1000."""
    pairs = set()

    def spy(student, target, teacher, x, t, s, *more):
        pairs.update(zip(t.tolist(), s.tolist()))
        return consistency_loss(student, target, teacher, x, t, s, *more)

    monkeypatch.setattr(consistency, "consistency_loss", spy)
    monkeypatch.setattr(consistency, "draw_more", lambda numbers, seed, count, shape, low, high: (
        draw_more(numbers, seed, count, shape)[0],
        torch.tensor([low + n % (high - low) for n in numbers])))
    go("--ode_steps", 3, "--max_steps", 1)
    assert pairs == {(332, 0), (665, 332), (999, 665)}


def test_the_optimizer_s_flags_and_the_target_s(go, plain):
    """AdamW's first step by hand, from its own state."""
    checkpoint, saved, _ = go("--max_steps", 1, "--beta1", 0.6, "--beta2", 0.7, "--weight_decay", 5,
                              "--grad_clip", 1e-3, "--ema", 0.05, "--warmup", 2)
    before, after, ema = (torch.cat([w.detach().flatten() for w in ws]) for ws in (
        load_unet(plain).parameters(), *(checkpoint["weights"][k] for k in ("student", "ema"))))
    opt = checkpoint["opts"]["student"]
    m, v = (torch.cat([s[key].flatten() for s in opt["state"].values()])
            for key in ("exp_avg", "exp_avg_sq"))
    g, root = m / 0.4, (v / 0.3).sqrt()
    assert g.norm().item() == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(v, 0.3 * g.square())
    torch.testing.assert_close(after, before * (1 - 5e-4 * 5) - 5e-4 * g / (root + 1e-8),
                               rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ema, 0.05 * before + 0.95 * after)
    equal(torch.cat([w.flatten() for w in saved.values()]).sort()[0], ema.sort()[0])


def test_without_ema_the_target_is_the_student_itself(go):
    weights = go("--ema", 0)[0]["weights"]
    equal(weights["ema"], weights["student"])


def test_accumulation_equals_the_large_batch(go, tmp_path):
    (large,) = go("--max_steps", 1)[2]
    (parts,) = go("--max_steps", 1, "--batch_size", 2, "--grad_accum", 2, out=tmp_path / "b")[2]
    for key in ("consistency", "grad_student"):
        assert parts[key] == pytest.approx(large[key], rel=2e-3)


@pytest.mark.slow
def test_two_processes_equal_the_large_batch(go, where, tmp_path):
    (large,) = go("--max_steps", 1)[2]
    code, output = run("recipes.consistency", *where, *SMALL, "--out_dir", tmp_path / "b",
                       "--max_steps", 1, "--batch_size", 2, ranks=2, cwd=tmp_path)
    assert code == 0, output
    parts = json.loads((tmp_path / "b/metrics.jsonl").read_text())
    for key in ("consistency", "grad_student"):
        assert parts[key] == pytest.approx(large[key], rel=2e-3)


def test_it_trains_resumes_bit_for_bit_and_is_heard(go, tmp_path, monkeypatch):
    """From a student of its own; behind the third step a signal stops it."""
    anew = go(out=tmp_path / "start")
    flags = ["--init", tmp_path / "start/student", "--keep_every", 3, "--max_steps"]
    whole = go(*flags, 4, out=tmp_path / "whole")
    go(*flags, 2)
    with monkeypatch.context() as patch:
        end = train.end_step
        patch.setattr(train, "end_step", lambda run, *a: run.caught.fill_(15) and end(run, *a))
        assert go(*flags, 4)[0]["step"] == 3 and go.code == 143
    parts = go(*flags, 4)
    for key in ("step", "weights", "opts"):
        equal(parts[0][key], whole[0][key])
    equal(parts[1], whole[1])
    equal(*(load_file(tmp_path / name / "student-3/diffusion_pytorch_model.safetensors")
            for name in ("out", "whole")))
    assert [{**line, "samples_per_s": 0} for line in parts[2]] == [
        {**line, "samples_per_s": 0} for line in whole[2]]
    about = json.loads((tmp_path / "out/student/swiftaudio.json").read_text())
    assert about["timestep"] == 999 and about["step"] == 4

    assert whole[2][0]["consistency"] != anew[2][0]["consistency"]     # not the teacher's
    sample.main(strings("--student", tmp_path / "out/student", "--prompt", "a dog", "--out",
                        tmp_path / "heard", "--device", "cpu"))
    assert len(list((tmp_path / "heard").glob("*.wav"))) == 1


# ---- bad input ---------------------------------------------------------------------------------

def test_refusals(where, tmp_path):
    for flags, says in ((["--ode_steps", 1], ["--ode_steps", "between 2"]),
                        (["--ode_steps", 500], ["--ode_steps 500", "at most 499"]),
                        (["--student_t", 625], ["--student_t 625", "999"]),
                        (["--loss", "l1"], ["--loss", "huber"]),
                        (["--samples", 2], ["unrecognized", "--samples"]),
                        (["--clips", 3], ["--clips 3", "--batch_size 4"])):
        refused("recipes.consistency", *where, *SMALL, "--out_dir", tmp_path / "out", *flags,
                cwd=tmp_path, says=says)
        assert not (tmp_path / "out/student").exists()


def test_another_run_is_not_resumed(go):
    go("--max_steps", 1)
    for flags, says in ((["--ode_steps", 20], "--ode_steps 50, this one has 20"),
                        (["--loss", "l2"], "--loss huber, this one has l2"),
                        (["--ema", 0], "--ema 0.95, this one has 0.0")):
        with pytest.raises(InputError, match=says):
            go(*flags)
