"""Training: a step is the method, every flag does its part, runs repeat bit for bit."""
import functools
import json
import math
import shutil
import time
import types

import huggingface_hub
import peft
import pytest
import torch
from conftest import run
from diffusers import UNet2DConditionModel
from runs import LOSSES, change_teacher, flags_of, go, metrics, result, same
from safetensors.torch import load_file

import model
import train
from data import InputError, caption_at, draw_batch, read_captions
from lora import inject, load_lora_state
from losses import guided, lora_loss, one_step, tv_loss, vsd_loss
from model import TextEncoder, denoiser, load_unet

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_a_run_and_what_it_leaves(plain, captions, tmp_path, capsys):
    torch.manual_seed(123)                                  # of no consequence
    done = go(plain, captions, tmp_path / "a", "--seed", 5)
    assert "23 captions used" in capsys.readouterr().out
    before, after = load_unet(plain), UNet2DConditionModel.from_pretrained(tmp_path / "a/student")
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    peft.PeftModel.from_pretrained(before, tmp_path / "a/lora")

    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["lora"] > 0
    assert all(math.isfinite(line["grad_lora"]) for line in lines)
    about = json.loads((tmp_path / "a/student/swiftaudio.json").read_text())
    assert about["step"] == 2 and about["timestep"] == 999 and about["seconds"] == 0.64
    assert about["teacher"] == str(plain.resolve())
    assert about["flags"]["lora_rank"] == 4
    assert not list((tmp_path / "a").rglob("*.tmp"))
    same(go(plain, captions, tmp_path / "b", "--seed", 5), done)        # the seed decides all


def test_the_speed_counts_what_a_gpu_has_yet_to_finish(tmp_path):
    class Late:
        """A sum and a count that are there 0.2 s after they are asked for."""

        def __getitem__(self, i):
            time.sleep(0.1)
            return 1.0

        def isfinite(self):
            return torch.ones(1)

    log = train.Log(types.SimpleNamespace(
        lines=[], out=tmp_path, rank=0, ranks=1, first_step=0, config={"captions a step": 4}))
    log.sums["vsd"] = Late()
    assert 0 < log.write(1)["samples_per_s"] <= 4 / 0.2


def test_the_log_holds_means_and_has_a_line_at_each_save(plain, captions, tmp_path, two_step_run):
    """So that a resumed run's log has no gap."""
    go(plain, captions, tmp_path, "--log_every", 2)
    (line,), (first, second) = metrics(tmp_path), metrics(two_step_run)
    for name in LOSSES:
        assert line[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5), name
    go(plain, captions, tmp_path, "--log_every", 5, "--save_every", 3, "--max_steps", 4)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4]


# ---- every flag of the method does its part ----------------------------------------------------

ONE = ["--max_steps", 1, "--lora_guidance", 1]  # so that eq. 3 is not zero in the first step


@pytest.fixture(scope="module")
def trained(plain, captions, tmp_path_factory):
    """Train with some flags, once for each: all that a run leaves, and its first metrics."""
    @functools.cache
    def train_with(*flags):
        out = tmp_path_factory.mktemp("flags")
        done = go(plain, captions, out, *ONE, *flags)
        names = [name for name, _ in load_unet(plain).named_parameters()]
        student = dict(zip(names, done["weights"]["student"], strict=True))
        return types.SimpleNamespace(out=out, line=metrics(out)[0], student=student, **done)

    return train_with


METHOD = {
    "--student_t": 625, "--guidance": 3, "--lora_guidance": 1.5, "--lora_weighting": "v",
    "--tv": "l2", "--tv_weight": 0.2, "--lora_drop": 0.6, "--t_min": 300, "--t_max": 700,
    "--seed": 3, "--lora_alpha": 8, "--lora_targets": "attention",
    "--grad_accum": 2}


def parsed(plain, captions, *flags):
    return train.parse_args([str(f) for f in (*flags_of("out", plain, captions), *flags)])


def expected_metrics(a, plain, captions, step, student, fake):
    """A step's losses and gradient by the flags `a`, with these networks, computed anew."""
    encode_text, teacher = TextEncoder(plain), denoiser(load_unet(plain))
    null, (alpha, sigma) = encode_text([""]), model.noise_schedule(model.load_scheduler(plain))
    size = a.batch_size * a.grad_accum
    numbers = range(step * size, (step + 1) * size)
    z_T, eps, eps_lora, t, t_lora, u = draw_batch(numbers, a.seed, (4, 8, 8), a.t_min, a.t_max, 999)
    read = read_captions(captions)[0]
    text = encode_text([caption_at(read, a.seed, n) for n in numbers])

    fake_guidance = a.guidance if a.lora_guidance is None else a.lora_guidance
    x0 = one_step(denoiser(student), z_T, text, alpha, sigma, a.student_t)
    vsd = vsd_loss(x0, t, eps, text, guided(teacher, null, a.guidance),
                   guided(fake, null, fake_guidance), alpha, sigma)
    tv = tv_loss(x0, a.tv)
    dropped = torch.stack([null[0] if drop < a.lora_drop else x for x, drop in zip(text, u)])
    lora = lora_loss(x0, t_lora, eps_lora, dropped, fake, alpha, sigma, a.lora_weighting)
    (vsd + a.tv_weight * tv).mean().backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()

    line = {"vsd": vsd.mean(), "tv": tv.mean(), "lora": lora.mean(), "grad_student": norm,
            "x0_std": x0.std((1, 2, 3)).mean()}
    return {name: value.item() for name, value in line.items()}


@pytest.mark.parametrize("flags", [{}, METHOD])
def test_the_first_step_is_the_method(trained, plain, captions, flags):
    """Adapters that are zero are the teacher."""
    flags = [x for flag in flags.items() for x in flag]
    expected = expected_metrics(parsed(plain, captions, *ONE, *flags), plain, captions, 0,
                                load_unet(plain).requires_grad_(True), denoiser(load_unet(plain)))
    line = trained(*flags).line
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-4), name


def test_the_second_step_compares_the_teacher_with_what_the_adapters_learned(
        plain, captions, one_step_run, two_step_run):
    """With the same guidance on both, eq. 3 is zero before that."""
    student, unet = load_unet(one_step_run, "student").requires_grad_(True), load_unet(plain)
    inject(unet, "qv", 4, 128)
    load_lora_state(unet, load_file(one_step_run / "lora/adapter_model.safetensors"))
    expected = expected_metrics(parsed(plain, captions), plain, captions, 1, student,
                                denoiser(unet))
    first, second = metrics(two_step_run)
    assert first["vsd"] == 0 < second["vsd"]
    for name, value in expected.items():
        assert second[name] == pytest.approx(value, rel=1e-3), name


EFFECTS = [                 # flag, another value, what of the first line of metrics it changes
    ("student_t", 625, LOSSES),
    ("guidance", 3, {"vsd", "grad_student"}),
    ("lora_guidance", 1.5, {"vsd", "grad_student"}),
    ("lora_weighting", "v", {"lora", "grad_lora"}),
    ("tv", "l2", {"tv", "grad_student"}),
    ("tv", "none", {"tv", "grad_student"}),
    ("tv_weight", 0.1, {"grad_student"}),
    ("lora_rank", 8, {"grad_lora"}),
    ("lora_alpha", 64, {"grad_lora"}),
    ("lora_targets", "attention", {"grad_lora"}),
    ("lora_drop", 1, {"lora", "grad_lora"}),
    ("t_min", 900, {"vsd", "grad_student"}),
    ("t_max", 100, {"vsd", "grad_student"}),
    ("seed", 1, LOSSES),
]


@pytest.mark.parametrize("flag, value, changes", EFFECTS)
def test_a_flag_changes_its_own_losses_and_no_others(trained, flag, value, changes):
    before, after = trained().line, trained(f"--{flag}", value).line
    assert {name for name in LOSSES if after[name] != before[name]} == changes


def test_flags_change_their_losses_by_the_right_amount(trained):
    def line(*flags):
        return trained(*flags).line

    base = line()
    # With adapters still zero, eq. 3 sees (guidance - lora_guidance) (eps(text) - eps(null)).
    assert line("--guidance", 3)["vsd"] == pytest.approx(4 * base["vsd"], rel=1e-3)
    assert line("--lora_guidance", 1.5)["vsd"] == pytest.approx(base["vsd"] / 4, rel=1e-3)
    assert line("--tv", "none")["tv"] == 0 < base["tv"]
    assert line("--lora_weighting", "v")["lora"] > 2 * base["lora"]         # 1 / a^2 for a^2
    assert line("--lora_alpha", 64)["grad_lora"] == pytest.approx(base["grad_lora"] / 2, rel=1e-4)

    # Where both guidances are alike, total variation is all that moves the student.
    alone = ["--lora_guidance", 2]
    once, twice = line(*alone), line(*alone, "--tv_weight", 0.1)
    assert once["vsd"] == 0 and twice["grad_student"] == pytest.approx(2 * once["grad_student"])
    assert line(*alone, "--tv", "none")["grad_student"] == 0


def test_the_adapters_are_those_the_flags_describe(trained):
    base, more = trained(), trained("--lora_rank", 8)
    for run_, rank in ((base, 4), (more, 8)):
        config = json.loads((run_.out / "lora/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, 128)
        assert {w.shape[0] for k, w in run_.adapters.items() if "lora_A" in k} == {rank}
        assert all(k.split(".lora_")[0].endswith(("to_q", "to_v")) for k in run_.adapters)
    half = trained("--lora_alpha", 64)
    assert json.loads((half.out / "lora/adapter_config.json").read_text())["lora_alpha"] == 64
    more = trained("--lora_targets", "attention").adapters
    assert len(more) == 2 * len(base.adapters) and any("to_out.0" in name for name in more)

    # A comes from the seed: in the first step its gradient is zero, as B is.
    again, other = trained("--lora_drop", 1), trained("--seed", 1)
    for name in (k for k in base.adapters if "lora_A" in k):
        assert torch.equal(again.adapters[name], base.adapters[name])
        assert (other.adapters[name] - base.adapters[name]).abs().max() > 0.1


ADAMW = ["--lr", 2e-3, "--lora_lr", 4e-3, "--beta1", 0.6, "--beta2", 0.8, "--weight_decay", 0.5,
         "--warmup", 4, "--grad_clip", 0]


def test_both_optimizers_are_adamw_with_the_flags_values(trained, plain):
    """The first step of arXiv 1711.05101, algorithm 2, from the gradient that the moments hold."""
    done = trained(*ADAMW)
    start = dict(load_unet(plain).named_parameters())
    student = [(start[name], done.student[name]) for name in start]
    adapters = [(None, w) for w in done.weights["lora"]]
    for optimizer, weights, rate in ((done.opts["student"], student, 2e-3 / 4),
                                     (done.opts["lora"], adapters, 4e-3 / 4)):
        group, = optimizer["param_groups"]
        assert group["lr"] == pytest.approx(rate) and tuple(group["betas"]) == (0.6, 0.8)
        assert group["weight_decay"] == 0.5 and len(weights) == len(optimizer["state"])
        for i, (before, after) in enumerate(weights):
            state = optimizer["state"][i]
            gradient = state["exp_avg"] / (1 - 0.6)
            torch.testing.assert_close(state["exp_avg_sq"], (1 - 0.8) * gradient ** 2)
            if before is None and not state["exp_avg"].any():       # A: unknown, but for decay
                continue
            before = torch.zeros_like(after) if before is None else before
            step = gradient / (gradient.abs() + 1e-8)
            expected = before * (1 - rate * 0.5) - rate * step
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_weight_decay_shrinks_the_adapters_too(trained):
    """A, whose gradient is zero in the first step, shrinks by exactly lora_lr weight_decay."""
    base, done = trained("--weight_decay", 0), trained("--weight_decay", 0.5)
    for name in (k for k in base.adapters if "lora_A" in k):
        torch.testing.assert_close(done.adapters[name], base.adapters[name] * (1 - 1e-3 * 0.5))


def test_betas_and_rates_change_the_weights(trained):
    """By more than rounding, in the network they are of."""
    def moved(a, b):
        return max((a[name] - b[name]).abs().max().item() for name in a)

    base = trained()
    for flag, student, adapters in (("--lr", True, False), ("--lora_lr", False, True)):
        done = trained(flag, 2e-3)
        assert (moved(done.student, base.student) > 5e-4) == student, flag
        assert (moved(done.adapters, base.adapters) > 5e-4) == adapters, flag
    base = trained("--max_steps", 2)
    for flag, value in (("--beta1", 0.5), ("--beta2", 0.9)):
        done = trained("--max_steps", 2, flag, value)
        assert moved(done.student, base.student) > 1e-5, flag
        assert moved(done.adapters, base.adapters) > 1e-5, flag


@pytest.mark.parametrize("clip", [1e-3, 0])
def test_gradients_are_clipped_to_their_norm(trained, clip):
    done = trained("--grad_clip", clip)
    for name, optimizer in done.opts.items():
        moments = [state["exp_avg"].norm() for state in optimizer["state"].values()]
        norm = torch.stack(moments).norm().item() / (1 - 0.9)
        logged = done.line[f"grad_{name}"]                  # the log has it before it is clipped
        assert logged > 2e-3 and norm == pytest.approx(clip or logged, rel=1e-3)


def test_the_average_of_the_weights_is_what_is_saved(trained, plain):
    """ema a: average = a average + (1 - a) weights, with a at most (step + 1) / (step + 10)."""
    start = dict(load_unet(plain).named_parameters())
    for flag, rate in ((0.05, 0.05), (0.999, 0.1)):
        done = trained("--ema", flag)
        for name, saved in done.saved.items():
            expected = rate * start[name] + (1 - rate) * done.student[name]
            torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-7)
        same([done.saved[name] for name in start], done.weights["ema"])
        assert not torch.equal(done.saved["conv_in.weight"], done.student["conv_in.weight"])
    assert trained().weights["ema"] == []
    same(trained().saved, trained().student)


def test_every_caption_comes_once_an_epoch(plain, captions, tmp_path, monkeypatch):
    asked = []

    class Listening(TextEncoder):
        def forward(self, prompts):
            asked.extend(prompts)
            return super().forward(prompts)

    monkeypatch.setattr(model, "TextEncoder", Listening)
    go(plain, captions, tmp_path, "--grad_accum", 2, "--batch_size", 8, "--seed", 5)
    asked = [prompt for prompt in asked if prompt]
    read = read_captions(captions)[0]
    assert asked == [caption_at(read, 5, n) for n in range(32)]
    assert sorted(asked[:23]) == sorted(read)


# ---- the learning rate --------------------------------------------------------------------------

@pytest.mark.parametrize("flags, steps, factors", [
    ([], [0, 1, 5, 99], [1, 1, 1, 1]),
    (["--warmup", "4"], [0, 1, 2, 3, 4, 99], [0.25, 0.5, 0.75, 1, 1, 1]),
    (["--decay", "--max_steps", "10"], [0, 1, 5, 9], [1, 0.9, 0.5, 0.1]),
    (["--decay", "--max_steps", "10", "--warmup", "2"], [0, 1, 2, 9], [0.5, 0.9, 0.8, 0.1]),
    (["--warmup", "1"], [0, 1], [1, 1])])
def test_the_learning_rate(tmp_path, monkeypatch, flags, steps, factors):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: str(tmp_path))
    args = train.parse_args(["--captions", "c.csv", *flags])
    assert [train.learning_rate(step, args) for step in steps] == pytest.approx(factors)


def test_both_optimizers_get_it(plain, captions, tmp_path):
    """In step 1 of 0 and 1: 2 / 8 for the warm-up, 1 / 2 for the decay."""
    done = go(plain, captions, tmp_path, "--decay", "--warmup", 8, "--lora_lr", 5e-3)
    rates = {name: opt["param_groups"][0]["lr"] for name, opt in done["opts"].items()}
    assert rates == pytest.approx({"student": 1e-3 / 8, "lora": 5e-3 / 8})


# ---- the same run in other ways -----------------------------------------------------------------

def same_up_to_rounding(a, b, out_a, out_b):
    # Adam's first steps are +-lr whatever the gradient's size, so that a rounded zero moves a
    # weight: compare moments and curves.
    for opt in ("student", "lora"):
        for i, state in a["opts"][opt]["state"].items():
            moment, other = state["exp_avg"], b["opts"][opt]["state"][i]["exp_avg"]
            assert (moment - other).abs().max() <= 2e-3 * moment.abs().max() + 1e-9
    for x, y in zip(metrics(out_a), metrics(out_b), strict=True):
        for name in LOSSES:
            assert x[name] == pytest.approx(y[name], rel=2e-4), name


def test_accumulation_and_two_processes_equal_the_large_batch(plain, captions, tmp_path):
    """16 x 1 == 4 x 4 == 4 x 2 in each of two processes, and a run goes on in another split."""
    large, small, two, lr = tmp_path / "large", tmp_path / "small", tmp_path / "two", ("--lr", 1e-4)
    expected = go(plain, captions, large, "--batch_size", 16, *lr)
    go(plain, captions, small, "--grad_accum", 4, *lr, "--max_steps", 1)
    shutil.copytree(small, two)
    with pytest.raises(InputError, match="captions a step 16, this one has 8"):
        go(plain, captions, small, "--grad_accum", 2, *lr)
    done = go(plain, captions, small, "--grad_accum", 2, "--batch_size", 8, *lr)
    same_up_to_rounding(expected, done, large, small)

    code, output = run("train.py", *flags_of(two, plain, captions), "--grad_accum", 2, *lr,
                       cwd=tmp_path, ranks=2)
    assert code == 0, output
    assert '"captions a step": 16' in output
    same_up_to_rounding(expected, result(two), large, two)


def test_activation_checkpointing_changes_nothing(plain, captions, tmp_path, monkeypatch):
    enable, enabled = UNet2DConditionModel.enable_gradient_checkpointing, []
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing",
                        lambda unet: enabled.append(enable(unet)))
    same(go(plain, captions, tmp_path / "a", "--checkpointing", "--lora_targets", "all"),
         go(plain, captions, tmp_path / "b", "--lora_targets", "all"), rtol=1e-4, atol=1e-5)
    assert len(enabled) == 2                                # of one run, both networks'


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_changes_nothing(backend, plain, captions, tmp_path, monkeypatch):
    """The eager backends trace as inductor does, without its minutes of code generation."""
    flags = ["--max_steps", 2, "--lr", 1e-5]
    expected = go(plain, captions, tmp_path / "b", *flags)
    compiler = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiler)
    done = go(plain, captions, tmp_path / "a", "--compile", *flags)
    same(done, expected, rtol=1e-3, atol=1e-3)


def test_bf16_trains(plain, captions, tmp_path, one_step_run):
    """With fp32 weights and moments, near the losses of fp32 but not at them."""
    half = go(plain, captions, tmp_path, "--max_steps", 1, "--precision", "bf16")
    (a,), (b,) = metrics(tmp_path), metrics(one_step_run)
    assert a["lora"] != b["lora"] and a["lora"] == pytest.approx(b["lora"], rel=0.05)
    assert a["tv"] != b["tv"] and a["tv"] == pytest.approx(b["tv"], rel=0.05)
    weights = [*half["weights"]["student"], *half["weights"]["lora"]]
    moments = [state["exp_avg"] for state in half["opts"]["student"]["state"].values()]
    assert {w.dtype for w in weights + moments} == {torch.float32}


@pytest.mark.parametrize("precision, allowed", [("auto", True), ("fp32", False)])
def test_fp32_is_not_tf32(plain, captions, tmp_path, tf32, precision, allowed):
    go(plain, captions, tmp_path, "--max_steps", 1, "--precision", precision)
    assert [switch.allow_tf32 for switch in tf32] == [allowed, allowed]


def test_the_adapter_layout_trains(adapter, captions, tmp_path):
    assert go(adapter, captions, tmp_path, "--max_steps", 1)["step"] == 1


def test_a_run_that_starts_from_a_student(plain, captions, tmp_path, broken):
    """It goes on with the student and the LoRA teacher, and with the flags that made them."""
    said = ["--guidance", 3, "--student_t", 625, "--lora_alpha", 8]
    first = go(plain, captions, tmp_path / "a", *said, "--max_steps", 1)
    student = str(tmp_path / "a/student")
    still = ["--init", student, "--lora_rank", 4, "--lr", 0, "--lora_lr", 0, "--device", "cpu",
             "--batch_size", 4, "--max_steps", 1, "--log_every", 1]
    train.main([str(f) for f in (*still, "--out_dir", tmp_path / "b")])
    same(result(tmp_path / "b")["weights"], first["weights"])
    same(go(plain, captions, tmp_path / "c", *still, *said)["weights"], first["weights"])
    assert metrics(tmp_path / "b")[0]["vsd"] > 0            # of the LoRA teacher as it was

    args = train.parse_args(["--init", student])
    assert (args.teacher, args.captions) == (str(plain.resolve()), str(captions))
    assert (args.guidance, args.lora_guidance, args.student_t, args.lora_alpha) == (3, None, 625, 8)
    assert (args.lr, args.out_dir) == (1e-5, "out")
    path = tmp_path / "a/student/swiftaudio.json"
    path.write_text(path.read_text().replace('"caption_column": null', '"caption_column": "said"')
                    .replace('"max_captions": null', '"max_captions": 7'))
    args = train.parse_args(["--init", student])
    assert (args.caption_column, args.max_captions) == ("said", 7)
    args = train.parse_args(["--init", student, "--guidance", "5", "--captions", str(captions)])
    assert (args.guidance, args.lora_guidance, args.caption_column) == (5, None, None)
    assert args.max_captions is None

    # a complete one-step model is not its own teacher
    flags = ["--init", str(plain), "--captions", str(captions), "--teacher"]
    assert train.parse_args([*flags, "tiny"]).teacher == "tiny"
    with pytest.raises(InputError, match=f"{train.AUFFUSION}: no such folder"):
        train.parse_args(flags[:-1])

    # lora/ is of the last step: it is not loaded beside a student kept earlier
    shutil.copytree(student, tmp_path / "a/student-1")
    still[1] = str(tmp_path / "a/student-1")
    fresh = go(plain, captions, tmp_path / "e", *still, *said)["weights"]
    same(fresh["student"], first["weights"]["student"])
    assert not any(w.any() for w in fresh["lora"][1::2])                # B is zero
    with pytest.raises(InputError, match="a/lora: .*another --lora_rank or --lora_targets"):
        go(plain, captions, tmp_path / "d", "--init", student, "--lora_rank", 2)

    change_teacher(broken)
    with pytest.raises(InputError, match="is not a student of --teacher"):
        go(broken, captions, tmp_path / "d", "--init", student)
    with pytest.raises(InputError, match="neither a student"):
        go(plain, captions, tmp_path / "d", "--init", plain / "vae")
    assert not (tmp_path / "d").exists()


def test_a_teacher_brings_defaults_and_flags_win(broken, monkeypatch):
    own = {"lr": 3e-4, "guidance": 3.0, "captions": "c.txt", "decay": True, "weight_decay": 0.0}
    (broken / "swiftaudio.json").write_text(json.dumps({"seconds": 0.64, "train": own}))
    args = train.parse_args(["--teacher", str(broken), "--guidance", "5", "--no-decay"])
    assert (args.lr, args.guidance, args.lora_guidance, args.decay) == (3e-4, 5, None, False)
    assert args.captions == str(broken / "c.txt") and args.weight_decay == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: str(broken))
    hub = train.parse_args(["--teacher", "user/model"])
    assert (hub.lr, hub.teacher, hub.captions) == (3e-4, "user/model", args.captions)


def test_the_defaults_are_the_paper_s(plain):
    args = train.parse_args(["--teacher", str(plain), "--captions", "c.csv"])
    expected = dict(lr=1e-5, guidance=7.5, lora_guidance=None, max_steps=20000, batch_size=16,
                    grad_accum=4, lora_lr=1e-3, lora_rank=64, lora_alpha=128, tv_weight=0.05,
                    tv="l1", lora_targets="qv", lora_weighting="alpha2", lora_drop=0.1, t_min=20,
                    t_max=981, beta1=0.9, beta2=0.999, weight_decay=0.01, grad_clip=1, warmup=0,
                    decay=False, ema=0)
    assert {name: getattr(args, name) for name in expected} == expected
