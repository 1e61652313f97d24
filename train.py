"""Distil a text-to-audio diffusion teacher into a student that makes a clip in one pass.

    python train.py --teacher tiny                # the embedded teacher, 2 CPU cores, 5 minutes
    python train.py --captions audiocaps.csv      # Auffusion, the paper's setting, a 48 GB GPU
    torchrun --nproc_per_node 4 train.py --captions audiocaps.csv --grad_accum 1    # on four GPUs

The same command again resumes, bit for bit (a GPU's own nondeterminism aside). Writes to
--out_dir: student/ (a diffusers UNet for sample.py), lora/ (PEFT's format), checkpoint.pt and
metrics.jsonl.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data import caption_at, draw_batch, read_captions
from extras.cli import InputError, Parser, number, replace_file, run
from extras.device import has_bf16, pick_device
from extras.hub import TINY, read_settings
from extras.log import Log
from extras.publish import write_student
from extras.resume import read_checkpoint
from lora import TARGETS, inject, load_lora_state, lora_disabled, lora_state, save_lora
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import Pipeline, denoiser, load_unet


def add_flags(add):
    """Add this program's flags; posttrain.py has them too."""
    count, positive = number(int, 1), number(float)
    # what to distil
    add("--teacher", default="auffusion/auffusion-full-no-adapter",
        help='hub name, folder, or "tiny"')
    add("--preset", choices=("teacher", "paper"), default="teacher",
        help="whose defaults: the teacher folder's own, if it has some, or the paper's")
    add("--captions", help="csv, tsv, txt, json or jsonl file")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--max_captions", type=count, help="use only the first so many")
    add("--out_dir", default="out", help="folder for everything that is written")
    add("--seed", type=number(int), default=0, help="of all that is drawn at random")
    # the method: the paper's values (section IV-A); lora_targets, lora_drop and t are SwiftBrush's
    add("--parameterization", choices=("eps", "direct"), default="eps",
        help="eq. 1, or the network's output as x0")
    add("--student_t", type=number(int, 1, 999), help="timestep of the one step; default: T, eq. 1")
    add("--guidance", type=positive, default=7.5, help="classifier-free, on the teacher")
    add("--lora_guidance", type=positive, help="on the LoRA teacher; default: same as --guidance")
    add("--weighting", choices=("sigma2", "dmd"), default="sigma2", help="w(t) of eq. 3")
    add("--lora_weighting", choices=("alpha2", "v"), default="alpha2",
        help="weight of eq. 8: alpha_t^2 (paper) or 1/alpha_t^2 (error of v)")
    add("--tv", choices=("l1", "l2", "none"), default="l1", help="total variation, eq. 6")
    add("--tv_weight", type=positive, default=0.05, help="its lambda, eq. 7")
    add("--lora_rank", type=count, default=64, help="rank r of the LoRA teacher")
    add("--lora_alpha", type=positive, default=128, help="its scale is alpha / r")
    add("--lora_targets", choices=TARGETS, default="qv", help="layers that get an adapter")
    add("--lora_drop", type=number(float, 0, 1), default=0.1, help="empty captions in eq. 8")
    add("--t_min", type=number(int, 0, 999), default=20, help="smallest timestep of eq. 3")
    add("--t_max", type=number(int, 1, 1000), default=981, help="one above the largest")
    # optimization: rates and batch are the paper's, betas and weight decay AdamW's own
    add("--max_steps", type=count, default=20000, help="optimizer steps")
    add("--batch_size", type=count, default=16, help="captions in a forward pass")
    add("--grad_accum", type=count, default=4, help="forward passes in an optimizer step")
    add("--lr", type=positive, default=1e-5, help="student's rate")
    add("--lora_lr", type=positive, default=1e-3, help="LoRA teacher's rate")
    add("--beta1", type=number(float, 0, 0.99999), default=0.9, help="AdamW's, both networks")
    add("--beta2", type=number(float, 0, 0.99999), default=0.999, help="AdamW's, both networks")
    add("--weight_decay", type=positive, default=0.01, help="AdamW's, both networks")
    add("--grad_clip", type=positive, default=1.0, help="largest gradient norm; 0: no limit")
    add("--warmup", type=number(int), default=0, help="steps of linear warm-up")
    add("--decay", action=argparse.BooleanOptionalAction, default=False,
        help="linear decay of both rates to zero at max_steps")
    add("--ema", type=number(float, 0, 0.99999), default=0.0, help="average the saved student")
    # machine and output
    add("--device", help="cuda, mps or cpu; default: the first there is")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="bf16: autocast with fp32 weights; auto: bf16 on a GPU that has it")
    add("--compile", action="store_true", help="torch.compile both UNets")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--log_every", type=count, default=10, help="steps between lines of metrics.jsonl")


def teacher_defaults(args):
    """Return the defaults {flag: value} that a teacher in a folder may bring, as tiny does."""
    folder = TINY if args.teacher == "tiny" else Path(args.teacher)
    own = read_settings(folder).get("train", {})
    if "captions" in own:
        own["captions"] = str((folder / own["captions"]).resolve())
    return {k: own[k] for k in own if args.preset == "teacher" or k == "captions"}


def parse_args(argv=None):
    p = Parser(__doc__)
    add_flags(p.add_argument)
    p.set_defaults(**teacher_defaults(p.parse_args(argv)))
    return checked(p.parse_args(argv))          # flags on the command line win


def checked(args):
    """Return the flags; InputError where two of them do not fit."""
    if args.captions is None:
        raise InputError("--captions FILE is needed")
    if args.t_min >= args.t_max:
        raise InputError(f"--t_min {args.t_min} must be below --t_max {args.t_max}")
    if args.lora_guidance is None:
        args.lora_guidance = args.guidance
    return args


def learning_rate(step, args):
    """The factor on both rates at a step: linear warm-up, then constant or linear decay."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    return warm * (1 - step / args.max_steps if args.decay else 1)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = tqdm.write if rank == 0 else lambda line: None
    device = pick_device(args.device, exact=args.precision == "fp32")
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    auto = device.type == "cuda" and has_bf16(device)
    bf16 = auto if args.precision == "auto" else args.precision == "bf16"
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    captions, counts = read_captions(args.captions, args.caption_column, args.max_captions)
    say(f"{args.captions}: {counts['rows']} rows, {len(captions)} captions used, "
        f"{counts['duplicates']} duplicates and {counts['empty']} empty ones left out")
    out = Path(args.out_dir)
    config = {**vars(args), "precision": "bf16" if bf16 else "fp32", "ranks": ranks}
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    found = read_checkpoint(out / "checkpoint.pt", config, digest)
    first_step = found["step"] if found else 0

    # ---- two networks: the student, and a frozen UNet with adapters --------------------------
    pipe = Pipeline(args.teacher).to(device)
    student = load_unet(pipe.folder).to(device)
    unet = load_unet(pipe.folder, dtype=torch.bfloat16 if bf16 else torch.float32).to(device)
    torch.manual_seed(args.seed)
    adapters = inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)
    ema = [p.detach().clone() for p in student.parameters()] if args.ema else []
    adamw = dict(betas=(args.beta1, args.beta2), weight_decay=args.weight_decay,
                 fused=device.type == "cuda")
    opt_student = torch.optim.AdamW(student.parameters(), args.lr, **adamw)
    opt_lora = torch.optim.AdamW(adapters, args.lora_lr, **adamw)
    if found:
        student.load_state_dict(found["student"])
        load_lora_state(unet, found["lora"])
        opt_student.load_state_dict(found["opt_student"])
        opt_lora.load_state_dict(found["opt_lora"])
        for average, saved in zip(ema, found["ema"]):
            average.copy_(saved)
        del found
    networks = [student, unet]
    if args.checkpointing:
        for network in networks:
            network.enable_gradient_checkpointing()
    if args.compile:
        networks = [torch.compile(network) for network in networks]
    if ranks > 1:
        networks = [DDP(network) for network in networks]

    # ---- three handles: adapters off, the frozen UNet is the teacher; on, the LoRA teacher -----
    student_eps, lora_eps = (denoiser(network, amp) for network in networks)

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return lora_eps(x, t, text)

    alpha, sigma, null = pipe.alpha, pipe.sigma, pipe.encode_text([""])
    step_size = args.batch_size * args.grad_accum * ranks
    millions = [sum(p.numel() for p in ps) / 1e6 for ps in (student.parameters(), adapters)]
    say(json.dumps(config))
    say(f"{args.batch_size} x {args.grad_accum} accumulated x {ranks} processes = {step_size} "
        f"captions a step, latents {pipe.latent_shape}, alpha_T {alpha[-1]:.6f}, sigma_T "
        f"{sigma[-1]:.6f}, student {millions[0]:.1f} M, LoRA {millions[1]:.2f} M parameters, "
        f"{device.type} {config['precision']}, from step {first_step}")

    def save(step):
        """Write the checkpoint, the student and the adapters; each file is replaced whole."""
        if rank > 0:
            return
        replace_file(out / "checkpoint.pt", lambda path: torch.save({
            "step": step, "config": config, "digest": digest, "ema": ema,
            "student": student.state_dict(), "opt_student": opt_student.state_dict(),
            "lora": lora_state(unet), "opt_lora": opt_lora.state_dict()}, path))
        write_student(out / "student", student, ema, pipe, step, config,
                      f"python train.py {shlex.join(argv)}")
        save_lora(unet, out / "lora", args.lora_rank, args.lora_alpha)

    # ---- the loop (the paper's Algorithm 1) ----------------------------------------------------
    log = Log(out, first_step, "a smaller --lr or --lora_lr, or with --precision fp32", rank)
    if first_step >= args.max_steps:        # finished, but perhaps killed between two files
        save(first_step)
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps,
               desc="distil", disable=rank > 0)
    for step in bar:
        for optimizer, rate in ((opt_student, args.lr), (opt_lora, args.lora_lr)):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(step, args)
            optimizer.zero_grad()

        for micro in range(args.grad_accum):
            first = ((step * args.grad_accum + micro) * ranks + rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device, non_blocking=True) for x in draw_batch(
                numbers, args.seed, pipe.latent_shape, args.t_min, args.t_max, pipe.T))
            text = pipe.encode_text([caption_at(captions, args.seed, n) for n in numbers])
            for network in networks:        # DDP averages gradients once a step
                network.require_backward_grad_sync = micro == args.grad_accum - 1

            # Student: one pass from noise to x0, moved along the two teachers' difference.
            x0 = one_step(student_eps, z_T, text, alpha, sigma, args.parameterization,
                          args.student_t)
            vsd = vsd_loss(x0, t, eps, text, guided(teacher_eps, null, args.guidance),
                           guided(lora_eps, null, args.lora_guidance), alpha, sigma, args.weighting)
            tv = tv_loss(x0, args.tv)
            ((vsd + args.tv_weight * tv).mean() / args.grad_accum).backward()

            # LoRA teacher: learn to denoise what the student makes now.
            text = torch.where((u < args.lora_drop)[:, None, None], null, text)
            lora = lora_loss(x0, t_lora, eps_lora, text, lora_eps, alpha, sigma,
                             args.lora_weighting)
            (lora.mean() / args.grad_accum).backward()

            log.add("vsd", vsd, t)
            log.add("tv", tv)
            log.add("lora", lora, t_lora)
            log.add("x0_std", x0.std((1, 2, 3)))

        limit = args.grad_clip or math.inf
        for name, ps in (("grad_student", list(student.parameters())), ("grad_lora", adapters)):
            norm = torch.nn.utils.clip_grad_norm_(ps, limit)
            log.add_gradient(name, norm, step)          # the run ends where it is not finite
        opt_student.step()
        opt_lora.step()
        if ema:                             # the average is shorter in the first steps
            rate = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(ema, [p.detach() for p in student.parameters()], 1 - rate)

        done = step + 1
        due_save = done == args.max_steps or done % args.save_every == 0
        if due_save or done % args.log_every == 0:      # at each save: a resumed log has no gap
            line = log.write(done, step_size)
            bar.set_postfix({k: f"{line[k]:.3g}" for k in ("vsd", "lora", "x0_std")})
        if due_save:
            save(done)

    say(f"student: {out / 'student'}; hear it: python sample.py --student {out / 'student'} "
        '--prompt "..."')


if __name__ == "__main__":
    run(main)
