import itertools
import json
import math
import re

import pytest
import torch
from conftest import refused

import bench

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


# ---- errors of a waveform ----------------------------------------------------------------------


def test_a_waveform_has_no_error_against_itself():
    wav = torch.randn(2, 16000)
    assert bench.waveform_error(wav, wav) == (math.inf, 0, 0)


def test_noise_of_a_tenth_of_the_amplitude_is_20_db_of_signal_to_noise():
    wav, noise = torch.randn(2, 16000)[:, None]
    noise *= 0.1 * wav.norm() / noise.norm()
    assert bench.waveform_error(wav, wav + noise)[0] == pytest.approx(20, abs=1e-3)


def test_a_waveform_louder_by_a_factor_is_off_by_its_logarithm_in_the_log_mel():
    wav = torch.randn(2, 16000)
    decibels, everywhere, heard = bench.waveform_error(wav, 1.5 * wav)
    assert decibels == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert everywhere == pytest.approx(math.log(1.5), rel=1e-3)
    assert heard == pytest.approx(math.log(1.5), rel=1e-3)


@pytest.mark.parametrize("below, counts", [(60, True), (100, False)])
def test_errors_below_80_db_under_the_peak_count_only_over_everything(below, counts):
    wav = torch.randn(1, 32000)
    wav[:, 16000:] *= 10 ** (-below / 20)
    other = wav.clone()
    other[:, 17000:] *= 2                       # behind the window of the last loud frame
    _, everywhere, heard = bench.waveform_error(1000 * wav, 1000 * other)
    assert everywhere > 0.3
    assert (heard > 0.3) == counts and (heard == 0) == (not counts)


# ---- the table of sampling ---------------------------------------------------------------------


@pytest.fixture
def known_times(monkeypatch):
    """The n-th thing that is timed takes n seconds; peaks of 1 and 2 MFLOP/s; half is bf16."""
    peaks = {torch.float32: 1e-6, torch.bfloat16: 2e-6}
    count = itertools.count(1)
    monkeypatch.setattr(bench, "clock", lambda f, device, runs: (next(count), f()))
    monkeypatch.setattr(bench, "peak", lambda device, dtype: peaks[dtype])
    monkeypatch.setattr(bench, "sampling_dtype", lambda device: torch.bfloat16)


def table(said):
    """{row: cells} of a printed table."""
    return {line[:24].strip(): line[24:].split() for line in said.splitlines()}


def test_the_table_of_sampling(plain, known_times, capsys):
    bench.bench_sample(plain, CPU, 2, 1, False)
    said = capsys.readouterr().out
    rows = table(said)
    # the plain script's stages take 1 to 4 s and its path 5, its vocoder in bf16 6, ours 7 to 11
    times = {
        "text": (1, 7, 1e-6), "UNet, one pass": (2, 8, 2e-6), "VAE decoder": (3, 9, 2e-6),
        "vocoder": (4, 10, 1e-6), "vocoder, torch.bfloat16": (4, 6, 2e-6)}
    best = 0
    for name, (a, b, peak) in times.items():
        tflop, *cells = rows[name]
        tflop = float(tflop)
        best += tflop / peak * (name != "vocoder, torch.bfloat16")
        assert cells[0] == f"{1e3 * a:.1f}" and cells[3] == f"{1e3 * b:.1f}"
        assert float(cells[1]) == pytest.approx(tflop / a, rel=0.02)
        assert float(cells[4]) == pytest.approx(tflop / b, rel=0.02)
        assert float(cells[2][:-1]) == pytest.approx(100 * tflop / 1e-6 / a, rel=0.02, abs=0.6)
        assert float(cells[5][:-1]) == pytest.approx(100 * tflop / peak / b, rel=0.02, abs=0.6)
        assert cells[6] == f"{a / b:.2f}x"
    whole = rows["text to waveform"]
    assert float(whole[0]) == pytest.approx(sum(float(rows[name][0]) for name in list(times)[:4]),
                                            rel=0.02)
    assert float(whole[6][:-1]) == pytest.approx(100 * best / 11, rel=0.02, abs=0.6)
    assert whole[-1] == "0.45x"
    # the path once more with the small decoder takes 12 to 16 s
    small, path = rows["small decoder"], rows["waveform, small decoder"]
    assert (small[4], small[-1]) == ("14000.0", f"{3 / 14:.2f}x")
    assert (path[4], path[-1]) == ("16000.0", f"{5 / 16:.2f}x")
    saved = float(whole[0]) - float(path[0])
    assert saved == pytest.approx(float(rows["VAE decoder"][0]) - float(small[0]), rel=0.05)
    assert f"{16 / (2 * 0.64):.3f} with the small decoder" in said
    audio, passes = 2 * 0.64, (200 * 8 + 9 + 10, 200 * 2 + 3 + 4)
    assert f"{5 / audio:.3f} plain, {11 / audio:.3f} ours" in said and "batch 2 of 0.64 s" in said
    assert f"{passes[0] / 11:.0f} x our time, in plain fp32 {passes[1] / 11:.0f} x" in said


def test_a_batch_does_its_number_of_times_the_operations(plain, known_times, capsys):
    bench.bench_sample(plain, CPU, 1, 1, False)
    one = table(capsys.readouterr().out)
    bench.bench_sample(plain, CPU, 4, 1, False)
    four = table(capsys.readouterr().out)
    for name in ("UNet, one pass", "text to waveform"):
        assert float(four[name][0]) == pytest.approx(4 * float(one[name][0]), rel=0.02)


def test_the_errors_that_are_printed(plain, known_times, capsys):
    bench.bench_sample(plain, CPU, 1, 1, False)
    ours, alone = (line for line in capsys.readouterr().out.splitlines() if "error of" in line)
    number = r"(\d+\.\d+)"
    found = re.search(rf"latents {number}% .* log-mel {number} nepers, waveform {number} dB", ours)
    latents, mel, decibels = map(float, found.groups())
    assert 0 < latents < 50 and 0 < mel < 1 and 10 < decibels < 80
    assert "in torch.bfloat16" in alone and alone.endswith("runs it in torch.float32")
    # bf16 has 8 bits of mantissa, which errors of a dozen layers do not use up
    assert 20 < float(re.search(rf"{number} dB", alone)[1]) < 70


def test_fp32_beside_fp32_has_one_vocoder_and_no_error(plain, monkeypatch, capsys):
    monkeypatch.setattr(bench, "sampling_dtype", lambda device: torch.float32)
    bench.bench_sample(plain, CPU, 1, 1, False)
    said = capsys.readouterr().out
    assert "vocoder alone" not in said and "vocoder, " not in said
    decibels, = re.findall(r"waveform (\S+) dB", said)
    assert float(decibels) > 80                     # the folded decoder adds up in another order


# ---- training ----------------------------------------------------------------------------------


def test_the_plain_loop_and_ours_run(plain):
    pytest.importorskip("peft")
    assert bench.plain_loop(plain, CPU, 1, 2, 2, 2.0) > 0
    assert bench.ours(plain, 1, "--batch_size", 2, "--lora_rank", 2, "--device", "cpu") > 0


def test_the_rate_of_training_is_the_median_of_the_steps_before_anything_is_saved(monkeypatch):
    def main(argv):
        flags = dict(zip(argv[::2], argv[1::2]))
        assert flags["--max_steps"] == flags["--save_every"] == "5" and flags["--log_every"] == "1"
        with open(f"{flags['--out_dir']}/metrics.jsonl", "w") as f:
            f.writelines(json.dumps({"samples_per_s": n}) + "\n" for n in (1, 2, 30, 50, 40))
        bench.train.replace_file("checkpoint.pt", lambda path: None)
        raise AssertionError("it saves")

    saved = bench.train.replace_file
    monkeypatch.setattr(bench.train, "main", main)
    assert bench.ours("folder", 3) == 40
    assert bench.train.replace_file is saved


def test_the_table_of_training(plain, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1e-3)
    monkeypatch.setattr(bench, "plain_loop", lambda *args: 2.0)
    monkeypatch.setattr(bench, "ours", lambda *args: 4.0)
    bench.bench_train(plain, CPU, 1, 16, 4)
    said = capsys.readouterr().out
    tflop = float(re.search(r"(\S+) TFLOP a sample", said)[1])
    rows = table(said)
    for name, rate, faster in (("plain loop, PEFT", 2, "1.00x"), ("train.py", 4, "2.00x")):
        samples, step, share, *rest = rows[name]
        assert float(samples) == rate and float(step) == 64 / rate and rest == ["-", faster]
        assert float(share[:-1]) == pytest.approx(100 * rate * tflop / 1e-3, rel=0.02, abs=0.6)
    assert f"{20000 * 16 / 3600:.1f} h; the paper: 40 h" in said


# ---- the command -------------------------------------------------------------------------------


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    bench.main(["sample", "--size", "tiny", "--device", "cpu", "--runs", "1"])
    said = capsys.readouterr().out
    assert "x real time" in said and "vocoder alone" not in said        # Griffin-Lim stays in fp32
    assert not torch.backends.cudnn.allow_tf32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, says", [
    (["memory"], "needs a CUDA GPU"),
    (["train", "--size", "full"], "needs a CUDA GPU"),
    (["--runs", "0"], "--runs: 0 must be at least 1"),
    (["--batch_size", "4", "0"], "--batch_size: 0 must be at least 1"),
    (["--grad_accum", "two"], "--grad_accum: invalid int value"),
    (["scale"], "invalid choice: 'scale'"),
])
def test_what_cannot_be_measured_is_refused_in_a_line(flags, says, tmp_path):
    refused("bench.py", *flags, "--device", "cpu", cwd=tmp_path, says=[says])
