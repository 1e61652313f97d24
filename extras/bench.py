"""Measure speed, memory and error, each beside something else measured in the same run.

    python -m extras.bench                      # sampling at full size and tiny, training of tiny
    python -m extras.bench sample --compile     # text to waveform only, compiled
    python -m extras.bench train --size full    # a GPU: an optimizer step, and what 20,000 take
    python -m extras.bench memory --size full   # a GPU: batch size against memory and rate

The full-size model has random weights, on which speed does not depend. "Peak" is what a large
matrix product reaches in the same dtype.
"""
import gc
import itertools
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from data import Parser, cli, draw_batch, number, require
from extras.fast import fold_upsampling
from extras.random_teacher import FULL, write_teacher
from lora import inject, lora_disabled
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import TINY, GriffinLim, System, denoiser, load_unet, noise_schedule, read_settings
from recipes.decoder import new_decoder

TEXT, UNET, VAE, VOCODER = "text", "UNet, one pass", "decoder", "vocoder"
WHOLE, PLAIN, OURS, SMALL = "text to waveform", "plain fp32", "ours", "ours, a small decoder"


# ---- measuring -----------------------------------------------------------------------------------

def clock(f, device, runs):
    """Call f `runs` times: (median seconds, the last result)."""
    sync, times = getattr(torch, device.type).synchronize, []
    for _ in range(runs):
        sync()
        started = time.perf_counter()
        result = f()
        sync()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def peak(device, dtype):
    """Measure the TFLOP/s of a large square matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2e-12 * n**3 / min(clock(lambda: a @ a, device, 1)[0] for _ in range(10))


def flops(f):
    """Call f once: (TFLOP, its result)."""
    # The counter does not know the CPU's fused attention, so attention is written out for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = f()
    return counter.get_total_flops() / 1e12, result


def forget(device):
    """Free what is not held, and start counting the GPU's memory anew."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row(name, *cells):
    """Print a line of a table, behind it the most memory that a GPU has held since forget()."""
    if torch.cuda.is_initialized():
        cells += f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
    cells = (c if isinstance(c, str) else f"{c:.4g}" for c in cells)
    print(f"{name:24s}" + "".join(f"{c:>10s}" for c in cells), flush=True)


# ---- sampling ------------------------------------------------------------------------------------

def load(kind, folder, device):
    """Load a System as the libraries leave it, as extras/fast.py does, or with a small decoder."""
    if kind == PLAIN:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        system = System(folder, unet, {}, None, "fp32", device)
        system.decoder.vae.to(memory_format=torch.contiguous_format)
        return system
    system = System(folder, load_unet(folder), {}, None, "auto", device)
    if kind == SMALL:                                   # untrained
        small = new_decoder(read_settings(folder)).requires_grad_(False)
        system.decoder.vae = small.to(system.decoder.vae.device, system.decoder.vae.dtype,
                                      memory_format=torch.channels_last)
    fold_upsampling(system.decoder.vae.decoder)
    return system


@torch.no_grad()
def walk(system, batch, measure):
    """From text to waveform: ({stage: what measure(f) says first}, {stage: its result})."""
    alpha, sigma = noise_schedule(system.scheduler, system.device)
    path = {TEXT: lambda _: system.encode_text(["a dog barks"] * batch),
            UNET: lambda text: one_step(system.eps, z_T, text, alpha, sigma),
            VAE: system.decoder.decode, VOCODER: system.decoder.vocode}
    z_T, said, made, x = system.noise(range(batch), 0), {}, {}, None
    for name, f in path.items():
        said[name], x = measure(lambda: f(x))
        made[name] = x = x.clone()          # the next call overwrites a CUDA graph's output
    return said, made


def bench_sample(folder, device, batch, runs, compiled):
    """Print each stage of a plain fp32 script, of ours, and of ours with a small decoder."""
    found, clips = {}, {}
    for kind in (PLAIN, OURS, SMALL):
        forget(device)
        system = load(kind, folder, device)
        best, decoder = peak(device, system.unet.dtype), system.decoder
        tflop = walk(system, 1, flops)[0]
        for part in (system.unet, decoder.vae.decoder, decoder.vocoder):
            if compiled and kind != PLAIN and not isinstance(part, GriffinLim):
                part.compile(mode="max-autotune")
        for _ in range(3 if compiled else 1):                           # warm-up
            walk(system, batch, lambda f: (None, f()))
        found[kind], clips[kind] = walk(system, batch, lambda f: clock(f, device, runs))

        tflop[WHOLE], found[kind][WHOLE] = sum(tflop.values()), sum(found[kind].values())
        print(f"{kind}, batch {batch} of {system.seconds:.2f} s; peak: {best:.2f} TFLOP/s in "
              f"{system.unet.dtype}")
        row("", "TFLOP", "ms", "of peak", "faster")
        for name, t in found[kind].items():
            row(name, n := batch * tflop[name], f"{1e3 * t:.1f}", f"{n / t / best:.0%}",
                f"{found[PLAIN][name] / t:.2f}x")
        print(f"real-time factor {t / batch / system.seconds:.3f}; the teacher's 200 passes, "
              f"computed: {1 + 199 * found[kind][UNET] / t:.0f} x the time\n")

    exact, fast = clips[PLAIN], clips[OURS]
    latents = (exact[UNET] - fast[UNET]).std() / exact[UNET].std()
    mel, wav = ((exact[name] - fast[name]).abs() for name in (VAE, VOCODER))
    ratio = 10 * (exact[VOCODER].square().sum() / wav.square().sum()).log10()
    print(f"error of ours: latents {latents:.2%} of their spread, log-mel {mel.mean():.4f} nepers, "
          f"waveform {ratio:.1f} dB of signal to noise\n")


# ---- training ------------------------------------------------------------------------------------

def trainer(folder, device, batch, accumulate=1, compiled=False, checkpointing=False):
    """Return step(): train.py's loop in the paper's setting, less log, resuming and processes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    student, unet = load_unet(folder).to(device), load_unet(folder, dtype=dtype).to(device)
    student.requires_grad_(True)
    weights, count = [list(student.parameters()), inject(unet)], itertools.count()
    opts = [torch.optim.AdamW(w, lr, fused=device.type == "cuda")
            for w, lr in zip(weights, (1e-5, 1e-3))]
    nets = student, unet
    for net in nets if checkpointing else ():
        net.enable_gradient_checkpointing()
    student_eps, lora_eps = (denoiser(torch.compile(n) if compiled else n, amp) for n in nets)
    encode_text, shape = model.TextEncoder(folder).to(device), model.latent_shape(folder)
    alpha, sigma = noise_schedule(model.load_scheduler(folder), device)
    null = encode_text([""])

    def teacher_eps(x, t, text):
        with lora_disabled(unet):
            return lora_eps(x, t, text)

    def step():
        for opt in opts:
            opt.zero_grad()
        for _ in range(accumulate):
            z_T, eps, eps_lora, t, t_lora, u = (x.to(device) for x in draw_batch(
                list(itertools.islice(count, batch)), 0, shape, 20, 981, len(alpha) - 1))
            text = encode_text(["a dog barks"] * batch)
            x0 = one_step(student_eps, z_T, text, alpha, sigma)
            vsd = vsd_loss(x0, t, eps, text, guided(teacher_eps, null, 7.5),
                           guided(lora_eps, null, 7.5), alpha, sigma)
            ((vsd + 0.05 * tv_loss(x0)).mean() / accumulate).backward()
            text = torch.where((u < 0.1)[:, None, None], null, text)
            lora = lora_loss(x0, t_lora, eps_lora, text, lora_eps, alpha, sigma)
            (lora.mean() / accumulate).backward()
        for opt, w in zip(opts, weights):
            torch.nn.utils.clip_grad_norm_(w, 1.0)
            opt.step()

    return step


def bench_train(folder, device, batches, accumulate, runs, compiled, checkpointing=False):
    """Print what an optimizer step takes in the paper's setting, by batch size."""
    tflop = 9 * walk(load(PLAIN, folder, device), 1, flops)[0][UNET]    # student 3, teacher 2, LoRA
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # teacher 2, its update 2
    best = peak(device, dtype)
    print(f"training{', compiled' * compiled}{', recomputing' * checkpointing}, {tflop:.3g} TFLOP "
          f"a sample; peak: {best:.2f} TFLOP/s in {dtype}")
    row("captions a step", "a second", "s a step", "of peak", "20,000")
    for batch in batches:
        forget(device)
        try:
            step = trainer(folder, device, batch, accumulate, compiled, checkpointing)
            clock(step, device, 2)                                      # warm-up
            seconds, step = clock(step, device, runs)                   # frees the networks
        except torch.OutOfMemoryError:
            return row(f"{batch} x {accumulate}", "does not fit")
        rate = batch * accumulate / seconds
        row(f"{batch} x {accumulate}", rate, seconds, f"{rate * tflop / best:.0%}",
            f"{20000 * seconds / 3600:.1f} h")


# ---- the command ---------------------------------------------------------------------------------

def main(argv=None):
    p, count = Parser(__doc__), number(int, 1)
    add = p.add_argument
    add("what", nargs="?", choices=("all", "sample", "train", "memory"), default="all")
    add("--size", choices=("both", "full", "tiny"), default="both",
        help="Auffusion's with random weights, or the tiny world's")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    add("--batch_size", type=count, help="clips at a time; default: 1, of training 16")
    add("--grad_accum", type=count, default=1, help="forward passes in a training step")
    add("--runs", type=count, default=3, help="timed calls, of which the median counts")
    add("--compile", action="store_true", help="torch.compile, with CUDA graphs for sampling")
    args = p.parse_args(argv)
    device = model.pick_device(args.device, exact=True)     # or errors would refer to TF32
    gpu, what, batch, how = device.type == "cuda", args.what, args.batch_size, args.compile
    require(gpu or what != "memory" and (what, args.size) != ("train", "full"),
            f"{what}: needs a CUDA GPU, this is {device.type}; what can be timed here is "
            "python -m extras.bench train --size tiny")
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(f"{device.type}: {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    with tempfile.TemporaryDirectory() as folder:
        for size in ("full", "tiny") if args.size == "both" else (args.size,):
            print(f"\n==== {size} size ====\n")
            teacher = write_teacher(Path(folder) / size, **FULL) if size == "full" else TINY
            if what in ("all", "sample"):
                bench_sample(teacher, device, batch or 1, args.runs, how)
            if what in ("all", "train") and (gpu or size == "tiny"):    # over a minute a sample
                bench_train(teacher, device, [batch or 16], args.grad_accum, args.runs, how)
            for again in (False, True) if what == "memory" else ():
                bench_train(teacher, device, (1, 2, 4, 8, 16, 32), 1, args.runs, how, again)


if __name__ == "__main__":
    cli(main)
