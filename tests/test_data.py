"""Caption files in all formats, and randomness that depends on nothing but a sample's number."""
import json

import pytest
import torch

from data import InputError, caption_at, draw_batch, read_captions, sampling_noise


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


LINES = '{"text": "a dog, twice"}\n{"text": "rain"}\n{"text": ""}\n{"text": "rain"}\n'
FORMATS = {                                     # four rows: one is empty, one comes twice
    "a.csv": 'id,caption\n1,"a dog, twice"\n2,rain\n3,\n4,rain\n',
    "a.tsv": "id\tcaption\n1\ta dog, twice\n2\train\n3\t\n4\train\n",
    "a.txt": "a dog, twice\nrain\n\nrain\n",
    "rows.json": json.dumps([{"id": 1, "caption": "a dog, twice"}, {"caption": "rain"},
                             {"caption": None}, {"caption": "rain"}]),
    "strings.json": json.dumps(["a dog, twice", "rain", "", "rain"], indent=1),
    "data.json": json.dumps({"version": 1, "data": [
        {"caption": "a dog, twice"}, {"caption": "rain"}, {"caption": ""}, {"caption": "rain"}]}),
    "lines.json": LINES,
    "blanks.jsonl": LINES.replace("\n", "\r\n\r\n"),
    "bom.csv": '\ufeffCaption\r\n"a dog, twice"\r\nrain\r\n" "\r\nrain\r\n',
    "bom.txt": "\ufeffa dog, twice\rrain\r\r\ufeffrain\r",
    "spaces.csv": 'id, caption\n1, "a dog, twice"\n2, rain\n3, \n4, rain\n',
    "UPPER.CSV": 'ID,CAPTION\n1,"a dog,\ntwice"\n2,rain\n3,\n4,"rain"\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    captions, counts = read_captions(write(tmp_path / name, FORMATS[name]))
    assert captions == ["a dog, twice", "rain"]
    assert counts == {"rows": 4, "not whole": 0, "empty": 1, "duplicates": 1}


def test_columns_and_limit(tmp_path):
    path = write(tmp_path / "c.csv",
                 "file,caption_1,caption_2,other\nx,one,two,three\ny,four,five,six\n")
    assert read_captions(path)[0] == ["one", "two", "four", "five"]
    assert read_captions(path, "other")[0] == ["three", "six"]
    assert read_captions(path, limit=3)[0] == ["one", "two", "four"]
    both = write(tmp_path / "b.csv", "text,caption\none,two\n")
    assert read_captions(both)[0] == ["two"]                # the first of NAMES
    for rows in ('{"tags": ["loud"], "words": "rain"}\n', '{"all": [{"words": "rain"}]}'):
        ending = "jsonl" if "tags" in rows else "json"
        assert read_captions(write(tmp_path / f"r.{ending}", rows), "words")[0] == ["rain"]


@pytest.mark.parametrize("name, content, expected", [
    ("one.txt", "rain", ["rain"]),
    ("one.json", '{"caption": "rain"}', ["rain"]),
    ("list.jsonl", '{"captions": ["one", "two"], "tags": ["x"]}\n', ["one", "two"]),
    ("captions.json", '{"captions": ["one", "two"]}', ["one", "two"]),
    ("described.json", '{"description": "a set", "data": [{"caption": "one"}]}', ["one"]),
    ("coco.json", '{"info": {"year": 1}, "images": [{"id": 1}], "annotations": [{"image_id": 1, '
     '"caption": "one"}], "licenses": []}', ["one"]),
    ("quoted.csv", 'caption\n"over\ntwo  ""lines"""\n', ['over two "lines"']),
    ("quoted.tsv", 'id\tcaption\n1\t"over\r\ntwo"\n2\tsay "hi"\n', ["over two", 'say "hi"']),
    ("brackets.txt", "[music] a dog\n[loud]\n", ["[music] a dog", "[loud]"]),
    ("trailing.csv", "caption,id,\none,1,\n", ["one"])])
def test_oddities(tmp_path, name, content, expected):
    assert read_captions(write(tmp_path / name, content))[0] == expected


@pytest.mark.parametrize("name, content, left_out", [
    ("cat.csv", "id,caption\n1,one\nid,caption\n2,two\n", {"not whole": 1}),
    ("half.csv", "id,youtube_id,start_time,caption\n1,x,30,one\n2,y\n,10,A dog\n3,z,10,two\n",
     {"not whole": 2}),                         # a row of AudioCaps 2.0 broken in two
    ("odd.json", '[{"caption": "one"}, {"caption": NaN}, {"caption": true}, {"caption": 3}, '
     '{"caption": ["two", null]}]', {"empty": 4})])
def test_what_is_no_caption_is_left_out_and_counted(tmp_path, name, content, left_out):
    captions, counts = read_captions(write(tmp_path / name, content))
    assert captions == ["one", "two"]
    assert {k: n for k, n in counts.items() if n and k != "rows"} == left_out


@pytest.mark.parametrize("name, content, says", [
    ("missing.csv", None, "No such file"),
    ("odd.parquet", "x", "unknown ending '.parquet'; use .csv, "),
    ("nul.txt", "a dog\nra\0in\n", "holds NUL bytes"),
    ("blank.txt", "\n \n", "no caption (2 rows read)"),
    ("half.jsonl", '{"text": "a"}\nrain\n', "line 2 is not JSON"),
    # what has no evidence
    ("wrong.csv", "id,words\n1,rain\n",
     "row 1 has ['id', 'words'] but no 'caption'; rename one, or train with --caption_column"),
    ("semi.csv", "id;caption\n1;A dog barks\n", "row 1 has ['id;caption'] but no"),
    ("later.jsonl", '{"text": "b"}\n{"words": "c"}\n', "row 2 has ['words'] but no"),
    ("values.json", '[["Y-abc", "a dog"], ["Ydef", "rain"]]',
     'row 1 is no caption, but ["Y-abc", "a dog"]'),
    ("many.json", json.dumps({f"Y{i}": i for i in range(99)}), "'Y19'] but no"),
    ("two.json", '{"test": [{"caption": "x"}], "train": [{"text": "y"}]}', "of test, train;"),
    ("texts.csv", "id,caption\n1,\"['a dog', 'rain']\"\n", "row 1 holds a list as text, ['a dog',"),
    ("texts.txt", "rain\n[\"a dog's bark\", 'rain']\n", "row 2 holds a list as text"),
    ("none.tsv", "caption\nrain\n[]\n", "row 2 holds a list as text, []; write each"),
    # cells and quotes
    ("comma.csv", "caption\nrain\n\nA dog barks, then a man\n", "row 2 has more cells than the "
     "header, 1; put quotes around text that holds ','"),
    ("open.tsv", 'id\tcaption\n1\train\n2\t"Go! she\n3\ta dog\n', "row 2: a quote is misplaced"),
    ("twice.csv", "caption,caption\nrain,wind\n", "one name twice")])
def test_bad_files_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(FileNotFoundError if content is None else InputError) as e:
        read_captions(path)
    assert name in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_wrong_column_and_not_utf8(tmp_path):
    with pytest.raises(InputError, match="row 1 has .'id', 'caption'.* but no 'sound'"):
        read_captions(write(tmp_path / "a.csv", FORMATS["a.csv"]), "sound")
    with pytest.raises(InputError, match="line 3 is not UTF-8"):
        read_captions(write(tmp_path / "l.csv", "caption\nrain\ncafé\n", "latin-1"))
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        read_captions(write(tmp_path / "u.txt", "rain\n", "utf-16"))


def test_an_epoch_holds_every_caption_once():
    captions = [str(i) for i in range(10)]
    first = [caption_at(captions, 0, n) for n in range(10)]
    second = [caption_at(captions, 0, n) for n in range(10, 20)]
    assert sorted(first) == sorted(second) == captions and first != second
    assert [caption_at(captions, 1, n) for n in range(10)] != first     # of another seed


def test_a_sample_does_not_depend_on_its_batch():
    args = (7, (4, 2, 3), 20, 981, 999)
    whole, alone = draw_batch(range(5, 9), *args), draw_batch([7], *args)
    assert all(torch.equal(w[2:3], a) for w, a in zip(whole, alone, strict=True))
    other = draw_batch([7], 8, *args[1:])
    assert not any(torch.equal(a, b) for a, b in zip(alone, other))


def test_what_is_drawn_is_spread_as_it_should():
    z, eps, eps_lora, t, t_lora, u = draw_batch(range(3000), 7, (4, 2, 3), 20, 981, 999)
    assert 20 <= t.min() < 25 and 975 < t.max() <= 980
    assert t_lora.min() < 5 and 994 < t_lora.max() <= 999
    for x in (z, eps, eps_lora):
        assert x.shape == (3000, 4, 2, 3) and x.dtype == torch.float32
        assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((z * eps).mean()) < 0.02 and abs((z * eps_lora).mean()) < 0.02
    assert abs((eps * eps_lora).mean()) < 0.02
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    _, _, _, t, t_lora, _ = draw_batch(range(64), 7, (1, 1, 1), 5, 7, 1)
    assert set(t.tolist()) == {5, 6} and set(t_lora.tolist()) == {0, 1}     # both ends are drawn


def test_noise_of_clips_has_a_seed_and_a_number():
    z = sampling_noise([3, 0, 3], 1, (2, 50, 50))
    assert z.shape == (3, 2, 50, 50) and torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    assert torch.equal(sampling_noise([3], 1, (2, 50, 50))[0], z[0])
    assert not torch.equal(sampling_noise([3], 2, (2, 50, 50))[0], z[0])
    assert abs(z[0].mean()) < 0.05 and abs(z[0].std() - 1) < 0.05
    drawn = draw_batch([3], 1, (2, 50, 50), 20, 981, 999)[:3]
    assert not any(torch.equal(x[0], z[0]) for x in drawn)      # no clip has training's noise
