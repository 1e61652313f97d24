"""Auffusion's true size with random weights: an optimizer step and a clip.

    python -m pytest --slow -s tests/test_full_size.py      # 10 minutes, 20 GB of memory and disk
"""
import os
import resource
import time

import pytest
import soundfile
from conftest import run

from extras.random_teacher import FULL, write_teacher
from model import load_unet


def parameters(*unet):
    return sum(p.numel() for p in load_unet(*unet).parameters())


def run_measured(script, *flags, cwd):
    """Run a command on all cores, print what it took, and check that it took under 24 GiB."""
    started = time.time()
    code, output = run(script, *flags, cwd=cwd, threads=os.cpu_count())
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{script}: {time.time() - started:.0f} s in all, the largest process so far {gib:.1f} "
          f"GiB\n{output}")
    assert code == 0 and gib < 24


def one_step_and_one_clip(teacher, captions, cwd):
    """Sample the teacher's UNet in one step, then distil for a step; the number of parameters."""
    run_measured("sample.py", "--student", teacher, "--prompt", "a dog", "--device", "cpu", cwd=cwd)
    run_measured("train.py", "--teacher", teacher, "--captions", captions, "--max_steps", 1,
                 "--batch_size", 1, "--grad_accum", 1, "--precision", "bf16", "--device", "cpu",
                 cwd=cwd)
    assert parameters(cwd / "out/student", "") == parameters(teacher)
    return soundfile.info(cwd / "samples/a-dog_seed0_0.wav").frames, parameters(teacher)


@pytest.mark.slow
def test_a_clip_and_a_step_at_auffusions_size(tmp_path, captions):
    teacher = write_teacher(tmp_path / "auffusion", **FULL)
    assert one_step_and_one_clip(teacher, captions, tmp_path) == (163840, 859_520_964)
