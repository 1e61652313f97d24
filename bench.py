"""How fast is it, and beside what? Every figure is a ratio to something measured in the same run on the same machine.

    python bench.py                     # sampling at Auffusion's size, sampling and training of the tiny world: 5 minutes on 2 CPU cores
    python bench.py train --size full   # a GPU: a whole optimizer step beside a plain loop, and what 20,000 of them take
    python bench.py memory              # a GPU: batch size against memory and rate
    python bench.py scale --size full   # how a step grows with batch, length of a clip, and LoRA (CPU: --size tiny)

The full-size model has random weights, on which speed does not depend. Peak is that of a large matrix product in the same dtype.
"""
import argparse
import contextlib
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import data
import train
from losses import at, diffuse
from model import HiFiGAN, Teacher, denoiser, load_unet, one_step, pick_device, quiet, sampling_dtype

HERE = Path(__file__).resolve().parent
VOCODER = dict(num_mels=256, upsample_rates=[5, 4, 2, 2, 2], upsample_kernel_sizes=[11, 8, 4, 4, 4], upsample_initial_channel=1024,
               resblock="1", resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=[[1, 3, 5]] * 3)
FULL = dict(dim=768, unet=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), vocoder=VOCODER, text_layers=12, heads=8, layers=2,
            groups=32, vocab=49408, text_heads=12, seconds=10.24)      # Auffusion's: 859.5 M parameters in the UNet


# ---- random teachers in Auffusion's layout (the tests write small ones) -----------------------------------------------

def write_tokenizer(folder):
    """A CLIP tokenizer as published: vocab.json, merges.txt and two small configs; it spells words letter by letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [c + "</w>" for c in letters] + ["do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
                                                              "model_max_length": 77, "add_prefix_space": False}))
    return len(words)


def write_vocoder(folder, config):
    """HiFi-GAN with weight norm, in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, w in HiFiGAN(config).state_dict().items():
        if name.endswith("weight"):
            state[f"{name}_g"], state[f"{name}_v"] = torch.rand(w.shape[0], 1, 1) + 0.5, torch.randn(w.shape) * 0.1
        else:
            state[name] = torch.randn(w.shape) * 0.1
    torch.save({"generator": state}, folder / "vocoder.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return state


def write_teacher(folder, layout="plain", *, dim, unet, vae, vocoder, seconds, text_layers=1, heads=2, layers=1, groups=4, vocab=None, text_heads=2):
    """A random teacher of Auffusion's structure in one of its layouts: "plain" (no adapter) or "adapter"."""
    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, layers_per_block=layers, block_out_channels=unet, cross_attention_dim=dim, attention_head_dim=heads,
                         norm_num_groups=groups).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=vae, layers_per_block=layers, norm_num_groups=groups, scaling_factor=0.18215,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(folder / "vae")
    PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1,
                  set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    write_vocoder(folder / "vocoder", vocoder)
    encoder = folder / ("text_encoder" if layout == "plain" else "text_encoder_0")
    size = write_tokenizer(folder / "tokenizer" if layout == "plain" else encoder)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab or size, hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=text_layers, num_attention_heads=text_heads,
        projection_dim=dim, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)).save_pretrained(encoder)
    if layout == "adapter":
        (folder / "condition_config.json").write_text(json.dumps([{
            "text_encoder_name": "openai/clip-vit-large-patch14", "condition_adapter_name": "condition_adapter_0",
            "condition_max_length": 77, "condition_dim": dim, "cross_attention_dim": dim}]))
        (folder / "condition_adapter_0").mkdir()
        (folder / "condition_adapter_0/config.json").write_text(json.dumps({"condition_dim": dim}))
        torch.save({"proj.weight": torch.randn(dim, dim), "proj.bias": torch.randn(dim), "norm.weight": torch.rand(dim) + 0.5,
                    "norm.bias": torch.randn(dim)}, folder / "condition_adapter_0/condition_adapter.pt")
    (folder / "swiftaudio.json").write_text(json.dumps({"seconds": seconds}))
    return folder


# ---- measuring -------------------------------------------------------------------------------------------------------

def sync(device):
    getattr(torch, device.type).synchronize()


def clock(f, device, runs):
    """(median seconds of `runs` calls, the last call's result)."""
    times = []
    for _ in range(runs):
        sync(device)
        started = time.perf_counter()
        result = f()
        sync(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def peak(device, dtype):
    """TFLOP/s of a large square matrix product: what this machine gives at best."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(clock(lambda: a @ a, device, 1)[0] for _ in range(10)) / 1e12


def forget(device):
    """Free what is not held, and start counting the GPU's memory anew."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device):
    """The most that a GPU has held since forget(), in words."""
    return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}" if device.type == "cuda" else "-"


def flops(f):
    """TFLOP of f(). Attention is written out for it: the counter does not know the CPU's fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops() / 1e12


# ---- sampling --------------------------------------------------------------------------------------------------------

def stages(teacher, unet, prompts):
    """The path from text to waveform as [(name, function of what came before)]."""
    shape = (len(prompts), *teacher.latent_shape)
    z_T = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(teacher.device)
    eps = denoiser(unet)
    return [("text", lambda _: teacher.encode_text(prompts)), ("UNet, one pass", lambda text: one_step(eps, z_T, text, teacher)),
            ("VAE decoder", teacher.decode), ("vocoder", teacher.vocode)]


@torch.no_grad()
def run_stages(teacher, unet, prompts, runs):
    """({stage: seconds}, results of the stages, seconds of the whole path at once)."""
    times, results, x = {}, [], None
    for name, f in stages(teacher, unet, prompts):
        times[name], x = clock(lambda: f(x), teacher.device, runs)
        results.append(x.clone())                                   # a CUDA graph's output is overwritten by the next call
    def whole():
        x = None
        for _, f in stages(teacher, unet, prompts):
            x = f(x)
        return x
    return times, results, clock(whole, teacher.device, runs)[0]


def bench_sample(folder, device, batch, runs, compile):
    """A table of stages: a plain fp32 script beside what sample.py does by default on this machine."""
    prompts, half = ["a dog barks twice while rain falls"] * batch, sampling_dtype(device)
    plain, unet = Teacher(folder).to(device), UNet2DConditionModel.from_pretrained(Path(folder) / "unet").to(device).eval()
    plain.vae = AutoencoderKL.from_pretrained(Path(folder) / "vae").to(device).eval()      # as the libraries leave them
    per_stage, x = {}, None
    with torch.no_grad():
        for name, f in stages(plain, unet, prompts[:1]):            # the first run warms up
            def step(f=f, x=x):
                step.result = f(x)
            per_stage[name], x = batch * flops(step), step.result
    a, exact, a_whole = run_stages(plain, unet, prompts, runs)
    peaks = peak(device, torch.float32), peak(device, half)
    del unet, plain, f, step
    forget(device)
    teacher, unet = Teacher(folder, dtype=half).to(device), load_unet(folder, dtype=half).to(device)
    if compile:
        unet, teacher.vae.decoder = (torch.compile(m, mode="max-autotune") for m in (unet, teacher.vae.decoder))
        if isinstance(teacher.vocoder, HiFiGAN):
            teacher.vocoder = torch.compile(teacher.vocoder, mode="max-autotune")
    run_stages(teacher, unet, prompts, 1 if not compile else 3)
    b, fast, b_whole = run_stages(teacher, unet, prompts, runs)
    held, length, ours_is = memory(device), fast[3].shape[1] / 16000, "compiled" if compile else "default"
    print(f"{Path(folder).name}: batch {batch} of {length:.2f} s; largest matrix product {peaks[0]:.2f} TFLOP/s in fp32, {peaks[1]:.2f} in {half}")
    print(f"{'':16s}{'TFLOP':>8s}{'plain fp32':>12s}{'TFLOP/s':>9s}{'of peak':>8s}{ours_is:>12s}{'TFLOP/s':>9s}{'of peak':>8s}{'faster':>9s}")
    for name, tflop in [*per_stage.items(), ("text to waveform", sum(per_stage.values()))]:
        s, t = (a[name], b[name]) if name in a else (a_whole, b_whole)
        print(f"{name:16s}{tflop:8.3f}{1e3 * s:9.1f} ms{tflop / s:9.3f}{tflop / s / peaks[0]:8.0%}{1e3 * t:9.1f} ms{tflop / t:9.3f}"
              f"{tflop / t / peaks[1]:8.0%}{s / t:8.2f}x")
    queries = [200 * row["UNet, one pass"] + row["VAE decoder"] + row["vocoder"] for row in (b, a)]
    print(f"real-time factor {a_whole / length / batch:.3f} plain, {b_whole / length / batch:.3f} {ours_is} ({length * batch / b_whole:.1f} x real time); the teacher's "
          f"200 passes, computed from the columns, take {queries[0] / b_whole:.0f} x the {ours_is} time, in plain fp32 {queries[1] / b_whole:.0f} x; peak GPU memory {held} GiB")
    noise = exact[3] - fast[3]
    print(f"error of the {ours_is} path against fp32: latents {((exact[1] - fast[1]).std() / exact[1].std()).item():.2%} of their spread, log-mel "
          f"{(exact[2] - fast[2]).abs().mean().item():.4f} in the mean, waveform {10 * (exact[3].square().sum() / noise.square().sum()).log10().item():.1f} dB of signal to "
          "noise" + (" (of phases that Griffin-Lim guesses)" if Path(folder) == HERE / "tiny/teacher" else " (random weights: see the tiny table for trained ones)") + "\n")


def bench_shell(folder, device, runs):
    """sample.py from the shell: what is not the model's work, against importing the libraries and reading the weights alone."""
    with tempfile.TemporaryDirectory() as out:
        bare = ("import torch, sys, pathlib\nfrom diffusers import UNet2DConditionModel, AutoencoderKL\nfrom transformers import CLIPTextModel, "
                "AutoTokenizer\nfrom safetensors.torch import load_file\nfor f in pathlib.Path(sys.argv[1]).rglob('diffusion*.safetensors'): load_file(f)")
        command = [sys.executable, str(HERE / "sample.py"), "--student", str(folder), "--prompt", "a dog barks", "--overwrite", "--out", out, "--device", str(device)]
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", bare, str(folder)], check=True, capture_output=True)
            middle = time.perf_counter()
            said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=out).stdout
            work = float(said.splitlines()[-1].split()[0])
            times.append((middle - started, time.perf_counter() - middle - work, work))
        a, b, work = (statistics.median(column) for column in zip(*times))
    print(f"sample.py from the shell ({Path(folder).name}): importing and reading alone 1.00, all of sample.py but the model's work {b / a:.2f}, "
          f"the model's work {work / a:.2f}\n")


# ---- training --------------------------------------------------------------------------------------------------------

def rate(out):
    """Samples per second of a run that logged every step, after two steps of warm-up."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["samples_per_s"] for line in lines[2:])


def ours(folder, steps, *flags):
    """Samples per second of train.py itself, after two steps of warm-up; nothing is saved."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch.object(train, "write"), mock.patch.object(train, "save_lora"), mock.patch.object(train, "save_file"):
        captions = Path(out) / "captions.csv"
        captions.write_text("caption\n" + "".join(f"a dog barks {i} times\n" for i in range(64)))
        train.main(["--teacher", str(folder), "--captions", str(captions), "--out_dir", out, "--eval_clips", "0", "--max_steps", str(steps + 2),
                    "--log_every", "1", *map(str, flags)])
        return rate(out)


def plain_loop(folder, device, steps, batch, accumulate, guidance):
    """Samples per second of the method as it is usually written: two fp32 UNets under autocast, PEFT's adapters switched by
    their library, four separate guided passes, embeddings computed beforehand."""
    from peft import LoraConfig
    teacher = Teacher(folder).to(device)
    with quiet():
        student, unet = (UNet2DConditionModel.from_pretrained(teacher.folder / "unet").to(device) for _ in range(2))
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=64, lora_alpha=128, target_modules=["to_q", "to_v"]))
    adapters = [p for p in unet.parameters() if p.requires_grad]
    optimizers = torch.optim.AdamW(student.parameters(), lr=1e-5), torch.optim.AdamW(adapters, lr=1e-3)
    text, null = teacher.encode_text(["a dog barks"] * batch), teacher.encode_text([""] * batch)
    alpha, sigma, T, times = teacher.alpha, teacher.sigma, teacher.T, []
    for _ in range(steps + 2):
        started = time.perf_counter()
        for _ in range(accumulate):
            z, eps = torch.randn(2, batch, *teacher.latent_shape, device=device)
            t = torch.randint(20, 981, (batch,), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x0 = (z - sigma[T] * student(z, torch.full_like(t, T), text).sample) / alpha[T]
                with torch.no_grad():
                    x_t, scores = diffuse(x0, t, eps, alpha, sigma), []
                    for switch in (unet.disable_adapters, unet.enable_adapters):
                        switch()
                        cond, uncond = unet(x_t, t, text).sample, unet(x_t, t, null).sample
                        scores.append(uncond + guidance * (cond - uncond))
                    target = x0 - at(sigma, t) ** 2 * (scores[0] - scores[1])
                vsd = 0.5 * (x0.float() - target.float()).square().mean()
            (vsd / accumulate).backward()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                fake = unet(diffuse(x0.detach(), t, eps, alpha, sigma), t, text).sample
                lora = (at(alpha, t) * (fake - eps)).square().mean()
            (lora / accumulate).backward()
        for optimizer, parameters in zip(optimizers, (student.parameters(), adapters)):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        vsd.item(), lora.item()
        times.append(time.perf_counter() - started)
    return batch * accumulate / statistics.median(times[2:])


def pass_tflop(folder):
    """TFLOP of one UNet pass for one clip, counted without computing anything."""
    teacher = Teacher(folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(teacher.folder / "unet"))
        x, t, text = torch.randn(1, *teacher.latent_shape), torch.zeros(1), torch.randn(1, teacher.tokens, unet.config.cross_attention_dim)
        return flops(lambda: unet(x, t, text))


def bench_train(folder, device, steps, batch, accumulate):
    """A whole optimizer step in the paper's setting (both teachers guided, LoRA on q and v), beside the plain loop."""
    guidance = 7.5
    flags = ("--batch_size", batch, "--grad_accum", accumulate, "--device", device, "--guidance", guidance, "--lora_guidance", guidance,
             "--lora_targets", "qv", "--lora_rank", 64, "--lora_alpha", 128)
    tflop = 9 * pass_tflop(folder)                                  # student 3, teacher 2, LoRA teacher 2, its update 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best, size = peak(device, dtype), batch * accumulate
    print(f"{Path(folder).name}: a training step of {batch} x {accumulate}, {tflop:.4f} TFLOP a sample; largest matrix product {best:.2f} TFLOP/s in {dtype}")
    print(f"{'':24s}{'samples/s':>10s}{'s a step':>10s}{'of peak':>9s}{'GPU GiB':>9s}{'faster':>9s}")
    def row(name, f):
        forget(device)
        try:
            rates.append(f())
        except ImportError:
            print(f"{name:24s} not measured: pip install peft")
        except torch.OutOfMemoryError:
            print(f"{name:24s} does not fit")
        else:
            print(f"{name:24s}{rates[-1]:10.2f}{size / rates[-1]:10.3f}{rates[-1] * tflop / best:9.0%}{memory(device):>9s}{rates[-1] / rates[0]:8.2f}x", flush=True)
    rates = []
    row("plain loop, PEFT", lambda: plain_loop(folder, device, steps, batch, accumulate, guidance))
    row("train.py", lambda: ours(folder, steps, *flags))
    if device.type == "cuda":
        row("train.py --compile", lambda: ours(folder, steps, *flags, "--compile"))
    if not rates:
        return
    hours = 20000 * size / rates[-1] / 3600
    print(f"20,000 steps at the last rate: {hours:.1f} h" + (f"; the paper: 40 h on one RTX 5880 Ada, {40 / hours:.1f} x as long" if tflop > 1 and size == 64 else ""))
    teacher = Teacher(folder).to(device)
    wait, _ = clock(lambda: (data.draw_batch(range(batch), 0, teacher.latent_shape, 20, 981, teacher.T), teacher.encode_text(["a dog barks"] * batch)), device, 3)
    print(f"random numbers and text encoding: {wait * accumulate / (size / rates[-1]):.1%} of a step\n")


def bench_processes(folder):
    """64 samples a step on one CPU thread, and on two processes of one thread that average their gradients once a step."""
    rates = []
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []), str(HERE / "train.py"),
                       "--teacher", str(folder), "--device", "cpu", "--batch_size", "16", "--grad_accum", str(4 // ranks), "--max_steps", "4", "--log_every",
                       "1", "--eval_clips", "0", "--out_dir", out, "--no-decay"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rates.append(rate(out))
    print(f"two processes: {rates[1] / rates[0]:.2f} x the rate of one, a thread each\n")


def bench_memory(folder, device):
    """Batch size against memory and rate, with and without recomputed activations, in the paper's setting."""
    if device.type != "cuda":
        raise data.InputError("bench.py memory needs a CUDA GPU")
    print(f"{'batch':>6s}{'checkpointing':>15s}{'GiB':>8s}{'samples/s':>11s}")
    for flags in ((), ("--checkpointing",)):
        for batch in (1, 2, 4, 8, 16, 32):
            forget(device)
            try:
                samples_per_s = ours(folder, 3, "--batch_size", batch, "--grad_accum", 1, "--device", device, *flags)
            except torch.OutOfMemoryError:
                print(f"{batch:6d}{'yes' if flags else 'no':>15s} does not fit")
                break
            print(f"{batch:6d}{'yes' if flags else 'no':>15s}{memory(device):>8s}{samples_per_s:11.2f}", flush=True)


def bench_scale(folder, device, runs):
    """How time grows: of a clip with batch and length, of a training sample with LoRA's rank and place. Bars are relative to the first."""
    dtype, seconds = sampling_dtype(device), Teacher(folder).seconds
    unet = load_unet(folder, dtype=dtype).to(device)
    def clip(batch, length):
        teacher = Teacher(folder, seconds * length, dtype=dtype).to(device)
        run_stages(teacher, unet, ["a dog"] * batch, 1)
        return run_stages(teacher, unet, ["a dog"] * batch, runs)[2] / batch
    def sample(rank, targets):
        return 1 / ours(folder, runs, "--lora_rank", rank, "--lora_alpha", rank, "--lora_targets", targets, "--device", device)
    for title, rows in {
            "seconds a clip, by batch": {b: lambda b=b: clip(b, 1) for b in (1, 4, 16, 64)},
            "seconds a clip, by length": {f"{seconds * k:g} s": lambda k=k: clip(1, k) for k in (0.25, 0.5, 1, 2)},
            "seconds a training sample, by LoRA": {f"{t}, rank {r}": lambda r=r, t=t: sample(r, t) for r, t in
                                                   ((4, "qv"), (16, "qv"), (64, "qv"), (256, "qv"), (4, "all"), (64, "all"), (256, "all"))}}.items():
        print(title)
        first = None
        for name, f in rows.items():
            value = f()
            first = first or value
            print(f"{name:>16}{value:10.4f}{value / first:7.2f}x {'#' * round(12 * value / first)}", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", nargs="?", choices=("all", "sample", "train", "memory", "scale"), default="all")
    p.add_argument("--size", choices=("both", "full", "tiny"), default="both", help="Auffusion's with random weights, or the tiny world's")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--batch_size", type=int, nargs="+", help="clips at a time (default: 1, and 16 on a GPU); of training: captions (16)")
    p.add_argument("--grad_accum", type=int, help="forward passes in a training step (default: 4 at full size, 1 for tiny)")
    p.add_argument("--runs", type=int, help="timed calls (default: 10 on a GPU, else 1 at full size and 5 for tiny)")
    p.add_argument("--compile", action="store_true", help="sampling: torch.compile, with CUDA graphs on a GPU")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False                     # or the fp32 that errors are judged by is as coarse as fp16
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{device.type}: {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    with tempfile.TemporaryDirectory() as folder:
        for size in ("full", "tiny"):
            if args.size not in ("both", size) or args.what == "scale" and args.size == "both" and (size == "full") != gpu:
                continue
            teacher, runs = HERE / "tiny/teacher", args.runs or (10 if gpu else 5 if size == "tiny" else 1)
            if size == "full" and (gpu or args.what != "train"):    # a full-size training step on a CPU takes over a minute a sample
                teacher = write_teacher(Path(folder) / "Auffusion's size", **FULL)
            if args.what in ("all", "sample"):
                for batch in args.batch_size or ((1, 16) if gpu else (1,)):
                    bench_sample(teacher, device, batch, runs, args.compile)
                if size == "tiny":
                    bench_shell(teacher, device, min(runs, 3))
            if args.what in ("all", "train") and (gpu or size == "tiny"):
                bench_train(teacher, device, runs, (args.batch_size or [16])[0], args.grad_accum or (4 if size == "full" else 1))
                if size == "tiny" and not gpu:
                    bench_processes(teacher)
            elif args.what in ("all", "train"):
                print("a training step at full size: not measured, no GPU\n")
            if args.what == "memory":
                bench_memory(teacher, device)
            if args.what == "scale":
                bench_scale(teacher, device, runs)


if __name__ == "__main__":
    main()
