"""Distil a text-to-audio diffusion teacher into a student that makes a clip in one pass.

    python train.py --teacher tiny                # the embedded teacher, 2 CPU cores, 5 minutes
    python train.py --captions audiocaps.csv      # Auffusion, the paper's setting, a 48 GB GPU
    torchrun --nproc_per_node 4 train.py --captions audiocaps.csv --grad_accum 1    # on four GPUs
    python train.py --init out/student --out_dir out2       # go on from a student, as a new run

The same command again resumes, bit for bit (a GPU's own nondeterminism aside). Writes student/
(a diffusers UNet for sample.py), lora/ (PEFT's format), checkpoint.pt, metrics.jsonl to --out_dir.
"""
import argparse
import copy
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import model
from data import InputError, Parser, caption_at, cli, draw_batch, number, replace_file, require
from lora import TARGETS, inject, load_lora_state, lora_disabled, save_lora
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import denoiser, load_unet, read_settings

# ---- flags ---------------------------------------------------------------------------------------

count, positive, beta = number(int, 1), number(float), number(float, 0, 0.99999)
AUFFUSION = "auffusion/auffusion-full-no-adapter"


def add_run(add):
    """Add what every training script has: what to distil, optimization, machine and output."""
    add("--teacher", default=AUFFUSION, help='hub name, folder, or "tiny"')
    add("--init", metavar="STUDENT", help="start from this student, with its run's flags")
    add("--captions", help="csv, tsv, txt, json or jsonl file")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--max_captions", type=count, help="use only the first N")
    add("--out_dir", default="out", help="folder for everything that is written")
    add("--seed", type=number(int, 0, 2**63), default=0, help="random seed")
    add("--student_t", type=number(int, 1, 999), help="timestep of the one step; default: T, eq. 1")
    add("--guidance", type=positive, default=7.5, help="classifier-free, on the teacher")
    # steps and batch: section IV-A; rates, guidance: README; betas, weight decay: AdamW's own
    add("--max_steps", type=count, default=20000, help="optimizer steps")
    add("--batch_size", type=count, default=16, help="captions in a forward pass")
    add("--grad_accum", type=count, default=4, help="forward passes in an optimizer step")
    add("--lr", type=positive, default=1e-5, help="student's rate")
    add("--beta1", type=beta, default=0.9, help="AdamW's, of all networks")
    add("--beta2", type=beta, default=0.999, help="AdamW's")
    add("--weight_decay", type=positive, default=0.01, help="AdamW's")
    add("--grad_clip", type=positive, default=1.0, help="largest gradient norm; 0: no limit")
    add("--warmup", type=number(int), default=0, help="steps of linear warm-up")
    add("--decay", action=argparse.BooleanOptionalAction, default=False,
        help="linear decay of all rates to zero at max_steps")
    add("--ema", type=beta, default=0.0, help="average the saved student")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="bf16: autocast with fp32 weights; auto: bf16 on a GPU that has it")
    add("--compile", action="store_true", help="torch.compile the UNets")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--keep_every", type=number(int), default=5000, help="keep student-N/ so often; 0: never")
    add("--log_every", type=count, default=10, help="steps between lines of metrics.jsonl")


def add_vsd(add):
    """Add the method's own flags; where their values come from: README, "Where this differs"."""
    add("--lora_guidance", type=positive, help="on the LoRA teacher; default: same as --guidance")
    add("--lora_weighting", choices=("alpha2", "v"), default="alpha2", help="weight of eq. 8")
    add("--tv", choices=("l1", "l2", "none"), default="l1", help="total variation, eq. 6")
    add("--tv_weight", type=positive, default=0.05, help="its lambda, eq. 7")
    add("--lora_rank", type=count, default=64, help="rank r; 64 on q and v ran away at rate 2e-3")
    add("--lora_alpha", type=positive, default=128, help="its scale is alpha / r")
    add("--lora_targets", choices=TARGETS, default="qv", help="layers that get an adapter")
    add("--lora_drop", type=number(float, 0, 1), default=0.1, help="empty captions in eq. 8")
    add("--lora_lr", type=positive, default=1e-3, help="LoRA teacher's rate")
    add("--t_min", type=number(int, 0, 999), default=20, help="smallest timestep of eq. 3")
    add("--t_max", type=number(int, 1, 1000), default=981, help="one above the largest")


# The flags that --init takes over from the run that made the student, unless they are given.
KEPT = ("captions caption_column max_captions guidance lora_guidance lora_weighting tv tv_weight "
        "lora_rank lora_alpha lora_targets lora_drop t_min t_max").split()


def words(p, given, values, path):
    """{flag: value} of a file as words of a command line; InputError where p cannot parse them."""
    values = values | (dict.fromkeys(["caption_column", "max_captions"]) if given.captions else {})
    found = [f"--{name}" if value is True else f"--{name}={value}"
             for name, value in values.items() if value is not None and value is not False]
    try:
        p.parse_args(found)
    except InputError as e:
        raise InputError(f"{path}: {e}")
    return found


def parse_run(p, argv):
    """Parse a training script's flags: those given, then --init's, then the teacher's own."""
    argv = sys.argv[1:] if argv is None else argv
    args, init = p.parse_args(argv), []
    if args.init:
        folder, _, about = model.open_student(args.init)
        kept = {k: v for k, v in about.get("flags", {}).items() if k in KEPT and k in args}
        kept.update(teacher=about.get("teacher"), student_t=about.get("timestep"))
        init = words(p, args, kept, folder)
        args = p.parse_args([*init, *argv])
    settings = read_settings(home := model.find(args.teacher, model.SETTINGS))
    own = dict(settings.get("train", {}))
    if p.prog != "train.py":                            # a recipe has some of them, and its own
        own = {k: own[k] for k in own if k in args} | settings.get(p.prog.split(".")[-1], {})
    if "captions" in own:
        own["captions"] = str(home / own["captions"])
    args = p.parse_args([*words(p, args, own, home / "swiftaudio.json"), *init, *argv])
    require(args.captions, "--captions FILE is needed")
    args.captions = str(Path(args.captions).resolve())  # they are read from elsewhere later
    if args.teacher != "tiny" and Path(args.teacher).is_dir():
        args.teacher = str(Path(args.teacher).resolve())
    return args


def parse_args(argv=None):
    p = Parser(__doc__, prog="train.py", usage="python train.py [flags]")
    add_run(p.add_argument)
    add_vsd(p.add_argument)
    args = parse_run(p, argv)
    require(args.t_min < args.t_max, f"--t_min {args.t_min} must be below --t_max {args.t_max}")
    return args


# ---- what recipes/ share with the loop below -----------------------------------------------------

def learning_rate(step, args):
    """The factor on all rates at a step: linear warm-up, then constant or linear decay."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    return warm * (1 - step / args.max_steps if args.decay else 1)


def adamw(args, weights, lr):
    """AdamW of these weights, as the flags say."""
    return torch.optim.AdamW(weights, lr, betas=(args.beta1, args.beta2),
                             weight_decay=args.weight_decay, fused=weights[0].is_cuda)


def start(args):
    """Start the processes and load all that a training script needs: a namespace of it."""
    run = argparse.Namespace(args=args, out=Path(args.out_dir), first_step=0, lines=[])
    run.rank, run.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run.say = tqdm.write if run.rank == 0 else lambda line: None
    run.device = device = model.pick_device(args.device, exact=args.precision == "fp32")
    if run.ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" and model.has_bf16(device) else "fp32"
    run.amp = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    run.captions, n = data.read_captions(args.captions, args.caption_column, args.max_captions)
    run.say(f"{args.captions}: {len(run.captions)} captions used, of {n}")

    run.folder = folder = model.find(args.teacher, model.TO_TRAIN)
    run.encode_text, run.shape = model.TextEncoder(folder).to(device), model.latent_shape(folder)
    run.null, run.scheduler = run.encode_text([""]), model.load_scheduler(folder)
    run.alpha, run.sigma = model.noise_schedule(run.scheduler, device)
    run.T = len(run.alpha) - 1
    fits = max(getattr(args, "t_max", 1) - 1, args.student_t or 0) <= run.T
    require(fits, f"--t_max or --student_t is above {run.T}, the last timestep of {folder}")
    if unread := run.encode_text.unread(run.captions):
        run.say(f"warning: {len(unread)} captions are not read whole, {list(unread.values())[0]}")
    run.home, part, about = model.open_student(args.init) if args.init else (folder, "unet", {})
    run.student = load_unet(run.home, part, fits=folder).to(device).requires_grad_(True)
    unet = load_unet(folder).to(device)
    is_of = fingerprint(unet)
    same = about.get("flags", {}).get("teacher's weights", is_of) == is_of
    require(same, f"--init {args.init}: is not a student of --teacher {args.teacher}")
    run.config = {**vars(args), "teacher's weights": is_of, "alpha_T": float(run.alpha[-1]),
                  "text encoder's weights": fingerprint(run.encode_text),
                  "first student's weights": fingerprint(run.student),
                  "captions' text": digest("\n".join(run.captions).encode()),
                  "captions a step": args.batch_size * args.grad_accum * run.ranks}
    run.unet = unet.to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    return run


def digest(content):
    """A hash of bytes, 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(network):
    """Hash a sample of each of a network's weights: what it is, whatever file it came from."""
    sample = [w.detach().flatten()[::max(1, w.numel() // 64)] for w in network.parameters()]
    return digest(torch.cat([w.bfloat16().float() for w in sample]).cpu().numpy().tobytes())


# What may differ on resume. Of teacher, first student and captions the content is compared, of a
# batch the size; other rates or precision get past a step that was not finite.
MAY_CHANGE = set("max_steps save_every keep_every log_every out_dir device compile checkpointing "
                 "captions caption_column max_captions teacher init batch_size grad_accum cache "
                 "lr lora_lr d_lr precision".split())


def resume(run, weights, opts, instead="choose another --out_dir"):
    """Go on from this run's checkpoint, if there is one: weights {name: [w]}, opts {name: opt}.

    Both stay in run, for save_run(). InputError for another run's, naming the flag, or no room.
    """
    out, path, ours = run.out, run.out / "checkpoint.pt", run.config
    run.weights, run.opts = weights, opts
    if run.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        run.lock = FileLock(out / "run.lock", timeout=0, is_singleton=True)
        try:                                            # held until `run` is gone
            run.lock.acquire()
        except Timeout:
            raise InputError(f"{out}: another process trains there; {instead}")
        except (OSError, NotImplementedError):          # a cluster's file system without locks
            pass
    if path.exists():
        try:                                            # torch maps no name that is not UTF-8
            found = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=str(path).isprintable())
            theirs = found["config"]
        except Exception as e:
            raise InputError(f"{path}: cannot be read ({model.cause(e)}); remove it, or {instead}")
        fixed = set(ours) - MAY_CHANGE | ({"max_steps"} if ours.get("decay") else set())
        for name in ["recipe", "teacher's weights", *sorted(fixed)]:
            flag = name if " " in name else f"--{name}"
            require(theirs.get(name) == ours.get(name), f"{out}: holds a run with {flag} "
                    f"{theirs.get(name)}, this one has {ours.get(name)}; {instead}")
        for name, tensors in weights.items():
            for w, saved in zip(tensors, found["weights"][name], strict=True):
                w.data.copy_(saved)
        for name, opt in opts.items():                  # copied, or the file would stay mapped
            opt.load_state_dict(copy.deepcopy(found["opts"][name]))
        run.first_step, run.lines = found["step"], found["lines"]
    require(run.first_step or not (out / "student").exists(),
            f"{out}: holds a student but no checkpoint to resume from; {instead}")
    if run.ranks > 1:
        steps = [None] * run.ranks
        dist.all_gather_object(steps, run.first_step)
        require(len(set(steps)) == 1, f"{out}: the processes would start at steps {steps}; pass an "
                "--out_dir that all of them see")
    size = sum(w.nbytes * (1 if name == "ema" else 3)   # Adam has two for each weight
               for name, tensors in weights.items() for w in tensors)
    free, copies = shutil.disk_usage(out).free, 1 if run.first_step else 2      # while replaced
    require(free > copies * size, f"{out}: {free / 1e9:.1f} GB are free, saving takes {copies} x "
            f"{size / 1e9:.1f} GB")


def prepare(run, nets):
    """{name: network} as the loop calls them: recomputing, compiled, averaging over processes."""
    for net in nets.values():
        if run.args.checkpointing:
            net.enable_gradient_checkpointing()
    if run.args.compile:
        nets = {name: torch.compile(net) for name, net in nets.items()}
    if run.ranks > 1:
        nets = {name: DDP(net, gradient_as_bucket_view=True) for name, net in nets.items()}
    return nets


def average(weights, ema, step):
    """Move the average that is saved towards the student; it is shorter in the first steps."""
    if weights["ema"]:
        rate = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(weights["ema"], [w.detach() for w in weights["student"]], 1 - rate)


def save_run(run, step, log):
    """Write checkpoint.pt, student/ and, where there are adapters, lora/: each file whole."""
    replace_file(run.out / "checkpoint.pt", lambda path: torch.save({
        "step": step, "config": run.config, "lines": log.lines,
        "weights": {name: [w.detach() for w in tensors] for name, tensors in run.weights.items()},
        "opts": {name: opt.state_dict() for name, opt in run.opts.items()}}, path))
    save_student(run, run.out / "student", step)
    if "lora" in run.weights:
        save_lora(run.unet, run.out / "lora", run.args.lora_rank, run.args.lora_alpha)


def save_student(run, folder, step):
    """Write the student, or its average, as sample.py and diffusers read it."""
    names, flags = [name for name, _ in run.student.named_parameters()], run.config
    kept = [w.detach().contiguous() for w in run.weights["ema"] or run.weights["student"]]
    about = {"teacher": flags["teacher"], "timestep": flags["student_t"] or run.T, "step": step,
             "seconds": read_settings(run.folder).get("seconds", 10.24), "flags": flags,
             "command": shlex.join(["python", *sys.orig_argv[1:]])}
    folder.mkdir(exist_ok=True)
    replace_file(folder / "diffusion_pytorch_model.safetensors",
                 lambda path: save_file(dict(zip(names, kept)), path, {"format": "pt"}))
    data.replace_text(folder / "config.json", run.student.to_json_string())
    data.replace_text(folder / "swiftaudio.json", json.dumps(about, indent=2) + "\n")


def steps_left(run, log, name):
    """A progress bar over the steps that are left. From here on a signal waits for a step's end."""
    if run.first_step >= run.args.max_steps and run.rank == 0:  # perhaps killed between two files
        save_run(run, run.first_step, log)
    run.caught = torch.zeros(1, device=run.device if run.ranks > 1 else "cpu")
    for n in (signal.SIGTERM, signal.SIGINT):   # SIGTERM may come twice; a second Ctrl-C ends it
        signal.signal(n, lambda n, _: (run.caught.fill_(n),
                                       signal.signal(signal.SIGINT, signal.SIG_DFL)))
    return tqdm(range(run.first_step, run.args.max_steps), initial=run.first_step,
                total=run.args.max_steps, desc=name, disable=run.rank > 0)


def end_step(run, done, log, bar, *shown):
    """Log and save what is due after step `done`; return the exit code of a signal that came."""
    args, signalled = run.args, run.caught.clone()      # another may come while they compare
    if run.ranks > 1:
        dist.all_reduce(signalled, dist.ReduceOp.MAX)
    keep = args.keep_every and done % args.keep_every == 0
    due = signalled or keep or done == args.max_steps or done % args.save_every == 0
    if due or done % args.log_every == 0:               # at each save: a resumed log has no gap
        line = log.write(done)
        bar.set_postfix({name: f"{line[name]:.3g}" for name in shown})
    if due and run.rank == 0:
        if keep:                                        # first, or it could be missed for good
            save_student(run, run.out / f"student-{done}", done)
        save_run(run, done, log)
    log.time = time.time() if due else log.time         # saving is not training
    if signalled:
        run.say(f"stopped after step {done}, which is saved; the same command goes on")
        return 128 + int(signalled)


class Log:
    """Mean values, a line per interval, in metrics.jsonl and in the checkpoint."""

    def __init__(self, run):
        self.run, self.lines, self.path = run, run.lines, run.out / "metrics.jsonl"
        self.sums, self.step, self.time = {}, run.first_step, time.time()
        if run.rank == 0:                               # lines after the checkpoint are dropped
            data.replace_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, name, value):
        """Add a loss (B,) or a number."""
        value = value.detach().reshape(-1)
        row = torch.stack([value.sum(), torch.ones_like(value).sum()])
        self.sums[name] = self.sums.get(name, 0) + row  # on the device: reading stalls a GPU

    def write(self, step):
        """Write the means since the last line, over all processes; InputError if not finite."""
        line, samples = {"step": step}, (step - self.step) * self.run.config["captions a step"]
        for name, row in self.sums.items():
            if self.run.ranks > 1:
                dist.all_reduce(row)
            line[name] = float(row[0] / row[1])
            require(row.isfinite().all(), f"steps {self.step + 1} to {step}: {name} is not "
                    "finite; the last checkpoint is good. Go on with smaller rates or in fp32")
        line["samples_per_s"] = samples / (time.time() - self.time)     # a GPU is done by now
        self.sums, self.step, self.time = {}, step, time.time()
        self.lines.append(line)
        if self.run.rank == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        return line


# ---- the program ---------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    run = start(args)
    device, alpha, sigma, null = run.device, run.alpha, run.sigma, run.null
    lora_guidance = args.guidance if args.lora_guidance is None else args.lora_guidance

    # ---- two networks: the student, and a frozen UNet with adapters --------------------------
    student, unet = run.student, run.unet
    torch.manual_seed(args.seed)
    adapters = inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)
    home = run.home.resolve()       # lora/ is of the last step, so it is not of a kept student-N
    if args.init and home.name == "student" and (home.parent / "lora").is_dir():
        model.load_part(home.parent, "lora", lambda path: load_lora_state(
            unet, load_file(path / "adapter_model.safetensors")))
    weights = {"student": list(student.parameters()), "lora": adapters}
    rates = {"student": args.lr, "lora": args.lora_lr}
    opts = {name: adamw(args, weights[name], rates[name]) for name in rates}
    weights["ema"] = [w.detach().clone() for w in weights["student"]] if args.ema else []
    resume(run, weights, opts)
    nets = prepare(run, {"student": student, "lora": unet})

    # ---- three handles: adapters off, the frozen UNet is the teacher; on, the LoRA teacher -----
    student_eps, lora_eps = (denoiser(net, run.amp) for net in nets.values())

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return lora_eps(x, t, text)

    run.say(json.dumps(run.config))
    run.say(f"latents {run.shape}, {device.type} {args.precision}, from step {run.first_step}")

    # ---- the loop (the paper's Algorithm 1) ----------------------------------------------------
    log = Log(run)
    bar = steps_left(run, log, "distil")
    for step in bar:
        for name, opt in opts.items():
            opt.param_groups[0]["lr"] = rates[name] * learning_rate(step, args)
            opt.zero_grad()

        for micro in range(args.grad_accum):
            first = ((step * args.grad_accum + micro) * run.ranks + run.rank) * args.batch_size
            numbers = range(first, first + args.batch_size)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
                numbers, args.seed, run.shape, args.t_min, args.t_max, run.T))
            text = run.encode_text([caption_at(run.captions, args.seed, n) for n in numbers])
            for net in nets.values():           # DDP averages gradients once a step
                net.require_backward_grad_sync = micro == args.grad_accum - 1

            # Student: one pass from noise to x0, moved along the two teachers' difference.
            x0 = one_step(student_eps, z_T, text, alpha, sigma, args.student_t)
            vsd = vsd_loss(x0, t, eps, text, guided(teacher_eps, null, args.guidance),
                           guided(lora_eps, null, lora_guidance), alpha, sigma)
            tv = tv_loss(x0, args.tv)
            ((vsd + args.tv_weight * tv).mean() / args.grad_accum).backward()

            # LoRA teacher: learn to denoise what the student makes now.
            text = torch.where((u < args.lora_drop)[:, None, None], null, text)
            lora = lora_loss(x0, t_lora, eps_lora, text, lora_eps, alpha, sigma,
                             args.lora_weighting)
            (lora.mean() / args.grad_accum).backward()

            log.add("vsd", vsd)
            log.add("tv", tv)
            log.add("lora", lora)
            log.add("x0_std", x0.std((1, 2, 3)))

        for name, opt in opts.items():
            norm = torch.nn.utils.clip_grad_norm_(weights[name], args.grad_clip or float("inf"))
            log.add(f"grad_{name}", norm)       # the run ends where it is not finite
            opt.step()
        average(weights, args.ema, step)
        if code := end_step(run, step + 1, log, bar, "vsd", "lora", "x0_std"):
            return code

    run.say(f"hear it: python sample.py --student {run.out / 'student'} --prompt \"...\"")


if __name__ == "__main__":
    cli(main)
