"""Measure speed and memory: the libraries' plain fp32 first, then ours, in the same run.

    python -m extras.bench sample                           # text to waveform, and its stages
    python -m extras.bench train                            # an optimizer step, the paper's setting
    python -m extras.bench train --size full --compile      # Auffusion's size: a GPU

The paper's setting is train.py's defaults, at both sizes: the tiny teacher's own has fewer passes
and more adapters. The full-size model has random weights, on which speed does not depend. "Of peak"
is the arithmetic of plain fp32 over the time, as a share of what a large matrix product reaches, in
bf16 if it can.
"""
import gc
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from data import Parser, cli, draw_batch, number, require
from extras.fast import fold_upsampling
from extras.random_teacher import FULL, write_teacher
from lora import inject, lora_disabled
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import TINY, System, denoiser, load_unet, noise_schedule

PLAIN, OURS = "plain fp32", "ours"
WHOLE, STEP = "text to waveform", "optimizer step"
# train.py's defaults: a folder that is no teacher has no setting of its own to replace them
PAPER = train.parse_args(["--teacher", str(Path(__file__).parent), "--captions", "none.csv"])


def clock(f, runs):
    """Seconds that a call of f takes, the mean of `runs` calls after two of warm-up."""
    return Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).timeit(runs).mean


def peak(device, dtype):
    """Measure the TFLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2e-12 * n**3 / clock(lambda: a @ a, 10)


def flops(f):
    """Count the TFLOP of a call of f."""
    # The counter does not know the CPU's fused attention, so attention is written out for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops() / 1e12


def sampler(kind, folder, device, batch, args):
    """Text to waveform, its stages first: {name: a function that does it}."""
    precision = "fp32" if kind == PLAIN else "auto"
    system = System(folder, load_unet(folder), {}, None, precision, device)
    decoder = system.decoder
    if kind == OURS:
        fold_upsampling(decoder.vae.decoder)
    for part in (system.unet, decoder.vae.decoder, decoder.vocoder):
        if kind == PLAIN:                   # as the libraries leave it
            part.to(memory_format=torch.contiguous_format)
        elif args.compile and type(part).__name__ != "GriffinLim":
            part.compile(mode="max-autotune")
    alpha, sigma = noise_schedule(system.scheduler, device)
    z_T = system.noise(range(batch), 0)
    encode = lambda: system.encode_text(["a dog barks"] * batch)
    latents = lambda text: one_step(system.eps, z_T, text, alpha, sigma)
    text = encode()
    x0 = latents(text).clone()              # a CUDA graph's next call overwrites its output
    mel = decoder.decode(x0).clone()
    return {"text": encode, "UNet, one pass": lambda: latents(text),
            "decoder": lambda: decoder.decode(x0), "vocoder": lambda: decoder.vocode(mel),
            WHOLE: lambda: decoder.vocode(decoder.decode(latents(encode())))}


def trainer(kind, folder, device, batch, args):
    """Return {STEP: train.py's loop in the paper's setting, less log, resuming, processes}."""
    lora_guidance = PAPER.guidance if PAPER.lora_guidance is None else PAPER.lora_guidance
    half = device.type == "cuda" and kind == OURS
    amp = torch.autocast(device.type, torch.bfloat16, enabled=half)
    student, unet = nets = [load_unet(folder).to(device) for _ in range(2)]
    student.requires_grad_(True)
    unet.to(torch.bfloat16 if half else torch.float32)
    adapters = inject(unet, PAPER.lora_targets, PAPER.lora_rank, PAPER.lora_alpha)
    opts = [torch.optim.AdamW(student.parameters(), PAPER.lr, fused=half),
            torch.optim.AdamW(adapters, PAPER.lora_lr, fused=half)]
    for net in nets:
        if kind == PLAIN:
            net.to(memory_format=torch.contiguous_format)
        elif args.checkpointing:            # what is done twice is not counted
            net.enable_gradient_checkpointing()
    if args.compile and kind == OURS:
        nets = [torch.compile(net) for net in nets]
    student_eps, lora_eps = (denoiser(net, amp) for net in nets)
    encode_text, shape = model.TextEncoder(folder).to(device), model.latent_shape(folder)
    alpha, sigma = noise_schedule(model.load_scheduler(folder), device)
    null = encode_text([""])

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return lora_eps(x, t, text)

    def step():
        for opt in opts:
            opt.zero_grad()
        z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
            range(batch), 0, shape, PAPER.t_min, PAPER.t_max, len(alpha) - 1))
        text = encode_text(["a dog barks"] * batch)
        x0 = one_step(student_eps, z_T, text, alpha, sigma, PAPER.student_t)
        vsd = vsd_loss(x0, t, eps, text, guided(teacher_eps, null, PAPER.guidance),
                       guided(lora_eps, null, lora_guidance), alpha, sigma)
        (vsd + PAPER.tv_weight * tv_loss(x0, PAPER.tv)).mean().backward()
        text = torch.where((u < PAPER.lora_drop)[:, None, None], null, text)
        lora = lora_loss(x0, t_lora, eps_lora, text, lora_eps, alpha, sigma, PAPER.lora_weighting)
        lora.mean().backward()
        for opt in opts:
            torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], PAPER.grad_clip)
            opt.step()

    return {STEP: step}


def bench(kind, build, batch, runs, at_peak, plain):
    """Print a row for each of build(kind)'s functions, and a GPU's memory: {name: seconds}."""
    gc.collect()
    if gpu := torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = {}
    try:
        for name, f in build(kind, batch).items():
            found[name] = t = clock(f, runs)
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
    add("--runs", type=positive, default=3, help="timed calls, whose mean is printed")
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
        at_peak = {name: flops(f) / best for name, f in build(PLAIN, 1).items()}      # seconds
        plain = bench(PLAIN, build, batch, args.runs, at_peak, {})
        ours = bench(OURS, build, batch, args.runs, at_peak, plain)
    if STEP in ours:
        captions = PAPER.max_steps * PAPER.batch_size * PAPER.grad_accum
        print(f"a run, {captions:,} captions, takes {captions / batch * ours[STEP] / 3600:.1f} h")


if __name__ == "__main__":
    cli(main)
