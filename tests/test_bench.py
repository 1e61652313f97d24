import argparse
import re

import pytest
import torch
from conftest import refused

import train
from extras import bench

CPU = torch.device("cpu")


def flags(**more):
    return argparse.Namespace(**{"compile": False, "checkpointing": False, **more})


def test_operations_are_counted_through_every_kind_of_layer():
    def operations(f):
        return bench.flops(f) * 1e12

    q = torch.randn(1, 2, 6, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    convolution = torch.nn.Conv2d(4, 6, 3, padding=1)
    for f, expected in ((lambda: torch.ones(3, 5) @ torch.ones(5, 7), 2 * 3 * 5 * 7),
                        (lambda: convolution(q.view(1, 4, 3, 8)), 2 * 9 * 4 * 6 * 3 * 8),
                        (lambda: attention(q, q, q), 2 * 2 * 2 * 6 * 6 * 8)):
        assert operations(f) == pytest.approx(expected)


def test_time_and_peak_are_those_of_a_call(monkeypatch):
    calls = []
    assert 0 < bench.clock(lambda: calls.append(1), 5) < 1 and len(calls) >= 7
    monkeypatch.setattr(bench, "clock", lambda f, runs: (f(), 4.0)[1])
    assert bench.peak(CPU, torch.float32) == pytest.approx(2 * 2048**3 / 4 / 1e12)


def test_the_stages_of_sampling_make_up_the_path(plain):
    """The same clip from the libraries' plain fp32 and from ours, whose decoder is folded."""
    torch.manual_seed(0)
    made = {}
    with torch.no_grad():
        for kind in (bench.PLAIN, bench.OURS):
            stages = bench.sampler(kind, plain, CPU, 2, flags())
            made[kind] = wav = stages[bench.WHOLE]()
            torch.testing.assert_close(stages["vocoder"](), wav, rtol=0, atol=1e-4)
            count = {name: bench.flops(f) for name, f in stages.items()}
            whole = count.pop(bench.WHOLE)
            assert whole == pytest.approx(sum(count.values())) and min(count.values()) > 0
    a, b = made.values()
    assert a.shape == (2, 10240) and (a - b).square().mean() < 0.05 * a.square().mean()


def test_the_loop_of_training_is_train_py_s(plain, tmp_path, monkeypatch):
    """Its losses in a step are those of train.py in the paper's setting, on the same caption."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog barks\n")
    given = "--max_steps 1 --batch_size 2 --grad_accum 1 --log_every 1 --device cpu"
    train.main(["--teacher", str(plain), "--captions", str(captions), "--out_dir",
                str(tmp_path / "out"), *given.split()])
    line, = train.data.read_rows(tmp_path / "out/metrics.jsonl")
    for kind, more in ((bench.OURS, {}), (bench.OURS, {"checkpointing": True}), (bench.PLAIN, {})):
        found = {"vsd": [], "lora": [], "tv": []}
        for name, values in found.items():
            loss = getattr(train, f"{name}_loss")
            monkeypatch.setattr(bench, f"{name}_loss", lambda *args, loss=loss, values=values: (
                values.append(loss(*args)) or values[-1]))
        torch.manual_seed(0)
        step = bench.trainer(kind, plain, CPU, 2, flags(**more))[bench.STEP]
        step()
        for name, (loss,) in found.items():
            assert loss.mean().item() == pytest.approx(line[name], rel=1e-4)
    forward = bench.flops(lambda: unet_of(plain))
    # 3 for the student, 2 for each guided network, 2 for the LoRA teacher's update; its adapters
    assert 1 < bench.flops(step) / (2 * 9 * forward) < 1.2


def unet_of(plain):
    """One sample through the UNet."""
    system = bench.System(plain, bench.load_unet(plain), {}, None, "fp32", CPU)
    with torch.no_grad():
        return system.eps(system.noise([0], 0), torch.tensor([999]), system.encode_text([""]))


def test_the_rows_of_the_table(monkeypatch, capsys):
    """A call of plain fp32 takes 4 s, of ours 2, for 8 samples that take 0.1 s each at the peak."""
    for kind, seconds, plain, cells in ((bench.PLAIN, 4, {}, ["4000.0", "2", "20%", "-"]),
                                        (bench.OURS, 2, {"a": 4}, ["2000.0", "4", "40%", "2.00x"])):
        monkeypatch.setattr(bench, "clock", lambda f, runs: (f(), seconds)[1])
        build = lambda which, batch: {"a": lambda: done.append((which, batch))}
        done = []
        assert bench.bench(kind, build, 8, 3, {"a": 0.1}, plain) == {"a": seconds}
        row, = capsys.readouterr().out.splitlines()
        assert row[:30].strip() == f"{kind}, a" and row[30:].split() == cells
        assert done == [(kind, 8)]


def test_what_does_not_fit_is_said(capsys):
    def build(kind, batch):
        raise torch.OutOfMemoryError

    assert bench.bench(bench.OURS, build, 8, 3, {}, {}) == {}
    assert capsys.readouterr().out == "ours: 8 at a time do not fit\n"


@pytest.mark.parametrize("what, rows", [
    ("sample", ["text", "UNet, one pass", "decoder", "vocoder", "text to waveform"]),
    ("train", ["optimizer step"])])
def test_the_command_line(what, rows, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(bench, "TINY", plain)
    monkeypatch.setattr(bench, "clock", lambda f, runs: (f(), 0.5 * runs)[1])
    bench.main([what, "--device", "cpu", "--runs", "1", "--batch_size", "2"])
    said = capsys.readouterr().out
    assert re.findall(r"^(.*?)  +500.0", said, re.MULTILINE) == [
        f"{kind}, {row}" for kind in (bench.PLAIN, bench.OURS) for row in rows]
    assert ("20,000 steps of 64 take 88.9 h" in said) == (what == "train")
    assert not torch.backends.cudnn.allow_tf32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, says", [
    (["train", "--size", "full"], "needs a CUDA GPU"),
    (["train", "--runs", "0"], "--runs: 0 must be between 1 and 1e+38"),
    (["sample", "--batch_size", "0"], "--batch_size: 0 must be between 1 and 1e+38"),
    (["scale"], "invalid choice: 'scale'"), ([], "what")])
def test_what_cannot_be_measured_is_refused_in_a_line(given, says, tmp_path):
    refused("extras.bench", *given, "--device", "cpu", cwd=tmp_path, says=[says])
