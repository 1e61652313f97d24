import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from test_metrics import write_clap

from data import InputError
from extras import eval as evaluate
from extras import metrics
from extras.audio import log_mel, read_audio
from extras.metrics import Clap, Cnn14, VGGish, load_classifier
from model import LOG_MAX, LOG_MIN

CAPTIONS = ["a dog barks", "rain falls", "a bell rings", "wind blows", "a cat meows"]
NAMES = [f"Yid{i:02d}.wav" for i in range(12)]
TEXTS = {name: f"{i} dogs bark" for i, name in enumerate(NAMES)}


def go(*flags):
    """Run extras.eval with these flags in this process."""
    return evaluate.main([str(flag) for flag in flags])


def refuses(*flags, says):
    with pytest.raises(InputError) as error:
        go(*flags)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in says), message


def load(path):
    return json.loads(path.read_text())


def contents(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("*.wav")}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twelve clips with AudioSet-like names, and list.csv: AudioCaps' test.csv in small."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = [("audiocap_id", "youtube_id", "start_time", "caption")]
    for i, name in enumerate(NAMES):
        noise = 0.02 * np.random.default_rng(i).standard_normal(40960)
        tone = 0.3 * np.sin(2 * np.pi * (300 + 400 * i) * np.arange(40960) / 16000)
        soundfile.write(folder / name, tone * (np.arange(40960) % 9000 < 6000) + noise, 16000)
        rows += [(k, f"id{i:02d}", 30, TEXTS[name] if k == 2 else f"caption {k}") for k in range(3)]
    rows.append((1, "gone", 0, "no recording of this"))
    with open(folder / "list.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    return write_clap(tmp_path_factory.mktemp("clap"))


def ears(kind, forward):
    network = torch.nn.Module()
    network.forward, network.file, network.sha256 = forward, kind.file, "0" * 64
    return network


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """The tiny world's classifier in CNN14's place, and the samples in VGGish's: both are large."""
    def load_network(kind, folder, download):
        if kind is VGGish:
            return ears(kind, lambda wav: wav[0, :320].view(80, 4))
        classifier = load_classifier()
        return ears(kind, lambda wav: classifier(log_mel(wav, 64).clamp(LOG_MIN, LOG_MAX)))

    monkeypatch.setattr(metrics, "load_network", load_network)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scored(recordings, here):
    """s.json: the recordings scored against themselves."""
    go("score", "--generated", recordings, "--reference", recordings,
       "--out", "new/s")
    return load(here / "new/s/scores.json")


# ---- score and table ---------------------------------------------------------------------------

def test_recordings_are_perfect_beside_themselves_and_the_row_says_how_it_was_made(scored):
    assert scored["N"] == 12 and scored["IS"] >= 1
    assert scored["FD"] == pytest.approx(0, abs=1e-6)
    assert scored["KL"] == pytest.approx(0, abs=1e-3)
    assert scored["FAD"] == pytest.approx(0, abs=1e-6) and scored["CLAP"] is None
    assert scored["rate"] == 16000 and scored["seconds"] == 10
    assert scored["weights"] == {kind.file: "0" * 64 for kind in (Cnn14, VGGish)}
    assert scored["list"] == NAMES
    assert scored["captions"] is None and scored["crop_seed"] is None


@pytest.mark.parametrize("flags", [
    ("score", "--generated"),
    ("audiocaps", "--teacher", "plain", "--teacher_steps", 1, "--precision", "auto", "--captions",
     "one.jsonl", "--out")])
def test_scores_are_taken_in_true_fp32(flags, recordings, plain, here, tf32):
    """With TF32, a GPU's default in convolutions, a network has 10 bits of mantissa for 23."""
    (here / "made").mkdir()
    (here / "made" / NAMES[0]).write_bytes((recordings / NAMES[0]).read_bytes())
    write_lines(here / "one.jsonl", [{"file": NAMES[0], "text": "a dog barks"}])
    flags = [plain if flag == "plain" else flag for flag in flags]
    go(*flags, "made", "--reference", recordings)
    assert not any(switch.allow_tf32 for switch in tf32)


def test_rows_are_side_by_side_where_they_compare(scored, here, capsys):
    for key, value, says in (("N", 11, "N differs (12, 11)"), ("seconds", 5, "seconds differs"),
                             ("crop_seed", 1, "crop_seed differs (None, 1)"),
                             ("weights", {Cnn14.file: "0" * 64}, "weights differs"),
                             ("fad_reads", "first channel", "fad_reads differs"),
                             ("list", ["a.wav"], "list differs"), ("rate", 8000, "rate differs")):
        (here / "t.json").write_text(json.dumps({**scored, key: value}))
        refuses("table", "new/s/scores.json", "t.json", says=["these do not compare", says])
    (here / "t.json").write_text(json.dumps({**scored, "KL": 1.234, "captions": "test.csv"}))
    capsys.readouterr()
    go("table", "new/s/scores.json", "t.json")
    head, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["N", "FD", "FAD", "KL", "IS", "CLAP", "captions"]
    assert first[0] == "new/s/scores.json" and first[-2:] == ["-", "-"]
    assert second[:2] == ["t.json", "12"] and second[4] == "1.23" and second[-1] == "test.csv"


def test_a_table_of_other_files_is_refused(here):
    for content in ("{}", "[1]", '{"N": 12, "FD": 1}'):
        (here / "other.json").write_text(content)
        refuses("table", "other.json", says=["other.json", "was not written by", "extras.eval"])
    refused("extras.eval", "table", "none.json", cwd=here, says=["none.json"])


def test_score_names_what_is_wrong(recordings, here, monkeypatch):
    (here / "made").mkdir()
    (here / "empty").mkdir()
    first = (recordings / NAMES[0]).read_bytes()
    (here / "made" / NAMES[0]).write_bytes(first[:40])
    flags = ("score", "--reference", recordings, "--generated")
    refused("extras.eval", *flags, "made", cwd=here, says=[f"made/{NAMES[0]}", "cannot be read"])
    refuses(*flags, "empty", says=["empty", "no sound file"])
    (here / "made/other.wav").write_bytes(first)
    refuses(*flags, "made", says=["1 of 2 files", "other.wav"])
    refuses(*flags, recordings, "--clap", here / "empty", says=["--clap", "cannot be loaded"])
    monkeypatch.undo()                                  # the networks themselves
    monkeypatch.chdir(here)
    refuses("score", "--reference", recordings, "--generated", recordings, "--weights", ".",
            says=["Cnn14", "zenodo"])


@pytest.mark.parametrize("flags, flag", [
    (("score", "--seconds", 0), "--seconds"), (("score", "--seconds", "nan"), "--seconds"),
    (("score", "--seconds", "inf"), "--seconds"), (("audiocaps", "--which", -1), "--which"),
    (("clotho", "--crop_seed", -1), "--crop_seed"), (("clotho", "--which", 0), "--which"),
    (("audiocaps", "--seed", "x"), "--seed"), ((), "score"), (("compare",), "compare")])
def test_bad_flags_are_refused_at_once(flags, flag, here):
    needed = ("--reference", "none", "--captions", "none.csv", "--out", "out")
    if "score" in flags:
        needed = ("--reference", "none", "--generated", "none")
    refuses(*flags, *(needed if flags else ()), says=[flag])
    assert not list(here.iterdir())


def test_clap_takes_the_prompts_of_the_manifest(recordings, clap, here, capsys):
    (here / "made").mkdir()
    for name in NAMES[:2]:
        (here / "made" / name).write_bytes((recordings / name).read_bytes())
    flags = ("score", "--reference", recordings, "--generated", "made",
             "--clap", clap, "--out", "s")
    go(*flags)
    assert load(here / "s/scores.json")["CLAP"] is None

    rows = [{"file": name, "prompt": text, "seed": 0, "k": 0}
            for name, text in zip(NAMES, CAPTIONS[:2])]
    model = Clap(clap, "cpu")
    expected = np.mean([float(model(recordings / row["file"], [row["prompt"]], 10))
                        for row in rows])
    weighted = [rows[0], {**rows[1], "prompt": "(rain:2) falls", "words": rows[1]["prompt"]}]
    for written in (rows, weighted):                    # as of sample.py, and of extras.control
        (here / "made/manifest.json").write_text(json.dumps(written))
        go(*flags)
        assert load(here / "s/scores.json")["CLAP"] == pytest.approx(expected, abs=1e-6)
        assert load(here / "s/scores.json")["list"] == dict(zip(NAMES, CAPTIONS[:2]))

    (here / "made/manifest.json").write_text(json.dumps(rows[:1]))
    refuses(*flags, says=["made/manifest.json", NAMES[1], "without --clap"])


def test_files_are_cut_to_the_seconds_that_are_asked_for(recordings, here):
    """Of 2.56 s, the last 0.56 s are silent in one folder."""
    (here / "made").mkdir()
    for name in NAMES[:2]:
        wav = soundfile.read(recordings / name)[0] + 0.0
        wav -= wav[:32000].mean()
        wav[32000:] = 0
        soundfile.write(here / "made" / name, wav, 16000, "FLOAT")
    flags = ("score", "--reference", recordings, "--generated", "made",
             "--out", "s", "--seconds")
    found = []
    for seconds in (2, 10):
        go(*flags, seconds)
        found.append(load(here / "s/scores.json")["FD"])
    assert found[0] < 0.1 * found[1]


def test_the_networks_are_read_from_where_weights_says_or_downloaded_there(
        recordings, here, monkeypatch):
    monkeypatch.setattr(metrics, "load_network", lambda kind, *how: pytest.fail(str(how)))
    for more in ([], ["--download"]):
        with pytest.raises(pytest.fail.Exception) as found:
            go("score", "--reference", recordings, "--generated", recordings, "--weights", "w",
               *more)
        assert str(found.value) == str((Path("w"), bool(more)))


# ---- caption lists -----------------------------------------------------------------------------

def test_auffusions_list_is_read_as_it_is_published(recordings, tmp_path, capsys):
    """JSON lines in a file that ends in .json; names with a start time and without a Y."""
    for name in NAMES[:3]:
        target = tmp_path / "recordings" / f"{name[:-4]}_30.wav"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((recordings / name).read_bytes())
    (tmp_path / "recordings/Yid01_30.wav").rename(tmp_path / "recordings/id01_30.wav")
    rows = [{"dataset_name": "AudioCaps", "audio_path": f"/data/audiocaps/data/id{i:02d}_30.wav",
             "text": f"clip {i}"} for i in range(5)]
    path = write_lines(tmp_path / "test_audiocaps.raw.json", rows)
    clips = evaluate.read_clips(str(path), tmp_path / "recordings")
    assert clips == {"Yid00_30.wav": ["clip 0"], "id01_30.wav": ["clip 1"],
                     "Yid02_30.wav": ["clip 2"]}
    assert capsys.readouterr().out.endswith(
        f"N = 3 of 5 clips; 2 without a recording in {tmp_path / 'recordings'}: "
        "/data/audiocaps/data/id03_30.wav, /data/audiocaps/data/id04_30.wav\n")


ID = "abc_12-3_Yz"                                      # as long as AudioSet's


@pytest.mark.parametrize("file, value", [
    (f"Y{ID}.wav", ID), (f"{ID}_30.wav", ID), (f"Y{ID}_30.000_40.000.flac", ID),
    (f"Y{ID}_30.000_40.000.wav", f"{ID}_30.wav"), (f"{ID}_30.5_40.5.wav", f"Y{ID}_30.5"),
    (f"{ID}.WAV", f"/data/Y{ID}.wav"), (f"Y{ID}.mp3", f"{ID}_30.wav"), (f"{ID}.Ogg", f"{ID}.wav"),
    (f"{ID}_30.wav", f"Y{ID}_30.wav"), ("Rain 2.FLAC", "Rain 2.wav")])
def test_the_names_of_mirrors_are_found(file, value, here):
    (here / file).write_bytes(b"")
    write_lines(here / "list.jsonl", [{"file": value, "text": "rain"}])
    assert evaluate.read_clips("list.jsonl", here) == {f"{file.rpartition('.')[0]}.wav": ["rain"]}


@pytest.mark.parametrize("files, value", [
    (["Bird_1.wav"], "Bird_3.wav"), (["Rain_sounds_1.wav"], "Rain_sounds_3.wav"),
    ([f"{ID}_0.wav", f"{ID}_30.wav"], ID), ([f"Y{ID}_3.000_40.000.wav"], f"{ID}_30.wav"),
    (["a.txt"], "a.wav")])
def test_another_recording_is_not_taken_for_it(files, value, here):
    for file in files:
        (here / file).write_bytes(b"")
    write_lines(here / "list.jsonl", [{"file": value, "text": "rain"}])
    refuses("audiocaps", "--captions", "list.jsonl", "--reference", here, "--out", "out",
            says=["holds no recording", value])


def test_clips_without_a_recording_are_named(recordings, here, capsys):
    rows = [{"file": name, "text": "rain"} for name in (NAMES[0], "m1.wav", "m2", "m3", "m4", "m1")]
    evaluate.read_clips(write_lines(here / "list.jsonl", rows), recordings)
    assert capsys.readouterr().out == (f"{here / 'list.jsonl'}: N = 1 of 6 clips; 5 without a "
                                       f"recording in {recordings}: m1.wav, m2, m3, ...\n")


LISTS = {
    "a.csv": "file_name,caption_1,caption_2\nYid00.wav,one,two\nYid01.wav,three,four\n",
    "numbers.csv": "id,file_name,caption_1,caption_2\nYid01,Yid00.wav,one,two\n"
                   "Yid00,Yid01.wav,three,four\n",             # the ids name other files
    "a.tsv": "name\tcaption\nYid00\tone\nYid00\ttwo\nid01\tthree\nid01\tfour\n",
    "a.json": json.dumps({"data": [{"id": "id00", "captions": ["one", "two"]},
                                   {"id": "id01", "captions": ["three", " four "]}]}),
    "a.jsonl": '{"location": "x/Yid00.flac", "text": "one"}\n{"location": "id00", "text": "two"}\n'
               '{"location": "Yid01", "text": "three"}\n{"location": "id01", "text": "four"}\n'}


@pytest.mark.parametrize("name", LISTS)
def test_all_kinds_of_lists_are_read(name, recordings, tmp_path):
    (tmp_path / name).write_text(LISTS[name])
    clips = evaluate.read_clips(str(tmp_path / name), recordings)
    assert clips == {"Yid00.wav": ["one", "two"], "Yid01.wav": ["three", "four"]}


@pytest.mark.parametrize("name, text, says", [
    ("bad.jsonl", '{"location": "Yid00.wav"}\n', ["row 1 holds no caption"]),
    ("bad.jsonl", '{"location": "a", "text": "b"}\n{"location": "a", "text": " "}', ["row 2"]),
    ("bad.jsonl", '{"location": "a"\n', ["line 1 is not JSON"]),
    ("bad.txt", "a dog barks\n", ["row 1 holds no caption"]),
    ("bad.csv", "file,caption\nYid00.wav\n", ["row 1 holds no caption"]),
    ("bad.csv", "youtube_id,caption\nnone,a dog\n", ["holds no recording", "none"]),
    ("bad.xls", "", ["unknown ending"]), ("bad.csv", None, ["no such file"])])
def test_a_bad_list_is_named_with_its_row(name, text, says, recordings, here):
    if text is not None:
        (here / name).write_text(text)
    refuses("audiocaps", "--captions", name, "--reference", recordings, "--out", "out",
            says=[name, *says])
    assert not (here / "out").exists()


# ---- the paper's protocols ---------------------------------------------------------------------

def test_audiocaps_is_resumed_and_notices_another_system(recordings, plain, here, capsys):
    flags = ("audiocaps", "--captions", recordings / "list.csv", "--reference", recordings,
             "--out", "ac", "--teacher", plain, "--which", 2,
             "--precision", "fp32")
    go(*flags, "--teacher_steps", 10)
    output = capsys.readouterr().out
    assert f"N = 12 of 13 clips; 1 without a recording in {recordings}: gone_0\n" in output
    before, row = contents(here / "ac/clips"), load(here / "ac/scores.json")
    assert load(here / "ac/clips/manifest.json")["clips"] == row["list"] == TEXTS

    (here / "ac/clips" / NAMES[3]).unlink()
    go(*flags, "--teacher_steps", 10)
    after, again = contents(here / "ac/clips"), load(here / "ac/scores.json")
    assert [name for name in before if before[name][1] != after[name][1]] == [NAMES[3]]
    for key in ("FD", "FAD", "KL", "IS"):               # a batch of one rounds otherwise
        assert again.pop(key) == pytest.approx(row.pop(key), rel=1e-3)
    assert again == row
    refuses(*flags, "--teacher_steps", 20, says=["ac/clips", "steps differs"])
    refuses(*flags, "--teacher_steps", 10, "--seed", 1, says=["ac/clips", "seed differs"])
    refuses(*flags, "--which", 3, says=["fewer than 4 captions", "--which"])
    assert contents(here / "ac/clips") == after


@pytest.fixture
def one(recordings, here, broken):
    """Flags to make a clip with a teacher that may be broken, and one with its student."""
    write_lines(here / "one.jsonl", [{"file": NAMES[0], "text": "a dog barks"}])
    (here / "student").mkdir()
    for path in (broken / "unet").iterdir():
        (here / "student" / path.name).write_bytes(path.read_bytes())
    about = {"teacher": str(broken), "parameterization": "eps"}
    (here / "student/swiftaudio.json").write_text(json.dumps(about))
    flags = ("audiocaps", "--captions", "one.jsonl", "--reference", recordings, "--precision",
             "fp32", "--out")
    return (*flags, "t", "--teacher", broken, "--teacher_steps", 1), (*flags, "s", "--student",
                                                                      "student")


def test_whatever_made_a_clip_is_noticed_when_it_changes(one, here, broken, monkeypatch):
    for flags in one:
        go(*flags)
    before = [contents(here / out / "clips") for out in ("t", "s")]
    both = ("swiftaudio.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
            "text_encoder/config.json", "vae/config.json", "vocoder/config.json")
    for path, of in [*((broken / name, one) for name in both),
                     (broken / "unet/config.json", one[:1]),
                     (here / "student/swiftaudio.json", one[1:])]:
        was = path.read_text()
        path.write_text(was + "\n")
        for flags in of:
            refuses(*flags, says=["/clips", "sha256 differs", "--out"])
        path.write_text(was)
    for folder, flags in ((broken / "unet", one[0]), (here / "student", one[1])):
        path = folder / "diffusion_pytorch_model.safetensors"
        was = path.read_bytes()
        save_file({k: 2 * v for k, v in load_file(path).items()}, path, {"format": "pt"})
        refuses(*flags, says=["/clips", "sha256 differs", "--out"])
        path.write_bytes(was)
    (here / "student/README.md").write_text("a card")   # no part of it
    for flags in one:
        go(*flags)
    assert [contents(here / out / "clips") for out in ("t", "s")] == before
    monkeypatch.setattr(evaluate, "CLIPS_VERSION", 2)
    refuses(*one[0], says=["t/clips", "version differs"])


def test_of_clips_that_are_not_finite_nothing_is_written(one, here, broken):
    path = broken / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: v * torch.nan for k, v in load_file(path).items()}, path, {"format": "pt"})
    refuses(*one[0], says=["not finite"])
    assert not (here / "t").exists()


def test_vggish_hears_the_mean_of_the_channels_and_its_dc(recordings, here, monkeypatch):
    """As in the public evaluation code; CNN14 hears the first channel less its mean."""
    heard = {}

    def load_network(kind, folder, download):
        def network(wav):
            heard.setdefault(kind, []).append(wav)
            return wav[:, :8] if kind is VGGish else (wav[:, :8], wav[:, :8])

        return ears(kind, network)

    monkeypatch.setattr(metrics, "load_network", load_network)
    left = soundfile.read(recordings / NAMES[0], dtype="float32")[0] + 0.25
    (here / "made").mkdir()
    for n in range(2):
        soundfile.write(here / f"made/{n}.wav", np.stack([left, 0 * left], 1), 16000, "FLOAT")
    go("score", "--generated", "made", "--reference", "made", "--out", "s")
    np.testing.assert_allclose(heard[VGGish][0][0], left / 2, atol=1e-7)
    np.testing.assert_allclose(heard[Cnn14][0][0], left - left.mean(), atol=1e-6)
    assert load(here / "s/scores.json")["FAD"] == pytest.approx(0, abs=1e-6)


def test_each_score_is_of_its_own_rows(recordings, here):
    """FD of embeddings, KL of pairs, IS of the generated, FAD of pooled patches, CLAP's mean."""
    real, made = here / "real", here / "made"
    for folder, step in ((real, 1), (made, 2)):
        folder.mkdir()
        for k, name in enumerate(NAMES):
            (folder / name).write_bytes((recordings / NAMES[k // step]).read_bytes())

    def hear(path, seconds):
        wav = read_audio(path, seconds)[None]
        return wav[:, :5], 9 * wav[:, 5:9], wav[0, :30].view(10, 3)

    prompts = {name: str(k) for k, name in enumerate([*NAMES, "deleted.wav"])}
    clap = lambda path, texts, seconds: torch.tensor([float(texts[0]) * (path.parent == made)])
    args = SimpleNamespace(seconds=2.0, out=here / "s", captions=None, crop_seed=None)
    evaluate.report(made, real, args, (hear, clap, {}), prompts)
    row = load(here / "s/scores.json")
    r, m = (torch.stack([read_audio(folder / name)[:30] for name in NAMES])
            for folder in (real, made))
    expected = metrics.scores((r[:, :5], 9 * r[:, 5:9]), (m[:, :5], 9 * m[:, 5:9]))
    assert row["N"] == 12 and row["CLAP"] == 5.5 and [*row["list"]] == NAMES
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    fad = metrics.frechet(r.view(-1, 3), m.view(-1, 3))
    assert row["FAD"] == pytest.approx(fad, rel=1e-5) and fad > 0


def test_a_row_names_its_clips_and_the_list(recordings, plain, here, capsys):
    rows = [{"audio_path": f"/data/{name}", "text": "rain falls"} for name in NAMES[:2]]
    write_lines(here / "list.raw.json", rows)
    go("audiocaps", "--captions", here / "list.raw.json", "--reference", recordings, "--out", "ac",
       "--teacher", plain, "--teacher_steps", 1)
    row = load(here / "ac/scores.json")
    assert row["captions"] == "list.raw.json" and row["N"] == 2 and row["crop_seed"] is None
    head, line = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert dict(zip(head, line[1:]))["N"] == "2" and head[-1] == "captions"
    assert line[0] == "ac/clips" and line[-1] == "list.raw.json"
    go("table", "ac/scores.json")
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == line[1:]


def test_a_clip_depends_on_its_name_and_prompt_not_on_the_rest_of_the_list(
        recordings, plain, here):
    flags = ("audiocaps", "--reference", recordings, "--teacher", plain,
             "--teacher_steps", 1, "--batch_size", 1, "--precision", "fp32")
    for out, names in (("all", NAMES[:3]), ("one", NAMES[2:3])):
        rows = [{"file": name, "text": f"caption of {name}"} for name in names]
        write_lines(here / f"{out}.jsonl", rows)
        go(*flags, "--captions", here / f"{out}.jsonl", "--out", out)
    clips = [soundfile.read(here / out / "clips" / NAMES[2])[0] for out in ("all", "one")]
    np.testing.assert_array_equal(*clips)
    others = soundfile.read(here / "all/clips" / NAMES[1])[0]
    assert not np.array_equal(clips[0], others)

    before = contents(here / "all/clips")
    changed = [{"file": name, "text": f"caption of {name}"} for name in NAMES[:2]]
    write_lines(here / "all.jsonl", [*changed, {"file": NAMES[2], "text": "rain falls"}])
    go(*flags, "--captions", here / "all.jsonl", "--out", "all")
    after = contents(here / "all/clips")
    assert [name for name in before if before[name] != after[name]] == [NAMES[2]]
    assert before[NAMES[2]][0] != after[NAMES[2]][0]                    # made anew


def test_a_system_that_cannot_be_is_refused_before_anything_is_written(recordings, here, clap):
    flags = ("--captions", recordings / "list.csv", "--reference", recordings, "--clap", clap,
             "--out", "out")
    for command in ("audiocaps", "clotho"):
        refuses(command, *flags, "--guidance", 3, says=["--guidance", "--teacher_steps"])
        refuses(command, *flags, "--student", here, says=[str(here)])
    assert not list(here.iterdir())


@pytest.fixture
def clotho(recordings, plain, here, clap):
    """A function that runs `extras.eval clotho` on three recordings of five captions each."""
    with open(here / "list.csv", "w", newline="") as f:
        rows = [(name, *CAPTIONS) for name in NAMES[:3]]
        head = ("file_name", *(f"caption_{k}" for k in range(1, 6)))
        csv.writer(f).writerows([head, *rows])

    def run(*flags, out="out"):
        go("clotho", "--captions", "list.csv", "--reference", recordings,
           "--clap", clap, "--seconds", 2.0, "--teacher", plain, "--teacher_steps", 1,
           "--out", out, *flags)
        return load(here / out / "scores.json")

    return run


def test_clotho_scores_crops_with_the_caption_that_clap_finds_closest(
        clotho, recordings, here, clap):
    row = clotho()
    assert row["N"] == 3 and row["CLAP"] is not None
    assert row["IS"] is None
    assert row["captions"] == "list.csv" and row["crop_seed"] == 0

    path = here / "out/reference" / NAMES[1]
    whole, crop = soundfile.read(recordings / NAMES[1])[0], soundfile.read(path)[0]
    starts = range(len(whole) - 32000 + 1)
    assert len(crop) == 32000
    assert any(np.array_equal(whole[start:start + 32000], crop) for start in starts)
    cosines = Clap(clap, "cpu")(path, CAPTIONS, 2.0)
    assert row["list"][NAMES[1]] == CAPTIONS[int(cosines.argmax())]

    first = path.read_bytes()
    assert clotho() == row and path.read_bytes() == first


@pytest.mark.parametrize("kind", ["MPEG_LAYER_III", "IMA_ADPCM", "PCM_24", "PCM_16", "FLOAT"])
def test_a_crop_loses_nothing(kind, tmp_path):
    ending, = {"MPEG_LAYER_III": [".mp3"]}.get(kind, [".wav"])
    wav = np.sin(np.arange(48000) / 9) / 3
    wav = 3 * np.sign(wav) / 3.1 if kind == "MPEG_LAYER_III" else wav       # decodes to above 1
    source = tmp_path / f"a{ending}"
    soundfile.write(source, wav, 16000, kind)
    evaluate.crop(source, tmp_path / "b.wav", SimpleNamespace(seconds=2.0, crop_seed=0))
    whole, crop = (soundfile.read(path)[0] for path in (source, tmp_path / "b.wav"))
    assert len(crop) == 32000
    assert min(np.abs(whole[i:i + 32000] - crop).max() for i in range(len(whole) - 31999)) < 2e-7


def test_crops_have_a_seed_of_their_own(clotho, here):
    """The noise of the clips must not move the recordings that they are scored against."""
    def crops(out, folder="reference"):
        return {name: content for name, (content, _) in contents(here / out / folder).items()}

    first = clotho()
    noise = clotho("--seed", 1, out="noise")
    moved = clotho("--crop_seed", 1, out="moved")
    assert crops("noise") == crops("out") and noise["list"] == first["list"]
    assert crops("noise", "clips") != crops("out", "clips") == crops("moved", "clips")
    assert all(crops("moved")[name] != content for name, content in crops("out").items())
    assert moved["crop_seed"] == 1
    go("table", "out/scores.json", "noise/scores.json")
    refuses("table", "out/scores.json", "moved/scores.json",
            says=["crop_seed differs (0, 1)", "same flags"])
