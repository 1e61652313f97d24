import json

import numpy as np
import pytest
import torch

from data import InputError, caption_at, draw_batch, order, read_captions, sampling_noise


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


FORMATS = {
    "a.csv": 'id,caption\n1,"a dog, twice"\n2,rain\n3,\n4,rain\n',
    "a.tsv": "id\tcaption\n1\ta dog, twice\n2\train\n3\t\n4\train\n",
    "a.txt": "a dog, twice\nrain\n\nrain\n",
    "a.json": json.dumps([{"id": 1, "caption": "a dog, twice"}, {"caption": "rain"}, {"caption": None}, {"caption": "rain"}]),
    "b.json": json.dumps({"captions": ["a dog, twice", "rain", "", "rain"]}),
    "a.jsonl": '{"text": "a dog, twice"}\n{"text": "rain"}\n{"text": ""}\n{"text": "rain"}\n',
    "b.jsonl": '"a dog, twice"\n"rain"\n""\n"rain"\n',
    "bom.csv": "\ufeffCaption\r\n\"a dog, twice\"\r\nrain\r\n\" \"\r\nrain\r\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    captions, report = read_captions(write(tmp_path / name, FORMATS[name]))
    assert captions == ["a dog, twice", "rain"]
    assert (report["rows"], report["empty"], report["duplicates"]) == (4, 1, 1)


def test_columns_and_limit(tmp_path):
    path = write(tmp_path / "c.csv", "file,caption_1,caption_2,other\nx,one,two,three\ny,four,five,six\n")
    assert read_captions(path)[0] == ["one", "two", "four", "five"]
    assert read_captions(path, "other")[0] == ["three", "six"]
    assert read_captions(path, limit=3)[0] == ["one", "two", "four"]
    several = write(tmp_path / "c.jsonl", json.dumps({"captions": ["one", "two"]}) + "\n")
    assert read_captions(several)[0] == ["one", "two"]
    quoted = write(tmp_path / "q.csv", 'caption\n"over\ntwo lines"\n')
    assert read_captions(quoted)[0] == ["over two lines"]


@pytest.mark.parametrize("name, content, says", [
    ("missing.csv", None, "no such file"),
    ("empty.csv", "", "no column"),
    ("header.csv", "caption\n", "no caption"),
    ("blank.txt", "\n \n", "no caption"),
    ("wrong.csv", "id,words\n1,rain\n", "words"),
    ("odd.parquet", "x", ".parquet"),
    ("bad.json", "[1,\n2,", "line 2"),
    ("bad.jsonl", '{"text": "a"}\n{"text": \n', "line 2"),
    ("keys.jsonl", '{"a": "b"}\n', "a"),
    ("later.jsonl", '{"text": "b"}\n{"words": "c"}\n', "item 2"),
])
def test_bad_files_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError) as e:
        read_captions(path)
    assert name in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_wrong_column_and_not_utf8(tmp_path):
    with pytest.raises(InputError, match="has no column 'sound'; its columns: id, caption"):
        read_captions(write(tmp_path / "a.csv", FORMATS["a.csv"]), "sound")
    with pytest.raises(InputError, match="line 3 is not UTF-8"):
        read_captions(write(tmp_path / "l.csv", "caption\nrain\ncafé\n", "latin-1"))


def test_an_epoch_holds_every_caption_once():
    captions = [str(i) for i in range(10)]
    first = [caption_at(captions, 0, n) for n in range(10)]
    second = [caption_at(captions, 0, n) for n in range(10, 20)]
    assert sorted(first) == sorted(second) == captions and first != second
    assert not np.array_equal(order(10, 0, 0), order(10, 1, 0))


def test_a_sample_does_not_depend_on_its_batch():
    args = (7, (4, 2, 3), 20, 981, 999)
    whole, alone = draw_batch(range(5, 9), *args), draw_batch([7], *args)
    assert all(torch.equal(w[2:3], a) for w, a in zip(whole, alone))
    z, eps, eps_lora, t, t_lora, u = draw_batch(range(3000), *args)
    assert 20 <= t.min() < 25 and 975 < t.max() <= 980 and t_lora.min() < 5 and 994 < t_lora.max() <= 999
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02 and abs((z * eps).mean()) < 0.02 and abs(u.mean() - 0.5) < 0.03
    assert torch.equal(sampling_noise(3, 1, (2, 2)), sampling_noise(3, 1, (2, 2)))
    assert not torch.equal(sampling_noise(3, 1, (2, 2)), sampling_noise(3, 2, (2, 2)))
