"""Training: a step is the method, every flag does its part, a student goes on as a new run."""
import functools
import json
import math
import shutil
import sys
import types

import huggingface_hub
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from runs import LOSSES, change_teacher, metrics, same
from safetensors.torch import load_file

import model
import train
from data import InputError, caption_at, draw_batch, read_captions
from lora import inject, lora_weights
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import TextEncoder, denoiser, load_unet

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_a_run_and_what_it_leaves(go, plain, tmp_path, capsys):
    killed, others = (tmp_path / name / "a.12345678.tmp" for name in ("student-5", "arc"))
    for path in (killed, others):                           # of this run, and of one that goes on
        path.parent.mkdir()
        path.touch()
    go(tmp_path)
    assert not killed.exists() and others.exists()
    said, shown = capsys.readouterr()
    assert "23 captions used" in said
    assert f'hear it: python sample.py --student {tmp_path / "student"} --prompt' in said
    before, after = load_unet(plain), UNet2DConditionModel.from_pretrained(tmp_path / "student")
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    config = peft.PeftModel.from_pretrained(before, tmp_path / "lora").peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 128)

    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert f"lora={lines[1]['lora']:.3g}, x0_std={lines[1]['x0_std']:.3g}]" in shown
    about = json.loads((tmp_path / "student/swiftaudio.json").read_text())
    assert (about["step"], about["timestep"]) == (2, 999)
    assert about["flags"]["lora_rank"] == 4 and "defaults" not in about["flags"]


def test_the_log_holds_means_and_has_a_line_at_each_save(go, tmp_path, two_step_run):
    """So that a resumed run's log has no gap."""
    go(tmp_path, "--log_every", 2)
    (line,), (first, second) = metrics(tmp_path), metrics(two_step_run)
    for name in LOSSES:
        assert line[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5), name
    go(tmp_path, "--log_every", 5, "--save_every", 3, "--max_steps", 4)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]
    assert all(line["samples_per_s"] > 0 for line in metrics(tmp_path))


ONE = ["--max_steps", 1, "--lora_guidance", 1]  # so that eq. 3 is not zero in the first step
METHOD = {
    "--student_t": 625, "--guidance": 3, "--lora_guidance": 1.5, "--lora_weighting": "v",
    "--tv": "l2", "--tv_weight": 0.2, "--lora_drop": 0.6, "--t_min": 300, "--t_max": 700,
    "--seed": 3, "--lora_alpha": 8, "--lora_targets": "attention", "--lora_rank": 3,
    "--grad_accum": 2}


def expected_line(words, plain, captions, step, state=None, student=None):
    """A step's losses and gradients by the flags, with these networks, computed anew."""
    a, teacher, unet = train.parse_args(words), denoiser(load_unet(plain)), load_unet(plain)
    student = (student or load_unet(plain)).requires_grad_(True)
    torch.manual_seed(a.seed)
    adapters = inject(unet, a.lora_targets, a.lora_rank, a.lora_alpha)
    if state:
        for name, w in lora_weights(unet).items():
            w.data.copy_(state[name])
    encode_text, lora_teacher = TextEncoder(plain), denoiser(unet)
    null, (alpha, sigma) = encode_text([""]), model.noise_schedule(model.load_scheduler(plain))
    size = a.batch_size * a.grad_accum
    numbers = range(step * size, (step + 1) * size)
    z_T, eps, eps_lora, t, t_lora, u = draw_batch(numbers, a.seed, (4, 8, 8), a.t_min, a.t_max, 999)
    read = read_captions(captions)[0]
    text = encode_text([caption_at(read, a.seed, n) for n in numbers])

    lora_guidance = a.guidance if a.lora_guidance is None else a.lora_guidance
    x0 = one_step(denoiser(student), z_T, text, alpha, sigma, a.student_t)
    vsd = vsd_loss(x0, t, eps, text, guided(teacher, null, a.guidance),
                   guided(lora_teacher, null, lora_guidance), alpha, sigma)
    tv = tv_loss(x0, a.tv)
    dropped = torch.stack([null[0] if drop < a.lora_drop else x for x, drop in zip(text, u)])
    lora = lora_loss(x0, t_lora, eps_lora, dropped, lora_teacher, alpha, sigma, a.lora_weighting)
    ((vsd + a.tv_weight * tv).mean() + lora.mean()).backward()
    norms = [torch.stack([w.grad.norm() for w in weights]).norm()
             for weights in (student.parameters(), adapters)]

    line = dict(vsd=vsd.mean(), tv=tv.mean(), lora=lora.mean(), x0_std=x0.std((1, 2, 3)).mean(),
                grad_student=norms[0], grad_lora=norms[1])
    return {name: pytest.approx(value.item(), rel=1e-3) for name, value in line.items()}


@pytest.mark.parametrize("flags", [{}, METHOD])
def test_the_first_step_is_the_method(words, go, plain, captions, tmp_path, flags):
    given = [*ONE, *(x for flag in flags.items() for x in flag)]
    go(tmp_path, *given)
    line, = metrics(tmp_path)
    expected = expected_line(words(tmp_path, *given), plain, captions, 0)
    assert {name: line[name] for name in LOSSES} == expected
    used = json.loads((tmp_path / "student/swiftaudio.json").read_text())["flags"]
    assert flags == {flag: used[flag.removeprefix("--")] for flag in flags}


def test_the_second_step_compares_the_teacher_with_what_the_adapters_learned(
        words, plain, captions, one_step_run, two_step_run):
    """With the same guidance on both, eq. 3 is zero before that."""
    first, second = metrics(two_step_run)
    assert first["vsd"] == 0 < second["vsd"]
    expected = expected_line(
        words("out"), plain, captions, 1, student=load_unet(one_step_run, "student"),
        state=load_file(one_step_run / "lora/adapter_model.safetensors"))
    assert {name: second[name] for name in LOSSES} == expected


@pytest.mark.parametrize("warmup, decay, steps, factors", [
    (0, False, [0, 1, 5, 9], [1, 1, 1, 1]), (1, False, [0, 1], [1, 1]),
    (4, False, [0, 1, 2, 3, 4, 9], [0.25, 0.5, 0.75, 1, 1, 1]),
    (0, True, [0, 1, 5, 9], [1, 0.9, 0.5, 0.1]), (2, True, [0, 1, 2, 9], [0.5, 0.9, 0.8, 0.1])])
def test_the_learning_rate(warmup, decay, steps, factors):
    args = types.SimpleNamespace(warmup=warmup, decay=decay, max_steps=10)
    assert [train.learning_rate(step, args) for step in steps] == pytest.approx(factors)


def test_activation_checkpointing_changes_nothing(go, tmp_path, monkeypatch):
    enable, enabled = UNet2DConditionModel.enable_gradient_checkpointing, []
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing",
                        lambda unet: enabled.append(enable(unet)))
    same(go(tmp_path / "a", "--lora_targets", "all", "--checkpointing"),
         go(tmp_path / "b", "--lora_targets", "all"), rtol=1e-4, atol=1e-5)
    assert len(enabled) == 2                                # of one run, both networks'


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_changes_nothing(backend, go, tmp_path, monkeypatch):
    """The eager backends trace as inductor does, without its minutes of code generation."""
    expected = go(tmp_path / "b", "--lr", 1e-5)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    same(go(tmp_path / "a", "--lr", 1e-5, "--compile"), expected, rtol=1e-3, atol=1e-3)


def test_bf16_trains(go, tmp_path, one_step_run):
    """With fp32 weights and moments, near the losses of fp32 but not at them."""
    half = go(tmp_path, "--max_steps", 1, "--precision", "bf16")
    (a,), (b,) = metrics(tmp_path), metrics(one_step_run)
    for name in ("lora", "tv"):
        assert a[name] != b[name] and a[name] == pytest.approx(b[name], rel=0.05)
    weights = [*half["weights"]["student"], *half["weights"]["lora"]]
    moments = [state["exp_avg"] for state in half["opts"]["student"]["state"].values()]
    assert {w.dtype for w in weights + moments} == {torch.float32}


@pytest.mark.parametrize("precision, allowed", [("auto", True), ("fp32", False)])
def test_fp32_is_not_tf32(go, adapter, tmp_path, tf32, precision, allowed):
    """And a teacher in Auffusion's older layout trains."""
    go(tmp_path, "--teacher", adapter, "--max_steps", 1, "--precision", precision)
    assert [switch.allow_tf32 for switch in tf32] == [allowed, allowed]


FIRST = ["--guidance", 3, "--student_t", 625, "--lora_alpha", 8, "--max_steps", 1]


def test_a_run_that_starts_from_a_student(go, tmp_path, plain, broken):
    """Of this teacher, or of another; its LoRA teacher starts anew."""
    expected, student = go(tmp_path / "b", *FIRST)["weights"], tmp_path / "b/student"
    still = [*FIRST, "--lr", 0, "--lora_lr", 0, "--init", student]
    change_teacher(broken)
    for i, teacher in enumerate((plain, broken)):
        fresh = go(tmp_path / f"a{i}", *still, "--teacher", teacher)["weights"]
        same(fresh["student"], expected["student"])
        assert not any(w.any() for w in fresh["lora"][1::2])    # B is zero
    with pytest.raises(InputError, match="neither a student"):
        go(tmp_path / "d", "--init", plain / "vae")
    assert not (tmp_path / "d").exists()


def test_nothing_of_this_machine_is_published(go, plain, captions, tmp_path, monkeypatch):
    """Where its teacher is stands beside student/; without that, the flags must say."""
    out, teacher = tmp_path / "a=b/same", str(shutil.copytree(plain, tmp_path / "a=b/of/same"))
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", str(tmp_path / "train.py"), "--init",
                                           teacher, f"--out_dir={out}"])
    go(out, *FIRST, "--teacher", teacher, "--init", teacher, "--keep_every", 1, "--seed", 3)
    files = [p for name in ("student", "student-1", "lora") for p in (out / name).iterdir()]
    for path in files:
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    about = json.loads((out / "student/swiftaudio.json").read_text())
    assert about["command"] == "python ./train.py --init ./same --out_dir=./same"
    assert (about["teacher"], about["flags"]["captions"]) == ("./same", "./captions.csv")

    given = ["--captions", str(captions)]
    args = train.parse_args(["--init", str(out / "student")])
    assert (args.teacher, args.captions, args.student_t, args.seed) == (teacher, given[1], 625, 0)
    with pytest.raises(InputError, match="--captions FILE is needed"):
        train.parse_args(["--init", str(out / "student"), "--teacher", teacher])
    monkeypatch.chdir(shutil.copytree(out / "student", tmp_path / "published"))
    for flags, says in ((["."], "./same: no such folder"),              # then not its teacher
                        ([teacher], f"{train.AUFFUSION}: no such folder")):
        with pytest.raises(InputError, match=says):
            train.parse_args([*given, "--init", *flags])


def test_a_teacher_brings_defaults_and_flags_win(broken, monkeypatch):
    own = {"lr": 3e-4, "guidance": 3.0, "captions": "c.txt", "decay": True, "weight_decay": 0.0,
           "caption_column": "x", "max_captions": 9}
    (broken / "swiftaudio.json").write_text(json.dumps({"seconds": 0.64, "train": own}))
    args = train.parse_args(["--teacher", str(broken), "--guidance", "5", "--no-decay"])
    assert (args.lr, args.guidance, args.lora_guidance, args.decay) == (3e-4, 5, None, False)
    assert (args.captions, args.weight_decay) == (str(broken / "c.txt"), 0)
    assert (args.caption_column, args.max_captions) == ("x", 9)
    others = train.parse_args(["--teacher", str(broken), "--captions", "c.csv"])
    assert (others.caption_column, others.max_captions) == (None, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: str(broken))
    hub = train.parse_args(["--teacher", "user/model"])
    assert (hub.lr, hub.teacher, hub.captions) == (3e-4, "user/model", args.captions)


@pytest.mark.parametrize("own, says", [
    ({"tv": "L1"}, "--tv: invalid choice"), ({"learning_rate": 1}, "unrecognized.*learning_rate")])
def test_a_teachers_own_defaults_are_parsed_too(broken, own, says):
    (broken / "swiftaudio.json").write_text(json.dumps({"train": own}))
    with pytest.raises(InputError, match=f"{broken}/swiftaudio.json: {says}"):
        train.parse_args(["--teacher", str(broken), "--captions", "c.csv"])


def test_the_defaults_are_the_paper_s(plain):
    args = train.parse_args(["--teacher", str(plain), "--captions", "c.csv"])
    expected = dict(lr=1e-5, guidance=7.5, lora_guidance=None, max_steps=20000, batch_size=16,
                    grad_accum=4, lora_lr=1e-3, lora_rank=64, lora_alpha=128, tv_weight=0.05,
                    tv="l1", lora_targets="qv", lora_weighting="alpha2", lora_drop=0.1, t_min=20,
                    t_max=981, beta1=0.9, beta2=0.999, weight_decay=0.01, grad_clip=1, warmup=0,
                    decay=False, ema=0)
    assert {name: getattr(args, name) for name in expected} == expected
