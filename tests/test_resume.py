"""Nothing is ever lost: stopped and killed runs, disks and displays, other runs, bad input."""
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import refused, started
from filelock import FileLock
from runs import change_teacher, curves, edit, metrics, read_checkpoint, result, same

import model
import train
from data import InputError
from model import load_unet

pytestmark = pytest.mark.usefixtures("loaded_once")
LONG = ["--max_steps", 10 ** 6, "--save_every", 10 ** 6]


@pytest.fixture
def half(one_step_run, tmp_path):
    """A copy of a run of one step, to go on from or to damage."""
    return shutil.copytree(one_step_run, tmp_path / "half")


@pytest.fixture
def goes_on(go, two_step_run):
    """Go on with a half run: it must become the whole one, bit for bit."""
    def goes_on(out, *flags):
        same(go(out, *flags), result(two_step_run))
        assert curves(out) == curves(two_step_run) and not list(out.rglob("*.tmp"))

    return goes_on


@pytest.fixture
def stays(one_step_run):
    """A half run must be as it was."""
    def stays(out):
        same(result(out), result(one_step_run))
        assert not list(out.rglob("*.tmp"))

    return stays


@pytest.fixture
def handlers():
    """Whether those of train.STOP are as they were; afterwards they are."""
    inherited = {n: signal.getsignal(n) for n in train.STOP}
    for n in (n for n in inherited if inherited[n] == signal.SIG_IGN):     # by a shell's &, nohup
        signal.signal(n, signal.SIG_DFL)
    before = {n: signal.getsignal(n) for n in train.STOP}
    yield lambda: {n: signal.getsignal(n) for n in train.STOP} == before
    for n, handler in inherited.items():
        signal.signal(n, handler)


def during_a_step(monkeypatch, do):
    """Call do() in each step, before the loss of the LoRA teacher."""
    loss = train.lora_loss
    monkeypatch.setattr(train, "lora_loss", lambda *args: do() or loss(*args))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT,
                                    signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_signal_ends_it_behind_the_step_that_is_saved(words, tmp_path, monkeypatch, capsys,
                                                        handlers, number):
    def stop():
        os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL        # a second Ctrl-C ends it

    during_a_step(monkeypatch, stop)
    assert train.main(words(tmp_path, *LONG)) == 128 + number
    assert read_checkpoint(tmp_path)["step"] == 1
    said = capsys.readouterr().out
    assert said.endswith("stopped after step 1, which is saved; the same command goes on\n")
    assert handlers()
    with FileLock(tmp_path / "run.lock", timeout=0):        # which is free again
        pass


def test_a_hangup_is_ignored_with_nohup_and_an_error_puts_the_handlers_back(
        words, go, tmp_path, monkeypatch, handlers):
    during_a_step(monkeypatch, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path)
    assert handlers()
    monkeypatch.undo()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    during_a_step(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert train.main(words(tmp_path)) == 0


@pytest.mark.skipif(os.name != "posix", reason="signals, streams, locales")
def test_what_only_shows_ends_no_run(words, tmp_path, one_step_run):
    """As of `| tee log`, which Ctrl-C ends first, and /dev/full; and a path with no letters.

    While it runs, no other may train there. tests/test_cli.py has streams closed at the start.
    """
    out = shutil.copytree(one_step_run, tmp_path / "č")
    flags = words(out, "--keep_every", 3, *LONG)
    locale = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "cp1252"}
    with open("/dev/full", "w") as full, started(
            out / "student-3/config.json", "train.py", *flags, cwd=tmp_path, env=locale,
            stderr=full) as process:
        process.stdout.close()
        refused("train.py", *flags, cwd=tmp_path, says=[str(out), "another process"])
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 128 + signal.SIGINT
    step = read_checkpoint(out)["step"]
    assert [line["step"] for line in metrics(out)] == [*range(1, step + 1)]
    assert json.loads((out / "student/swiftaudio.json").read_text())["step"] == step


@pytest.mark.parametrize("where", ["checkpoint.pt", "student/diffusion_pytorch_model.safetensors"])
def test_a_kill_between_the_files_of_a_save(go, half, goes_on, monkeypatch, where):
    """The old and the new files are mixed, and the log is, until the same command goes on."""
    replace = Path.replace

    def kill(temporary, path):
        if path == half / where:
            raise KeyboardInterrupt                     # nothing there catches it, like SIGKILL
        return replace(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", kill)
        go(half, "--keep_every", 2)
    assert read_checkpoint(half)["step"] == (1 if where == "checkpoint.pt" else 2)
    assert len(list(half.rglob("*.tmp"))) == 1
    kept = model.load_unet(half, "student-2").state_dict()  # it would not be written again
    (half / "metrics.jsonl").write_bytes(b'{"step": 1}{"step": 1}\n\xff\x00{"step": 2, "vs')
    goes_on(half)
    same(kept, model.load_unet(half, "student").state_dict())


def test_a_full_disk_loses_nothing(words, half, stays):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))     # let no file grow larger
    try:
        refused("train.py", *words(half), cwd=half,
                says=["checkpoint.pt", "not saved, kept as it was"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stays(half)


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_what_some_file_systems_lack_is_not_needed(half, goes_on, monkeypatch, error):
    """Modes of files, locks."""
    for owner, name in ((os, "chmod"), (Path, "chmod"), (FileLock, "acquire")):
        monkeypatch.setattr(owner, name, Mock(side_effect=error))
    goes_on(half)


def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(go, half, one_step_run):
    checkpoint = read_checkpoint(half)
    checkpoint["weights"]["student"][0].fill_(math.nan)
    torch.save(checkpoint, half / "checkpoint.pt")
    damaged = (half / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="steps 2 to 3: .* is not finite; the last.*smaller rates"):
        go(half, "--max_steps", 4, "--log_every", 3)
    assert (half / "checkpoint.pt").read_bytes() == damaged and len(metrics(half)) == 1

    # the rates may change, to get past it
    shutil.copy(one_step_run / "checkpoint.pt", half)
    assert go(half, "--lr", 1e-5, "--lora_lr", 1e-4)["step"] == 2


def test_the_same_teacher_by_another_name_resumes_and_another_does_not(
        go, plain, captions, half, goes_on, broken, monkeypatch):
    monkeypatch.chdir(broken.parent)
    goes_on(half, "--teacher", "./teacher/", "--captions", os.path.relpath(captions))
    monkeypatch.chdir(plain)
    args = train.parse_args(["--init", str(half / "student"), "--captions", str(captions)])
    assert args.teacher == str(broken)

    change_teacher(broken)
    monkeypatch.setattr(train, "load_unet", load_unet)      # read anew
    with pytest.raises(InputError, match="holds a run with teacher's weights .*, not "):
        go(half, "--teacher", broken)


@pytest.mark.parametrize("flags, says", [
    (["--lora_rank", 8], "half: holds a run with lora_rank 4, not 8; start in another folder"),
    (["--seed", 1], "seed 0, not 1"), (["--max_captions", 3], "holds a run with captions' text "),
    (["--batch_size", 8], "captions a step 4, not 8"),
    (["--decay", "--max_steps", 1], "decay False, not True")])
def test_another_run_is_not_mixed_in(go, half, stays, flags, says):
    with pytest.raises(InputError, match=says):
        go(half, *flags)
    stays(half)


def test_with_decay_the_number_of_steps_may_not_change(go, tmp_path):
    go(tmp_path, "--decay", "--max_steps", 1)
    with pytest.raises(InputError, match="max_steps 1, not 2"):
        go(tmp_path, "--decay", "--max_steps", 2)


def test_a_checkpoint_that_is_missing_cut_or_of_something_else(go, half):
    (half / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="holds a student but no checkpoint"):
        go(half)
    for content, says in ((b"cut short", "cannot be read .*; remove it$"),
                          ({"step": 1, "flags": {"lr": 1}, "identity": {}},
                           "with teacher's weights None, not ")):
        torch.save(content, half / "checkpoint.pt")
        with pytest.raises(InputError, match=says):
            go(half)


@pytest.mark.parametrize("flags, says", [
    (("--batch_size", 0), "batch_size"), (("--beta1", 1), "beta1"),
    (("--t_min", 500, "--t_max", 500), "--t_min 500 must be below --t_max 500"),
    (("--eval_clips", 5), "unrecognized arguments: --eval_clips"), (("--captions", "no.csv"), "no"),
    (("--caption_column", "words"), "words"), (("--device", "quantum"), "quantum"),
    (("--tv", "none"), "tv: invalid choice: 'none'")])
def test_impossible_flags(go, tmp_path, flags, says):
    with pytest.raises(FileNotFoundError if "no.csv" in flags else InputError, match=says):
        go(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, dict.fromkeys(["RANK", "WORLD_SIZE", "LOCAL_RANK"], "")])
def test_half_of_what_torchrun_sets(words, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused("train.py", *words(tmp_path / "out"), cwd=tmp_path,
            says=["RANK, WORLD_SIZE, LOCAL_RANK", "start it with torchrun"])
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_fewer_timesteps(go, broken, tmp_path):
    edit(broken / "scheduler/scheduler_config.json", num_train_timesteps=900)
    for flags in (["--t_max", 901], ["--t_max", 900, "--student_t", 900]):
        with pytest.raises(InputError, match="--t_max or --student_t is above 899"):
            go(tmp_path, "--teacher", broken, *flags)
    go(tmp_path, "--teacher", broken, "--t_max", 900, "--student_t", 899, "--max_steps", 1)


def test_captions_that_are_not_read_whole_are_counted(go, tmp_path, capsys):
    path = tmp_path / "c.txt"
    path.write_text("a dog barks\n" + "a dog barks " * 40)
    go(tmp_path, "--captions", path, "--max_steps", 1)
    line, = (x for x in capsys.readouterr().out.splitlines() if x.startswith("warning"))
    assert line.startswith("warning: 1 captions are not read whole, ") and "77 fit" in line
