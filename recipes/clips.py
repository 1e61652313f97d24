"""What recipes share: a loop as train.py's, and a teacher's own clips, made once and kept."""
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

import train
from data import InputError, Parser, caption_at, locked, number, replace_file, require
from losses import guided, one_step
from model import cause, denoiser, noise_schedule


def fit(run, nets, weights, opts, backward, *shown, first={}, hear=None):
    """Train as train.py's loop does and return main()'s exit code.

    backward(numbers) adds the gradients of a micro-batch and logs; the terminal shows what it logs
    as `shown`. nets: those that DDP may wrap. weights, opts: {network's name: its weights, its
    optimizer}; first: {name: step from which it learns}. hear: what to run then, if not sample.py.
    """
    args = run.args
    for step in run.steps(run.identity["recipe"], *shown):
        for opt in opts.values():
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * train.learning_rate(step, args)
            opt.zero_grad()
        for micro in range(args.grad_accum):
            for net in nets:                            # DDP averages gradients once a step
                net.require_backward_grad_sync = micro == args.grad_accum - 1
            backward(run.numbers(step, micro))
        for name, opt in opts.items():
            norm = torch.nn.utils.clip_grad_norm_(weights[name], args.grad_clip or float("inf"))
            run.log(**{f"grad_{name}": norm})
            if step >= first.get(name, 0):
                opt.step()
        if "ema" in weights:
            train.average(weights, args.ema, step)
    return run.end(hear)


def parser(doc, recipe, **defaults):
    """A parser that has the flags of every training script, and those of the teacher's clips."""
    add = (p := Parser(doc, prog=f"python -m recipes.{recipe}")).add_argument
    add("--clips", type=number(int, 1), default=1536, help="how many the teacher makes")
    add("--clip_steps", type=number(int, 1, 1000), default=10, help="sampling steps of each")
    add("--cache", help="file to keep them in; default: clips.safetensors in --out_dir")
    train.add_run(add)
    p.set_defaults(out_dir=f"out_{recipe}", **defaults)
    return p


def draw_more(numbers, seed, count, shape, low=0, high=1, stream=3):
    """Random numbers beside draw_batch()'s: noises (count, B, *shape), t (B,) in [low, high)."""
    rngs = [np.random.default_rng((seed, stream, n)) for n in numbers]
    noises = np.stack([r.standard_normal((count, *shape), dtype=np.float32) for r in rngs], 1)
    return torch.from_numpy(noises), torch.tensor([int(r.integers(low, high)) for r in rngs])


def read_clips(path, about, shape):
    """Read a file's latents (N, *shape), none if it is missing; InputError if made otherwise."""
    if not path.exists():
        return torch.zeros(0, *shape, dtype=torch.float16)
    try:
        with safe_open(path, "pt") as file:
            found, clips = json.loads(file.metadata()["about"]), file.get_tensor("clips").clone()
    except Exception as e:                              # each kind of damage its own error
        raise InputError(f"{path}: is no file of clips ({cause(e)}); move it away")
    for key, value in about.items():
        require(found.get(key) == value, f"{path}: its clips were made with {key} "
                f"{found.get(key)}, not {value}; move it away")
    return clips


def keep_clips(path, about, clips):
    """Add clips to a file, and return them; those that it has stay, as another run may use them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        found = read_clips(path, about, clips.shape[1:])
        clips = torch.cat([found, clips[len(found):]])
        if len(clips) > len(found):
            content = save({"clips": clips}, {"about": json.dumps(about)})
            replace_file(path, lambda temporary: temporary.write_bytes(content))
    return clips


def many_steps(eps, z_T, text, scheduler, steps):
    """The teacher's own sampling with its scheduler; eps is guided. One step is eq. 1."""
    if steps == 1:
        return one_step(eps, z_T, text, *noise_schedule(scheduler, z_T.device))
    scheduler = type(scheduler).from_config(scheduler.config)           # with no history
    try:
        scheduler.set_timesteps(steps, device=z_T.device)
    except Exception as e:                              # of LCM above 50 steps, PNDM below 4
        raise InputError(f"{steps} steps: not with this scheduler; try others ({cause(e)})")
    first, T = int(scheduler.timesteps[0]), len(scheduler.alphas_cumprod) - 1
    require(0.9 * T <= first <= T, f"{steps} steps: this scheduler starts at t = {first}, "
            f"not just below {T}; ask for another number, or 1")        # "leading": 501 for 2
    x = z_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = eps(scheduler.scale_model_input(x, t), t.expand(len(x)), text)
        x = scheduler.step(out, t, x).prev_sample
    return x


@torch.no_grad()
def teacher_clips(run, unet):
    """Make latents (--clips, C, h, w) in fp16 by the guided teacher: clip n is of caption_at(n).

    unet: the teacher's. --cache keeps the clips; where it holds fewer, this goes on.
    """
    args, seed, cut = run.args, run.args.seed, run.args.batch_size
    require(args.clips >= cut, f"--clips {args.clips}: fewer than a batch, --batch_size {cut}")
    path = Path(args.cache or run.out / "clips.safetensors")
    about = {key: (run.flags | run.identity)[key] for key in (
        "teacher's weights", "text encoder's weights", "alpha_T", "captions' text", "guidance",
        "clip_steps", "seed")}
    about["latents"] = list(run.shape)
    clips = read_clips(path, about, run.shape)
    while run.rank > 0 and len(clips) < args.clips:     # the first process makes them, for hours
        time.sleep(2)
        clips = read_clips(path, about, run.shape)
    # from T itself: 10 "leading" steps, as Auffusion's scheduler takes them, start at t = 901
    scheduler = type(run.scheduler).from_config(run.scheduler.config, timestep_spacing="trailing")
    eps = guided(denoiser(unet, run.amp), run.null, args.guidance)
    bar = tqdm(desc="the teacher's clips", initial=len(clips), total=args.clips,
               disable=len(clips) >= args.clips)
    while len(clips) < args.clips:
        numbers = range(len(clips), min(len(clips) + cut, args.clips))
        text = run.encode_text([caption_at(run.captions, seed, n) for n in numbers])
        # not the noise of sampling_noise(), from which the student will be judged
        z_T = draw_more(numbers, seed, 1, run.shape, stream=4)[0][0].to(run.device)
        x0 = many_steps(eps, z_T, text, scheduler, args.clip_steps).half().cpu()
        require(x0.isfinite().all(), f"--teacher {args.teacher}: makes clips that are not finite "
                "in fp16; try --precision fp32, or a smaller --guidance")
        clips = torch.cat([clips, x0])
        if len(clips) % 128 < cut or len(clips) == args.clips:
            clips = keep_clips(path, about, clips)
        bar.update(len(clips) - bar.n)
    bar.close()
    return clips[:args.clips]


def clips_of(numbers, run, clips):
    """What samples of a run learn from: the teacher's clips (B, C, h, w), and their text."""
    seed = run.args.seed
    rows = [caption_at(range(len(clips)), seed, n) for n in numbers]
    y = clips[rows].to(run.device).float()              # clip n is of the n-th caption
    return y, run.encode_text([caption_at(run.captions, seed, n) for n in rows])
