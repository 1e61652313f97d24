"""What extras.bench times is the work that sample.py and train.py do."""
import argparse
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

import train
from extras import bench

CPU = torch.device("cpu")


def flags(**more):
    return argparse.Namespace(**{"compile": False, "checkpointing": False, **more})


def test_the_stages_of_sampling_make_up_the_path(plain):
    """The same clip from the libraries' plain fp32 and from ours; other parts make another."""
    torch.manual_seed(0)
    made = []
    with torch.no_grad():
        for kind in (bench.PLAIN, bench.OURS, bench.FAST):
            stages = bench.sampler(kind, plain, CPU, 2, flags())
            made.append(stages[bench.WHOLE](0))
            torch.testing.assert_close(stages["vocoder"](0), made[-1], rtol=0, atol=1e-4)
            assert [len(f(0)) for f in stages.values()] == [2] * 5
    a, b, fast = made
    assert a.shape == fast.shape == (2, 10240) and not torch.allclose(a, fast, atol=0.1)
    assert (a - b).square().mean() < 0.05 * a.square().mean()


@pytest.mark.parametrize("kind, layout", [
    (bench.PLAIN, torch.contiguous_format), (bench.OURS, torch.channels_last)])
def test_a_step_of_training_is_train_py_s(plain, monkeypatch, capsys, kind, layout):
    """In the paper's setting, of which a teacher's own flags are no part."""
    (flags_of, layouts), adamw = ([], []), train.adamw

    def see(args, weights, lr):
        flags_of.append((args.batch_size, args.lr, args.lora_rank, args.checkpointing))
        layouts.extend(w.is_contiguous(memory_format=layout) for w in weights if w.ndim == 4)
        return adamw(args, weights, lr)

    monkeypatch.setattr(train, "adamw", see)
    steps, numbers = [], train.Run.numbers
    monkeypatch.setattr(train.Run, "numbers", lambda *where: steps.append(0) or numbers(*where))
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: len(steps) ** 2))
    timer = bench.trainer(kind, plain, CPU, 2, flags(checkpointing=True))[bench.STEP]
    assert timer(2) == (4 ** 2 - 2 ** 2) / 2 and capsys.readouterr().out == ""
    assert flags_of == 2 * [(2, 1e-5, 64, kind == bench.OURS)] and all(layouts)
    assert timer(0) == 5 ** 2 - 4 ** 2 and len(steps) == 5


@pytest.mark.parametrize("what, rows", [
    ("sample", ["text", "UNet, one pass", "decoder", "vocoder", "text to waveform"]),
    ("train", ["optimizer step"])])
def test_the_table(what, rows, plain, tmp_path, monkeypatch, capsys):
    """Calls of 4 s in plain fp32, 2 in ours, 1 in fast: two samples of 1 TFLOP, at most 2 a s."""
    seconds = iter([4.0] * len(rows) + [2.0] * len(rows) + [1.0] * len(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(bench, "TINY", plain)
    timer, batches = lambda name: lambda runs: next(seconds) if runs else None, []
    build = lambda *args: batches.append(args[3]) or {name: timer(name) for name in rows}
    monkeypatch.setattr(bench, "sampler" if what == "sample" else "trainer", build)
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 2.0)
    monkeypatch.setattr(bench, "flops", lambda f: 1.0)
    bench.main([what, "--device", "cpu", "--batch_size", "2"])
    said = capsys.readouterr().out
    assert said.startswith(f"cpu, {torch.get_num_threads()} threads") and "peak: 2 TFLOP" in said
    assert re.findall(r"^(.+?)  +([\d.]+) +([\d.]+) +(\d+%) +(\S+)$", said, re.MULTILINE) == [
        *((f"plain fp32, {row}", "4000.0", "0.5", "25%", "-") for row in rows),
        *((f"ours, {row}", "2000.0", "1", "50%", "2.00x") for row in rows),
        *((f"fast, {row}", "1000.0", "2", "100%", "4.00x") for row in rows if what == "sample")]
    assert batches == ([1, 2, 2, 1, 2] if what == "sample" else [1, 2, 2])      # 1: arithmetic
    assert ("a run, 1,280,000 captions, takes 355.6 h" in said) == (what == "train")
    assert not torch.backends.cudnn.allow_tf32 and not list(tmp_path.iterdir())


def test_the_arithmetic_of_a_product_and_of_attention():
    a, q = torch.ones(100, 200), torch.ones(1, 1, 64, 32)
    assert bench.flops(lambda runs: a @ a.T) == pytest.approx(2 * 100 * 200 * 100 / 1e12)
    attention = lambda runs: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert bench.flops(attention) == pytest.approx(2 * 2 * 64 * 64 * 32 / 1e12)
    assert bench.peak(CPU, torch.float32) > 0


def test_time_is_that_of_a_call_and_what_cannot_be_measured_is_a_line(capsys, tmp_path):
    calls = []
    assert 0 < bench.clock(lambda: calls.append(1), 5) < 1 and len(calls) >= 7

    def build(kind, batch):
        raise torch.OutOfMemoryError

    assert bench.bench(bench.OURS, build, 8, 3, {}, {}) == {}
    assert capsys.readouterr().out == "ours: 8 at a time do not fit\n"
    refused("extras.bench", "train", "--size", "full", "--device", "cpu", cwd=tmp_path,
            says=["needs a CUDA GPU"])
