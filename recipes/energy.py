"""Distil by the energy score (arXiv 2605.00329): clips as spread as the teacher's, and as near.

    python -m recipes.energy --init out/student         # go on from a student of train.py
    python -m recipes.energy --teacher tiny             # from the teacher itself

Captions still suffice: clips that the teacher makes, once, replace the recordings of the paper.
The same command again resumes. Writes to --out_dir what train.py does, and clips.safetensors.
"""
import itertools

import train
from data import cli, number, require
from losses import one_step
from model import denoiser
from recipes.clips import clips_of, draw_more, fit, parser, teacher_clips


def parse_args(argv=None):
    p = parser(__doc__, "energy")
    add = p.add_argument
    # the defaults are ours (docs/LOG.md, 2026-11-21)
    add("--samples", type=number(int, 2), default=2, help="clips of a caption")
    add("--patch", type=number(int, 1), default=4, help="latent columns whose distance is taken")
    return train.parse_run(p, argv, "energy")


def energy_loss(x, y, width=4):
    """Energy score with beta = 1 of clips x (m, B, C, H, W), m >= 2, against y (B, ...): (B,).

    2 mean_k |x_k - y| - mean_{k < l} |x_k - x_l|, the mean over patches of `width` columns of the
    latents, where |d| is the root of the mean square. It is least, on average, for x of y's own
    distribution given the caption. Without the second term it would be regression.
    """
    def length(d):
        patches = d.unflatten(-1, (-1, width))                  # (..., C, H, W / width, width)
        return (patches.square().mean((-4, -3, -1)) + 1e-8).sqrt().mean(-1)

    apart = [length(a - b) for a, b in itertools.combinations(x, 2)]
    return 2 * length(x - y).mean(0) - sum(apart) / len(apart)


def main(argv=None):
    args = parse_args(argv)
    run = train.start(args)
    device, alpha, sigma = run.device, run.alpha, run.sigma
    run.identity["recipe"] = "energy"
    require(run.shape[-1] % args.patch == 0, f"--patch {args.patch}: the latents' {run.shape[-1]} "
            "columns are not a multiple of it")

    weights = {"student": list(run.student.parameters())}
    opts = {"student": train.adamw(args, weights["student"], args.lr)}
    weights["ema"] = [w.detach().clone() for w in weights["student"]] if args.ema else []
    run.resume(weights, opts)
    net = train.prepare(run, run.student)
    eps = denoiser(net, run.amp)
    clips = teacher_clips(run, run.unet)
    del run.unet                                        # 1.7 GB at full size

    def backward(numbers):
        z_T = draw_more(numbers, args.seed, args.samples, run.shape)[0].to(device)
        y, text = clips_of(numbers, run, clips)
        # Several clips x (m, B, C, h, w) of each caption, scored against the teacher's one.
        x = one_step(eps, z_T.flatten(0, 1), text.repeat(args.samples, 1, 1), alpha, sigma,
                     args.student_t).unflatten(0, (args.samples, -1))
        energy = energy_loss(x, y, args.patch)
        (energy.mean() / args.grad_accum).backward()
        run.log(energy=energy, x0_std=x[0].std((1, 2, 3)))

    return fit(run, [net], weights, opts, backward, "energy", "x0_std")


if __name__ == "__main__":
    cli(main)
