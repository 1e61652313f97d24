"""Measure speed, memory and error, each beside something else measured in the same run.

    python bench.py                     # sampling at Auffusion's size and tiny, training of tiny
    python bench.py sample --compile    # text to waveform only, compiled
    python bench.py train --size full   # a GPU: an optimizer step, and what 20,000 of them take
    python bench.py memory              # a GPU: batch size against memory and rate

The full-size model has random weights, on which speed does not depend. "Peak" is what a large
matrix product reaches in the same dtype.
"""
import contextlib
import gc
import io
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data import draw_batch
from extras.audio import log_mel
from extras.cli import InputError, Parser, number, run
from extras.decoder import new_decoder
from extras.device import pick_device, sampling_dtype
from extras.folded import fold_upsampling
from extras.hub import TINY
from extras.random_teacher import FULL, write_teacher
from losses import at, diffuse, one_step
from model import RATE, Pipeline, denoiser, load_unet
from sample import draw_noise
from tiny.vocoder import GriffinLim

TEXT, UNET, VAE, VOCODER = "text", "UNet, one pass", "VAE decoder", "vocoder"
WHOLE = "text to waveform"

# ---- measuring ---------------------------------------------------------------------------------


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


def memory(device):
    """The most GiB that a GPU has held since forget(), in words."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"


def row(name, *cells):
    """Print a line of a table."""
    cells = (c if isinstance(c, str) else f"{c:.4g}" for c in cells)
    print(f"{name:24s}" + "".join(f"{c:>10s}" for c in cells), flush=True)


# ---- sampling ----------------------------------------------------------------------------------


def plain_system(folder, device):
    """Load (pipe, unet) in fp32 as the libraries leave them."""
    pipe = Pipeline(folder)
    pipe.decoder = AutoencoderKL.from_pretrained(folder / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    return pipe.to(device), unet.to(device)


def our_system(folder, device, dtype, compiled):
    """Load (pipe, unet) as sample.py does."""
    pipe = Pipeline(folder, dtype=dtype).to(device)
    unet = load_unet(folder, dtype=dtype).to(device)
    for network in (unet, pipe.decoder.decoder, pipe.vocoder):
        if compiled and not isinstance(network, GriffinLim):
            network.compile(mode="max-autotune")
    return pipe, unet


def stages(pipe, unet, prompts):
    """The path from text to waveform: {name: function of what the stage before it made}."""
    z_T, eps = draw_noise(pipe, range(len(prompts)), 0), denoiser(unet)
    return {
        TEXT: lambda _: pipe.encode_text(prompts),
        UNET: lambda text: one_step(eps, z_T, text, pipe.alpha, pipe.sigma),
        VAE: pipe.decode,
        VOCODER: pipe.vocode,
    }


@torch.no_grad()
def walk(path, measure):
    """Run stage after stage: ({name: what measure(f) says first}, {name: the stage's result})."""
    said, made, x = {}, {}, None
    for name, f in path.items():
        said[name], x = measure(lambda: f(x))
        made[name] = x = x.clone()          # the next call overwrites a CUDA graph's output
    return said, made


def time_stages(path, timed, warm_up):
    """Time each stage, then the whole path: ({name: seconds}, {name: result})."""
    at_once = lambda: walk(path, lambda f: (None, f()))
    for _ in range(warm_up):
        at_once()
    seconds, made = walk(path, timed)
    return {**seconds, WHOLE: timed(at_once)[0]}, made


def waveform_error(exact, wav):
    """Compare waveforms (B, N): signal to noise in dB, and two errors of the log-mel in nepers.

    The errors are mean magnitudes, over everything and within 80 dB of the clip's peak.
    """
    noise = (exact - wav).square().sum()
    mel = log_mel(exact)                                                    # (B, mels, frames)
    error = (log_mel(wav) - mel).abs()
    heard = error[mel > mel.amax((1, 2), keepdim=True) - 80 / 20 * math.log(10)]
    ratio = 10 * (exact.square().sum() / noise).log10()
    return ratio.item(), error.mean().item(), heard.mean().item()


def say_error(*waveforms):
    """waveform_error() in words."""
    ratio, everywhere, heard = waveform_error(*waveforms)
    return (f"{ratio:.1f} dB of signal to noise and log-mel {everywhere:.4f} nepers ({heard:.4f} "
            "within 80 dB of the peak)")


def bench_sample(folder, device, batch, runs, compiled):
    """Print the stages of a plain fp32 script beside those of sample.py on this machine."""
    prompts, full, half = ["a dog barks"] * batch, torch.float32, sampling_dtype(device)
    best = {dtype: peak(device, dtype) for dtype in (full, half)}
    timed = lambda f: clock(f, device, runs)

    pipe, unet = plain_system(folder, device)
    tflop, _ = walk(stages(pipe, unet, prompts[:1]), flops)
    a, exact = time_stages(stages(pipe, unet, prompts), timed, 1)
    alone = half != full and not isinstance(pipe.vocoder, GriffinLim)
    if alone:                               # the vocoder in half precision, on the same log-mel
        pipe.vocoder.to(half)
        pipe.vocode(exact[VAE])
        b_alone, wav_alone = timed(lambda: pipe.vocode(exact[VAE]))
    del pipe, unet
    forget(device)

    pipe, unet = our_system(folder, device, half, compiled)
    warm_up = 3 if compiled else 1
    b, fast = time_stages(stages(pipe, unet, prompts), timed, warm_up)
    pipe.decoder = small = new_decoder(pipe.settings).requires_grad_(False)
    small_tflop = batch * flops(lambda: small.decode(exact[UNET][:1].cpu()))[0]
    fold_upsampling(small.decoder)
    small.to(device, half, memory_format=torch.channels_last)
    if compiled:
        small.decoder.compile(mode="max-autotune")
    c, _ = time_stages(stages(pipe, unet, prompts), timed, warm_up)

    # TFLOP, and the seconds that they take at the peak
    dtypes = {TEXT: full, UNET: half, VAE: half, VOCODER: pipe.vocoder.dtype}
    tflop = {name: batch * n for name, n in tflop.items()}
    least = {name: n / best[dtypes[name]] for name, n in tflop.items()}
    tflop[WHOLE], least[WHOLE] = sum(tflop.values()), sum(least.values())
    rows = [(name, name, b[name], least[name]) for name in tflop]
    if alone:
        rows.append((f"vocoder, {half}", VOCODER, b_alone, tflop[VOCODER] / best[half]))

    seconds = exact[VOCODER].shape[1] / RATE
    peaks = ", ".join(f"{n:.2f} TFLOP/s in {dtype}" for dtype, n in best.items())
    print(f"sampling{', compiled' * compiled}, batch {batch} of {seconds:.2f} s; peak: {peaks}")
    row("", "TFLOP", "plain ms", "TFLOP/s", "of peak", "ours ms", "TFLOP/s", "of peak", "faster")
    for title, name, t, at_peak in rows:
        n, s = tflop[name], a[name]
        row(title, n, f"{1e3 * s:.1f}", n / s, f"{n / best[full] / s:.0%}",
            f"{1e3 * t:.1f}", n / t, f"{at_peak / t:.0%}", f"{s / t:.2f}x")
    for title, name, n in (("small decoder", VAE, small_tflop),
                           ("waveform, small decoder", WHOLE,
                            tflop[WHOLE] - tflop[VAE] + small_tflop)):
        row(title, n, "-", "-", "-", f"{1e3 * c[name]:.1f}", n / c[name], "-",
            f"{a[name] / c[name]:.2f}x")

    factors = [x[WHOLE] / (batch * seconds) for x in (a, b, c)]
    teacher = [(200 * x[UNET] + x[VAE] + x[VOCODER]) / b[WHOLE] for x in (b, a)]
    print(f"real-time factor: {factors[0]:.3f} plain, {factors[1]:.3f} ours "
          f"({1 / factors[1]:.1f} x real time), {factors[2]:.3f} with the small decoder "
          f"({1 / factors[2]:.1f} x); peak GPU memory {memory(device)} GiB")
    print(f"the teacher's 200 passes, computed from the columns: {teacher[0]:.0f} x our time, in "
          f"plain fp32 {teacher[1]:.0f} x")
    latents = (exact[UNET] - fast[UNET]).std() / exact[UNET].std()
    mel = (exact[VAE] - fast[VAE]).abs().mean()
    phases = "; its phases are guessed" if folder == TINY else ""
    print(f"error of ours: latents {latents:.2%} of their spread, log-mel {mel:.4f} nepers, "
          f"waveform {say_error(exact[VOCODER], fast[VOCODER])}{phases}")
    if alone:
        print(f"error of the vocoder alone in {half}: {say_error(exact[VOCODER], wav_alone)}; "
              f"sample.py runs it in {dtypes[VOCODER]}")
    print()


# ---- training ----------------------------------------------------------------------------------


def ours(folder, steps, *flags):
    """Samples per second of train.py itself in the paper's setting, after two steps of warm-up."""
    quiet = io.StringIO()
    # Saving, 14 GB at full size, is after all that is timed: the run ends before it.
    stop = mock.patch.object(train, "replace_file", side_effect=StopIteration)
    with tempfile.TemporaryDirectory() as out:
        captions = Path(out) / "captions.txt"
        captions.write_text("".join(f"a dog barks {i} times\n" for i in range(64)))
        command = ["--teacher", folder, "--preset", "paper", "--captions", captions, "--out_dir",
                   out, "--max_steps", steps + 2, "--save_every", steps + 2, "--log_every", 1]
        with (contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), stop,
              contextlib.suppress(StopIteration)):
            train.main([str(word) for word in (*command, *flags)])
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["samples_per_s"] for line in lines[2:])


def plain_loop(folder, device, steps, batch, accumulate, guidance=7.5):
    """Samples per second of the method as it is usually written, after two steps of warm-up.

    Two fp32 UNets under autocast, PEFT's adapters switched by the library, four separate guided
    passes, text encoded beforehand.
    """
    from peft import LoraConfig

    pipe = Pipeline(folder).to(device)
    load = UNet2DConditionModel.from_pretrained
    student, unet = (load(folder / "unet").to(device) for _ in range(2))
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=64, lora_alpha=128, target_modules=["to_q", "to_v"]))
    adapters = [p for p in unet.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(student.parameters(), 1e-5), torch.optim.AdamW(adapters, 1e-3)]
    text, null = pipe.encode_text(["a dog barks"] * batch), pipe.encode_text([""] * batch)
    alpha, sigma, T = pipe.alpha, pipe.sigma, pipe.T
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def score(x_t, t):
        cond, uncond = unet(x_t, t, text).sample, unet(x_t, t, null).sample
        return uncond + guidance * (cond - uncond)

    def step():
        for _ in range(accumulate):
            z_T, eps = torch.randn(2, batch, *pipe.latent_shape, device=device)
            t = torch.randint(20, 981, (batch,), device=device)
            with autocast:
                out = student(z_T, torch.full_like(t, T), text).sample
                x0 = (z_T - sigma[T] * out) / alpha[T]
                with torch.no_grad():
                    x_t = diffuse(x0, t, eps, alpha, sigma)
                    unet.disable_adapters()
                    teacher = score(x_t, t)
                    unet.enable_adapters()
                    target = x0 - at(sigma, t) ** 2 * (teacher - score(x_t, t))
                vsd = 0.5 * (x0 - target).square().mean()
            (vsd / accumulate).backward()
            with autocast:
                fake = unet(x_t, t, text).sample
                lora = (at(alpha, t) * (fake - eps)).square().mean()
            (lora / accumulate).backward()
        for optimizer, parameters in zip(optimizers, (list(student.parameters()), adapters)):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return vsd.item(), lora.item()

    clock(step, device, 2)
    return batch * accumulate / clock(step, device, steps)[0]


def bench_train(folder, device, runs, batch, accumulate):
    """Print a whole optimizer step of train.py in the paper's setting, beside the plain loop."""
    tflop, _ = walk(stages(*plain_system(folder, device), ["a dog barks"]), flops)
    tflop = 9 * tflop[UNET]             # student 3, teacher 2, LoRA teacher 2, its update 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best, size = peak(device, dtype), batch * accumulate
    flags = ["--batch_size", batch, "--grad_accum", accumulate, "--device", device]
    loops = {
        "plain loop, PEFT": lambda: plain_loop(folder, device, runs, batch, accumulate),
        "train.py": lambda: ours(folder, runs, *flags),
    }
    if device.type == "cuda":
        loops["train.py --compile"] = lambda: ours(folder, runs, *flags, "--compile")

    print(f"training, a step of {batch} x {accumulate}, {tflop:.3g} TFLOP a sample; peak: "
          f"{best:.2f} TFLOP/s in {dtype}")
    row("", "samples/s", "s a step", "of peak", "GPU GiB", "faster")
    rates = []
    for name, loop in loops.items():
        forget(device)
        try:
            rates.append(loop())
        except ImportError:
            row(name, "not measured: pip install peft")
        except torch.OutOfMemoryError:
            row(name, "does not fit")
        else:
            row(name, rates[-1], size / rates[-1], f"{rates[-1] * tflop / best:.0%}",
                memory(device), f"{rates[-1] / rates[0]:.2f}x")
    if not rates:
        return

    step = size / rates[-1]
    paper = "; the paper: 40 h on one RTX 5880 Ada" if folder != TINY and size == 64 else ""
    print(f"20,000 steps at the last rate: {20000 * step / 3600:.1f} h{paper}")
    pipe = Pipeline(folder).to(device)

    def prepare():
        draw_batch(range(batch), 0, pipe.latent_shape, 20, 981, pipe.T)
        pipe.encode_text(["a dog barks"] * batch)

    wait, _ = clock(prepare, device, 3)
    print(f"random numbers and text encoding: {wait * accumulate / step:.1%} of a step\n")


def bench_memory(folder, device):
    """Print memory and rate by batch size, with and without recomputed activations."""
    for flags in ([], ["--checkpointing"]):
        row(" ".join(flags), "GPU GiB", "samples/s")
        for batch in (1, 2, 4, 8, 16, 32):
            forget(device)
            try:
                rate = ours(folder, 3, "--batch_size", batch, "--grad_accum", 1, "--device", device,
                            *flags)
            except torch.OutOfMemoryError:
                row(f"batch {batch}", "does not fit")
                break
            row(f"batch {batch}", memory(device), rate)


# ---- the command -------------------------------------------------------------------------------


def main(argv=None):
    p, count = Parser(__doc__), number(int, 1)
    add = p.add_argument
    add("what", nargs="?", choices=("all", "sample", "train", "memory"), default="all")
    add("--size", choices=("both", "full", "tiny"), default="both",
        help="Auffusion's with random weights, or the tiny world's")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    add("--batch_size", type=count, nargs="+",
        help="clips at a time; default: 1, on a GPU also 16; of training: captions; default: 16")
    add("--grad_accum", type=count, help="forward passes in a training step; default: 4, of tiny 1")
    add("--runs", type=count, help="timed calls; default: 10 on a GPU, else 1, of tiny 5")
    add("--compile", action="store_true", help="sampling: torch.compile, CUDA graphs on a GPU")
    args = p.parse_args(argv)

    device = pick_device(args.device, exact=True)       # or the fp32 that errors refer to is TF32
    gpu = device.type == "cuda"
    if not gpu and (args.what == "memory" or (args.what, args.size) == ("train", "full")):
        raise InputError(f"{args.what}: needs a CUDA GPU, this is {device.type}; what can be timed "
                         "here is python bench.py train --size tiny")
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if gpu else cpu
    print(f"{device.type}: {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")

    sizes = ("full", "tiny") if args.size == "both" else (args.size,)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            full = size == "full"
            trains = args.what in ("all", "train") and (gpu or not full)
            if args.what == "train" and not trains:     # over a minute a sample
                continue
            print(f"\n==== {size} size ====\n")
            teacher = write_teacher(Path(folder) / size, **FULL) if full else TINY
            runs = args.runs or (10 if gpu else 1 if full else 5)
            if args.what in ("all", "sample"):
                for batch in args.batch_size or ((1, 16) if gpu else (1,)):
                    bench_sample(teacher, device, batch, runs, args.compile)
            if trains:
                batch = (args.batch_size or [16])[0]
                bench_train(teacher, device, runs, batch, args.grad_accum or (4 if full else 1))
            elif args.what == "all":
                print("training at full size: not measured, it needs a GPU")
            if args.what == "memory":
                bench_memory(teacher, device)


if __name__ == "__main__":
    run(main)
