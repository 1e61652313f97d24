"""Distil a text-to-audio diffusion teacher into a student that makes a clip in one pass.

    python train.py --teacher tiny                # the embedded teacher, 2 CPU cores, 5 minutes
    python train.py --captions audiocaps.csv      # Auffusion, the paper's setting, a 48 GB GPU
    torchrun --nproc_per_node 4 train.py --captions audiocaps.csv --grad_accum 1    # on four GPUs
    python train.py --init out/student --out_dir out2       # a new run, from a student

The same command again resumes, bit for bit (a GPU's own nondeterminism aside). Writes student/
(a diffusers UNet for sample.py), lora/ (PEFT's format), checkpoint.pt, metrics.jsonl to --out_dir.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import model
from data import InputError, Parser, caption_at, cli, draw_batch, number, replace_file, require
from lora import TARGETS, inject, lora_disabled, save_lora
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import denoiser, load_unet, read_settings

# ---- flags ---------------------------------------------------------------------------------------
count, positive, beta = number(int, 1), number(float), number(float, 0, 0.99999)
AUFFUSION = "auffusion/auffusion-full-no-adapter"


def add_run(add):
    """Add what every training script has: what to distil, optimization, machine and output."""
    add("--teacher", help=f'hub name, folder, or "tiny"; default: {AUFFUSION}')
    add("--init", metavar="STUDENT", help="start from this student, of this or another teacher")
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
    add("--decay", action=argparse.BooleanOptionalAction, default=False, help="linear, to rate 0")
    add("--ema", type=beta, default=0.0, help="average the saved student")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU")
    add("--compile", action="store_true", help="torch.compile the UNets")
    add("--checkpointing", action="store_true", help="recompute activations to save memory")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--keep_every", type=number(int), default=5000, help="keep student-N/ so often; 0: never")
    add("--log_every", type=count, default=10, help="steps between lines of metrics.jsonl")


def add_vsd(add):
    """Add the method's own flags; where their values come from: README, "Where this differs"."""
    add("--lora_guidance", type=positive, help="on the LoRA teacher; default: same as --guidance")
    add("--lora_weighting", choices=("alpha2", "v"), default="alpha2", help="weight of eq. 8")
    add("--tv", choices=("l1", "l2"), default="l1", help="total variation, eq. 6")
    add("--tv_weight", type=positive, default=0.05, help="its lambda, eq. 7; 0: none")
    add("--lora_rank", type=count, default=64, help="rank r; 64 on q and v ran away at rate 2e-3")
    add("--lora_alpha", type=positive, default=128, help="its scale is alpha / r")
    add("--lora_targets", choices=TARGETS, default="qv", help="layers that get an adapter")
    add("--lora_drop", type=number(float, 0, 1), default=0.1, help="empty captions in eq. 8")
    add("--lora_lr", type=positive, default=1e-3, help="LoRA teacher's rate")
    add("--t_min", type=number(int, 0, 999), default=20, help="smallest timestep of eq. 3")
    add("--t_max", type=number(int, 1, 1000), default=981, help="one above the largest")


def parse_args(argv=None):
    p = Parser(__doc__, prog="train.py", usage="python train.py [flags]")
    add_run(p.add_argument)
    add_vsd(p.add_argument)
    args = parse_run(p, argv)
    require(args.t_min < args.t_max, f"--t_min {args.t_min} must be below --t_max {args.t_max}")
    return args


# ---- the method (the paper's Algorithm 1) --------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    run = start(args)
    device, alpha, sigma, null = run.device, run.alpha, run.sigma, run.null

    # Two networks: the student, and a frozen UNet with adapters.
    torch.manual_seed(args.seed)
    adapters = inject(run.unet, args.lora_targets, args.lora_rank, args.lora_alpha)
    weights = {"student": list(run.student.parameters()), "lora": adapters}
    rates = {"student": args.lr, "lora": args.lora_lr}
    opts = {name: adamw(args, weights[name], rates[name]) for name in rates}
    weights["ema"] = [w.detach().clone() for w in weights["student"]] if args.ema else []
    run.resume(weights, opts)
    nets = [prepare(run, net) for net in (run.student, run.unet)]

    # Three denoisers: with its adapters off, the frozen UNet is the teacher; on, the LoRA teacher.
    student, lora_teacher = (denoiser(net, run.amp) for net in nets)

    def teacher(x, t, text):
        with lora_disabled(run.unet):
            return lora_teacher(x, t, text)

    lora_guidance = args.guidance if args.lora_guidance is None else args.lora_guidance
    guided_teacher = guided(teacher, null, args.guidance)
    guided_lora_teacher = guided(lora_teacher, null, lora_guidance)

    for step in run.steps("distil", "vsd", "lora", "x0_std"):       # logs and saves behind each
        for name, opt in opts.items():
            opt.param_groups[0]["lr"] = rates[name] * learning_rate(step, args)
            opt.zero_grad()

        for micro in range(args.grad_accum):
            numbers = run.numbers(step, micro)
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
                numbers, args.seed, run.shape, args.t_min, args.t_max, run.T))
            text = run.encode_text([caption_at(run.captions, args.seed, n) for n in numbers])
            for net in nets:                    # DDP averages gradients once a step
                net.require_backward_grad_sync = micro == args.grad_accum - 1

            # Student: one pass from noise to x0, moved along the two teachers' difference.
            x0 = one_step(student, z_T, text, alpha, sigma, args.student_t)         # eq. 1
            vsd = vsd_loss(x0, t, eps, text, guided_teacher, guided_lora_teacher,   # eq. 3
                           alpha, sigma)
            tv = tv_loss(x0, args.tv)                                               # eq. 6
            ((vsd + args.tv_weight * tv).mean() / args.grad_accum).backward()       # eq. 7

            # LoRA teacher: learn to denoise what the student makes now.
            text = torch.where((u < args.lora_drop)[:, None, None], null, text)
            lora = lora_loss(x0, t_lora, eps_lora, text, lora_teacher, alpha, sigma,
                             args.lora_weighting)                                   # eq. 8
            (lora.mean() / args.grad_accum).backward()

            run.log(vsd=vsd, tv=tv, lora=lora, x0_std=x0.std((1, 2, 3)))

        for name, opt in opts.items():
            norm = torch.nn.utils.clip_grad_norm_(weights[name], args.grad_clip or float("inf"))
            run.log(**{f"grad_{name}": norm})   # the run ends where it is not finite
            opt.step()
        average(weights, args.ema, step)

    return run.end()


# ---- flags of several sources; from here on, what recipes/ use too -------------------------------
def parse_run(p, argv, recipe=None):
    """Parse a training script's flags: those given, else the teacher's own of swiftaudio.json.

    recipe: whose section counts after "train". --init brings its step, its captions and teacher.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = p.parse_args(argv)
    about = model.open_student(given.init)[2] if given.init else {}
    teacher = given.teacher or about.get("teacher", AUFFUSION)
    settings = read_settings(home := model.find(teacher, model.SETTINGS))
    values = {k: v for k, v in settings.get("train", {}).items() if k in given or not recipe}
    values |= settings.get(recipe, {})
    if "captions" in values:
        values["captions"] = str(home / values["captions"])
    values |= {"teacher": teacher, "student_t": about.get("timestep", values.get("student_t"))}
    known = about if about.get("captions") and not given.teacher else values
    source = {} if given.captions else known
    values |= {name: source.get(name) for name in ("captions", "caption_column", "max_captions")}
    words = [f"--{name}" if value is True else f"--{name}={value}"
             for name, value in values.items() if value is not None and value is not False]
    try:
        args = p.parse_args([*words, *argv])
    except InputError as e:                             # of these words: argv alone was fine
        raise InputError(f"{home / 'swiftaudio.json'}: {e}")
    require(args.captions, "--captions FILE is needed")
    args.captions = str(Path(args.captions).resolve())  # they are read from elsewhere later
    if args.teacher != "tiny" and Path(args.teacher).is_dir():
        args.teacher = str(Path(args.teacher).resolve())
    args.defaults = {name: p.get_default(name) for name in vars(args)}
    return args


# ---- the networks --------------------------------------------------------------------------------
def start(args):
    """Start the processes and load what a training script needs: a Run, with these besides.

    device; amp (autocast); captions; folder, the teacher's; encode_text; null (1, tokens, dim);
    shape (C, h, w) of latents; alpha, sigma (T + 1,); T; scheduler; the networks student and unet.
    """
    run = Run(args, args.out_dir)
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
    home, part, _ = model.open_student(args.init) if args.init else (folder, "unet", {})
    run.student, unet = load_unet(home, part), load_unet(folder)
    for net in (unet, run.student):
        model.check_fit(folder, net, run.encode_text)
        net.to(device)
    run.student.requires_grad_(True)
    run.identity |= {"teacher's weights": fingerprint(unet), "alpha_T": float(run.alpha[-1]),
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


def adamw(args, weights, lr):
    """AdamW of these weights, as the flags say."""
    return torch.optim.AdamW(weights, lr, betas=(args.beta1, args.beta2),
                             weight_decay=args.weight_decay, fused=weights[0].is_cuda)


def learning_rate(step, args):
    """The factor on all rates at a step: linear warm-up, then constant or linear decay."""
    warm = min(1, (step + 1) / max(1, args.warmup))
    return warm * (1 - step / args.max_steps if args.decay else 1)


def average(weights, ema, step):
    """Move the average that is saved towards the student; it is shorter in the first steps."""
    if weights["ema"]:
        rate = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(weights["ema"], [w.detach() for w in weights["student"]], 1 - rate)


def prepare(run, net):
    """A network as the loop calls it: recomputing, compiled, averaging over processes."""
    if run.args.checkpointing:
        net.enable_gradient_checkpointing()
    if run.args.compile:
        net = torch.compile(net)
    return DDP(net, gradient_as_bucket_view=True) if run.ranks > 1 else net


# ---- a run: its checkpoint, log and signals ------------------------------------------------------
# What may differ on resume. Of teacher, first student and captions the content is compared, of a
# batch the size; other rates or precision get past a step that was not finite.
MAY_CHANGE = set("max_steps save_every keep_every log_every out_dir device compile checkpointing "
                 "captions caption_column max_captions teacher init batch_size grad_accum cache "
                 "lr lora_lr d_lr precision student".split())
# How users and clusters ask a program to end.
STOP = [n for n in signal.Signals if n.name[3:] in "TERM INT HUP QUIT USR1 USR2 XCPU BREAK".split()]


class Run:
    """A run on its way: its folder, checkpoint, log, bar and signals.

    args, flags: a namespace, a dict. identity: what else must be equal for a checkpoint to be of
    this run. out: its folder. rank, ranks: this process, of how many. By resume(): weights
    {name: [w]}, opts {name: optimizer}; first_step; lines, of the log. code: main()'s, 0 or 128+n.
    """

    def __init__(self, args, out):
        self.args, self.out, self.first_step, self.code = args, Path(out), 0, 0
        self.identity, self.lines, self.after = {"recipe": None}, [], contextlib.ExitStack()
        given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        require(given == 3 * [None] or all(n and n.isdigit() for n in given), "RANK, WORLD_SIZE, "
                f"LOCAL_RANK are {given}: start it with torchrun, or unset them")
        self.rank, self.ranks = int(given[0] or 0), int(given[1] or 1)
        self.say = tqdm.write if self.rank == 0 else lambda line: None

    def numbers(self, step, micro):
        """The numbers of the samples in this process's forward pass `micro` of a step."""
        place = (step * self.args.grad_accum + micro) * self.ranks + self.rank
        return range(place * self.args.batch_size, (place + 1) * self.args.batch_size)

    def resume(self, weights, opts, result="student"):
        """Lock the folder, go on from its checkpoint if there is one; result: what is saved."""
        self.weights, self.opts, path = weights, opts, self.out / "checkpoint.pt"
        self.flags = {k: v for k, v in vars(self.args).items() if k != "defaults"}
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.after.enter_context(data.locked(self.out / "run", wait=False))
            for own in ("", f"{result}*/", f"{result}/unet/", "lora/"):
                for left in self.out.glob(f"{own}*.????????.tmp"):      # by a kill during a save
                    left.unlink()
        if path.exists():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                # a flag that a checkpoint lacks had its default
                theirs = self.args.defaults | found["flags"] | found["identity"]
            except Exception as e:
                raise InputError(f"{path}: cannot be read ({model.cause(e)}); remove it")
            may_change = MAY_CHANGE - {"max_steps" if self.args.decay else ""}
            for name, ours in (self.identity | self.flags).items():
                require(name in may_change or theirs.get(name) == ours, f"{self.out}: holds a run "
                        f"with {name} {theirs.get(name)}, not {ours}; start in another folder")
            for name, tensors in weights.items():
                for w, saved in zip(tensors, found["weights"][name], strict=True):
                    w.data.copy_(saved)
            for name, opt in opts.items():
                opt.load_state_dict(found["opts"][name])
            self.first_step, self.lines = found["step"], found["lines"]
        require(self.first_step or not (self.out / result).exists(), f"{self.out}: holds a "
                f"{result} but no checkpoint to resume from; start in another folder")
        self.means, self.logged, self.time = {}, self.first_step, time.time()
        self.say(f"{self.flags}\n{self.device.type}, {self.shape}, from step {self.first_step}")
        if self.rank == 0:                              # lines after the checkpoint are dropped
            lines = "".join(json.dumps(line) + "\n" for line in self.lines)
            data.replace_text(self.out / "metrics.jsonl", lines)

    def log(self, **values):
        """Add losses (B,) or numbers to the means of the next line."""
        for name, value in values.items():              # on the device: reading stalls a GPU
            self.means.setdefault(name, []).append(value.detach().mean())

    def write_line(self, done):
        """Write the means since the last line, over all processes; InputError if not finite."""
        line, samples = {"step": done}, (done - self.logged) * self.identity["captions a step"]
        for name, values in self.means.items():
            mean = torch.stack(values).mean() / self.ranks
            if self.ranks > 1:
                dist.all_reduce(mean)
            line[name] = mean.item()
            require(mean.isfinite(), f"steps {self.logged + 1} to {done}: {name} is not finite; "
                    "the last checkpoint is good. Go on with smaller rates or in fp32")
        line["samples_per_s"] = samples / (time.time() - self.time)     # a GPU is done by now
        self.means, self.logged, self.time = {}, done, time.time()
        self.lines.append(line)
        if self.rank == 0:              # a line that cannot be written is in the checkpoint, too
            with contextlib.suppress(OSError), open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        return line

    def steps(self, name, *shown):
        """Yield the steps that are left; behind each, save what is due, show it, heed a signal."""
        first, last = self.first_step, self.args.max_steps
        if first >= last and self.rank == 0:            # perhaps killed between two files
            self.save(first)
        bar = tqdm(range(first, last), initial=first, total=last, desc=name, disable=self.rank > 0)
        self.caught = 0
        with self.after:                                # the lock goes, the handlers come back
            for n in STOP:                              # SIGHUP is ignored by nohup
                if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN:
                    self.after.callback(signal.signal, n, signal.signal(n, self.catch))
            for step in bar:
                yield step
                if line := self.end_step(step + 1):
                    bar.set_postfix({name: f"{line[name]:.3g}" for name in shown})
                if self.code:
                    break

    def catch(self, n, frame):
        self.caught = n                                 # SIGTERM may come twice
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second Ctrl-C ends it

    def end_step(self, done):
        """Log and save what is due after step `done`: a line of the log, or None."""
        args, signalled = self.args, torch.tensor(self.caught)
        if self.ranks > 1:
            dist.all_reduce(signalled := signalled.to(self.device), dist.ReduceOp.MAX)
        self.code = 128 + int(signalled) if signalled else 0
        keep = args.keep_every and done % args.keep_every == 0
        due = self.code or keep or done == args.max_steps or done % args.save_every == 0
        if not due and done % args.log_every:
            return None
        line = self.write_line(done)                    # at each save: a resumed log has no gap
        if due and self.rank == 0:
            if keep:                                    # first, or it could be missed for good
                save_student(self, self.out / f"student-{done}", done)
            self.save(done)
        self.time = time.time()                         # saving is not training
        return line

    def save(self, step):
        """Write checkpoint.pt, then what others read: each file whole."""
        replace_file(self.out / "checkpoint.pt", lambda path: torch.save({
            "step": step, "flags": self.flags, "identity": self.identity, "lines": self.lines,
            "weights": {k: [w.detach() for w in tensors] for k, tensors in self.weights.items()},
            "opts": {name: opt.state_dict() for name, opt in self.opts.items()}}, path))
        self.save_result(step)

    def save_result(self, step):
        save_student(self, self.out / "student", step)
        if "lora" in self.weights:
            save_lora(self.unet, self.out / "lora", self.args.lora_rank, self.args.lora_alpha)

    def end(self, hear=None):
        """Say how the run ended, and return main()'s exit code."""
        hear = hear or f'python sample.py --student {self.out / "student"} --prompt "..."'
        self.say(f"stopped after step {self.logged}, which is saved; the same command goes on"
                 if self.code else f"hear it: {hear}")
        return self.code


def public(value):
    """A flag, or a word of a command, without this machine's folders: /home/me/S is ./S."""
    text = str(value)
    flag, sign, path = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{flag}{sign}./{Path(path).name}" if Path(path).is_absolute() else value


def save_network(folder, network, weights):
    """Write a network's settings and weights {name: w} as diffusers reads them: each file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(network.to_json_string()) | {"_name_or_path": None}
    weights = {name: w.detach().contiguous() for name, w in weights.items()}
    replace_file(folder / "diffusion_pytorch_model.safetensors",
                 lambda path: path.write_bytes(save(weights, {"format": "pt"})))
    data.replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save_student(run, folder, step):
    """Write the student, or its average, as sample.py and diffusers read it."""
    kept, flags = run.weights["ema"] or run.weights["student"], run.flags
    about = {"teacher": public(flags["teacher"]), "timestep": flags["student_t"] or run.T,
             "step": step, "identity": run.identity,
             "flags": {name: public(value) for name, value in flags.items()},
             "command": shlex.join(["python", *map(public, sys.orig_argv[1:])])}
    save_network(folder, run.student, dict(zip(dict(run.student.named_parameters()), kept)))
    data.replace_text(folder / "swiftaudio.json", json.dumps(about, indent=2) + "\n")
    here = {name: flags[name] for name in "teacher captions caption_column max_captions".split()}
    data.replace_text(run.out / "paths.json", json.dumps(here))     # of this machine alone


if __name__ == "__main__":
    cli(main)
