"""The model card."""
import json
import shlex

import pytest
from conftest import refused

from data import InputError
from extras import publish
from extras.publish import write_card


def card(folder, **about):
    """The card's front matter {key: value} and its text, of a student of these facts."""
    facts = {"teacher": "tiny", "step": 480, "command": "python train.py --teacher tiny", **about}
    facts = {key: value for key, value in facts.items() if value}
    (folder / "swiftaudio.json").write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    return read_card(write_card(folder))


def read_card(path):
    empty, front, text = path.read_text("utf-8").split("---\n", 2)
    assert empty == ""
    return dict(line.split(": ", 1) for line in front.splitlines()), text


@pytest.mark.parametrize("teacher, licence, base, name", [
    ("tiny", "mit", None, "tiny"),
    ("someone/My-Auffusion-2", "cc-by-nc-sa-4.0", "someone/My-Auffusion-2",
     "someone/My-Auffusion-2"),
    ("/home/auffusion/my-teacher/", "other", None, "my-teacher")])
def test_licence_and_base_model(tmp_path, teacher, licence, base, name):
    front, text = card(tmp_path, teacher=teacher)
    expected = {"license": licence, "base_model": base, "pipeline_tag": "text-to-audio"}
    assert front == {k: v for k, v in expected.items() if v}
    assert f"text-to-audio student of {name}, made" in text


def test_metrics_stay_until_the_student_goes_on_and_the_small_decoder_is_told(tmp_path):
    text = card(tmp_path)[1]
    assert "- Metrics: not measured" in text and "decoder" not in text
    write_card(tmp_path, metrics="FD 12.3")
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/config.json").write_text("{}")
    text = card(tmp_path, command="a new command")[1]
    assert "- Metrics: FD 12.3\n" in text and "- Small decoder: `--decoder fast`\n" in text
    assert "- Metrics: not measured" in card(tmp_path, step=960)[1]


def test_absolute_paths_are_cut(tmp_path, capsys):
    words = "--captions=/data/犬.csv", "--out_dir", "out/x", "/home/me/a b/", "a/full"
    text = card(tmp_path, command=shlex.join(["python", "train.py", *words]))[1]
    told = "--captions=./犬.csv", "--out_dir", "out/x", "./a b", "a/full"
    assert f"`{shlex.join(['python', 'train.py', *told])}`, 480 steps" in text
    publish.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"


def test_what_is_no_student_or_would_be_lost_is_named(tmp_path):
    (tmp_path / "README.md").write_bytes(b"hours of writing, \xff")
    with pytest.raises(InputError, match="README.md: would be replaced; move it away"):
        card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"hours of writing, \xff"
    (tmp_path / "swiftaudio.json").write_text('{"seconds": 2.56}')      # a teacher's
    refused("extras.publish", ".", cwd=tmp_path, says=["is no student of train.py"])
