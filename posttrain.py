"""Train a one-step student on its teacher's own clips, after VSD (train.py) or in its place.

    python posttrain.py --student out/student --objective arc       # adversarial, arXiv 2505.08175
    python posttrain.py --student out/student --objective energy    # energy score, arXiv 2605.00329
    python posttrain.py --teacher tiny --objective energy           # from the teacher itself

Captions are still all it needs: the papers have recordings, here the teacher makes clips, once.
The same command again resumes, bit for bit. Writes to --out_dir what train.py writes, and
clips.safetensors.
"""
import datetime
import hashlib
import json
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import caption_at, draw_batch, read_captions, sampling_noise
from extras.cli import InputError, Parser, number, replace_file, run
from extras.clips import teacher_clips
from extras.device import has_bf16, pick_device
from extras.hub import TINY, full_name, open_student, read_settings
from extras.log import Log
from extras.publish import write_student
from extras.resume import read_checkpoint
from lora import inject, load_lora_state, lora_disabled, save_lora
from losses import (
    diffuse,
    energy_loss,
    guided,
    lora_loss,
    one_step,
    relativistic_loss,
    tv_loss,
    vsd_loss,
)
from model import Pipeline, denoiser, load_unet
from train import add_flags, checked, learning_rate, teacher_defaults

# Flags of one objective or two: kind of value, {objective: default}, what it is. The defaults are
# ours (LOG.md, 2026-11-21). With another objective such a flag is an error.
POSITIVE, COUNT, TIMESTEP = number(float), number(int, 1), number(int, 0, 1000)
FLAGS = {
    "contrast": (POSITIVE, {"arc": 1.0}, "weight of the contrastive loss"),
    "r1": (POSITIVE, {"arc": 1.0}, "weight of D's flatness near the teacher's clips"),
    "r2": (POSITIVE, {"arc": 1.0}, "the same near the student's"),
    "d_lr": (POSITIVE, {"arc": 5e-4}, "rate of the discriminator D"),
    "d_first": (number(int), {"arc": 40}, "first steps, in which only D learns"),
    "d_frozen": (number(int, 0, 1), {"arc": 0}, "1: of D only the heads learn"),
    "d_t_min": (TIMESTEP, {"arc": 50}, "smallest timestep that D hears clips at"),
    "d_t_max": (TIMESTEP, {"arc": 700}, "one above the largest"),
    "samples": (number(int, 2), {"energy": 2}, "clips of a caption"),
    "patch": (COUNT, {"energy": 4, "regression": 4}, "columns of latents compared as one"),
    "feature_weight": (POSITIVE, {"energy": 0.0, "regression": 0.0},
                       "weight of the distance in the teacher's features"),
}
# What a student's own run decides here as well, unless the command line does.
KEPT = ("captions", "caption_column", "max_captions", "guidance", "lora_guidance", "weighting",
        "lora_weighting", "tv", "tv_weight", "lora_rank", "lora_alpha", "lora_targets", "lora_drop",
        "t_min", "t_max", "parameterization", "student_t")
NEAR = 0.05             # how far R1 and R2 move a noised clip, as in ARC's public code


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--objective", choices=("arc", "energy", "regression", "vsd"), required=True,
        help="what to learn from the clips by; vsd: nothing, train.py's loss goes on")
    add("--student", help="start from this student of train.py; default: from --teacher")
    add("--clips", type=COUNT, default=1536, help="clips that the teacher makes")
    add("--clip_steps", type=number(int, 1, 1000), default=10, help="in so many steps each")
    add("--cache", help="file to keep them in; default: clips.safetensors in --out_dir")
    add("--vsd", type=POSITIVE, help="weight of VSD beside the objective; default: 0")
    for name, (kind, defaults, what) in FLAGS.items():
        default, = set(defaults.values())
        add(f"--{name}", type=kind, help=f"{', '.join(defaults)}: {what}; default: {default}")
    add_flags(add)

    # The start decides the teacher, and the two bring defaults; the command line wins.
    p.set_defaults(teacher=None, out_dir="out_post")
    args, about = p.parse_args(argv), {}
    if args.student:
        about = open_student(args.student)[2]
        args.teacher = args.teacher or about["teacher"]
        if full_name(args.teacher) != full_name(about["teacher"]):
            raise InputError(f"--student {args.student}: its teacher is {about['teacher']}, not "
                             f"--teacher {args.teacher}")
    if args.teacher is None:
        raise InputError("pass --student FOLDER or --teacher NAME to start from")
    flags, folder = about.get("flags", {}), TINY if args.teacher == "tiny" else args.teacher
    p.set_defaults(**{**teacher_defaults(args), "teacher": args.teacher,
                      **read_settings(folder).get("posttrain", {}).get(args.objective, {}),
                      **{key: flags[key] for key in KEPT if key in flags}})
    args = checked(p.parse_args(argv))

    for name, (_, defaults, _) in FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(args.objective))
        elif args.objective not in defaults:
            raise InputError(f"--{name} does not go with --objective {args.objective}")
    if args.clips < args.batch_size:
        raise InputError(f"--clips {args.clips}: fewer than a batch, --batch_size "
                         f"{args.batch_size}")
    if args.objective == "arc" and args.d_t_min >= args.d_t_max:
        raise InputError(f"--d_t_min {args.d_t_min} must be below --d_t_max {args.d_t_max}")
    if args.vsd is None:
        args.vsd = float(args.objective == "vsd")
    args.cache = args.cache or os.path.join(args.out_dir, "clips.safetensors")
    return args


# ---- ARC's discriminator -----------------------------------------------------------------------

def encode(unet, x, t, text):
    """The maps [(B, C, h, w)] at the end of each level of a UNet's encoder, and in its middle."""
    dtype = next(unet.parameters()).dtype
    x, text = x.to(dtype), text.to(dtype)
    emb = unet.time_embedding(unet.time_proj(t).to(dtype))
    x, maps = unet.conv_in(x), []
    for block in unet.down_blocks:
        attends = getattr(block, "has_cross_attention", False)
        x, states = block(x, emb, **({"encoder_hidden_states": text} if attends else {}))
        maps.append(states[-2] if block.downsamplers else states[-1])
    return [*maps, unet.mid_block(x, emb, encoder_hidden_states=text)]


class Discriminator(nn.Module):
    """Scores (B, n) of noised clips: the higher, the more like the teacher's own.

    As in ARC it is the network itself up to its middle, trained, with new heads; here one on each
    level. frozen: only the heads learn, and the rest stays the teacher's (LADD, arXiv 2403.12015).
    """

    def __init__(self, unet, frozen):
        super().__init__()
        self.unet = unet.requires_grad_(not frozen)
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(self.unet, unused)
        widths = unet.config.block_out_channels
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 1, 1))
            for width in (*widths, widths[-1]))

    def forward(self, x, t, text):
        maps = encode(self.unet, x, t, text)
        return torch.cat([head(m.float()).flatten(1) for head, m in zip(self.heads, maps)], 1)


def draw_more(numbers, seed, count, shape, low, high):
    """What is drawn beside draw_batch(): noises (count, B, *shape), and t (B,) in [low, high)."""
    rngs = [np.random.default_rng((seed, 3, n)) for n in numbers]
    noises = np.stack([r.standard_normal((count, *shape), dtype=np.float32) for r in rngs], 1)
    return torch.from_numpy(noises), torch.tensor([int(r.integers(low, high)) for r in rngs])


def restore_lora(unet, folder):
    """Load the LoRA teacher that train.py left beside a student, if there is one; say which."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return f"{path}: not there, so the LoRA teacher starts as the teacher"
    try:
        load_lora_state(unet, load_file(path))
    except Exception as e:
        raise InputError(f"{path}: does not fit --lora_rank and --lora_targets, or is damaged "
                         f"({type(e).__name__})")
    return f"{path}: the LoRA teacher goes on from there"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = tqdm.write if rank == 0 else lambda line: None
    device = pick_device(args.device, exact=args.precision == "fp32")
    if ranks > 1:           # the others wait while the first makes the clips
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=2))
    auto = device.type == "cuda" and has_bf16(device)
    bf16 = auto if args.precision == "auto" else args.precision == "bf16"
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    captions, _ = read_captions(args.captions, args.caption_column, args.max_captions)
    out = Path(args.out_dir)
    config = {**vars(args), "precision": "bf16" if bf16 else "fp32", "ranks": ranks}
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    found = read_checkpoint(out / "checkpoint.pt", config, digest)
    first_step = found["step"] if found else 0
    arc, energy, regression = (args.objective == name for name in ("arc", "energy", "regression"))

    # ---- the teacher and its clips -------------------------------------------------------------
    pipe = Pipeline(args.teacher).to(device)
    unet = load_unet(pipe.folder, dtype=torch.bfloat16 if bf16 else torch.float32).to(device)
    if args.patch and pipe.latent_shape[-1] % args.patch:
        raise InputError(f"--patch {args.patch}: the latents' {pipe.latent_shape[-1]} columns are "
                         "not a multiple of it")
    null, clips = pipe.encode_text([""]), ()
    if args.objective != "vsd":
        eps = guided(denoiser(unet.requires_grad_(False), amp), null, args.guidance)
        clips = teacher_clips(args, captions, digest, pipe, eps, rank)
        if ranks > 1:
            dist.barrier()
            clips = teacher_clips(args, captions, digest, pipe, eps)
        del eps

    # ---- what learns: the student; ARC's discriminator; with VSD, the LoRA teacher --------------
    folder, part, _ = open_student(args.student) if args.student else (pipe.folder, "unet", {})
    nets, rates = {"student": load_unet(folder, part).to(device)}, {"student": args.lr}
    torch.manual_seed(args.seed)
    if arc:
        dtype = unet.dtype if args.d_frozen else torch.float32
        D = Discriminator(load_unet(pipe.folder, dtype=dtype), args.d_frozen)
        nets["d"], rates["d"] = D.to(device), args.d_lr
    if args.vsd:
        inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)
        if args.student:
            say(restore_lora(unet, folder.parent / "lora"))
        nets["lora"], rates["lora"] = unet, args.lora_lr
    elif not args.feature_weight:
        unet = None                         # it has made its clips; at full size 1.7 GB
    weights = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
    ema = [p.detach().clone() for p in weights["student"]] if args.ema else []
    opts = {name: torch.optim.AdamW(weights[name], rates[name], betas=(args.beta1, args.beta2),
                                    weight_decay=args.weight_decay, fused=device.type == "cuda")
            for name in nets}
    if found:
        for name, ours in {**weights, "ema": ema}.items():
            for p, saved in zip(ours, found["weights"][name]):
                p.data.copy_(saved)
        for name, opt in opts.items():
            opt.load_state_dict(found["opts"][name])
        del found
    student = nets["student"]
    if args.checkpointing:
        for net in (student, unet, D.unet if arc else None):
            if net is not None:
                net.enable_gradient_checkpointing()
    if args.compile:
        nets = {name: torch.compile(net) for name, net in nets.items()}
    if ranks > 1:
        nets = {name: DDP(net) for name, net in nets.items()}

    student_eps, lora_eps = denoiser(nets["student"], amp), None
    if args.vsd:
        lora_eps = denoiser(nets["lora"], amp)

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return lora_eps(x, t, text)

    def scores(x, t, text):
        with amp:
            return nets["d"](x, t, text)

    def save(step):
        """Write the checkpoint, the student and the adapters; each file is replaced whole."""
        if rank > 0:
            return
        replace_file(out / "checkpoint.pt", lambda path: torch.save({
            "step": step, "config": config, "digest": digest, "weights": {**weights, "ema": ema},
            "opts": {name: opt.state_dict() for name, opt in opts.items()}}, path))
        write_student(out / "student", student, ema, pipe, step, config,
                      f"python posttrain.py {shlex.join(argv)}")
        if args.vsd:
            save_lora(unet, out / "lora", args.lora_rank, args.lora_alpha)

    # ---- the loop ------------------------------------------------------------------------------
    alpha, sigma, step_size = pipe.alpha, pipe.sigma, args.batch_size * args.grad_accum * ranks
    millions = {name: round(sum(p.numel() for p in ps) / 1e6, 2) for name, ps in weights.items()}
    say(json.dumps(config))
    say(f"{args.batch_size} x {args.grad_accum} accumulated x {ranks} processes = {step_size} "
        f"captions a step, {len(clips)} clips of the teacher, latents {pipe.latent_shape}, "
        f"millions of parameters {millions}, {device.type} {config['precision']}, from step "
        f"{first_step}")
    log = Log(out, first_step, rank)
    if first_step >= args.max_steps:        # finished, but perhaps killed between two files
        save(first_step)
    bad_step = torch.tensor(math.inf, device=device)
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps,
               desc=args.objective, disable=rank > 0)
    for step in bar:
        for name, opt in opts.items():
            waits = name == "student" and arc and step < args.d_first
            opt.param_groups[0]["lr"] = 0 if waits else rates[name] * learning_rate(step, args)
            opt.zero_grad()

        for micro in range(args.grad_accum):
            first = ((step * args.grad_accum + micro) * ranks + rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
                numbers, args.seed, pipe.latent_shape, args.t_min, args.t_max, pipe.T))
            more, t_d = (x.to(device) for x in draw_more(
                numbers, args.seed, args.samples or 3, pipe.latent_shape, args.d_t_min or 0,
                args.d_t_max or 1))
            if len(clips):                  # clip y, made from noise z_y, and its caption's place
                numbers = [caption_at(range(args.clips), args.seed, n) for n in numbers]
                y = clips[numbers].to(device).float()
                z_y = sampling_noise(numbers, args.seed, pipe.latent_shape).to(device)
            text = pipe.encode_text([caption_at(captions, args.seed, n) for n in numbers])
            for net in nets.values():       # DDP averages gradients once a step
                net.require_backward_grad_sync = micro == args.grad_accum - 1

            # Student: clips x (m, B, C, h, w) of the captions of y, from noise that is not y's
            # unless it regresses; with a feature loss, also from y's.
            z = [*more] if energy else [z_y] if regression else [z_T]
            z += [z_y] if args.feature_weight else []
            x = one_step(student_eps, torch.cat(z), text.repeat(len(z), 1, 1), alpha, sigma,
                         args.parameterization, args.student_t).unflatten(0, (len(z), -1))
            x0, loss = x[0], torch.zeros(args.batch_size, device=device)
            if arc:
                # D hears both with the same noise; its pass of `made` serves the student and D.
                fake = x0.detach().requires_grad_()
                y_t, fake_t = (diffuse(clip, t_d, more[0], alpha, sigma) for clip in (y, fake))
                heard = [y_t, y_t, y_t + NEAR * more[1], fake_t.detach() + NEAR * more[2]]
                texts = [text, text.roll(1, 0), text, text]
                made = scores(fake_t, t_d, text)
                real, wrong, near_real, near_made = scores(
                    torch.cat(heard), t_d.repeat(4), torch.cat(texts)).chunk(4)
                arc_loss = relativistic_loss(made, real.detach())
                to_x0, = torch.autograd.grad(arc_loss.sum(), fake, retain_graph=True)
                loss = (x0 * to_x0).flatten(1).sum(1)           # its gradient to x0 is to_x0
                d = (relativistic_loss(real, made)
                     + args.contrast * relativistic_loss(real, wrong)
                     + args.r1 * (near_real - real).square().mean(1)
                     + args.r2 * (near_made - made).square().mean(1))
                (d.mean() / args.grad_accum).backward(inputs=weights["d"])
                log.add("arc", arc_loss)
                log.add("d", d, t_d)
                log.add("d_right", (real > made).float().mean(1), t_d)
            elif energy or regression:
                loss = energy_loss(x[:args.samples or 1], y, args.patch)
                log.add(args.objective, loss)
            if args.feature_weight:
                ours, theirs = (diffuse(clip, t, eps, alpha, sigma) for clip in (x[-1], y))
                with lora_disabled(unet), amp:
                    maps = zip(encode(unet, ours, t, text), encode(unet, theirs, t, text))
                    feature = sum((a - b).float().square().mean((1, 2, 3)) for a, b in maps)
                log.add("feature", feature, t)
                loss = loss + args.feature_weight * feature
            if args.vsd:                    # train.py's step, from here
                vsd = vsd_loss(x0, t, eps, text, guided(teacher_eps, null, args.guidance),
                               guided(lora_eps, null, args.lora_guidance), alpha, sigma,
                               args.weighting)
                loss = loss + args.vsd * (vsd + args.tv_weight * tv_loss(x0, args.tv))
                log.add("vsd", vsd, t)
            (loss.mean() / args.grad_accum).backward()
            if args.vsd:
                text = torch.where((u < args.lora_drop)[:, None, None], null, text)
                lora = lora_loss(x0, t_lora, eps_lora, text, lora_eps, alpha, sigma,
                                 args.lora_weighting)
                (lora.mean() / args.grad_accum).backward()
                log.add("lora", lora, t_lora)
            log.add("x0_std", x0.std((1, 2, 3)))

        for name, opt in opts.items():
            norm = torch.nn.utils.clip_grad_norm_(weights[name], args.grad_clip or math.inf)
            log.add(f"grad_{name}", norm)
            bad_step = torch.where(norm.isfinite(), bad_step, bad_step.clamp(max=step))
            opt.step()
        if ema:
            rate = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(ema, [p.detach() for p in weights["student"]], 1 - rate)

        done = step + 1
        due_save = done == args.max_steps or done % args.save_every == 0
        if due_save or done % args.log_every == 0:      # at each save: a resumed log has no gap
            if math.isfinite(bad_step):
                raise InputError(f"step {int(bad_step)}: the loss or a gradient is not finite; the "
                                 f"last checkpoint in {out} is good. Resume with a smaller --lr or "
                                 "--lora_lr, or with --precision fp32")
            line = log.write(done, step_size)
            bar.set_postfix({k: f"{line[k]:.3g}" for k in (args.objective, "x0_std")})
        if due_save:
            save(done)

    if ranks > 1:
        dist.barrier()                      # none leaves while another still saves
        dist.destroy_process_group()
    say(f"student: {out / 'student'}; hear it: python sample.py --student {out / 'student'} "
        '--prompt "..."')


if __name__ == "__main__":
    run(main)
