"""What extras.bench times is the work that sample.py and train.py do."""
import argparse
import re

import pytest
import torch
from conftest import refused
from runs import call, metrics

import train
from extras import bench

CPU = torch.device("cpu")


def flags(**more):
    return argparse.Namespace(**{"compile": False, "checkpointing": False, **more})


def test_the_stages_of_sampling_make_up_the_path(plain):
    """The same clip from the libraries' plain fp32 and from ours, whose decoder is folded."""
    torch.manual_seed(0)
    made = []
    with torch.no_grad():
        for kind in (bench.PLAIN, bench.OURS):
            stages = bench.sampler(kind, plain, CPU, 2, flags())
            made.append(stages[bench.WHOLE]())
            torch.testing.assert_close(stages["vocoder"](), made[-1], rtol=0, atol=1e-4)
            assert [len(f()) for f in stages.values()] == [2] * 5
    a, b = made
    assert a.shape == (2, 10240) and (a - b).square().mean() < 0.05 * a.square().mean()


def test_the_loop_of_training_is_train_py_s(plain, tmp_path, monkeypatch):
    """Its losses in a step are those of train.py without flags, on the same caption."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog barks\n")
    given = "--max_steps 1 --batch_size 2 --grad_accum 1 --log_every 1 --device cpu"
    call(train.main, "--teacher", plain, "--captions", captions, "--out_dir", tmp_path,
         *given.split())
    line, = metrics(tmp_path)
    for kind, more in ((bench.OURS, {}), (bench.OURS, {"checkpointing": True}), (bench.PLAIN, {})):
        found = {"vsd": [], "lora": [], "tv": []}
        for name, values in found.items():
            loss = getattr(train, f"{name}_loss")
            monkeypatch.setattr(bench, f"{name}_loss", lambda *args, loss=loss, values=values: (
                values.append(loss(*args)) or values[-1]))
        torch.manual_seed(0)
        step = bench.trainer(kind, plain, CPU, 2, flags(**more))[bench.STEP]
        step()
        step()
        for name, (first, second) in found.items():
            assert first.mean().item() == pytest.approx(line[name], rel=1e-4)
            assert not torch.equal(first, second)           # both networks have learned


@pytest.mark.parametrize("what, rows", [
    ("sample", ["text", "UNet, one pass", "decoder", "vocoder", "text to waveform"]),
    ("train", ["optimizer step"])])
def test_the_table(what, rows, plain, monkeypatch, capsys):
    """Plain fp32 takes 4 s a call, ours 2, for two samples."""
    seconds = iter([2.0, *[4.0] * len(rows), *[2.0] * len(rows)])       # first of the peak
    monkeypatch.setattr(bench, "TINY", plain)
    monkeypatch.setattr(bench, "clock", lambda f, runs: (f(), next(seconds))[1])
    call(bench.main, what, "--device", "cpu", "--batch_size", 2)
    said = capsys.readouterr().out
    assert re.findall(r"^(.+?)  +([\d.]+) +([\d.]+) +\d+% +(\S+)$", said, re.MULTILINE) == [
        *((f"plain fp32, {row}", "4000.0", "0.5", "-") for row in rows),
        *((f"ours, {row}", "2000.0", "1", "2.00x") for row in rows)]
    assert ("a run, 1,280,000 captions, takes 355.6 h" in said) == (what == "train")


def test_the_arithmetic_of_a_product_and_of_attention():
    a, q = torch.ones(100, 200), torch.ones(1, 1, 64, 32)
    assert bench.flops(lambda: a @ a.T) == pytest.approx(2 * 100 * 200 * 100 / 1e12)
    attention = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert bench.flops(attention) == pytest.approx(2 * 2 * 64 * 64 * 32 / 1e12)
    assert bench.peak(CPU, torch.float32) > 0 < bench.clock(lambda: a, 5) < 1


def test_what_cannot_be_measured_is_a_line(capsys, tmp_path):
    def build(kind, batch):
        raise torch.OutOfMemoryError

    assert bench.bench(bench.OURS, build, 8, 3, {}, {}) == {}
    assert capsys.readouterr().out == "ours: 8 at a time do not fit\n"
    refused("extras.bench", "train", "--size", "full", "--device", "cpu", cwd=tmp_path,
            says=["needs a CUDA GPU"])
