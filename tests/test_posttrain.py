"""ARC and energy scoring on a teacher's own clips: the loop, its clips, and what it refuses."""
import functools
import json

import pytest
import torch
from conftest import refused, run
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import posttrain
import train
from data import caption_at, draw_batch, read_captions, sampling_noise
from extras.cli import InputError
from lora import inject, load_lora_state
from losses import diffuse, energy_loss, guided, one_step, relativistic_loss, vsd_loss
from model import Pipeline, denoiser, load_unet, many_steps

pytestmark = pytest.mark.usefixtures("loaded_once")
SMALL = ["--max_steps", 2, "--batch_size", 4, "--lr", 1e-3, "--guidance", 2, "--lora_rank", 4,
         "--grad_accum", 1, "--clips", 8, "--log_every", 1, "--device", "cpu"]
ARC = ["--objective", "arc", "--d_first", 0]
FULL = {"arc": [*ARC, "--vsd", 1, "--ema", 0.9, "--d_first", 3],
        "energy": ["--objective", "energy", "--samples", 3, "--feature_weight", 0.1],
        "regression": ["--objective", "regression"], "vsd": ["--objective", "vsd"]}


@pytest.fixture(scope="module")
def clips(plain, captions, tmp_path_factory):
    """The file of clips that all runs here share."""
    out = tmp_path_factory.mktemp("clips")
    posttrain.main(strings("--teacher", plain, "--captions", captions, "--out_dir", out, *SMALL,
                           "--max_steps", 1, "--objective", "energy", "--patch", 1))
    return out / "clips.safetensors"


@pytest.fixture(scope="module")
def start(plain, captions, tmp_path_factory):
    """A student of train.py, with its LoRA teacher beside it."""
    out = tmp_path_factory.mktemp("start")
    train.main(strings("--teacher", plain, "--captions", captions, "--out_dir", out, "--max_steps",
                       1, "--batch_size", 4, "--grad_accum", 1, "--lora_rank", 4, "--lora_lr", 0.01,
                       "--guidance", 2, "--student_t", 625, "--device", "cpu"))
    return out / "student"


def strings(*flags):
    return [str(flag) for flag in flags]


@pytest.fixture
def go(plain, captions, clips, tmp_path):
    """Run posttrain.py in this process: (checkpoint, saved student, lines of metrics)."""
    def go(*flags, out=tmp_path / "out", first=("--teacher", plain, "--captions", captions)):
        posttrain.main(strings(*first, "--out_dir", out, "--cache", clips, *SMALL, *flags))
        saved = load_file(out / "student/diffusion_pytorch_model.safetensors")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / "checkpoint.pt", weights_only=True), saved, lines
    return go


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- the teacher's clips -----------------------------------------------------------------------

def test_the_clips_are_the_guided_teacher_s(plain, captions, clips):
    pipe, listed = Pipeline(plain), read_captions(captions)[0]
    made = load_file(clips)["clips"]
    assert made.shape == (8, *pipe.latent_shape) and made.dtype == torch.float16
    eps = guided(denoiser(load_unet(plain)), pipe.encode_text([""]), 2)
    text = pipe.encode_text([caption_at(listed, 0, n) for n in range(4, 8)])
    expected = many_steps(eps, sampling_noise(range(4, 8), 0, pipe.latent_shape), text, pipe, 10)
    torch.testing.assert_close(made[4:].float(), expected, rtol=1e-2, atol=1e-2)


def test_making_clips_goes_on_where_it_stopped(go, clips, tmp_path):
    some, cache = tmp_path / "some.safetensors", load_file(clips)
    flags = ["--objective", "energy", "--patch", 1, "--cache", some, "--max_steps", 1]
    go(*flags, "--clips", 4, out=tmp_path / "a")
    assert len(load_file(some)["clips"]) == 4
    go(*flags, out=tmp_path / "b")
    equal(load_file(some), cache)
    some.write_bytes(clips.read_bytes())
    go(*flags, "--clips", 4, out=tmp_path / "c")        # fewer than there are: all of them stay
    equal(load_file(some), cache)


# ---- a step is the method ----------------------------------------------------------------------

@pytest.fixture
def step(plain, captions, clips):
    """What the first step of a run draws, and the networks it starts from."""
    pipe, listed = Pipeline(plain), read_captions(captions)[0]
    z_T, eps, _, t, _, _ = draw_batch(range(4), 0, pipe.latent_shape, 20, 981, 999)
    places = [caption_at(range(8), 0, n) for n in range(4)]
    return {"pipe": pipe, "z_T": z_T, "eps": eps, "t": t, "unet": load_unet(plain),
            "text": pipe.encode_text([caption_at(listed, 0, n) for n in places]),
            "y": load_file(clips)["clips"][places].float(),
            "z_y": sampling_noise(places, 0, pipe.latent_shape)}


def make(step, z, t=None):
    pipe = step["pipe"]
    return one_step(denoiser(step["unet"]), z, step["text"], pipe.alpha, pipe.sigma, t=t)


def test_energy_and_regression_are_their_losses_of_new_noise_and_of_the_clip_s(go, step, tmp_path):
    more, _ = posttrain.draw_more(range(4), 0, 3, step["pipe"].latent_shape, 0, 1)
    x = torch.stack([make(step, z) for z in more])
    line = go("--objective", "energy", "--samples", 3, "--patch", 2)[2][0]
    assert line["energy"] == pytest.approx(energy_loss(x, step["y"], 2).mean().item(), rel=1e-4)
    line = go("--objective", "regression", "--patch", 2, out=tmp_path / "b")[2][0]
    expected = energy_loss(make(step, step["z_y"])[None], step["y"], 2).mean().item()
    assert line["regression"] == pytest.approx(expected, rel=1e-4)


def test_the_feature_loss_compares_clips_of_one_noise_in_the_teacher(go, step):
    pipe, t, eps = step["pipe"], step["t"], step["eps"]
    x, maps = make(step, step["z_y"]), []
    for clip in (x, step["y"]):
        x_t = diffuse(clip, t, eps, pipe.alpha, pipe.sigma)
        maps.append(posttrain.encode(step["unet"], x_t, t, step["text"]))
    expected = sum((a - b).square().mean() for a, b in zip(*maps)).item()
    line = go(*FULL["energy"])[2][0]
    assert line["feature"] == pytest.approx(expected, rel=1e-4)


def test_arc_compares_both_clips_at_one_t_and_noise(go, step, plain):
    pipe, x0, y = step["pipe"], make(step, step["z_T"]).detach(), step["y"]
    torch.manual_seed(0)
    D = posttrain.Discriminator(load_unet(plain), frozen=False)
    more, t = posttrain.draw_more(range(4), 0, 3, pipe.latent_shape, 100, 300)
    assert ((100 <= t) & (t < 300)).all()
    made, real = (diffuse(clip, t, more[0], pipe.alpha, pipe.sigma) for clip in (x0, y))
    score = functools.partial(D, t=t, text=step["text"])
    arc = relativistic_loss(score(made), score(real)).mean()
    d = (relativistic_loss(score(real), score(made)).mean()
         + 0.5 * relativistic_loss(score(real), D(real, t, step["text"].roll(1, 0))).mean()
         + 7e4 * (score(real + 0.05 * more[1]) - score(real)).square().mean()
         + 3e4 * (score(made + 0.05 * more[2]) - score(made)).square().mean())
    d.backward()
    checkpoint, _, (line, _) = go(*ARC, "--contrast", 0.5, "--r1", 7e4, "--r2", 3e4, "--d_t_min",
                                     100, "--d_t_max", 300)
    assert line["arc"] == pytest.approx(arc.item(), rel=1e-4)
    assert line["d"] == pytest.approx(d.item(), rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in D.parameters()]).norm().item()
    assert line["grad_d"] == pytest.approx(norm, rel=1e-3)      # and not the student's part of it
    assert line["d_right"] == pytest.approx((score(real) > score(made)).float().mean().item())
    assert len(checkpoint["weights"]["d"]) == len(list(D.parameters()))


def test_d_hears_the_clip_once_with_the_caption_of_another(go, step, monkeypatch):
    texts, forward = [], posttrain.Discriminator.forward

    def heard(self, x, t, text):
        texts.append(text)
        return forward(self, x, t, text)

    monkeypatch.setattr(posttrain.Discriminator, "forward", heard)
    go(*ARC, "--max_steps", 1)
    made, others = texts
    right, wrong, near_real, near_made = others.chunk(4)
    for text in (made, right, near_real, near_made):
        equal(text, step["text"])
    equal(wrong, step["text"].roll(1, 0))
    assert not torch.equal(wrong, right)


def test_arc_moves_the_student_by_the_gradient_of_its_loss(go, step, plain):
    """The gradient's norm, with D's scores differentiated through the whole student."""
    pipe = step["pipe"]
    torch.manual_seed(0)
    D = posttrain.Discriminator(load_unet(plain), frozen=False)
    more, t = posttrain.draw_more(range(4), 0, 3, pipe.latent_shape, 50, 700)
    x0 = make(step, step["z_T"])
    made, real = (diffuse(clip, t, more[0], pipe.alpha, pipe.sigma) for clip in (x0, step["y"]))
    relativistic_loss(D(made, t, step["text"]), D(real, t, step["text"])).mean().backward()
    norm = torch.stack([p.grad.norm() for p in step["unet"].parameters()]).norm().item()
    assert go(*ARC)[2][0]["grad_student"] == pytest.approx(norm, rel=1e-3)


def test_vsd_goes_on_with_the_lora_teacher_of_the_run(go, start, step, plain, captions):
    """From the student's own step, with the flags of its run: guidance 2, one step at t = 625."""
    pipe, lora = step["pipe"], load_unet(plain)
    inject(lora, "qv", 4, 128)
    load_lora_state(lora, load_file(start.parent / "lora/adapter_model.safetensors"))
    step["unet"], listed = load_unet(start, ""), read_captions(captions)[0]
    step["text"] = pipe.encode_text([caption_at(listed, 0, n) for n in range(4)])
    null, teacher = pipe.encode_text([""]), denoiser(load_unet(plain))
    vsd = vsd_loss(make(step, step["z_T"], 625), step["t"], step["eps"], step["text"],
                   guided(teacher, null, 2), guided(denoiser(lora), null, 2), pipe.alpha,
                   pipe.sigma).mean().item()
    lines = go("--objective", "vsd", first=["--student", start])[2]
    assert lines[0]["vsd"] == pytest.approx(vsd, rel=1e-3)
    (start.parent / "lora").rename(start.parent / "away")
    try:
        other = go("--objective", "vsd", first=["--student", start], out=start.parent / "b")[2]
    finally:
        (start.parent / "away").rename(start.parent / "lora")
    assert other[0]["vsd"] != pytest.approx(vsd, rel=1e-2)


def test_vsd_from_the_teacher_is_train_py(go, plain, captions, tmp_path):
    """Bit for bit, so that its part here needs no tests of its own."""
    flags = ["--tv_weight", 2, "--lora_drop", 0.6, "--weighting", "dmd", "--lora_weighting", "v",
             "--lora_guidance", 1, "--decay", "--warmup", 2, "--ema", 0.05, "--grad_clip", 0.01]
    checkpoint, saved, lines = go("--objective", "vsd", *flags)
    same = SMALL[:SMALL.index("--clips")] + SMALL[SMALL.index("--clips") + 2:]
    train.main(strings("--teacher", plain, "--captions", captions, "--out_dir", tmp_path / "train",
                       *same, *flags))
    theirs = torch.load(tmp_path / "train/checkpoint.pt", weights_only=True)
    equal(checkpoint["weights"]["student"], list(theirs["student"].values()))
    assert sorted(t.sum().item() for t in checkpoint["weights"]["lora"]) == sorted(
        t.sum().item() for t in theirs["lora"].values())
    equal(saved, load_file(tmp_path / "train/student/diffusion_pytorch_model.safetensors"))
    expected = [json.loads(line) for line in
                (tmp_path / "train/metrics.jsonl").read_text().splitlines()]
    for ours, line in zip(lines, expected, strict=True):
        assert {**ours, "samples_per_s": 0} == {
            key: 0 if key == "samples_per_s" else line[key] for key in ours}


def test_encode_gives_the_unet_s_own_maps(step):
    unet, seen = step["unet"], []
    for block in unet.down_blocks:
        block.resnets[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    x, t = step["z_T"], step["t"]
    maps = posttrain.encode(unet, x, t, step["text"])
    again, seen[:] = list(seen), []
    unet(x, t, step["text"])
    equal(again, seen)
    assert [m.shape[1:] for m in maps] == [(16, 8, 8), (32, 4, 4), (32, 2, 2), (32, 1, 1),
                                           (32, 1, 1)]
    equal(maps[-1], seen[-1])


# ---- the discriminator and the flags -----------------------------------------------------------

@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_d_learns_its_heads_alone(go, plain, frozen):
    before = load_unet(plain)
    learned = go(*ARC, "--d_frozen", int(frozen))[0]["weights"]["d"]
    heads = 5 * 6                               # weight and bias of two convolutions and a norm
    assert len(learned) == heads if frozen else len(learned) > heads
    assert frozen or not torch.equal(learned[0], next(before.parameters()))


def test_the_student_waits_for_d(go, plain):
    checkpoint = go(*ARC, "--d_first", 2, "--weight_decay", 0)[0]
    equal(checkpoint["weights"]["student"], list(p.detach() for p in load_unet(plain).parameters()))


@pytest.mark.parametrize("flag, value, same", [
    ("--seed", 0, True), ("--d_lr", 0.01, False), ("--d_frozen", 1, False), ("--d_first", 1, False),
    ("--student_t", 500, False)])
def test_a_flag_of_arc_does_something(go, flag, value, same, tmp_path):
    """The others are in the equation above."""
    lines = [go(*ARC, *flags, out=tmp_path / str(len(flags)))[2][1]
             for flags in ([], [flag, value])]
    keys = ("arc", "d", "grad_student", "grad_d")
    assert ([lines[0][k] for k in keys] == [lines[1][k] for k in keys]) == same


@pytest.mark.parametrize("flag, values, base, kept", [
    ("--vsd", (0.5, 1), ARC, ("arc", "vsd")), ("--tv_weight", (0, 9), [*ARC, "--vsd", 1], ["vsd"]),
    ("--feature_weight", (0.1, 0.2), ["--objective", "energy"], ("energy", "feature")),
    ("--feature_weight", (0.1, 0.2), ["--objective", "regression"], ["regression"])])
def test_a_weight_changes_the_gradient_and_no_loss(go, flag, values, base, kept, tmp_path):
    a, b = (go(*base, flag, value, "--max_steps", 1, out=tmp_path / str(value))[2][0]
            for value in values)
    assert [a[key] for key in kept] == [b[key] for key in kept]
    assert a["grad_student"] != pytest.approx(b["grad_student"], rel=1e-3)


def test_flags_of_a_student_s_own_run_hold_unless_given(start, clips, captions):
    def parsed(*flags):
        return posttrain.parse_args(strings("--student", start, "--objective", "energy", *flags))

    args = parsed()
    assert (args.guidance, args.student_t, args.lora_rank) == (2, 625, 4)
    assert args.captions == str(captions) and args.out_dir == "out_post" and args.samples == 2
    given = parsed("--guidance", 3, "--captions", captions)
    assert given.guidance == given.lora_guidance == 3 and args.r1 is None


# ---- resuming, processes, memory ---------------------------------------------------------------

@pytest.mark.parametrize("objective", ["arc", "energy"] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ("regression", "vsd")])
def test_2n_steps_equal_n_resume_n(go, start, objective, tmp_path):
    flags = dict(first=["--student", start])
    whole = go(*FULL[objective], "--max_steps", 4, out=tmp_path / "whole", **flags)
    go(*FULL[objective], "--max_steps", 2, **flags)
    parts = go(*FULL[objective], "--max_steps", 4, **flags)
    for key in ("step", "weights", "opts"):
        equal(parts[0][key], whole[0][key])
    equal(parts[1], whole[1])
    for ours, theirs in zip(parts[2], whole[2], strict=True):
        assert {**ours, "samples_per_s": 0} == {**theirs, "samples_per_s": 0}
    UNet2DConditionModel.from_pretrained(tmp_path / "out/student")
    about = json.loads((tmp_path / "out/student/swiftaudio.json").read_text())
    assert about["timestep"] == 625 and about["step"] == 4
    assert about["command"].startswith("python posttrain.py --student ")


DIVIDED = [*ARC, "--vsd", 1, "--contrast", 0, "--max_steps", 1]     # "another caption" is of a part


def same_sums(line, large):
    for key in ("arc", "d", "vsd", "lora", "grad_student", "grad_d", "grad_lora"):
        assert line[key] == pytest.approx(large[key], rel=2e-3), key


def test_accumulation_equals_the_large_batch(go, tmp_path):
    (large,) = go(*DIVIDED)[2]
    (parts,) = go(*DIVIDED, "--batch_size", 2, "--grad_accum", 2, out=tmp_path / "b")[2]
    same_sums(parts, large)


@pytest.mark.slow
def test_two_processes_equal_the_large_batch(go, plain, captions, clips, tmp_path):
    """They have no file of clips yet: one makes it, both learn from it."""
    (large,) = go(*DIVIDED)[2]
    code, output = run("posttrain.py", "--teacher", plain, "--captions", captions, "--out_dir",
                       tmp_path / "c", *SMALL, *DIVIDED, "--batch_size", 2, ranks=2, cwd=tmp_path)
    assert code == 0, output
    torch.testing.assert_close(load_file(tmp_path / "c/clips.safetensors"), load_file(clips),
                               rtol=1e-2, atol=1e-2)
    same_sums(json.loads((tmp_path / "c/metrics.jsonl").read_text()), large)


def test_checkpointing_and_bf16_run(go, tmp_path):
    whole = go(*FULL["arc"])[2]
    saving = go(*FULL["arc"], "--checkpointing", out=tmp_path / "b")[2]
    assert saving[1]["grad_student"] == pytest.approx(whole[1]["grad_student"], rel=1e-3)
    half = go(*FULL["arc"], "--precision", "bf16", out=tmp_path / "c")[2]
    assert half[0]["vsd"] == pytest.approx(whole[0]["vsd"], rel=0.3)


# ---- bad input ---------------------------------------------------------------------------------

def test_refusals(plain, adapter, captions, clips, start, tmp_path):
    base = ["--captions", captions, "--cache", clips, *SMALL]
    teacher, student = ["--teacher", plain], ["--student", start]
    energy = ["--objective", "energy"]
    for flags, says in (
            ([*teacher], ["--objective"]),
            ([*energy], ["--student FOLDER", "--teacher NAME"]),
            ([*energy, *teacher, "--r1", 1], ["--r1 does not go with --objective energy"]),
            ([*ARC, *teacher, "--samples", 2], ["--samples", "--objective arc"]),
            ([*energy, *teacher, "--clips", 3], ["--clips 3", "--batch_size 4"]),
            ([*energy, *teacher, "--patch", 3], ["--patch 3", "8"]),
            ([*ARC, *teacher, "--d_t_min", 700], ["--d_t_min 700", "--d_t_max 700"]),
            ([*energy, *student, "--teacher", adapter], [str(start), str(plain), str(adapter)]),
            ([*energy, *teacher, "--guidance", 3], [str(clips), "guidance 2.0", "3.0"]),
            ([*energy, "--teacher", adapter], [str(clips), "teacher", str(adapter)]),
            ([*energy, *teacher, "--seed", 1], [str(clips), "seed 0"]),
            ([*energy, *teacher, "--vsd", 1, "--feature_weight", 1], ["--vsd 1.0", "--feature_w"]),
            (["--objective", "vsd", *teacher, "--vsd", 0], ["--vsd 0.0", "--objective vsd"]),
            ([*energy, "--student", plain], [str(plain), "pass --teacher"]),
            ([*energy, *teacher, "--clip_steps", 2, "--cache", tmp_path / "n"], ["2 steps", "1"]),
            ([*energy, *teacher, "--cache", captions], [str(captions), "no file of clips"]),
            (["--objective", "vsd", *student, "--lora_rank", 5], ["lora", "--lora_rank"]),
            ([*energy, *teacher, "--out_dir", start.parent], [str(start.parent), "another"])):
        kept = clips.read_bytes()
        refused("posttrain.py", *base, "--out_dir", tmp_path / "out", *flags, cwd=tmp_path,
                says=says)
        assert clips.read_bytes() == kept and not (tmp_path / "out/student").exists()


def test_a_folder_with_another_run_stays_as_it_is(go, tmp_path, plain, captions):
    before = go("--objective", "energy")[1]
    with pytest.raises(InputError, match="holds a run with --objective energy"):
        go("--objective", "regression")
    with pytest.raises(InputError, match="holds a run with --objective energy, this one has None"):
        train.main(strings("--teacher", plain, "--captions", captions, "--out_dir",
                           tmp_path / "out", "--device", "cpu", "--lora_rank", 4))
    equal(load_file(tmp_path / "out/student/diffusion_pytorch_model.safetensors"), before)
