"""Which device to run on, and in which precision to sample."""
import os

import torch

from extras.cli import InputError


def has_bf16(device):
    """Whether a device computes in bf16 itself: recent GPUs, and CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()          # older torch: unknown
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def sampling_dtype(device):
    """What to sample in: fp16 on a GPU, bf16 on a CPU with instructions for it, else fp32.

    Eq. 1 multiplies an error of eps by 14.6. Tiny student, mean error of the log-mel: fp16 0.006,
    bf16 0.049 (LOG.md, 2026-11-21).
    """
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if has_bf16(device) else torch.float32


def pick_device(name=None, exact=False):
    """The device called `name`, or the first there is of cuda, mps and cpu.

    Each process of torchrun gets a GPU of its own. exact: fp32 is fp32, not TF32, on it.
    """
    if not name:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if exact:       # cuDNN's convolutions are TF32 by default: 10 bits of mantissa for 23
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not usable here ({str(e).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
