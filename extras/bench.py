"""Measure speed and memory: the libraries' plain fp32 first, then ours, in the same run.

    python -m extras.bench sample                           # text to waveform, and its stages
    python -m extras.bench train                            # an optimizer step, the paper's setting
    python -m extras.bench train --size full --compile      # Auffusion's size: a GPU

The paper's setting is train.py's defaults, at both sizes: the tiny teacher's own has fewer passes
and more adapters. The full-size model has random weights, on which speed does not depend. "Of peak"
is the arithmetic of plain fp32 (of the rows "fast", with a small decoder and vocoder, their own)
over the time, as a share of what a large matrix product reaches, in bf16 if it can.
"""
import contextlib
import functools
import gc
import io
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from data import Parser, cli, number, require
from extras.random_teacher import FULL, write_teacher
from model import TINY, System, load_unet
from recipes.decoder import new_decoder
from recipes.vocoder import new_vocoder

PLAIN, OURS, FAST = "plain fp32", "ours", "fast"        # fast: with both small parts
WHOLE, STEP = "text to waveform", "optimizer step"
train.add_run((paper := Parser("the paper's setting")).add_argument)
PAPER = paper.parse_args([])


def clock(f, runs):
    """Seconds that a call of f takes, the mean of `runs` after two of warm-up; 0: just one call."""
    if not runs:
        return f()
    return Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).timeit(runs).mean


def peak(device, dtype):
    """Measure the TFLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2e-12 * n**3 / clock(lambda: a @ a, 10)


def flops(f):
    """Count the TFLOP of what a timer of f measures."""
    # The counter does not know the CPU's fused attention, so attention is written out for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f(0)
    return counter.get_total_flops() / 1e12


def sampler(kind, folder, device, batch, args):
    """Text to waveform, its stages first: {name: its seconds, the mean of so many calls}."""
    precision = "fp32" if kind == PLAIN else "auto"
    system = System(folder, load_unet(folder), {}, None, precision, device)
    decoder = system.decoder
    if kind == FAST:
        own = model.read_settings(folder)
        decoder.vae = new_decoder(own).to(device, decoder.vae.dtype,
                                          memory_format=torch.channels_last)
        vocoder, _ = new_vocoder(8 * system.shape[1], own.get("vocoder", {}))
        decoder.vocoder = vocoder.to(device, decoder.vocoder.dtype)
    for part in (system.unet, decoder.vae.decoder, decoder.vocoder):
        if kind == PLAIN:                   # as the libraries leave it
            part.to(memory_format=torch.contiguous_format)
        elif args.compile and type(part).__name__ != "GriffinLim":
            part.compile(mode="max-autotune")
    z_T = system.noise(range(batch), 0)
    encode = lambda: system.encode_text(["a dog barks"] * batch)
    latents = lambda text: system.latents(z_T, text)
    text = encode()
    x0 = latents(text).clone()              # a CUDA graph's next call overwrites its output
    mel = decoder.decode(x0).clone()
    stages = {"text": encode, "UNet, one pass": lambda: latents(text),
              "decoder": lambda: decoder.decode(x0), "vocoder": lambda: decoder.vocode(mel),
              WHOLE: lambda: decoder.vocode(decoder.decode(latents(encode())))}
    return {name: functools.partial(clock, f) for name, f in stages.items()}


def trainer(kind, folder, device, batch, args):
    """Return {STEP: train.py's own loop in the paper's setting, which saves nothing}."""
    def measure(runs):
        layout, lines = torch.contiguous_format if kind == PLAIN else torch.channels_last, []
        with tempfile.TemporaryDirectory() as out, patch.multiple(
                train, STOP=[], read_settings=lambda folder: {},        # no flags of its own
                load_unet=lambda *where: load_unet(*where).to(memory_format=layout)
                ), patch.object(train.Run, "save", lambda run, step: lines.extend(run.lines)
                ), contextlib.redirect_stdout(quiet := io.StringIO()
                ), contextlib.redirect_stderr(quiet):
            Path(out, "captions.txt").write_text("a dog barks\n")
            train.main([
                f"--teacher={folder}", f"--captions={out}/captions.txt", f"--out_dir={out}",
                f"--device={device}", f"--batch_size={batch}", "--grad_accum=1",
                f"--max_steps={2 * runs or 1}", f"--log_every={runs or 1}",     # half: warm-up
                f"--precision={'fp32' if kind == PLAIN else 'auto'}",
                *[f"--{name}" for name in ("compile", "checkpointing")
                  if kind == OURS and getattr(args, name)]])
        return batch / lines[-1]["samples_per_s"]

    return {STEP: measure}


def bench(kind, build, batch, runs, at_peak, plain):
    """Print a row for each of build(kind)'s timers, and a GPU's memory: {name: seconds}."""
    gc.collect()
    if gpu := torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = {}
    try:
        for name, f in build(kind, batch).items():
            found[name] = t = f(runs)
            row, ratio = f"{kind}, {name}", f"{plain[name] / t:.2f}x" if name in plain else "-"
            print(f"{row:30s}{1e3 * t:10.1f}{batch / t:10.3g}"
                  f"{batch * at_peak[name] / t:10.0%}{ratio:>10s}", flush=True)
    except torch.OutOfMemoryError:
        print(f"{kind}: {batch} at a time do not fit")
    if gpu:
        print(f"{kind}: at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return found


def main(argv=None):
    p, positive = Parser(__doc__), number(int, 1)
    add = p.add_argument
    add("what", choices=("sample", "train"))
    add("--size", choices=("tiny", "full"), default="tiny", help="the tiny world's, or Auffusion's")
    add("--batch_size", type=positive, help="samples at a time; default: 1, in training 16")
    add("--runs", type=positive, default=3, help="timed calls; training warms up as long")
    add("--compile", action="store_true", help="torch.compile, with CUDA graphs for sampling")
    add("--checkpointing", action="store_true", help="recompute activations in training")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    args = p.parse_args(argv)
    device = model.pick_device(args.device, exact=True)     # or plain fp32 would be TF32
    training, full = args.what == "train", args.size == "full"
    require(device.type == "cuda" or not (training and full), "train --size full needs a CUDA GPU")
    batch = args.batch_size or (PAPER.batch_size if training else 1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device
    dtype = torch.bfloat16 if model.has_bf16(device) else torch.float32
    best = peak(device, dtype)
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; peak: {best:.3g} "
          f"TFLOP/s in {dtype}\n{'':30s}{'ms':>10s}{'a second':>10s}{'of peak':>10s}"
          f"{'faster':>10s}")
    with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled(training):
        home = write_teacher(Path(folder) / "full", **FULL) if full else TINY
        what = trainer if training else sampler
        build = lambda kind, batch: what(kind, home, device, batch, args)
        at_peak = lambda kind: {k: flops(f) / best for k, f in build(kind, 1).items()}  # seconds
        needed = at_peak(PLAIN)
        plain = bench(PLAIN, build, batch, args.runs, needed, {})
        ours = bench(OURS, build, batch, args.runs, needed, plain)
        if not training:
            bench(FAST, build, batch, args.runs, at_peak(FAST), plain)
    if STEP in ours:
        captions = PAPER.max_steps * PAPER.batch_size * PAPER.grad_accum
        print(f"a run, {captions:,} captions, takes {captions / batch * ours[STEP] / 3600:.1f} h")


if __name__ == "__main__":
    cli(main)
