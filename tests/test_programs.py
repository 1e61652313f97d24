"""Every program that trains: stopped, resumed, cut otherwise or in two processes, it is one run."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import run
from runs import SMALL, alike, curves, metrics, noise, read_checkpoint, same

import train
from model import load_unet
from recipes import arc, consistency, decoder, energy, sounds, vocoder

pytestmark = pytest.mark.usefixtures("loaded_once")

# --contrast: ARC's "another caption" is one of a forward pass, so that a cut changes what it is.
PROGRAMS = {
    "train": [train, "--lora_guidance", 1, "--lora_targets", "attention", "--lora_rank", 4],
    "arc": [arc, "--clips", 8, "--d_first", 0, "--contrast", 0],
    "energy": [energy, "--clips", 8, "--samples", 3], "consistency": [consistency, "--clips", 8],
    "decoder": [decoder, "--clips", 8, "--batch_size", 2, "--device", "cpu"],
    "vocoder": [vocoder, "--clips", 4, "--batch_size", 1, "--device", "cpu"],
    "sounds": [sounds, "--lora_rank", 4]}
FOUR = [*PROGRAMS][:4]                                      # those with the flags of train.py
RATES = {"student": 1e-3, "lora": 1e-3, "d": 5e-4, "decoder": 4e-3, "vocoder": 1e-3,
         "teacher": 1e-3}
NETWORKS = {"vocoder": "model", "sounds": "teacher/unet/diffusion_pytorch_model"}


@pytest.fixture
def words_of(plain, captions, one_step_run, tmp_path):
    """The words of a program's run in a folder, and where that writes."""
    def words_of(name, out, *flags):
        where = ["--teacher", plain, "--captions", captions, "--out_dir", tmp_path / out, *SMALL]
        if name in ("decoder", "vocoder"):
            shutil.copytree(one_step_run, tmp_path / out, dirs_exist_ok=True)
            where = ["--student", tmp_path / out / "student", "--captions", captions]
            out = f"{out}/student/{name}"
        elif name == "sounds":
            (tmp_path / "two").mkdir(exist_ok=True)
            for word in ("low", "high"):
                soundfile.write(tmp_path / f"two/{word}.wav", noise(2000, seed=len(word)), 16000)
                (tmp_path / f"two/{word}.txt").write_text(word)
            at = SMALL.index("--guidance")              # which it has not
            where = [*where[:2], "--sounds", tmp_path / "two", *where[4:6], *SMALL[:at],
                     *SMALL[at + 2:]]
        elif name != "train":
            where += ["--cache", captions.parent / "clips.safetensors"]
        return [str(word) for word in (*where, *PROGRAMS[name][1:], *flags)], tmp_path / out

    return words_of


@pytest.fixture
def go(words_of):
    """Run a program in this process: main()'s exit code, its folder, and what it leaves there."""
    def go(name, *flags, out="out"):
        words, folder = words_of(name, out, *flags)
        code, found = PROGRAMS[name][0].main(words), read_checkpoint(folder)
        file = NETWORKS.get(name, "diffusion_pytorch_model")
        students = {str(path.relative_to(folder)): path.read_bytes()
                    for path in folder.rglob(f"{file}.safetensors")}
        return code, folder, {key: found[key] for key in ("step", "weights", "opts")}, students

    return go


@pytest.mark.parametrize("name", PROGRAMS)
def test_2n_steps_equal_n_a_signal_a_resume_and_n(go, name, monkeypatch):
    """Bit for bit; so does a run that was killed before its student was written."""
    flags, log = ["--max_steps", 3], train.Run.log
    if name in FOUR:
        flags += ["--keep_every", 2, "--ema", 0.9, "--warmup", 8, "--decay"]
    _, folder, whole, students = go(name, *flags, out="whole")
    assert [Path(student).parent.name for student in sorted(students)] == (
        ["student-2", "student"] if name in FOUR else ["unet" if name == "sounds" else ""])

    def log_and_stop(run, **values):
        os.kill(os.getpid(), signal.SIGTERM)                # several times in a step
        log(run, **values)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", log_and_stop)
        code, out, stopped, _ = go(name, *flags)
    assert (code, stopped["step"]) == (143, 1)
    for _ in range(2):
        code, _, parts, found = go(name, *flags)
        assert code == 0 and found == students
        same(parts, whole)
        (out / sorted(found)[-1]).unlink()
    assert name in ("decoder", "vocoder") or curves(out) == curves(folder)
    for opt, state in whole["opts"].items():                # at the last step, of 0 to 2
        factor = 3 / (8 if name in FOUR else 50) * (1 - 2 / 3)
        assert state["param_groups"][0]["lr"] == pytest.approx(RATES[opt] * factor)


@pytest.mark.parametrize("name", FOUR)
def test_accumulation_equals_the_large_batch_and_goes_on_with_it(go, name):
    cut = ["--batch_size", 2, "--grad_accum", 2, "--lr", 1e-4]
    large = go(name, "--lr", 1e-4, out="large")[1]
    go(name, *cut, "--max_steps", 1)
    alike(metrics(go(name, *(cut if name == "arc" else ["--lr", 1e-4]))[1]), metrics(large))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR[1:])
def test_two_processes_equal_the_large_batch(go, words_of, name, tmp_path):
    """They have no file of clips yet: one makes it for both. tests/test_house.py has train.py."""
    large = go(name, "--lr", 1e-4, out="large")[1]
    words, folder = words_of(name, "two", "--batch_size", 2, "--lr", 1e-4,
                             "--cache", tmp_path / "clips")
    code, said = run(f"recipes.{name}", *words, cwd=tmp_path, ranks=2)
    assert code == 0, said
    alike(metrics(folder), metrics(large))


@pytest.mark.parametrize("name, clip, ema", [*((name, 1e-3, 0.05) for name in FOUR),
                                             ("train", 0, 0.999)])
def test_the_first_step_is_adamw_s_with_the_flags_values(go, plain, name, clip, ema):
    """arXiv 1711.05101, algorithm 2, from the gradient that the moments hold; and the average.

    Of that --ema is at most (step + 1) / (step + 10).
    """
    flags = ["--beta1", 0.6, "--beta2", 0.7, "--weight_decay", 5, "--warmup", 2]
    _, out, done, _ = go(name, "--max_steps", 1, *flags, "--grad_clip", clip, "--ema", ema)
    line, = metrics(out)
    for opt, found in done["opts"].items():
        group, = found["param_groups"]
        rate = group["lr"]
        assert rate == RATES[opt] / 2 and (*group["betas"], group["weight_decay"]) == (0.6, 0.7, 5)
        m, v = (torch.cat([state[key].flatten() for state in found["state"].values()])
                for key in ("exp_avg", "exp_avg_sq"))
        gradient, root = m / (1 - 0.6), (v / (1 - 0.7)).sqrt()
        torch.testing.assert_close(root, gradient.abs(), rtol=1e-3, atol=1e-12)
        logged = line[f"grad_{opt}"]                        # before it is clipped
        assert logged > 2e-3
        assert gradient.norm().item() == pytest.approx(clip or logged, rel=1e-2)
        if opt == "student":
            before, after, average = (torch.cat([w.flatten() for w in weights]) for weights in (
                load_unet(plain).parameters(), *(done["weights"][k] for k in ("student", "ema"))))
            torch.testing.assert_close(
                after, before * (1 - rate * 5) - rate * gradient / (root + 1e-8), rtol=1e-4,
                atol=1e-6)
            ema = min(ema, 1 / 10)
            torch.testing.assert_close(average, ema * before + (1 - ema) * after)


@pytest.mark.parametrize("name", ["decoder", "vocoder"])
def test_the_gradients_of_small_parts_are_not_clipped(go, name):
    _, out, done, _ = go(name, "--max_steps", 1)
    m = [state["exp_avg"].norm() / (1 - 0.9) for state in done["opts"][name]["state"].values()]
    norm = torch.stack(m).norm().item()
    assert norm == pytest.approx(metrics(out)[0][f"grad_{name}"], rel=1e-3) and norm > 1
