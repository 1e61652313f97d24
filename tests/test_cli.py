"""What all commands share: flags with bounds, errors of one line, files that are always whole."""
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refused
from safetensors.torch import save_file

from extras.cli import InputError, Parser, number, read_json, replace_file, replace_text, run


def parse(type, *flags):
    parser = Parser("A program.\n\nMore about it.")
    parser.add_argument("--flag", type=type, default=1, help="of interest")
    return parser.parse_args(flags).flag


@pytest.mark.parametrize("type, text, value", [
    (number(int), "0", 0), (number(int, 1), "1", 1), (number(int, 1, 5), "5", 5),
    (number(float), "0", 0), (number(float, 0, 1), "1", 1), (number(float), "1e-5", 1e-5),
    (number(float, 0.16, 30), "0.16", 0.16), (number(int), "1" + 20 * "0", 10 ** 20)])
def test_numbers_within_their_bounds(type, text, value):
    assert parse(type, "--flag", text) == value


@pytest.mark.parametrize("type, text, says", [
    (number(int, 1), "0", "--flag: 0 must be at least 1"),
    (number(int), "-1", "--flag: -1 must be at least 0"),
    (number(float, 0, 1), "1.5", "--flag: 1.5 must be between 0 and 1"),
    (number(float, 0, 0.99999), "1", "--flag: 1 must be between 0 and 0.99999"),
    (number(float), "nan", "--flag: nan must be at least 0 and finite"),
    (number(float), "inf", "--flag: inf must be at least 0 and finite"),
    (number(int), "1.5", "--flag: invalid int value: '1.5'"),
    (number(float), "much", "--flag: invalid float value: 'much'"),
    (number(int), "", "--flag: invalid int value: ''")])
def test_numbers_out_of_their_bounds_are_one_line(type, text, says):
    with pytest.raises(InputError) as e:
        parse(type, f"--flag={text}")
    assert str(e.value) == f"error: {says}"


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


def ended(code):
    """Run a few lines in a new interpreter: (exit code, standard output, standard error)."""
    lines = "from extras.cli import *\n" + code
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_a_program_ends_with_one_line_and_exit_code_1():
    assert ended("raise InputError('a.csv: is odd')") == (1, "", "error: a.csv: is odd\n")
    code, out, err = ended("Parser('x').parse_args(['--flag'])")
    assert (code, out) == (1, "") and err == "error: unrecognized arguments: --flag\n"
    code, out, err = ended("run(lambda: open('/no/such/file'))")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "/no/such/file" in err
    assert ended("run(lambda: print('fine'))") == (0, "fine\n", "")


def test_only_what_the_file_system_refuses_is_said_in_one_line():
    """A mistake in the program keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


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

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    def broken(temporary):
        temporary.write_text("half")
        raise ValueError("x" * 1000)

    for save in (full_disk, broken):
        with pytest.raises(InputError, match="a.txt: not saved") as e:
            replace_file(path, save)
        assert len(str(e.value)) < 400
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="not saved"):
        replace_text(tmp_path / "no folder/a.txt", "x")


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
            says=["--batch_size: 0 must be at least 1"])
    refused(script, "--precision", "fp8", cwd=tmp_path, says=["--precision", "fp8", "fp32"])
