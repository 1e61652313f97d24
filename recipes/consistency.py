"""Distil by latent consistency (LCM, arXiv 2310.04378): one answer along the teacher's path.

    python -m recipes.consistency --teacher tiny
    python -m recipes.consistency --init out/student --student_t 999    # on from one of train.py

Captions still suffice: clips that the teacher makes, once, take the place of the papers' data.
The same command again resumes. Writes to --out_dir what train.py does, and clips.safetensors.
--ema is of the target network, which is the student that is saved; unlike LCM's it averages over
fewer steps at first (train.average). Guidance is inside, as in ConsistencyTTA (arXiv 2309.10740),
but at one scale: a range of them would need an input for it.
"""
import copy

import torch

import train
from data import cli, number, require
from losses import at, diffuse, guided
from model import denoiser
from recipes.clips import clips_of, draw_more, fit, parser, teacher_clips


def parse_args(argv=None):
    p = parser(__doc__, "consistency", ema=0.95)
    add = p.add_argument
    # the defaults are LCM's
    add("--ode_steps", type=number(int, 2), default=50, help="the teacher's DDIM steps, T to 0")
    add("--loss", choices=("huber", "l2"), default="huber", help="LCM's pseudo-Huber, or squares")
    return train.parse_run(p, argv, "consistency")


def ddim_timesteps(steps, T):
    """Timesteps (steps + 1,) that DDIM's steps lead through: of 50 steps 0, 19, 39, ..., T."""
    return (torch.arange(steps + 1) * (T + 1) // steps - 1).clamp(min=0)


def consistency_function(eps, x, t, text, alpha, sigma):
    """LCM's f(x_t, t, text), a clip: eq. 1 at any t, and x itself at t = 0.

    LCM's c_skip x + c_out x0, with 10 t in the scalings, is this within 7e-6 for all t of 50 steps.
    At T c_skip is 2.5e-9 and c_out 1 - 1.3e-9, so eq. 1, which samples the student, is exact.
    """
    x0 = (x - at(sigma, t) * eps(x, t, text)) / at(alpha, t)
    return torch.where((t > 0).view(-1, 1, 1, 1), x0, x)


def consistency_loss(student, target, teacher, x, t, s, text, alpha, sigma, kind="huber"):
    """How far the student's clip of x (B, C, H, W) at t is from the target's at s < t: (B,), clips.

    One DDIM step of the teacher, guidance included, leads from t to s. No gradient reaches it or
    the target. kind "huber" is LCM's sqrt(d^2 + c^2) - c, c = 0.001, "l2" d^2: of each element d.
    Returns the clips x0 (B, C, H, W) too.
    """
    with torch.no_grad():
        out = teacher(x, t, text)
        x_s = diffuse((x - at(sigma, t) * out) / at(alpha, t), s, out, alpha, sigma)
        goal = consistency_function(target, x_s, s, text, alpha, sigma)
    x0 = consistency_function(student, x, t, text, alpha, sigma)
    d2 = (x0 - goal).square()
    return (d2 if kind == "l2" else (d2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3)), x0


def main(argv=None):
    args = parse_args(argv)
    run = train.start(args)
    device, alpha, sigma, T = run.device, run.alpha, run.sigma, run.T
    run.identity["recipe"] = "consistency"
    require(args.student_t in (None, T), f"--student_t {args.student_t}: consistency is learned up "
            f"to T, where noise has no clip in it; pass --student_t {T}")
    require(args.ode_steps <= T // 2, f"--ode_steps {args.ode_steps}: at most {T // 2}, as this "
            f"teacher has {T + 1} timesteps")
    grid = ddim_timesteps(args.ode_steps, T).to(device)

    # The target is the student's average, which is saved; with --ema 0 it is the student itself.
    target = copy.deepcopy(run.student).requires_grad_(False)
    weights = {"student": list(run.student.parameters()), "ema": list(target.parameters())}
    opts = {"student": train.adamw(args, weights["student"], args.lr)}
    run.resume(weights, opts)
    net = train.prepare(run, run.student)
    student, target, teacher = (denoiser(n, run.amp) for n in (net, target, run.unet))
    teacher = guided(teacher, run.null, args.guidance)
    clips = teacher_clips(run, run.unet)

    def backward(numbers):
        noises, i = (x.to(device) for x in draw_more(
            numbers, args.seed, 1, run.shape, 1, args.ode_steps + 1))
        y, text = clips_of(numbers, run, clips)
        # The student at t must say what its average says one step of the teacher further on.
        t, s = grid[i], grid[i - 1]
        x = diffuse(y, t, noises[0], alpha, sigma)
        loss, x0 = consistency_loss(student, target, teacher, x, t, s, text, alpha, sigma,
                                    args.loss)
        (loss.mean() / args.grad_accum).backward()
        run.log(consistency=loss, x0_std=x0.std((1, 2, 3)))

    return fit(run, [net], weights, opts, backward, "consistency", "x0_std")


if __name__ == "__main__":
    cli(main)
