"""What all commands share: flags with bounds, errors of one line, files that are always whole."""
import contextlib
import errno
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data import InputError, Parser, cli, locked, number, replace_file, replace_text


def parse(type, *flags):
    parser = Parser("A program.\n\nMore about it.")
    parser.add_argument("--flag", type=type, default=1, help="of interest")
    return parser.parse_args(flags).flag


@pytest.mark.parametrize("kind, flags, found", [
    (number(int, 1, 5), ["--flag=5"], 5), (number(float), ["--flag", "1e-5"], 1e-5),
    (number(int, 1), ["--flag=0"], "--flag: 0 must be between 1 and 1e+38"),
    (number(float, 0, 0.5), ["--flag=nan"], "--flag: nan must be between 0 and 0.5"),
    (number(int), ["--flag=1.5"], "--flag: invalid int value: '1.5'"),
    (number(int), ["--flag"], "--flag: expected one argument"),
    (number(int), ["--fla=1"], "unrecognized arguments: --fla=1")])
def test_numbers_within_their_bounds_or_one_line(kind, flags, found):
    try:
        assert parse(kind, *flags) == found
    except InputError as e:
        assert str(e) == found


def test_help_shows_defaults_and_the_first_paragraph(capsys):
    with pytest.raises(SystemExit) as e:
        parse(number(int), "--help")
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert "A program." in said and "More about it" not in said
    assert "of interest (default: 1)" in said


def fail(error):
    raise error


@pytest.mark.parametrize("error, code", [
    (FileNotFoundError(2, "No such file or directory", "a.wav"),
     "error: [Errno 2] No such file or directory: 'a.wav'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\n"), "error: CUDA out of memory. Tried"),
    (InputError("Error(s) in loading:\n\tMissing key(s): 'w'.\n"),
     "error: Error(s) in loading: Missing key(s): 'w'."),       # Python prints it and ends with 1
    (KeyboardInterrupt, 130)])
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as e:
        cli(lambda: fail(error))
    assert e.value.code == code and capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as e:
        cli(lambda: 143)                                    # main's own
    assert e.value.code == 143 and cli(lambda: None) is None and cli(lambda: 0) is None
    with pytest.raises(KeyError):                           # a mistake in the program
        cli(lambda: fail(KeyError("odd")))


@pytest.mark.parametrize("streams, shown", [
    ("2>&1", "?\nrain\nerror: ?.csv: is odd\n"), (">&- 2>/dev/full", "")])
def test_nothing_depends_on_what_is_shown(streams, shown, tmp_path):
    """A terminal that lacks the letters, streams that are closed, a full disk."""
    program = ("from data import *\ndef main():\n    print('犬', flush=True)\n"
               "    print('rain', file=sys.stderr)\n"
               f"    Path({str(tmp_path / 'saved')!r}).touch()\n"
               "    raise InputError('犬.csv: is\\n odd')\ncli(main)")
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "program": program}
    done = subprocess.run(f'"{sys.executable}" -c "$program" {streams}', shell=True, cwd=ROOT,
                          env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, shown, "")
    assert (tmp_path / "saved").exists()


def test_the_streams_of_a_notebook_are_its_own(monkeypatch):
    """They have no reconfigure()."""
    said = []
    mine = types.SimpleNamespace(write=said.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", mine)
    cli(lambda: print("rain"))
    assert sys.stdout is mine and said == ["rain", "\n"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path, used = tmp_path / "a.txt", []
    replace_text(path, "before")

    def save(temporary):
        used.append(temporary)
        temporary.write_text("zwölf", encoding="utf-8")
        if len(used) == 1:
            replace_file(path, save)                        # another program, meanwhile
        assert path.read_text() == "before" or len(used) == 2

    replace_file(path, save)
    assert path.read_text(encoding="utf-8") == "zwölf" and list(tmp_path.iterdir()) == [path]
    assert len({path, *used}) == 3


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (RuntimeError("[enforce fail]\n  unexpected pos 64" + "x" * 1000), r"\[enforce fail\] unexp")])
def test_the_old_file_stays_when_saving_fails(tmp_path, error, says):
    path = tmp_path / "a.txt"
    replace_text(path, "before")

    def save(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(InputError, match=f"a.txt: not saved, kept as it was .*{says}") as e:
        replace_file(path, save)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("times, left", [(1, "after"), (2, "before")])
def test_a_rename_that_fails_is_tried_once_more(tmp_path, monkeypatch, times, left):
    """As virus scanners and network drives make it."""
    rename, path, errors = Path.replace, tmp_path / "a.txt", times * [PermissionError(13, "in use")]
    replace_text(path, "before")
    monkeypatch.setattr("data.time.sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", lambda source, target: (
        fail(errors.pop()) if errors else rename(source, target)))
    with (contextlib.nullcontext() if times == 1
          else pytest.raises(InputError, match="a.txt: not saved, kept as it was .*in use")):
        replace_text(path, "after")
    assert path.read_text() == left and list(tmp_path.iterdir()) == [path]


def test_one_at_a_time(tmp_path):
    def enter(path, **how):
        with locked(path, **how):
            order.append("other")

    order = []
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path / "manifest.json"):
            other = pool.submit(enter, tmp_path / "manifest.json")
            wait([other], 0.3)
            order.append("this")
        other.result()
        with locked(tmp_path / "run", wait=False):
            with pytest.raises(InputError, match="another process writes there"):
                pool.submit(enter, tmp_path / "run", wait=False).result()
        pool.submit(enter, tmp_path / "run", wait=False).result()
    assert order == ["this", "other", "other"]
