"""The model card."""
import json
import shlex

import pytest

import train
from extras.publish import write_card


def card(folder, **about):
    """The card's front matter {key: value} and its text, of a student of these facts."""
    facts = {"teacher": "tiny", "step": 480, "command": "python train.py --teacher tiny", **about}
    (folder / "swiftaudio.json").write_text(json.dumps(facts))
    write_card(folder)
    return read_card(folder)


def read_card(folder):
    empty, front, text = (folder / "README.md").read_text().split("---\n", 2)
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


def test_a_student_of_an_older_version_has_no_command(tmp_path):
    (tmp_path / "swiftaudio.json").write_text(json.dumps({"teacher": "tiny", "step": 3}))
    write_card(tmp_path)
    assert "`python train.py`, 3 steps" in read_card(tmp_path)[1]


def test_train_writes_it_and_its_command_can_be_run_again(plain, captions, tmp_path):
    out = tmp_path / "a folder"                             # so that the command needs quotes
    flags = ["--teacher", str(plain), "--captions", str(captions), "--out_dir", str(out),
             "--max_steps", "1", "--batch_size", "2", "--grad_accum", "1", "--lora_rank", "2",
             "--device", "cpu"]
    train.main(flags)
    front, text = read_card(out / "student")
    assert front == {"license": "other", "pipeline_tag": "text-to-audio"}
    command = text.split("Trained: `")[1].split("`, 1 steps")[0]
    program, script, *again = shlex.split(command)
    assert (program, script, again) == ("python", "train.py", flags)
    assert vars(train.parse_args(again)) == vars(train.parse_args(flags))
    about = json.loads((out / "student/swiftaudio.json").read_text())
    assert about["command"] == command
