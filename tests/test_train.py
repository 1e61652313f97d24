import functools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from conftest import ROOT, refused, run
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train
from data import InputError
from model import load_unet

SMALL = ["--max_steps", 4, "--batch_size", 4, "--grad_accum", 1, "--lr", 1e-3, "--guidance", 2, "--lora_rank", 4, "--log_every", 1,
         "--save_every", 2, "--device", "cpu"]


def go(plain, captions, out, *flags):
    """Train in this process; the last value of a flag given twice counts."""
    train.main([str(f) for f in ("--teacher", plain, "--captions", captions, "--out_dir", out, *SMALL, *flags)])
    return result(out)


def result(out):
    """Everything a run leaves that must be reproducible: student, LoRA and the whole checkpoint."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    return {"student": load_file(out / "student/diffusion_pytorch_model.safetensors"),
            "lora": load_file(out / "lora/adapter_model.safetensors"),
            **{k: checkpoint[k] for k in ("step", "ema", "opt_student", "opt_lora")}}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))


def flags_of(name, plain, captions, tmp_path):
    return ["--teacher", plain, "--captions", captions, "--out_dir", tmp_path / name, *SMALL]


def test_a_run_and_what_it_leaves(plain, captions, tmp_path, capsys):
    torch.manual_seed(123)                                          # of no consequence
    done = go(plain, captions, tmp_path / "a", "--seed", 5)
    assert "23 captions used" in capsys.readouterr().out
    before, student = load_unet(plain), UNet2DConditionModel.from_pretrained(tmp_path / "a/student")
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), student.parameters())]
    assert all(moved)
    peft.PeftModel.from_pretrained(before, tmp_path / "a/lora")
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["lora"] > 0 and len(lines[0]["vsd_by_t"]) == 4 and all(math.isfinite(line["grad_lora"]) for line in lines)
    about = json.loads((tmp_path / "a/student/swiftaudio.json").read_text())
    assert about["step"] == 4 and about["timestep"] == 999 and about["parameterization"] == "eps" and about["seconds"] == 0.64
    assert about["teacher"] == str(plain.resolve()) and about["flags"]["lora_rank"] == 4
    assert not list((tmp_path / "a").rglob("*.tmp"))
    same(go(plain, captions, tmp_path / "b", "--seed", 5), done)   # the seed decides all
    other = go(plain, captions, tmp_path / "c", "--seed", 6)
    assert not torch.equal(other["student"]["conv_in.weight"], done["student"]["conv_in.weight"])


def test_accumulation_equals_the_large_batch(plain, captions, tmp_path):
    """4 x 4 == 16 x 1, for both optimizers."""
    large = go(plain, captions, tmp_path / "large", "--batch_size", 16, "--lr", 1e-4)
    small = go(plain, captions, tmp_path / "small", "--batch_size", 4, "--grad_accum", 4, "--lr", 1e-4)
    same_up_to_rounding(large, small, tmp_path / "large", tmp_path / "small")


def same_up_to_rounding(a, b, out_a, out_b):
    # Adam's first steps are +-lr whatever the gradient's size, so that a rounded zero moves: compare moments and curves.
    for opt in ("opt_student", "opt_lora"):
        for i, state in a[opt]["state"].items():
            scale = state["exp_avg"].abs().max()
            assert (state["exp_avg"] - b[opt]["state"][i]["exp_avg"]).abs().max() <= 2e-3 * scale + 1e-9
    for x, y in zip(metrics(out_a), metrics(out_b)):
        for name in ("vsd", "tv", "lora", "x0_std", "grad_student", "grad_lora"):
            assert x[name] == pytest.approx(y[name], rel=2e-4), name
        assert x["vsd_by_t"] == pytest.approx(y["vsd_by_t"], rel=1e-3)


def test_two_processes_equal_one(plain, captions, tmp_path):
    code, output = run("train.py", *flags_of("two", plain, captions, tmp_path), "--grad_accum", 2, "--lr", 1e-4, cwd=tmp_path, ranks=2)
    assert code == 0, output
    one = go(plain, captions, tmp_path / "one", "--batch_size", 16, "--lr", 1e-4)
    same_up_to_rounding(one, result(tmp_path / "two"), tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("flags", [(), ("--ema", 0.9, "--warmup", 3, "--lora_targets", "all", "--grad_accum", 2)])
def test_2n_steps_equal_n_resume_n(plain, captions, tmp_path, flags):
    straight = go(plain, captions, tmp_path / "straight", *flags)
    go(plain, captions, tmp_path / "parts", "--max_steps", 2, *flags)
    same(go(plain, captions, tmp_path / "parts", *flags), straight)
    keep = lambda out: [{k: v for k, v in line.items() if k != "samples_per_s"} for line in metrics(out)]
    assert keep(tmp_path / "parts") == keep(tmp_path / "straight")


def test_kill_9_then_the_same_command(plain, captions, tmp_path):
    flags = ["--max_steps", 40, "--save_every", 3, "--decay", "--ema", 0.9]
    command = [sys.executable, ROOT / "train.py", *flags_of("killed", plain, captions, tmp_path), *flags]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = tmp_path / "killed/metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < 8:    # between two saves
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"]
    assert step % 3 == 0 and step >= 6 - 3 and step < 40
    with open(path, "a") as f:
        f.write('{"step": 12, "vs')                                 # the line that was being written
    same(go(plain, captions, tmp_path / "killed", *flags), go(plain, captions, tmp_path / "straight", *flags))
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 41))


def test_a_finished_run_stays_as_it_is(plain, captions, tmp_path):
    done = go(plain, captions, tmp_path / "a")
    same(go(plain, captions, tmp_path / "a"), done)
    assert len(metrics(tmp_path / "a")) == 4


def test_activation_checkpointing_changes_nothing(plain, captions, tmp_path):
    same(go(plain, captions, tmp_path / "a", "--checkpointing", "--lora_targets", "all"),
         go(plain, captions, tmp_path / "b", "--lora_targets", "all"), rtol=1e-4, atol=1e-5)


def test_ema_is_what_is_saved(plain, captions, tmp_path):
    go(plain, captions, tmp_path / "a", "--ema", 0.999)
    checkpoint = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    saved = load_file(tmp_path / "a/student/diffusion_pytorch_model.safetensors")
    names = [n for n, _ in load_unet(plain).named_parameters()]
    same(saved, dict(zip(names, checkpoint["ema"])))
    assert not torch.equal(saved["conv_in.weight"], checkpoint["student"]["conv_in.weight"])


@pytest.mark.parametrize("flags", [("--precision", "bf16"), ("--parameterization", "direct"), ("--tv", "l2"), ("--tv", "none"), ("--weighting", "dmd"), ("--lora_weighting", "v"),
                                   ("--lora_guidance", 1, "--lora_drop", 0)])
def test_variants_run(plain, captions, tmp_path, flags):
    go(plain, captions, tmp_path, "--max_steps", 1, *flags)
    assert all(math.isfinite(v) for v in metrics(tmp_path)[0].values() if not isinstance(v, list))


def test_the_adapter_layout_trains(adapter, captions, tmp_path):
    assert go(adapter, captions, tmp_path, "--max_steps", 1)["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_changes_nothing(backend, plain, captions, tmp_path, monkeypatch):
    """The eager backends trace as inductor does (adapters that go on and off, gradients that come and go) without its minutes of code generation."""
    expected = go(plain, captions, tmp_path / "b", "--max_steps", 2, "--lr", 1e-5)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    same(go(plain, captions, tmp_path / "a", "--compile", "--max_steps", 2, "--lr", 1e-5), expected, rtol=1e-3, atol=1e-3)


def test_a_teacher_brings_defaults_and_flags_win(broken, captions, tmp_path):
    (broken / "swiftaudio.json").write_text(json.dumps({"seconds": 0.64, "train": {"lr": 3e-4, "guidance": 3.0, "captions": "c.txt"}}))
    args = train.parse_args(["--teacher", str(broken), "--guidance", "5"])
    assert (args.lr, args.guidance, args.lora_guidance, args.captions) == (3e-4, 5, 5, str(broken / "c.txt"))
    paper = train.parse_args(["--teacher", str(broken), "--preset", "paper"])
    assert paper.captions == str(broken / "c.txt")
    assert (paper.lr, paper.guidance, paper.max_steps, paper.batch_size, paper.grad_accum, paper.lora_lr, paper.lora_rank, paper.lora_alpha, paper.tv_weight,
            paper.tv, paper.lora_targets) == (1e-5, 7.5, 20000, 16, 4, 1e-3, 64, 128, 0.05, "l1", "qv")


# ---- what can go wrong ----

def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(plain, captions, tmp_path):
    good = go(plain, captions, tmp_path, "--max_steps", 2)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["student"]["conv_out.bias"].fill_(math.nan)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="step 2: the loss or a gradient is not finite"):
        go(plain, captions, tmp_path, "--max_steps", 8, "--log_every", 3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2 and len(metrics(tmp_path)) == 2
    (tmp_path / "checkpoint.pt").write_bytes(saved)
    same(result(tmp_path), good)


@pytest.mark.parametrize("flags, says", [
    (("--batch_size", 0), "batch_size"), (("--max_captions", 0), "max_captions"), (("--lr", -1), "lr"), (("--ema", 1), "ema"),
    (("--t_min", 500, "--t_max", 400), "t_min"), (("--eval_clips", 5), "tiny"), (("--captions", "no.csv"), "no.csv"),
    (("--caption_column", "words"), "words"), (("--device", "quantum"), "quantum")])
def test_impossible_flags(plain, captions, tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        go(plain, captions, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_mixed_in(plain, captions, tmp_path):
    done = go(plain, captions, tmp_path / "a")
    for flags, says in ((("--lora_rank", 8), "lora_rank 4"), (("--seed", 1), "seed 0"), (("--max_captions", 3), "other captions")):
        with pytest.raises(InputError, match=says):
            go(plain, captions, tmp_path / "a", *flags)
    same(result(tmp_path / "a"), done)
    (tmp_path / "a/checkpoint.pt").rename(tmp_path / "a/moved.pt")
    with pytest.raises(InputError, match="holds a student but no checkpoint"):
        go(plain, captions, tmp_path / "a")
    (tmp_path / "a/checkpoint.pt").write_bytes(b"cut short")
    with pytest.raises(InputError, match="cannot be read"):
        go(plain, captions, tmp_path / "a")


def test_a_full_disk_loses_nothing(plain, captions, tmp_path):
    done = go(plain, captions, tmp_path / "full")
    def small_files():                                              # files over 100 kB cannot be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    refused("train.py", *flags_of("full", plain, captions, tmp_path), "--max_steps", 6, cwd=tmp_path, says=["checkpoint.pt", "not saved"],
            preexec_fn=small_files)
    same(result(tmp_path / "full"), done)
    assert not list(tmp_path.rglob("*.tmp"))


def test_command_line_refusals(plain, captions, tmp_path):
    refused("train.py", "--teacher", plain, cwd=tmp_path, says=["--captions FILE"])
    refused("train.py", "--teacher", "nobody/nothing", "--captions", captions, cwd=tmp_path, says=["nobody/nothing", "pass its folder"])
    assert not os.listdir(tmp_path)
    code, text = run("train.py", "--help", cwd=tmp_path)
    assert code == 0 and text.count("\n") < 90
