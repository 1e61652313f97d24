"""The model card, and a run's means as TensorBoard's events."""
import json
import shlex
import sys
import types

import pytest
from conftest import refused

import train
from data import InputError
from extras import publish
from extras.publish import write_card


def card(folder, **about):
    """The card's front matter {key: value} and its text, of a student of these facts."""
    facts = {"teacher": "tiny", "step": 480, "command": "python train.py --teacher tiny", **about}
    (folder / "swiftaudio.json").write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    write_card(folder)
    return read_card(folder)


def read_card(folder):
    empty, front, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    assert empty == ""
    return dict(line.split(": ", 1) for line in front.splitlines()), text


@pytest.mark.parametrize("teacher, licence, base, name", [
    ("tiny", "mit", None, "tiny"),
    ("auffusion/auffusion-full-no-adapter", "cc-by-nc-sa-4.0",
     "auffusion/auffusion-full-no-adapter", "auffusion/auffusion-full-no-adapter"),
    ("someone/My-Auffusion-2", "cc-by-nc-sa-4.0", "someone/My-Auffusion-2",
     "someone/My-Auffusion-2"),
    ("someone/model", "other", "someone/model", "someone/model"),
    ("/home/me/models/auffusion-full", "cc-by-nc-sa-4.0", None, "auffusion-full"),
    ("/home/auffusion/my-teacher", "other", None, "my-teacher")])
def test_licence_and_base_model(tmp_path, teacher, licence, base, name):
    front, text = card(tmp_path, teacher=teacher)
    expected = {"license": licence, "base_model": base, "pipeline_tag": "text-to-audio"}
    assert front == {k: v for k, v in expected.items() if v}
    assert f"text-to-audio student of {name}, made" in text
    assert "/home" not in text                              # a folder of this machine says nothing


def test_metrics_and_how_it_was_made(tmp_path):
    _, text = card(tmp_path)
    assert "`python train.py --teacher tiny`, 480 steps" in text
    assert "Metrics: not measured" in text and "python sample.py --student" in text
    write_card(tmp_path, metrics="FD 12.3 on 512 captions")
    _, text = read_card(tmp_path)
    assert "- Metrics: FD 12.3 on 512 captions\n" in text and "not measured" not in text


def test_metrics_stay_until_the_student_goes_on(tmp_path):
    card(tmp_path)
    write_card(tmp_path, metrics="FD 12.3")
    assert "- Metrics: FD 12.3\n" in card(tmp_path, command="a new command")[1]
    assert "Metrics: not measured" in card(tmp_path, step=960)[1]


def test_the_small_decoder_and_letters_of_other_languages(tmp_path):
    assert "decoder" not in card(tmp_path)[1]
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/config.json").write_text("{}")
    _, text = card(tmp_path, command="python train.py --captions 犬.csv")
    assert "- Small decoder: `--decoder fast`\n" in text and "犬.csv" in text


def test_a_student_of_an_older_version_has_no_command(tmp_path):
    (tmp_path / "swiftaudio.json").write_text(json.dumps({"teacher": "tiny", "step": 3}))
    write_card(tmp_path)
    assert "`python train.py`, 3 steps" in read_card(tmp_path)[1]


def test_the_command_in_the_card_of_a_student_can_be_run_again(
        plain, captions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a folder"                             # so that the command needs quotes
    flags = ["--teacher", str(plain), "--captions", str(captions), "--out_dir", str(out),
             "--max_steps", "1", "--batch_size", "2", "--grad_accum", "1", "--lora_rank", "2",
             "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", *flags])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train.py", *flags])     # or -m
    train.main()
    capsys.readouterr()
    publish.main(["card", str(out / "student")])
    assert capsys.readouterr().out == f"{out / 'student/README.md'}\n"
    front, text = read_card(out / "student")
    assert front == {"license": "other", "pipeline_tag": "text-to-audio"}
    command = text.split("Trained: `")[1].split("`, 1 steps")[0]
    program, script, *again = shlex.split(command)
    assert (program, script, again) == ("python", "train.py", flags)
    assert vars(train.parse_args(again)) == vars(train.parse_args(flags))
    about = json.loads((out / "student/swiftaudio.json").read_text("utf-8"))
    assert about["command"] == command


def test_a_readme_that_somebody_wrote_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_bytes(b"hours of writing, \xff")
    with pytest.raises(InputError, match="README.md: would be replaced; move it away"):
        card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"hours of writing, \xff"


def test_what_is_no_student_is_named(tmp_path):
    refused("extras.publish", "card", "nowhere", cwd=tmp_path, says=["nowhere/swiftaudio.json"])
    (tmp_path / "swiftaudio.json").write_text('{"seconds": 2.56}')      # a teacher's
    refused("extras.publish", "card", ".", cwd=tmp_path, says=["is no student of train.py"])
    refused("extras.publish", "cart", ".", cwd=tmp_path, says=["invalid choice: 'cart'"])
    assert [p.name for p in tmp_path.iterdir()] == ["swiftaudio.json"]


# ---- TensorBoard --------------------------------------------------------------------------------

@pytest.fixture
def metrics(tmp_path):
    lines = [{"step": 10, "vsd": 0.5, "vsd_by_t": [0.1, 0.2, 0.3, 0.4]}, {"step": 20, "vsd": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_means_become_events(metrics, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))
            self.add_scalar = lambda *scalar: written.append(scalar)
            self.close = lambda: written.append("closed")

    writer = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    publish.main(["tensorboard", str(metrics)])
    assert written == [(str(metrics), 0), ("vsd", 0.5, 10), ("vsd", 0.25, 20), "closed"]


@pytest.mark.parametrize("error", [ImportError("no tensorboard"), TypeError("Descriptors\ncannot")])
def test_a_missing_or_broken_tensorboard_is_one_line(metrics, monkeypatch, error):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))
    refused("extras.publish", "tensorboard", ".", cwd=metrics,
            says=[type(error).__name__, "pip install tensorboard"])
    assert [p.name for p in metrics.iterdir()] == ["metrics.jsonl"]


def test_a_folder_without_metrics_is_named(tmp_path):
    refused("extras.publish", "tensorboard", "out", cwd=tmp_path,
            says=["out/metrics.jsonl: no such file"])
