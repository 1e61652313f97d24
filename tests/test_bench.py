import functools
import itertools
import re

import pytest
import torch
from conftest import refused

import train
from extras import bench

CPU = torch.device("cpu")


def test_operations_are_counted_through_every_kind_of_layer():
    def tflop(f):
        return bench.flops(f)[0] * 1e12

    q = torch.randn(1, 2, 6, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert tflop(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == pytest.approx(2 * 3 * 5 * 7)
    convolution = torch.nn.Conv2d(4, 6, 3, padding=1)
    assert tflop(lambda: convolution(q.view(1, 4, 3, 8))) == pytest.approx(2 * 9 * 4 * 6 * 3 * 8)
    assert tflop(lambda: attention(q, q, q)) == pytest.approx(2 * 2 * 2 * 6 * 6 * 8)


def test_the_clock_gives_the_median_and_the_last_result(monkeypatch):
    ticks = iter((0, 1, 10, 15, 20, 22))                                # of 1, 5 and 2 seconds
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    assert bench.clock(iter("abc").__next__, CPU, 3) == (2, "c")


# ---- the tables of sampling ----------------------------------------------------------------------


def tables(said):
    """[{row: cells}] of the printed tables: plain, ours, with a small decoder."""
    parts = re.split(r"^.*, batch \d.*\n", said, flags=re.MULTILINE)[1:]
    return [{line[:24].strip(): line[24:].split() for line in part.splitlines()} for part in parts]


@pytest.fixture
def known_times(monkeypatch):
    """The n-th thing that is timed takes n seconds; the peaks are 1 and 2 MFLOP/s; half is bf16."""
    count, peaks = itertools.count(1), {torch.float32: 1e-6, torch.bfloat16: 2e-6}
    monkeypatch.setattr(bench, "clock", lambda f, device, runs: (next(count), f()))
    monkeypatch.setattr(bench, "peak", lambda device, dtype: peaks[dtype])
    monkeypatch.setattr(bench.model, "sampling_dtype", lambda device: torch.bfloat16)


def test_the_tables_of_sampling(plain, known_times, capsys):
    bench.bench_sample(plain, CPU, 2, 1, False)
    said = capsys.readouterr().out
    for k, (rows, peak) in enumerate(zip(tables(said), (1e-6, 2e-6, 2e-6), strict=True)):
        names, times = [*rows][1:6], [4 * k + n for n in (1, 2, 3, 4)]
        times.append(sum(times))
        assert names == [bench.TEXT, bench.UNET, bench.VAE, bench.VOCODER, bench.WHOLE]
        for name, t, first in zip(names, times, (1, 2, 3, 4, 10)):
            tflop, ms, share, faster = rows[name]
            assert ms == f"{1e3 * t:.1f}" and faster == f"{first / t:.2f}x"
            assert float(share[:-1]) == pytest.approx(100 * float(tflop) / t / peak, rel=0.02,
                                                      abs=0.6)
        parts = sum(float(rows[name][0]) for name in names[:4])
        assert float(rows[bench.WHOLE][0]) == pytest.approx(parts, rel=0.02)
        whole, passes = times[-1], (200 * times[1] + times[0] + times[2] + times[3])
        assert f"real-time factor {whole / (2 * 0.64):.3f}; " in said
        assert f"computed: {passes / whole:.0f} x the time" in said
    one, two = (float(tables(said)[n][bench.VAE][0]) for n in (0, 1))
    assert one > two                                # folded, its upsampling takes 16 taps for 36
    batch_of_one = bench.walk(bench.load(bench.PLAIN, plain, CPU), 1, bench.flops)[0]
    assert one == pytest.approx(2 * batch_of_one[bench.VAE], rel=0.02)
    assert "ours, batch 2 of 0.64 s; peak: 0.00 TFLOP/s in torch.bfloat16" in said
    found = re.search(r"latents (\S+)% .* log-mel (\S+) nepers, waveform (\S+) dB", said)
    latents, mel, decibels = map(float, found.groups())
    assert 0 < latents < 50 and 0 < mel < 1 and 10 < decibels < 80


def test_fp32_beside_fp32_has_no_error(plain, monkeypatch, capsys):
    monkeypatch.setattr(bench.model, "sampling_dtype", lambda device: torch.float32)
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1.0)
    bench.bench_sample(plain, CPU, 1, 1, False)
    decibels, = re.findall(r"waveform (\S+) dB", capsys.readouterr().out)
    assert float(decibels) > 80                     # the folded decoder adds up in another order


# ---- training ------------------------------------------------------------------------------------


def test_the_loop_of_training_is_train_py_s(plain, tmp_path, monkeypatch):
    """Its losses in a step are those of train.py in the paper's setting, on the same caption."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog barks\n")
    flags = "--preset paper --max_steps 1 --batch_size 2 --grad_accum 2 --log_every 1 --device cpu"
    train.main(["--teacher", str(plain), "--captions", str(captions), "--out_dir",
                str(tmp_path / "out"), *flags.split()])
    line, = train.data.read_rows(tmp_path / "out/metrics.jsonl")
    found = {"vsd": [], "lora": [], "tv": []}
    for name, values in found.items():
        loss = getattr(bench, f"{name}_loss")
        monkeypatch.setattr(bench, f"{name}_loss", lambda *args, loss=loss, values=values: (
            values.append(loss(*args)) or values[-1]))
    torch.manual_seed(0)
    bench.trainer(plain, CPU, 2, 2)()
    for name, values in found.items():
        assert torch.cat(values).mean().item() == pytest.approx(line[name], rel=1e-4)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_the_rate_of_training_is_of_whole_steps(plain, monkeypatch, capsys, checkpointing):
    """A step of 4 x 2 samples takes a second, behind two of warm-up; the peak is 1 MFLOP/s."""
    timed = []
    monkeypatch.setattr(bench, "clock", lambda f, device, runs: timed.append(runs) or (1.0, f()))
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1e-6)
    tflop = bench.walk(bench.load(bench.PLAIN, plain, CPU), 1, bench.flops)[0][bench.UNET]
    bench.bench_train(plain, CPU, [4], 2, 3, False, checkpointing)
    said, _, line = capsys.readouterr().out.splitlines()
    assert timed == [2, 3] and line.startswith("4 x 2") and ("recomputing" in said) == checkpointing
    rate, seconds, share, hours, _ = line[24:].split()
    assert (rate, seconds, hours) == ("8", "1", f"{20000 / 3600:.1f}")
    assert float(share[:-1]) == pytest.approx(100 * 8 * 9 * tflop / 1e-6, rel=0.01)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(bench, "peak", functools.cache(bench.peak))     # it takes seconds
    bench.main(["--size", "tiny", "--device", "cpu", "--runs", "1", "--batch_size", "1"])
    said = capsys.readouterr().out
    assert "real-time factor" in said and "a second" in said
    assert not torch.backends.cudnn.allow_tf32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, says", [
    (["memory"], "needs a CUDA GPU"),
    (["train", "--size", "full"], "needs a CUDA GPU"),
    (["--runs", "0"], "--runs: 0 must be at least 1"),
    (["--batch_size", "0"], "--batch_size: 0 must be at least 1"),
    (["--grad_accum", "two"], "--grad_accum: invalid int value"),
    (["scale"], "invalid choice: 'scale'"),
])
def test_what_cannot_be_measured_is_refused_in_a_line(flags, says, tmp_path):
    refused("extras.bench", *flags, "--device", "cpu", cwd=tmp_path, says=[says])
