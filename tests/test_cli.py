"""What all commands share: flags with bounds, errors of one line, files that are always whole."""
import errno
import os
import shutil
import stat
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, refused
from safetensors.torch import save_file

from data import InputError, Parser, cli, number, read_json, replace_file, replace_text


def parse(type, *flags):
    parser = Parser("A program.\n\nMore about it.")
    parser.add_argument("--flag", type=type, default=1, help="of interest")
    return parser.parse_args(flags).flag


@pytest.mark.parametrize("type, text, value", [
    (number(int), "0", 0), (number(int, 1), "1", 1), (number(int, 1, 5), "5", 5),
    (number(float), "0", 0), (number(float, 0, 1), "1", 1), (number(float), "1e-5", 1e-5),
    (number(float, 0.16, 30), "0.16", 0.16), (number(int), "1" + 17 * "0", 10 ** 17)])
def test_numbers_within_their_bounds(type, text, value):
    assert parse(type, "--flag", text) == value


@pytest.mark.parametrize("type, text, says", [
    (number(int, 1), "0", "--flag: 0 must be between 1 and 1e+38"),
    (number(int), "-1", "--flag: -1 must be between 0 and 1e+38"),
    (number(float, 0, 1), "1.5", "--flag: 1.5 must be between 0 and 1"),
    (number(float, 0, 0.99999), "1", "--flag: 1 must be between 0 and 0.99999"),
    (number(float), "nan", "--flag: nan must be between 0 and 1e+38"),
    (number(float), "inf", "--flag: inf must be between 0 and 1e+38"),
    (number(int), "1.5", "--flag: invalid int value: '1.5'"),
    (number(float), "much", "--flag: invalid float value: 'much'"),
    (number(int), "", "--flag: invalid int value: ''")])
def test_numbers_out_of_their_bounds_are_one_line(type, text, says):
    with pytest.raises(InputError) as e:
        parse(type, f"--flag={text}")
    assert str(e.value) == says


@pytest.mark.parametrize("flags, says", [
    (["--flag", "1", "--other"], "unrecognized arguments: --other"),
    (["--flag"], "--flag: expected one argument"),
    (["words"], "unrecognized arguments: words")])
def test_flags_that_are_not_there_are_one_line(flags, says):
    with pytest.raises(InputError) as e:
        parse(int, *flags)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_help_shows_defaults_and_the_first_paragraph(capsys):
    with pytest.raises(SystemExit) as e:
        parse(number(int), "--help")
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert "A program." in said and "More about it" not in said
    assert "of interest (default: 1)" in said


# ---- how a program ends --------------------------------------------------------------------------

def fail(error):
    raise error


@pytest.mark.parametrize("error, line", [
    (InputError("a.csv: is odd"), "error: a.csv: is odd"),
    (FileNotFoundError(2, "No such file or directory", "a.wav"),
     "error: [Errno 2] No such file or directory: 'a.wav'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\n"), "error: CUDA out of memory. Tried"),
    (InputError("Error(s) in loading:\n\tMissing key(s): 'w'.\n"),
     "error: Error(s) in loading: Missing key(s): 'w'.")])
def test_what_the_user_or_the_file_system_did_is_one_line(error, line):
    with pytest.raises(SystemExit) as e:
        cli(lambda: fail(error))
    assert e.value.code == line                             # Python prints it and ends with 1


def test_a_process_ends_with_one_line_and_exit_code_1():
    code = "from data import *\ndef main():\n    raise InputError('犬.csv: is\\n odd')\ncli(main)"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}      # a terminal that lacks the letter
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode().splitlines() == ["error: ?.csv: is odd"]


def test_ctrl_c_ends_in_silence(capsys):
    with pytest.raises(SystemExit) as e:
        cli(lambda: fail(KeyboardInterrupt))
    assert e.value.code == 130 and capsys.readouterr() == ("", "")


def test_the_exit_code_is_the_one_that_main_returns():
    for code in (143, 1):
        with pytest.raises(SystemExit) as e:
            cli(lambda: code)
        assert e.value.code == code
    assert cli(lambda: None) is None and cli(lambda: 0) is None


@pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError])
def test_a_mistake_in_the_program_keeps_its_traceback(error):
    with pytest.raises(error):
        cli(lambda: fail(error("odd")))


def test_an_input_error_can_be_caught():
    """As by who calls load_student() in a notebook: an Exception that ends nothing."""
    assert issubclass(InputError, Exception) and not issubclass(InputError, SystemExit)


# ---- files ---------------------------------------------------------------------------------------

def test_files_that_are_not_json_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"words": "café"}', encoding="utf-8")
    assert read_json(path) == {"words": "café"}
    for content in (b"", b"{", b"caf\xe9"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="a.json: is not JSON") as e:
            read_json(path)
        assert "\n" not in str(e.value)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "one\n")
    replace_text(path, "zwölf\n")
    assert path.read_text(encoding="utf-8") == "zwölf\n"
    weights = tmp_path / "a.safetensors"
    replace_file(weights, lambda temporary: save_file({"w": torch.ones(3)}, temporary))
    assert stat.S_IMODE(weights.stat().st_mode) == 0o644    # safetensors leaves them private
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.txt"]


def test_the_old_file_stays_when_saving_fails(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "before")

    def out_of_space(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(temporary):
        temporary.write_text("half")
        raise ValueError("x" * 1000)

    for save in (out_of_space, broken):
        with pytest.raises(InputError, match="a.txt: not saved") as e:
            replace_file(path, save)
        assert len(str(e.value)) < 400
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="a.txt: not saved .*No such file"):
        replace_text(tmp_path / "no folder/a.txt", "x")
    (tmp_path / "a.txt.tmp").mkdir()                        # in the way, and not ours to remove
    with pytest.raises(InputError, match="a.txt: not saved .*a.txt.tmp"):
        replace_text(path, "after")
    assert path.read_text() == "before"


@pytest.mark.parametrize("free, full", [(0, True), (2**20 - 1, True), (2**30, False)])
def test_a_full_disk_is_named_only_when_it_is_full(tmp_path, monkeypatch, free, full):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    for error in (OSError(errno.ENOSPC, "write failed"), ValueError("unexpected pos 64")):
        with pytest.raises(InputError, match="not saved") as e:
            replace_file(tmp_path / "a.txt", lambda temporary: fail(error))
        assert ("the disk is full" in str(e.value)) is full


def test_an_error_of_several_lines_becomes_one(tmp_path):
    """As torch's own are."""
    def save(temporary):
        raise RuntimeError("[enforce fail]\n  unexpected pos 64")

    with pytest.raises(InputError, match="a.txt: not saved .*enforce fail") as e:
        replace_file(tmp_path / "a.txt", save)
    assert "\n" not in str(e.value)


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "before")

    def save(temporary):
        temporary.write_text("after")
        assert path.read_text() == "before" and temporary != path

    replace_file(path, save)
    assert path.read_text() == "after"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_the_commands_complain_in_one_line(script, tmp_path):
    refused(script, "--no_such_flag", cwd=tmp_path, says=["--no_such_flag"])
    refused(script, "--device", "cpu", "--batch_size", "0", cwd=tmp_path,
            says=["--batch_size: 0 must be between 1 and 1e+38"])
    refused(script, "--precision", "fp8", cwd=tmp_path, says=["--precision", "fp8", "fp32"])
