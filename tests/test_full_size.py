"""Auffusion's true size with random weights: one optimizer step and one clip. About 10 minutes, 20 GB of memory and disk.

    python -m pytest --slow -s tests/test_full_size.py
"""
import resource
import time

import pytest
import soundfile
import torch
from conftest import run

from bench import FULL, write_teacher
from model import load_unet


@pytest.mark.slow
def test_one_step_and_one_clip(tmp_path, captions):
    teacher = write_teacher(tmp_path / "auffusion", **FULL)
    assert sum(p.numel() for p in load_unet(teacher).parameters()) == 859_520_964
    def measured(*command, **kw):
        started = time.time()
        code, output = run(*command, cwd=tmp_path, threads=torch.get_num_threads(), **kw)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
        print(f"\n{command[0]}: {time.time() - started:.0f} s in all, largest process so far {peak:.1f} GiB\n{output}")
        assert code == 0 and peak < 24
    measured("sample.py", "--student", teacher, "--prompt", "a dog")
    assert soundfile.info(tmp_path / "samples/a-dog_seed0_0.wav").frames == 163840
    measured("train.py", "--teacher", teacher, "--captions", captions, "--max_steps", 1, "--batch_size", 1, "--grad_accum", 1,
             "--precision", "bf16", "--device", "cpu")
    assert sum(p.numel() for p in load_unet(tmp_path / "out/student", "").parameters()) == 859_520_964
