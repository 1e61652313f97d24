"""Distil a text-to-audio diffusion teacher into a student that makes a clip in one pass, from captions alone.

    python train.py --teacher tiny                                  # the embedded teacher: 2 CPU cores, about 5 minutes
    python train.py --captions audiocaps.csv                        # Auffusion, the paper's setting, one 48 GB GPU
    torchrun --nproc_per_node 4 train.py --captions audiocaps.csv --grad_accum 1     # the same batch on four GPUs

The same command again resumes, bit for bit (a GPU's own nondeterminism aside). Writes to --out_dir: student/ (a diffusers
UNet folder for sample.py), lora/ (PEFT's format), checkpoint.pt, metrics.jsonl.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
from data import InputError, write
from lora import TARGETS, inject, load_lora_state, lora_disabled, lora_state, save_lora
from losses import lora_loss, tv_loss, vsd_loss
from model import Teacher, denoiser, find, folder_defaults, guided, load_unet, one_step, pick_device

# Flags that may change when a run goes on; any other change is another run.
MAY_CHANGE = {"max_steps", "save_every", "log_every", "out_dir", "device", "compile", "checkpointing", "eval_clips",
              "captions", "caption_column", "max_captions",         # captions: their content is compared instead
              "lr", "lora_lr", "precision"}                         # to get past a step that was not finite
LOSSES = ("vsd", "tv", "lora", "x0_std", "grad_student", "grad_lora")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    # what
    add("--teacher", default="auffusion/auffusion-full-no-adapter", help='hub name, folder, or "tiny"')
    add("--preset", choices=("teacher", "paper"), default="teacher", help="paper: not the folder's")
    add("--captions", help="csv, tsv, txt, json or jsonl file")
    add("--caption_column", help="their column or key, if unusual")
    add("--max_captions", type=int, help="use only the first so many")
    add("--out_dir", default="out", help="where everything is written")
    add("--seed", type=int, default=0, help="of captions' order, noise, timesteps and LoRA's start")
    # the method; defaults are the paper's (section IV-A) or, where it is silent, SwiftBrush's
    add("--parameterization", choices=("eps", "direct"), default="eps", help="eq. 1, or the network's output as x0")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance on the teacher")
    add("--lora_guidance", type=float, help="on the LoRA teacher (default: the same; 1 is none)")
    add("--weighting", choices=("sigma2", "dmd"), default="sigma2", help="w(t) of eq. 3, or DMD's")
    add("--lora_weighting", choices=("alpha2", "v"), default="alpha2", help="of eq. 8: alpha_t^2, or 1 over it")
    add("--tv", choices=("l1", "l2", "none"), default="l1", help="temporal total variation, eq. 6")
    add("--tv_weight", type=float, default=0.05, help="its lambda, eq. 7")
    add("--lora_rank", type=int, default=64, help="rank r of the LoRA teacher")
    add("--lora_alpha", type=float, default=128, help="its scale is alpha / r")
    add("--lora_targets", choices=tuple(TARGETS), default="qv", help="layers that get an adapter")
    add("--lora_drop", type=float, default=0.1, help="share of empty captions in eq. 8")
    add("--t_min", type=int, default=20, help="smallest timestep of VSD, eq. 3")
    add("--t_max", type=int, default=981, help="one above the largest")
    # optimisation
    add("--max_steps", type=int, default=20000, help="optimizer steps")
    add("--batch_size", type=int, default=16, help="captions in a forward pass")
    add("--grad_accum", type=int, default=4, help="forward passes in an optimizer step")
    add("--lr", type=float, default=1e-5, help="student, AdamW")
    add("--lora_lr", type=float, default=1e-3, help="LoRA teacher, AdamW")
    add("--beta1", type=float, default=0.9, help="of both; beta2 is --beta2")
    add("--beta2", type=float, default=0.999, help="of both")
    add("--weight_decay", type=float, default=0.01, help="of both")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm (0: no limit)")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--decay", action=argparse.BooleanOptionalAction, default=False, help="linear decay to zero at max_steps")
    add("--ema", type=float, default=0.0, help="decay of the saved average weights")
    # machine
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="bf16: autocast, fp32 master weights")
    add("--compile", action="store_true", help="torch.compile both UNets")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    # output
    add("--save_every", type=int, default=500, help="steps between checkpoints")
    add("--log_every", type=int, default=10, help="steps between lines of metrics.jsonl")
    add("--eval_clips", type=int, default=0, help="tiny only: clips to score at the end")
    args = p.parse_args(argv)
    if args.teacher != "tiny" and not os.path.isdir(args.teacher):   # say what is wrong before gigabytes are downloaded
        if args.captions is None:
            raise InputError("--captions FILE is needed")
        data.read_captions(args.captions, args.caption_column, args.max_captions)
    folder = find(args.teacher)
    defaults = folder_defaults(folder).get("train", {})             # a teacher's own defaults; the command line wins
    kept = ("captions", "eval_clips") if args.preset == "paper" else defaults
    p.set_defaults(**{name: value for name, value in defaults.items() if name in kept})
    args = p.parse_args(argv)
    if args.captions is None:
        raise InputError("--captions FILE is needed")
    if args.captions == defaults.get("captions"):
        args.captions = str((folder / args.captions).resolve())
    if args.lora_guidance is None:
        args.lora_guidance = args.guidance
    rules = {  # what must hold, and what to say otherwise
        "batch_size, grad_accum, max_steps, save_every, log_every and lora_rank must be at least 1":
            min(args.batch_size, args.grad_accum, args.max_steps, args.save_every, args.log_every, args.lora_rank) >= 1,
        "max_captions must be at least 1": args.max_captions is None or args.max_captions >= 1,
        "lr, lora_lr, tv_weight, weight_decay, grad_clip, warmup and seed must not be negative":
            min(args.lr, args.lora_lr, args.tv_weight, args.weight_decay, args.grad_clip, args.warmup, args.seed) >= 0,
        "ema, beta1 and beta2 must be in [0, 1), lora_drop in [0, 1]":
            0 <= min(args.ema, args.beta1, args.beta2, args.lora_drop) and max(args.ema, args.beta1, args.beta2) < 1 >= args.lora_drop,
        "0 <= t_min < t_max <= 1000 must hold": 0 <= args.t_min < args.t_max <= 1000,
        "eval_clips needs a teacher with held-out captions, which is tiny": args.eval_clips == 0 or "eval_clips" in defaults,
    }
    for rule, holds in rules.items():
        if not holds:
            raise InputError(rule)
    return args


def setup(args):
    """One process of torchrun or the only one: (rank, number of processes, device, autocast dtype or None)."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = args.precision == "bf16" or args.precision == "auto" and able
    return rank, ranks, device, torch.bfloat16 if bf16 else None


def read_checkpoint(path, config, digest):
    """The checkpoint of an earlier part of this run, or None. Refuses one of another run, naming what differs."""
    if not path.exists():
        if (path.parent / "student").exists():
            raise InputError(f"{path.parent}: holds a student but no checkpoint to go on from; choose another --out_dir")
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise InputError(f"{path}: cannot be read ({type(e).__name__}); remove it to start anew, or choose another --out_dir")
    fixed = set(config) - MAY_CHANGE | ({"max_steps"} if config["decay"] else set())
    for name in sorted(fixed):
        if found["config"].get(name) != config[name]:
            raise InputError(f"{path.parent}: holds a run with --{name} {found['config'].get(name)}, this one has "
                             f"{config[name]}; choose another --out_dir")
    if found["digest"] != digest:
        raise InputError(f"{path.parent}: holds a run on other captions; choose another --out_dir")
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    rank, ranks, device, amp = setup(args)
    captions, report = data.read_captions(args.captions, args.caption_column, args.max_captions)
    say = tqdm.write if rank == 0 else lambda line: None
    say(f"{args.captions}: {report['rows']} rows, {len(captions)} captions used, {report['duplicates']} duplicates and "
        f"{report['empty']} empty ones left out")
    out = Path(args.out_dir)
    config = {**vars(args), "precision": "bf16" if amp else "fp32", "ranks": ranks}
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    found = read_checkpoint(out / "checkpoint.pt", config, digest)

    # ---- the three networks: the student; and one frozen UNet that is the teacher, or with its adapters on the LoRA teacher
    teacher = Teacher(args.teacher).to(device)
    student = load_unet(teacher.folder).to(device)
    unet = load_unet(teacher.folder, dtype=amp or torch.float32).to(device)
    torch.manual_seed(args.seed)
    lora_parameters = inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)
    ema = [p.detach().clone() for p in student.parameters()] if args.ema else None
    adamw = dict(betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=device.type == "cuda")
    opt_student = torch.optim.AdamW(student.parameters(), lr=args.lr, **adamw)
    opt_lora = torch.optim.AdamW(lora_parameters, lr=args.lora_lr, **adamw)
    first_step = 0
    if found:
        first_step = found["step"]
        student.load_state_dict(found["student"])
        load_lora_state(unet, found["lora"])
        opt_student.load_state_dict(found["opt_student"])
        opt_lora.load_state_dict(found["opt_lora"])
        for mine, saved in zip(ema or [], found["ema"]):
            mine.copy_(saved)
        del found
    if args.checkpointing:
        student.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()
    student_run, unet_run = (torch.compile(student), torch.compile(unet)) if args.compile else (student, unet)
    student_ddp, unet_ddp = (DDP(student_run), DDP(unet_run)) if ranks > 1 else (student_run, unet_run)
    student_eps, frozen_eps, lora_eps = denoiser(student_ddp), denoiser(unet_run), denoiser(unet_ddp)
    alpha, sigma, null = teacher.alpha, teacher.sigma, teacher.encode_text([""])

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return guided(frozen_eps, x, t, text, null, args.guidance)

    def fake_eps(x, t, text):
        return guided(frozen_eps, x, t, text, null, args.lora_guidance)

    step_size = args.batch_size * args.grad_accum * ranks
    say(json.dumps(config))
    say(f"{args.batch_size} x {args.grad_accum} accumulated x {ranks} processes = {step_size} "
        f"captions a step, latents {teacher.latent_shape}, alpha_T {alpha[-1]:.6f}, sigma_T {sigma[-1]:.6f}, student "
        f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} M, LoRA {sum(p.numel() for p in lora_parameters) / 1e6:.2f} M "
        f"parameters, {device.type} {config['precision']}" + (f", going on from step {first_step}" if first_step else ""))

    def save(step):
        """The student for sample.py, the adapters, and all that resuming needs. Nothing old is touched until the new is whole."""
        if rank:
            return
        weights = dict(zip((n for n, _ in student.named_parameters()), ema)) if ema else student.state_dict()
        weights = {n: w.detach().contiguous() for n, w in weights.items()}
        about = {"teacher": args.teacher if args.teacher == "tiny" else str(teacher.folder.resolve()) if os.path.isdir(args.teacher)
                 else args.teacher, "timestep": teacher.T, "parameterization": args.parameterization,
                 "seconds": teacher.seconds, "step": step, "flags": config}
        write(out / "checkpoint.pt", lambda path: torch.save(
            {"step": step, "config": config, "digest": digest, "student": student.state_dict(), "ema": ema or [],
             "lora": lora_state(unet), "opt_student": opt_student.state_dict(), "opt_lora": opt_lora.state_dict()}, path))
        (out / "student").mkdir(exist_ok=True)
        write(out / "student/diffusion_pytorch_model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        write(out / "student/config.json", lambda path: path.write_text(student.to_json_string()))
        write(out / "student/swiftaudio.json", lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
        write(out / "student/README.md", lambda path: path.write_text(model_card(args.teacher, step, argv)))
        save_lora(unet, out / "lora", args.lora_rank, args.lora_alpha)

    if first_step >= args.max_steps:                                # finished, but perhaps killed between two files
        save(first_step)
    # ---- the loop (the paper's Algorithm 1) ------------------------------------------------------------------------
    log = Log(out, first_step) if rank == 0 else None
    totals = {name: torch.zeros((), device=device) for name in LOSSES}
    by_t = torch.zeros(2, 2, 4, device=device)                      # (vsd or lora, sum or count, quarter of t)
    bad_step = torch.tensor(math.inf, device=device)
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps, desc="distil", disable=rank > 0)
    started, logged = time.time(), first_step                       # of the interval that the next log line is about
    for step in bar:
        for group, lr in ((opt_student.param_groups[0], args.lr), (opt_lora.param_groups[0], args.lora_lr)):
            group["lr"] = lr * min(1, (step + 1) / max(1, args.warmup)) * (1 - step / args.max_steps if args.decay else 1)
        opt_student.zero_grad(set_to_none=True)
        opt_lora.zero_grad(set_to_none=True)
        for micro in range(args.grad_accum):
            first = ((step * args.grad_accum + micro) * ranks + rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device, non_blocking=True) for x in data.draw_batch(
                numbers, args.seed, teacher.latent_shape, args.t_min, args.t_max, teacher.T))
            last = micro == args.grad_accum - 1
            with contextlib.ExitStack() as stack:
                if ranks > 1 and not last:                          # gradients are averaged over processes once a step
                    stack.enter_context(student_ddp.no_sync())
                    stack.enter_context(unet_ddp.no_sync())
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    text = teacher.encode_text([data.caption_at(captions, args.seed, n) for n in numbers])
                    # Student: one step from noise to x0, moved along the difference of the two teachers' scores.
                    x0 = one_step(student_eps, z_T, text, teacher, args.parameterization)
                    vsd = vsd_loss(x0, t, eps, text, teacher_eps, fake_eps, alpha, sigma, args.weighting)
                    tv = tv_loss(x0, args.tv)
                ((vsd + args.tv_weight * tv).mean() / args.grad_accum).backward()
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    # LoRA teacher: learn to denoise what the student makes now.
                    dropped = torch.where((u < args.lora_drop)[:, None, None], null, text)
                    lora = lora_loss(x0, t_lora, eps_lora, dropped, lora_eps, alpha, sigma, args.lora_weighting)
                (lora.mean() / args.grad_accum).backward()
            with torch.no_grad():
                for name, value in (("vsd", vsd), ("tv", tv), ("lora", lora), ("x0_std", x0.std((1, 2, 3)))):
                    totals[name] += value.mean() / args.grad_accum
                for i, (loss, when) in enumerate(((vsd, t), (lora, t_lora))):
                    bins = when * 4 // (teacher.T + 1)
                    by_t[i, 0] += torch.zeros_like(by_t[i, 0]).index_add_(0, bins, loss.detach())
                    by_t[i, 1] += torch.zeros_like(by_t[i, 1]).index_add_(0, bins, torch.ones_like(loss))
        limit = args.grad_clip or math.inf
        norms = [torch.nn.utils.clip_grad_norm_(p, limit) for p in (list(student.parameters()), lora_parameters)]
        totals["grad_student"] += norms[0]
        totals["grad_lora"] += norms[1]
        # A norm is finite only if losses and gradients are. Kept on the device: reading it would stall the GPU each step.
        bad_step = torch.where(torch.isfinite(norms[0] + norms[1]), bad_step, bad_step.clamp(max=step))
        opt_student.step()
        opt_lora.step()
        if ema:
            torch._foreach_lerp_(ema, [p.detach() for p in student.parameters()], 1 - min(args.ema, (step + 1) / (step + 10)))

        done = step + 1 == args.max_steps
        due_save = done or (step + 1) % args.save_every == 0
        due_log = due_save or (step + 1) % args.log_every == 0      # with each save, so that a resumed log has the same lines
        if due_log and math.isfinite(bad_step):
            raise InputError(f"step {int(bad_step)}: the loss or a gradient is not finite; nothing was saved since, the checkpoint "
                             f"in {out} is good. Go on from it with a smaller --lr or --lora_lr, or with --precision fp32")
        if due_log:
            mean = torch.stack(list(totals.values())) / (step + 1 - logged)
            parts = torch.cat([mean, by_t.flatten()])
            if ranks > 1:                                           # every process saw its own share of the batch
                dist.all_reduce(parts)
                parts[:len(LOSSES)] /= ranks
            if rank == 0:
                line = dict(zip(LOSSES, parts.tolist()))
                sums, counts = parts[len(LOSSES):].view(2, 2, 4).unbind(1)
                line["vsd_by_t"], line["lora_by_t"] = (sums / counts.clamp(min=1)).tolist()
                line["samples_per_s"] = (step + 1 - logged) * step_size / (time.time() - started)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in ("vsd", "lora", "x0_std")})
                log.write(step + 1, line)
            for total in (*totals.values(), by_t):
                total.zero_()
            if due_save:
                save(step + 1)
            started, logged = time.time(), step + 1
    bar.close()
    if ranks > 1:
        dist.barrier()                                              # none leaves while another still saves
        dist.destroy_process_group()
    say(f"student: {out / 'student'} (step {max(first_step, args.max_steps)}); hear it: python sample.py --student "
        f"{out / 'student'} --prompt \"...\"")
    if args.eval_clips and rank == 0:
        from tiny import score
        table = score.report(teacher, out / "student", args.eval_clips)
        card = model_card(args.teacher, max(first_step, args.max_steps), argv, table, args.eval_clips)
        write(out / "student/README.md", lambda path: path.write_text(card))


def model_card(teacher, step, argv, table=None, clips=0):
    """What a student's README.md on the hub says of it."""
    name = Path(teacher).name if os.path.isdir(teacher) else teacher
    licence = "mit" if teacher == "tiny" else "cc-by-nc-sa-4.0" if re.search("auffusion|swiftaudio", name.lower()) else "other"
    metrics = f"{clips} held-out captions of the tiny world: " + "; ".join(f"{system} " + ", ".join(f"{k} {v:.2f}" for k, v in row.items() if v)
                                                                           for system, row in table.items()) if table else "not measured; see eval.py"
    base = f"base_model: {name}\n" if "/" in name else ""
    return (f"---\nlicense: {licence}\n{base}pipeline_tag: text-to-audio\n---\n\nA one-step text-to-audio student of {name}, made with SwiftAudio "
            f"(arXiv 2606.31259): a clip in one UNet pass.\n\n- Sample: `python sample.py --student FOLDER --prompt \"a dog barks\"`\n"
            f"- Trained: `python train.py {shlex.join(argv)}`, {step} steps\n- Licence: that of the teacher, of which "
            f"this is an adaptation\n- Metrics: {metrics}\n")


class Log:
    """metrics.jsonl, a line an interval, and TensorBoard if it is installed. A resumed run replaces what it runs again."""

    def __init__(self, out, first_step):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        write(self.path, lambda path: path.write_text("".join(line + "\n" for line in kept)))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=first_step + 1)
        except ImportError:
            self.board = None

    def write(self, step, line):
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **line}) + "\n")
        if self.board:
            for name, value in line.items():
                if not isinstance(value, list):
                    self.board.add_scalar(name, value, step)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        raise InputError(e)
