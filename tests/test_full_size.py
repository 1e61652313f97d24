"""Auffusion's true size with random weights: a clip, a step of each program but consistency.

    python -m pytest --slow -s tests/test_full_size.py      # 20 minutes, 24 GB of memory and disk
"""
import os
import resource
import shutil
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
    run_measured("recipes.decoder", "--clips", 1, "--batch_size", 1, "--max_steps", 1, "--device",
                 "cpu", cwd=cwd)
    run_measured("sample.py", "--decoder", "fast", "--prompt", "a dog", "--overwrite", "--device",
                 "cpu", cwd=cwd)
    for recipe in (["recipes.energy"], ["recipes.arc", "--d_frozen", 1, "--contrast", 0]):
        out = cwd / recipe[0]
        shutil.rmtree(cwd / "out", ignore_errors=True)          # 17 GB
        run_measured(*recipe, "--teacher", teacher, "--captions", captions, "--clips", 1,
                     "--clip_steps", 1, "--max_steps", 1, "--batch_size", 1, "--grad_accum", 1,
                     "--precision", "bf16", "--device", "cpu", "--out_dir", out, cwd=cwd)
        assert parameters(out / "student", "") == parameters(teacher)
        shutil.rmtree(out)
    return soundfile.info(cwd / "samples/a-dog_seed0_0.wav").frames, parameters(teacher)


@pytest.mark.slow
def test_a_clip_and_a_step_at_auffusions_size(tmp_path, captions):
    teacher = write_teacher(tmp_path / "auffusion", **FULL)
    assert one_step_and_one_clip(teacher, captions, tmp_path) == (163840, 859_520_964)
