"""Train a one-step student on its teacher's own clips, after VSD (train.py) or in its place.

    python posttrain.py --student out/student --objective arc       # adversarial, arXiv 2505.08175
    python posttrain.py --student out/student --objective energy    # energy score, arXiv 2605.00329
    python posttrain.py --teacher tiny --objective energy           # from the teacher itself

It still needs only captions: the papers train on recordings, here the teacher makes clips, once.
The same command again resumes, bit for bit (a GPU's own nondeterminism aside). Writes to --out_dir
what train.py writes, and clips.safetensors.
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
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import caption_at, draw_batch, read_captions, sampling_noise
from extras.cli import InputError, Parser, number, replace_file, run
from extras.clips import teacher_clips
from extras.device import has_bf16, pick_device
from extras.discriminator import Discriminator, encode
from extras.hub import check_fit, full_name, open_student
from extras.log import Log
from extras.publish import write_student
from extras.resume import read_checkpoint, restore_lora
from lora import inject, lora_disabled, save_lora
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

# Flags of some objectives only: (type, objectives, default, help). The defaults are ours (LOG.md,
# 2026-11-21). With any other objective they are refused.
POSITIVE, COUNT, TIMESTEP = number(float), number(int, 1), number(int, 0, 1000)
ENERGY = ("energy", "regression")
FLAGS = {
    "contrast": (POSITIVE, ["arc"], 1.0, "weight of the contrastive loss"),
    "r1": (POSITIVE, ["arc"], 1.0, "weight of R1, which keeps D flat around the teacher's clips"),
    "r2": (POSITIVE, ["arc"], 1.0, "weight of R2, around the student's"),
    "d_lr": (POSITIVE, ["arc"], 5e-4, "rate of the discriminator D"),
    "d_first": (number(int), ["arc"], 40, "steps before the student starts to learn"),
    "d_frozen": (number(int, 0, 1), ["arc"], 0, "1: train only D's heads"),
    "d_t_min": (TIMESTEP, ["arc"], 50, "smallest timestep of the clips that D scores"),
    "d_t_max": (TIMESTEP, ["arc"], 700, "one above the largest"),
    "samples": (number(int, 2), ["energy"], 2, "clips of a caption"),
    "patch": (COUNT, ENERGY, 4, "latent columns in a patch; distances are per patch"),
    "feature_weight": (POSITIVE, ENERGY, 0.0, "weight of the distance in the teacher's features"),
}
# Flags whose defaults come from the run that made --student.
KEPT = ("captions", "caption_column", "max_captions", "guidance", "lora_guidance", "weighting",
        "lora_weighting", "tv", "tv_weight", "lora_rank", "lora_alpha", "lora_targets", "lora_drop",
        "t_min", "t_max")
NEAR = 0.05             # standard deviation of the noise that R1 and R2 add, as in ARC's code


def student_defaults(args):
    """Return the defaults {flag: value} that --student brings; InputError for another teacher's."""
    _, _, about = open_student(args.student)
    flags, teacher = about.get("flags", {}), about["teacher"]
    if not flags and not args.teacher:
        raise InputError(f"--student {args.student}: does not say whose student it is; pass "
                         "--teacher NAME")
    if flags and args.teacher and full_name(args.teacher) != full_name(teacher):
        raise InputError(f"--student {args.student}: its teacher is {teacher}, not --teacher "
                         f"{args.teacher}")
    kept = {key: flags[key] for key in KEPT if key in flags}
    if kept.get("lora_guidance") == kept.get("guidance"):
        kept.pop("lora_guidance", None)             # "same as --guidance", which may be given here
    if args.captions:
        kept.update(caption_column=None, max_captions=None)
    return {**kept, "teacher": args.teacher or teacher, "student": full_name(args.student),
            "parameterization": about["parameterization"], "student_t": about.get("timestep")}


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--objective", choices=("arc", "energy", "regression", "vsd"), required=True,
        help="loss on the teacher's clips; vsd: none, only train.py's own")
    add("--student", help="start from this student of train.py; default: from --teacher")
    add("--clips", type=COUNT, default=1536, help="how many the teacher makes")
    add("--clip_steps", type=number(int, 1, 1000), default=10, help="sampling steps of each")
    add("--cache", help="file to keep them in; default: clips.safetensors in --out_dir")
    add("--vsd", type=POSITIVE, help="weight of VSD beside the objective; default: 0")
    for name, (kind, objectives, default, what) in FLAGS.items():
        add(f"--{name}", type=kind, help=f"{', '.join(objectives)}: {what}; default: {default}")
    add_flags(add)

    # The starting student fixes the teacher; both supply defaults; the command line wins.
    p.set_defaults(teacher=None, out_dir="out_post")
    args = p.parse_args(argv)
    defaults = student_defaults(args) if args.student else {"teacher": args.teacher}
    args.teacher = defaults["teacher"]
    if args.teacher is None:
        raise InputError("pass --student FOLDER or --teacher NAME to start from")
    p.set_defaults(**{**teacher_defaults(args), **defaults})
    args = checked(p.parse_args(argv))
    args.student = defaults.get("student")

    for name, (_, objectives, default, _) in FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default if args.objective in objectives else None)
        elif args.objective not in objectives:
            raise InputError(f"--{name} does not go with --objective {args.objective}")
    if args.clips < args.batch_size:
        raise InputError(f"--clips {args.clips}: fewer than a batch, --batch_size "
                         f"{args.batch_size}")
    if args.objective == "arc" and args.d_t_min >= args.d_t_max:
        raise InputError(f"--d_t_min {args.d_t_min} must be below --d_t_max {args.d_t_max}")
    if args.vsd is None:
        args.vsd = float(args.objective == "vsd")
    if args.vsd and args.feature_weight or args.objective == "vsd" and not args.vsd:
        raise InputError(f"--vsd {args.vsd} does not go with "
                         + ("--feature_weight" if args.vsd else "--objective vsd"))
    args.cache = args.cache or os.path.join(args.out_dir, "clips.safetensors")
    return args


def draw_more(numbers, seed, count, shape, low=0, high=1):
    """Random numbers beside draw_batch()'s: noises (count, B, *shape), t (B,) in [low, high)."""
    rngs = [np.random.default_rng((seed, 3, n)) for n in numbers]
    noises = np.stack([r.standard_normal((count, *shape), dtype=np.float32) for r in rngs], 1)
    return torch.from_numpy(noises), torch.tensor([int(r.integers(low, high)) for r in rngs])


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
        if rank > 0:
            dist.barrier()
        teacher = guided(denoiser(unet.requires_grad_(False), amp), null, args.guidance)
        clips = teacher_clips(args, captions, digest, pipe, teacher)
        if rank == 0 and ranks > 1:
            dist.barrier()
        del teacher

    # ---- what learns: the student; ARC's discriminator; with VSD, the LoRA teacher --------------
    folder, part, _ = open_student(args.student) if args.student else (pipe.folder, "unet", {})
    student = load_unet(folder, part).to(device)
    check_fit(student.config, pipe.folder)
    nets, rates = {"student": student}, {"student": args.lr}
    torch.manual_seed(args.seed)
    if arc:
        dtype = unet.dtype if args.d_frozen else torch.float32
        D = Discriminator(load_unet(pipe.folder, dtype=dtype), args.d_frozen)
        nets["d"], rates["d"] = D.to(device), args.d_lr
    if args.vsd:
        inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)
        if args.student and not found:
            say(restore_lora(unet, folder.parent / "lora", args))
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
    if args.checkpointing:
        for net in (student, unet, D.unet if arc else None):
            if net is not None:
                net.enable_gradient_checkpointing()
    if args.compile:
        nets.update({k: torch.compile(nets[k]) for k in nets if k != "d"})  # D goes back twice
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
    log = Log(out, first_step, "a smaller --lr, --lora_lr or --d_lr, or with --precision fp32",
              rank)
    if first_step >= args.max_steps:        # finished, but perhaps killed between two files
        save(first_step)
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps,
               desc=args.objective, disable=rank > 0)
    for step in bar:
        for name, opt in opts.items():
            opt.param_groups[0]["lr"] = rates[name] * learning_rate(step, args)
            opt.zero_grad()

        for micro in range(args.grad_accum):
            first = ((step * args.grad_accum + micro) * ranks + rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
                numbers, args.seed, pipe.latent_shape, args.t_min, args.t_max, pipe.T))
            if arc:
                noises, t_d = (x.to(device) for x in draw_more(
                    numbers, args.seed, 3, pipe.latent_shape, args.d_t_min, args.d_t_max))
            if energy:
                z_more = draw_more(numbers, args.seed, args.samples, pipe.latent_shape)[0]
            if len(clips):                  # y, made from noise z_y; clip n has the n-th caption
                numbers = [caption_at(range(args.clips), args.seed, n) for n in numbers]
                y = clips[numbers].to(device).float()
                z_y = sampling_noise(numbers, args.seed, pipe.latent_shape).to(device)
            text = pipe.encode_text([caption_at(captions, args.seed, n) for n in numbers])
            for net in nets.values():       # DDP averages gradients once a step
                net.require_backward_grad_sync = micro == args.grad_accum - 1

            # Student: clips x (m, B, C, h, w) of the same captions, from fresh noise; regression
            # and the feature loss need the noise that y was made from.
            z = [*z_more.to(device)] if energy else [z_y] if regression else [z_T]
            z += [z_y] if energy and args.feature_weight else []
            x = one_step(student_eps, torch.cat(z), text.repeat(len(z), 1, 1), alpha, sigma,
                         args.parameterization, args.student_t).unflatten(0, (len(z), -1))
            x0, loss = x[0], torch.zeros(args.batch_size, device=device)
            if arc:
                # D scores both clips at one t and noise. The scores `made` are used twice, for the
                # student's gradient and for D's loss.
                fake = x0.detach().requires_grad_()
                y_t, fake_t = (diffuse(clip, t_d, noises[0], alpha, sigma) for clip in (y, fake))
                heard = [y_t, y_t, y_t + NEAR * noises[1], fake_t.detach() + NEAR * noises[2]]
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
                with amp:
                    maps = zip(encode(unet, ours, t, text), encode(unet, theirs, t, text))
                    feature = sum((a.float() - b.float()).square().mean((1, 2, 3))
                                  for a, b in maps)
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
            log.add_gradient(f"grad_{name}", norm, step)
            if name != "student" or step >= (args.d_first or 0):
                opt.step()
        if ema:
            rate = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(ema, [p.detach() for p in weights["student"]], 1 - rate)

        done = step + 1
        due_save = done == args.max_steps or done % args.save_every == 0
        if due_save or done % args.log_every == 0:      # at each save: a resumed log has no gap
            line = log.write(done, step_size)
            bar.set_postfix({k: f"{line[k]:.3g}" for k in (args.objective, "x0_std")})
        if due_save:
            save(done)

    say(f"student: {out / 'student'}; hear it: python sample.py --student {out / 'student'} "
        '--prompt "..."')


if __name__ == "__main__":
    run(main)
