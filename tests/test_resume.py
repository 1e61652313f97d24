"""Nothing is ever lost: resumed, killed and stopped runs, other runs, what can be wrong."""
import contextlib
import json
import math
import os
import resource
import runpy
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run, started
from runs import change_teacher, curves, flags_of, go, metrics, read_checkpoint, result, same

import model
import train
from data import InputError
from losses import lora_loss
from model import load_unet

pytestmark = pytest.mark.usefixtures("loaded_once")

MUCH = ["--ema", 0.9, "--warmup", 3, "--lora_targets", "attention", "--grad_accum", 2,
        "--batch_size", 2]


def test_2n_steps_equal_n_resume_n(plain, captions, tmp_path, copied, one_step_run, two_step_run):
    out = copied(one_step_run)
    same(go(plain, captions, out), result(two_step_run))
    assert curves(out) == curves(two_step_run)
    straight = go(plain, captions, tmp_path / "straight", *MUCH)
    go(plain, captions, tmp_path / "parts", *MUCH, "--max_steps", 1)
    same(go(plain, captions, tmp_path / "parts", *MUCH), straight)
    assert curves(tmp_path / "parts") == curves(tmp_path / "straight")
    if sys.platform == "linux":                             # or a save would need it twice
        assert "checkpoint.pt" not in Path("/proc/self/maps").read_text()


def test_the_same_teacher_by_another_name_resumes(plain, captions, tmp_path, broken, monkeypatch,
                                                  one_step_run, two_step_run):
    monkeypatch.chdir(plain.parent)
    for n, name in enumerate((plain.name, f"./{plain.name}/", broken)):
        out = shutil.copytree(one_step_run, tmp_path / str(n))
        same(go(name, os.path.relpath(captions), out), result(two_step_run))
        about = json.loads((out / "student/swiftaudio.json").read_text())
        teacher, read = Path(about["teacher"]), Path(about["flags"]["captions"])
        assert teacher.is_absolute() and teacher.samefile(name)     # wherever it is read from
        assert read.is_absolute() and read.samefile(captions)

    change_teacher(broken)
    monkeypatch.setattr(train, "load_unet", load_unet)      # read anew
    with pytest.raises(InputError, match="holds a run with .* weights .*, this one has"):
        go(broken, captions, out)


def test_students_are_kept_on_the_way(plain, captions, tmp_path, two_step_run, monkeypatch):
    go(plain, captions, tmp_path, "--max_steps", 1)
    go(plain, captions, tmp_path, "--keep_every", 2, "--max_steps", 3)
    assert [path.name for path in tmp_path.glob("student-*")] == ["student-2"]
    system, half = (model.load_student(str(out), device="cpu", precision="fp32")
                    for out in (tmp_path / "student-2", two_step_run / "student"))
    same(system(["dog"]), half(["dog"]))
    assert json.loads((tmp_path / "student-2/swiftaudio.json").read_text())["step"] == 2
    def full(run, step, log):
        raise InputError("the disk is full")
    monkeypatch.setattr(train, "save_run", full)
    with pytest.raises(InputError, match="disk"):           # a resumed run would not write it again
        go(plain, captions, tmp_path / "full", "--keep_every", 1, "--max_steps", 1)
    assert (tmp_path / "full/student-1").is_dir()
    tiny = train.parse_args(["--teacher", "tiny"])
    assert not 0 < tiny.keep_every <= tiny.max_steps


def test_a_damaged_log_is_written_anew(plain, captions, copied, one_step_run, two_step_run):
    out = copied(one_step_run)
    (out / "metrics.jsonl").write_bytes(b'{"step": 1}{"step": 1}\n\xff\x00')
    go(plain, captions, out)
    assert curves(out) == curves(two_step_run)


LONG = ["--max_steps", 10 ** 6, "--save_every", 10 ** 6]


def test_a_signal_ends_it_behind_a_step_that_is_saved(plain, captions, tmp_path):
    """And while it runs, no other may train in its folder."""
    out = tmp_path / "out"
    flags = flags_of(out, plain, captions)
    with started(out / "metrics.jsonl", "train.py", *flags, *LONG, cwd=tmp_path) as process:
        refused("train.py", *flags, cwd=tmp_path, says=[str(out), "another process trains there"])
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in said, said
    step = read_checkpoint(out)["step"]
    assert said.count(f"stopped after step {step}, which is saved; the same command goes on") == 1
    more = "--max_steps", step + 1
    same(go(plain, captions, out, *more), go(plain, captions, tmp_path / "straight", *more))
    assert curves(out) == curves(tmp_path / "straight")


def test_ctrl_c_in_the_middle_of_a_step(plain, captions, tmp_path, monkeypatch, two_step_run):
    def loss_and_ctrl_c(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return lora_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "lora_loss", loss_and_ctrl_c)
        assert train.main([str(f) for f in flags_of(tmp_path, plain, captions)]) == 130
    assert read_checkpoint(tmp_path)["step"] == 1
    same(go(plain, captions, tmp_path), result(two_step_run))


def test_a_signal_ends_all_processes_behind_the_same_step(plain, captions, tmp_path):
    flags = [*flags_of(tmp_path, plain, captions), *LONG]
    with started(tmp_path / "metrics.jsonl", "train.py", *flags, cwd=tmp_path, ranks=2) as process:
        process.terminate()                                 # one of them
        said = process.communicate(timeout=60)[0]
    assert process.returncode, said
    step = read_checkpoint(tmp_path)["step"]
    assert said.count(f"stopped after step {step}, which is saved") == 1, said
    assert [line["step"] for line in metrics(tmp_path)] == [*range(1, step + 1)]
    about = json.loads((tmp_path / "student/swiftaudio.json").read_text())
    assert about["step"] == step


@pytest.mark.skipif(os.name != "posix", reason="locales")
def test_a_path_that_the_terminal_cannot_write(plain, captions, tmp_path, one_step_run,
                                               two_step_run):
    out = shutil.copytree(one_step_run, tmp_path / "č")
    code, said = run("train.py", *flags_of(out, plain, captions), cwd=tmp_path, new=True,
                     encoding="cp1252",
                     env={"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "cp1252"})
    assert code == 0, said
    same(result(out), result(two_step_run))


class Killed(BaseException):
    """Nothing in the program catches it, like SIGKILL."""


def test_a_kill_between_two_saves_in_the_middle_of_a_line(plain, captions, tmp_path, monkeypatch):
    flags = ["--max_steps", 5, "--save_every", 2, "--decay", "--ema", 0.9]
    out, straight, write = tmp_path / "killed", tmp_path / "straight", train.Log.write

    def write_until_killed(log, step):
        if step == 4:
            with open(log.path, "a") as f:
                f.write('{"step": 4, "vs')
            raise Killed
        return write(log, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Log, "write", write_until_killed)
        go(plain, captions, out, *flags)
    assert read_checkpoint(out)["step"] == 2
    log = (out / "metrics.jsonl").read_text()
    assert log.count("\n") == 3 and log.endswith('"vs')

    same(go(plain, captions, out, *flags), go(plain, captions, straight, *flags))
    assert curves(out) == curves(straight)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("where", ["checkpoint.pt", "student/diffusion_pytorch_model.safetensors"])
def test_a_kill_between_the_files_of_a_save(plain, captions, copied, one_step_run, two_step_run,
                                            monkeypatch, where):
    """The old and the new files are mixed, until the same command goes on."""
    out, replace = copied(one_step_run), os.replace

    def replace_until_killed(temporary, path):
        if str(path) == str(out / where):
            raise Killed
        replace(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_until_killed)
        go(plain, captions, out)
    assert read_checkpoint(out)["step"] == (1 if where == "checkpoint.pt" else 2)
    same(go(plain, captions, out), result(two_step_run))
    assert not list(out.rglob("*.tmp"))


def test_a_finished_run_stays_as_it_is(plain, captions, copied, two_step_run):
    out = copied(two_step_run)
    same(go(plain, captions, out), result(two_step_run))
    assert curves(out) == curves(two_step_run)


def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(plain, captions, copied, one_step_run):
    out = copied(one_step_run)
    checkpoint = read_checkpoint(out)
    checkpoint["weights"]["student"][0].fill_(math.nan)
    torch.save(checkpoint, out / "checkpoint.pt")
    damaged = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="steps 2 to 3: .* is not finite; the last") as e:
        go(plain, captions, out, "--max_steps", 4, "--log_every", 3)
    assert "smaller rates" in str(e.value)
    assert (out / "checkpoint.pt").read_bytes() == damaged and len(metrics(out)) == 1

    # the rates may change, to get past it
    (out / "checkpoint.pt").write_bytes((one_step_run / "checkpoint.pt").read_bytes())
    assert go(plain, captions, out, "--lr", 1e-5, "--lora_lr", 1e-4)["step"] == 2


def test_a_non_finite_first_step_leaves_no_checkpoint(plain, captions, tmp_path):
    with pytest.raises(InputError, match="steps 1 to 2: .* is not finite"):
        go(plain, captions, tmp_path, "--guidance", 1e38, "--log_every", 2)
    assert not list(tmp_path.glob("*/")) and not (tmp_path / "checkpoint.pt").exists()


def test_another_run_is_not_mixed_in(plain, captions, copied, one_step_run):
    out = copied(one_step_run)
    for flags, says in ((["--lora_rank", 8], "holds a run with --lora_rank 4, this one has 8"),
                        (["--seed", 1], "--seed 0"), (["--guidance", 3], "--guidance 2"),
                        (["--t_min", 30], "--t_min 20"), (["--beta1", 0.8], "--beta1 0.9"),
                        (["--ema", 0.5], "--ema 0.0"), (["--tv", "l2"], "--tv l1"),
                        (["--max_captions", 3], "holds a run with captions. text"),
                        (["--decay"], "--decay False, this one has True")):
        with pytest.raises(InputError, match=says):
            go(plain, captions, out, *flags)
    same(result(out), result(one_step_run))

    (out / "checkpoint.pt").rename(out / "moved.pt")
    with pytest.raises(InputError, match="holds a student but no checkpoint"):
        go(plain, captions, out)
    (out / "checkpoint.pt").write_bytes(b"cut short")
    with pytest.raises(InputError, match="cannot be read"):
        go(plain, captions, out)


def test_with_decay_the_number_of_steps_may_not_change(plain, captions, tmp_path):
    go(plain, captions, tmp_path, "--decay", "--max_steps", 1)
    with pytest.raises(InputError, match="--max_steps 1, this one has 2"):
        go(plain, captions, tmp_path, "--decay", "--max_steps", 2)


def change_config(out, change):
    checkpoint = read_checkpoint(out)
    change(checkpoint["config"])
    torch.save(checkpoint, out / "checkpoint.pt")


def test_a_checkpoint_that_lacks_a_flag_is_refused_and_one_with_more_resumes(
        plain, captions, copied, one_step_run, two_step_run):
    out = copied(one_step_run)
    change_config(out, lambda config: config.pop("lora_weighting"))
    with pytest.raises(InputError, match="--lora_weighting None, this one has alpha2") as e:
        go(plain, captions, out)
    assert "\n" not in str(e.value)
    change_config(out, lambda config: config.update(lora_weighting="alpha2", old_flag="x"))
    same(go(plain, captions, out), result(two_step_run))


def test_a_checkpoint_of_an_earlier_version_is_refused_and_its_student_goes_on(
        plain, captions, copied, tmp_path, one_step_run):
    out = copied(one_step_run)
    new = read_checkpoint(out)
    gone = {"captions a step", "captions' text", "teacher's weights", "first student's weights",
            "init", "keep_every"}
    config = {**{k: v for k, v in new["config"].items() if k not in gone}, "ranks": 1}
    torch.save({"step": 1, "config": config, "digest": "0", "ema": [], "student": {}, "lora": {},
                "opt_student": new["opts"]["student"], "opt_lora": {}}, out / "checkpoint.pt")
    with pytest.raises(InputError, match="teacher's weights None, this one has") as e:
        go(plain, captions, out)
    assert "\n" not in str(e.value) and "choose another --out_dir" in str(e.value)
    about = json.loads((out / "student/swiftaudio.json").read_text())
    (out / "student/swiftaudio.json").write_text(json.dumps({**about, "flags": config}))
    assert go(plain, captions, tmp_path / "on", "--init", out / "student")["step"] == 2


@contextlib.contextmanager
def no_file_over(size):
    """Let no file grow larger, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_nothing(plain, captions, copied, one_step_run):
    out = copied(one_step_run)
    with no_file_over(100_000):
        refused("train.py", *flags_of(out, plain, captions), cwd=out.parent,
                says=["checkpoint.pt", "not saved"])
    same(result(out), result(one_step_run))
    assert not list(out.rglob("*.tmp"))


def test_too_little_room_is_said_before_the_first_step(plain, captions, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 ** 5))
    with pytest.raises(InputError, match=f"{tmp_path}: 0.0 GB are free"):
        go(plain, captions, tmp_path)
    assert os.listdir(tmp_path) == ["run.lock"]


# ---- what can be wrong -------------------------------------------------------------------------

@pytest.mark.parametrize("flags, says", [
    (("--batch_size", 0), "batch_size"), (("--max_captions", 0), "max_captions"),
    (("--lr", -1), "lr"), (("--ema", 1), "ema"), (("--beta1", 1), "beta1"),
    (("--lora_drop", 2), "lora_drop: 2 must be between 0 and 1"),
    (("--t_min", 500, "--t_max", 400), "--t_min 500 must be below --t_max 400"),
    (("--t_max", 1001), "t_max"), (("--eval_clips", 5), "unrecognized arguments: --eval_clips"),
    (("--captions", "no.csv"), "no.csv"), (("--caption_column", "words"), "words"),
    (("--device", "quantum"), "quantum"), (("--lora_weighting", "other"), "lora_weighting")])
def test_impossible_flags(plain, captions, tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        go(plain, captions, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_teachers_own_column_is_not_of_other_captions(broken):
    own = {"captions": "a.csv", "caption_column": "x", "max_captions": 9}
    flags = ["--teacher", str(broken)]
    (broken / "swiftaudio.json").write_text(json.dumps({"train": own}))
    args = train.parse_args(flags)
    assert (args.caption_column, args.max_captions) == ("x", 9)
    args = train.parse_args([*flags, "--captions", "c.csv"])
    assert (args.caption_column, args.max_captions) == (None, None)


@pytest.mark.parametrize("own, says", [
    ({"tv": "L1"}, "tv: invalid choice"), ({"lr": -1}, "lr: -1 must be"),
    ({"learning_rate": 1}, "unrecognized arguments: --learning_rate")])
def test_a_teachers_own_defaults_are_parsed_too(broken, own, says):
    (broken / "swiftaudio.json").write_text(json.dumps({"train": own}))
    with pytest.raises(InputError, match=says) as e:
        train.parse_args(["--teacher", str(broken), "--captions", "c.csv"])
    assert str(e.value).startswith(str(broken / "swiftaudio.json")) and "\n" not in str(e.value)


@pytest.mark.parametrize("changes, says", [
    ({"num_train_timesteps": 900}, "t_max"),
    ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "alpha_T"),
    ({"prediction_type": "v_prediction"}, "epsilon"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "epsilon")])
def test_a_teacher_that_the_method_cannot_use(broken, captions, tmp_path, changes, says):
    path = broken / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=says) as e:
        go(broken, captions, tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_captions_that_are_not_read_whole_are_counted(captions, tmp_path, capsys):
    path = tmp_path / "c.txt"
    path.write_text("a dog barks\na zyzzyva barks\n" + "a dog barks " * 40)
    flags = ["--captions", path, "--out_dir", tmp_path, "--max_steps", 1, "--batch_size", 1]
    train.main([str(f) for f in ("--teacher", "tiny", *flags)])
    line, = (x for x in capsys.readouterr().out.splitlines() if x.startswith("warning"))
    assert "2" in line.split()


def test_command_line_refusals(plain, captions, tmp_path):
    refused("train.py", "--teacher", plain, cwd=tmp_path, says=["--captions FILE"])
    refused("train.py", "--teacher", "nobody/nothing", "--captions", captions, cwd=tmp_path,
            says=["nobody/nothing", "pass a folder"])
    assert not os.listdir(tmp_path)


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and said.count("\n") <= 70
    for flag in vars(train.parse_args(["--teacher", "tiny"])):
        assert f"--{flag}" in said, flag
