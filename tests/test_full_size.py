"""Auffusion's true size with random weights: a clip, a step of each program but consistency.

    python -m pytest --slow -s tests/test_full_size.py      # 20 minutes, 24 GB of memory and disk
"""
import functools
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


@pytest.mark.slow
def test_a_clip_and_a_step_at_auffusions_size(tmp_path, captions):
    """Sample the teacher's UNet in one step, then distil for a step."""
    teacher = write_teacher(tmp_path / "auffusion", **FULL)
    measured = functools.partial(run_measured, cwd=tmp_path)
    of_teacher = ["--teacher", teacher, "--captions", captions]
    a_step = ["--max_steps", 1, "--batch_size", 1, "--device", "cpu"]
    half = ["--grad_accum", 1, "--precision", "bf16"]
    measured("sample.py", "--student", teacher, "--prompt", "a dog", "--device", "cpu")
    measured("train.py", *of_teacher, *a_step, *half)
    assert parameters(tmp_path / "out/student", "") == parameters(teacher) == 859_520_964
    measured("recipes.decoder", "--clips", 1, *a_step)
    measured("sample.py", "--decoder", "fast", "--prompt", "a dog", "--overwrite", "--device",
             "cpu")
    for recipe in (["recipes.energy"], ["recipes.arc", "--d_frozen", 1, "--contrast", 0]):
        out = tmp_path / recipe[0]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)     # 17 GB
        measured(*recipe, *of_teacher, "--clips", 1, "--clip_steps", 1, *a_step, *half,
                 "--out_dir", out)
        assert parameters(out / "student", "") == parameters(teacher)
        shutil.rmtree(out)
    assert soundfile.info(tmp_path / "samples/a-dog_seed0_0.wav").frames == 163840
