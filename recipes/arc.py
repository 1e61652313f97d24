"""Distil by ARC (arXiv 2505.08175): a discriminator tells the student's clips from the teacher's.

    python -m recipes.arc --init out/student            # go on from a student of train.py
    python -m recipes.arc --teacher tiny                # from the teacher itself

Captions still suffice: clips that the teacher makes, once, replace the recordings of the paper.
The same command again resumes. Writes to --out_dir what train.py does, and clips.safetensors.
"""
import torch
from torch import nn

import train
from data import cli, draw_batch, number, require
from losses import diffuse, one_step
from model import denoiser, load_unet
from recipes.clips import clips_of, draw_more, fit, parser, teacher_clips


def parse_args(argv=None):
    p = parser(__doc__, "arc")
    add = p.add_argument
    # the defaults are ours (docs/LOG.md, 2026-11-21)
    add("--contrast", type=number(float), default=1.0, help="weight of the contrastive loss")
    add("--r1", type=number(float), default=1.0, help="weight of R1: flat at the teacher's clips")
    add("--r2", type=number(float), default=1.0, help="weight of R2: flat at the student's")
    add("--d_lr", type=number(float), default=5e-4, help="rate of the discriminator D")
    add("--d_first", type=number(int), default=40, help="steps before the student starts to learn")
    add("--d_frozen", type=number(int, 0, 1), default=0, help="1: train only D's heads")
    add("--d_t_min", type=number(int), default=50, help="smallest timestep of what D scores")
    add("--d_t_max", type=number(int), default=700, help="one above the largest")
    args = train.parse_run(p, argv, "arc")
    require(args.batch_size > 1 or not args.contrast, "--batch_size 1: has no other caption to "
            "contrast with; give it 2 or more, or --contrast 0")
    return args


def encode(unet, x, t, text):
    """The maps [(B, C, h, w)] at the end of each level of a UNet's encoder, and in its middle."""
    emb = unet.time_embedding(unet.time_proj(t))
    x, maps = unet.conv_in(x), []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        x, states = block(x, emb, **({"encoder_hidden_states": text} if attends else {}))
        maps.append(states[-2] if block.downsamplers else states[-1])
    return [*maps, unet.mid_block(x, emb, encoder_hidden_states=text)]


class Discriminator(nn.Module):
    """Scores (B, n) of noised clips: the higher, the more like the teacher's own.

    As in ARC, the teacher's UNet up to its middle, fine-tuned, with new heads: here one per level.
    frozen: only the heads learn, on the teacher's features (LADD, arXiv 2403.12015).
    """

    def __init__(self, unet, frozen, amp):
        super().__init__()
        self.unet, self.amp = unet.requires_grad_(not frozen), amp
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(self.unet, unused)
        widths = unet.config.block_out_channels
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 1, 1))
            for width in (*widths, widths[-1]))

    def forward(self, x, t, text):
        with self.amp:                          # but not the heads: R1 and R2 are small differences
            maps = encode(self.unet, x, t, text)
        return torch.cat([head(m.float()).flatten(1) for head, m in zip(self.heads, maps)], 1)


def relativistic_loss(better, worse):
    """softplus(worse - better) of score maps (B, n): -log P(better is preferred), (B,)."""
    return nn.functional.softplus(worse - better).mean(1)


def main(argv=None):
    args = parse_args(argv)
    run = train.start(args)
    device, alpha, sigma = run.device, run.alpha, run.sigma
    run.identity["recipe"] = "arc"
    run.identity["captions a forward pass"] = args.batch_size   # "another caption" is one of them
    require(args.d_t_min < args.d_t_max <= len(alpha), f"--d_t_min {args.d_t_min} must be below "
            f"--d_t_max {args.d_t_max}, and that at most {len(alpha)}")

    torch.manual_seed(args.seed)
    D = Discriminator(load_unet(run.folder), args.d_frozen, run.amp).to(device)
    weights = {"student": list(run.student.parameters()),
               "d": [w for w in D.parameters() if w.requires_grad]}
    opts = {"student": train.adamw(args, weights["student"], args.lr),
            "d": train.adamw(args, weights["d"], args.d_lr)}
    weights["ema"] = [w.detach().clone() for w in weights["student"]] if args.ema else []
    run.resume(weights, opts)
    net = train.prepare(run, run.student)
    if args.checkpointing:
        D.unet.enable_gradient_checkpointing()
    scores = train.DDP(D) if run.ranks > 1 else D   # goes back twice: not compiled
    eps = denoiser(net, run.amp)
    clips = teacher_clips(run, run.unet)
    del run.unet                                        # 1.7 GB at full size

    def backward(numbers):
        z_T = draw_batch(numbers, args.seed, run.shape, 0, 1, run.T)[0].to(device)
        noises, t = (x.to(device) for x in draw_more(
            numbers, args.seed, 3, run.shape, args.d_t_min, args.d_t_max))
        y, text = clips_of(numbers, run, clips)

        # D scores both clips at one t and noise, and with 0.05 more (R1, R2; stable-audio-tools
        # d7e78b0 has 0.05, its 9418630 0.01 and weight 100). It prefers the real clip to the fake
        # (relativistic), the right caption to another (contrastive).
        x0 = one_step(eps, z_T, text, alpha, sigma, args.student_t)
        fake = x0.detach().requires_grad_()
        y_t, fake_t = (diffuse(clip, t, noises[0], alpha, sigma) for clip in (y, fake))
        made = scores(fake_t, t, text)
        real, wrong, near_real, near_made = scores(
            torch.cat([y_t, y_t, y_t + 0.05 * noises[1], fake_t.detach() + 0.05 * noises[2]]),
            t.repeat(4), torch.cat([text, text.roll(1, 0), text, text])).chunk(4)
        d = (relativistic_loss(real, made) + args.contrast * relativistic_loss(real, wrong)
             + args.r1 * (near_real - real).square().mean(1)
             + args.r2 * (near_made - made).square().mean(1))

        # The student wants its fake preferred; `made` is used again, so its graph is kept.
        arc = relativistic_loss(made, real.detach())
        to_x0, = torch.autograd.grad(arc.sum(), fake, retain_graph=True)
        (d.mean() / args.grad_accum).backward(inputs=weights["d"])
        ((x0 * to_x0).flatten(1).sum(1).mean() / args.grad_accum).backward()
        d_right = (real > made).float().mean(1)
        run.log(arc=arc, d=d, d_right=d_right, x0_std=x0.std((1, 2, 3)))

    return fit(run, [net, scores], weights, opts, backward, "arc", "d_right", "x0_std",
               first={"student": args.d_first})


if __name__ == "__main__":
    cli(main)
