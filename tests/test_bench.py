import re

import pytest
import torch

import bench
from model import Teacher, load_unet

CPU = torch.device("cpu")


def test_operations_are_counted_alike_with_and_without_computing(plain):
    teacher, unet = Teacher(plain), load_unet(plain)
    real = bench.flops(lambda: unet(torch.randn(1, *teacher.latent_shape), torch.zeros(1), torch.randn(1, 77, 24)))
    assert bench.pass_tflop(plain) == real > 0
    assert bench.flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7 / 1e12


def test_the_table_of_sampling(plain, capsys):
    bench.bench_sample(plain, CPU, 2, 1, False)
    said = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in said.splitlines()}
    for name in ("UNet, one pass", "VAE decoder", "vocoder", "text to waveform"):       # TFLOP, ms "ms" TFLOP/s %, twice, ratio
        row = rows[name]
        assert float(row[-1][:-1]) == pytest.approx(float(row[1]) / float(row[5]), rel=0.2) and "batch 2 of 0.64 s" in said
    assert float(re.search(r"latents ([\d.]+)%", said)[1]) < 50


def test_the_plain_loop_and_ours_run(plain):
    pytest.importorskip("peft")
    assert bench.plain_loop(plain, CPU, 1, 2, 2, 2.0) > 0
    assert bench.ours(plain, 1, "--batch_size", 2, "--lora_rank", 2, "--device", "cpu") > 0


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(["sample", "--size", "tiny", "--device", "cpu", "--runs", "1"])
    said = capsys.readouterr().out
    assert "of sample.py but the model's work" in said and "x real time" in said and not list(tmp_path.iterdir())
