"""Scores, their table, lists of captions, and the paper's protocols, with small networks."""
import csv
import json
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import soundfile
import torch
from runs import call

from data import InputError, locked, read_json
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
    call(evaluate.main, *flags)


def refuses(*flags, says):
    message = runs.refuses(go, *flags, says="")
    assert all(word in message for word in says), message


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


# ---- score -------------------------------------------------------------------------------------

def test_recordings_are_perfect_beside_themselves(recordings, here, tf32, capsys):
    """The row says how it was made."""
    go("score", "--generated", recordings, "--reference", recordings, "--out", "new/s")
    assert not any(switch.allow_tf32 for switch in tf32)    # a GPU's default: 10 bits for 23
    row = read_json("new/s/scores.json")
    assert row["FD"] == pytest.approx(0, abs=1e-6) and row["KL"] == pytest.approx(0, abs=1e-3)
    assert row["FAD"] == pytest.approx(0, abs=1e-6) and row["IS"] >= 1 and row["N"] == 12
    about = {"rate": 16000, "seconds": 10, "list": NAMES, "captions": None, "crop_seed": None,
             "CLAP": None, "weights": {kind.file: "0" * 64 for kind in (Cnn14, VGGish)}}
    assert about.items() <= row.items()

    head, line, path = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["N", "FD", "FAD", "KL", "IS", "CLAP", "captions"]
    assert path == ["new/s/scores.json"] and line[1] == "12"
    assert line[4] == f"{row['KL']:.2f}" and line[-2:] == ["-", "-"]


def test_what_is_wrong_is_named_at_once(recordings, here, plain, monkeypatch):
    needed = ("--reference", "none", "--captions", "none.csv", "--out", "out")
    for flags, says in (((), "score"), (("clotho", "--crop_seed", -1), "--crop_seed"),
                        (("clotho", "--which", 0), "--which")):
        refuses(*flags, *needed, says=[says])
    flags = ("--captions", recordings / "list.csv", "--reference", recordings, "--out", "out")
    for command in ("audiocaps", "clotho"):
        refuses(command, *flags, "--guidance", 3, says=["--guidance", "--teacher_steps"])
        refuses(command, *flags, "--student", here, says=[str(here)])
        for ours in ("out/clips", "out/reference"):
            refuses(command, *flags, "--reference", ours, says=[ours, "change --out"])
    for text, says in (("a \ud83d barks", "half a character"), (" ", "row 1 holds no caption"),
                       ("['rain', 'wind']", "row 1 holds a list as text")):
        path = write_lines(here / "list.jsonl", [{"file": NAMES[0], "text": text}])
        refuses("audiocaps", *flags, "--teacher", plain, "--teacher_steps", 1, "--captions", path,
                says=[says])
    path.write_text('"a dog barks"')
    refuses("audiocaps", *flags, "--captions", path, says=["row 1 names no recording"])
    monkeypatch.undo()                                      # the networks themselves
    refuses("score", "--reference", recordings, "--generated", recordings, "--weights", here / "w",
            says=[f"{here}/w/Cnn14", "zenodo", "--download"])
    assert [*here.iterdir()] == [path]


def test_clap_takes_the_prompts_of_the_manifest(recordings, clap, here):
    (here / "made").mkdir()
    for name in NAMES[:2]:
        (here / "made" / name).write_bytes((recordings / name).read_bytes())
    flags = ("score", "--reference", recordings, "--generated", "made", "--clap", clap,
             "--out", ".")
    go(*flags)
    assert read_json("scores.json")["CLAP"] is None

    rows = [{"file": name, "prompt": text, "seed": 0, "k": 0}
            for name, text in zip(NAMES, CAPTIONS[:2])]
    model = Clap(clap, "cpu")
    expected = np.mean([float(model(recordings / row["file"], [row["prompt"]], 10))
                        for row in rows])
    weighted = [rows[0], {**rows[1], "prompt": "(rain:2) falls", "words": rows[1]["prompt"]}]
    for written in (rows, weighted):                    # as of sample.py, and of extras.control
        (here / "made/manifest.json").write_text(json.dumps(written))
        go(*flags)
        assert read_json("scores.json")["CLAP"] == pytest.approx(expected, abs=1e-6)
        assert read_json("scores.json")["list"] == dict(zip(NAMES, CAPTIONS[:2]))

    (here / "made/manifest.json").write_text(json.dumps(rows[:1]))
    refuses(*flags, says=["made/manifest.json", NAMES[1], "without --clap"])


def test_each_score_is_of_its_own_rows_and_network(recordings, here, monkeypatch):
    """FD of embeddings, KL of pairs, IS of the generated, FAD of pooled patches.

    CNN14 hears the first channel less its mean, VGGish the mean of the channels with its DC, as in
    the public evaluation code.
    """
    def load_network(kind, folder, download):
        def network(wav):
            assert wav.shape == (1, 36000)              # of --seconds
            return wav[0, :30].view(10, 3) if kind is VGGish else (wav[:, :5], 9 * wav[:, 5:9])

        return ears(kind, network)

    monkeypatch.setattr(metrics, "load_network", load_network)
    for folder, step in (("real", 1), ("made", 2)):
        (here / folder).mkdir()
        for k, name in enumerate(NAMES):
            left = soundfile.read(recordings / NAMES[k // step], dtype="float32")[0] + 0.25
            soundfile.write(here / folder / name, np.stack([left, 0 * left], 1), 16000, "FLOAT")
    go("score", "--generated", "made", "--reference", "real", "--out", "s", "--seconds", 2.25)
    row = read_json("s/scores.json")
    (r, mixed_r), (m, mixed_m) = (
        [torch.stack([read_audio(f"{folder}/{name}", mix=mix)[:30] for name in NAMES])
         for mix in (False, True)] for folder in ("real", "made"))
    expected = metrics.scores((r[:, :5], 9 * r[:, 5:9]), (m[:, :5], 9 * m[:, 5:9]))
    expected["FAD"] = metrics.frechet(mixed_r.view(-1, 3), mixed_m.view(-1, 3))
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert min(expected.values()) > 0 and row["N"] == 12


# ---- caption lists -----------------------------------------------------------------------------

ID = "abc_12-3_Yz"                                      # as long as AudioSet's
NFC, NFD = (unicodedata.normalize(form, "café.wav") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("file, value", [
    (f"{ID}_30.wav", ID), (f"Y{ID}_30.000_40.000.flac", ID), (f"Y{ID}.mp3", f"{ID}_30.wav"),
    (f"Y{ID}_30.000_40.000.wav", f"{ID}_30.wav"), (f"{ID}_30.5_40.5.wav", f"Y{ID}_30.5"),
    (f"{ID}.WAV", f"/data/Y{ID}.wav"), (f"{ID}_30.wav", f"Y{ID}_30.wav"), ("1.5.wav", "1.5"),
    ("Rain 2.Ogg", "Rain 2.wav"), (" c.wav", " c.wav"), (" c.wav", "c.wav"), ("c.wav", " c.wav"),
    (NFD, NFC), (NFC, NFD), (NFD, NFD), ("c.wav", r"x\y\c.wav"), (r"y\c.wav", r"y\c.wav")])
def test_a_recording_is_found_by_its_name(file, value, here):
    for name in (file, "x y.wav"):
        (here / name).write_bytes(b"")
    path = write_lines(here / "list.jsonl", [{"file": value, "text": "rain"}])
    assert evaluate.match_captions(path, here) == {f"{file.rpartition('.')[0]}.wav": ["rain"]}


@pytest.mark.parametrize("files, value", [
    (["Bird_1.wav"], "Bird_3.wav"), (["Rain_sounds_1.wav"], "Rain_sounds_3.wav"),
    ([f"{ID}_0.wav", f"{ID}_30.wav"], ID), ([f"Y{ID}_3.000_40.000.wav"], f"{ID}_30.wav"),
    (["a.txt"], "a.wav")])
def test_another_recording_is_not_taken_for_it(files, value, here):
    for file in files:
        (here / file).write_bytes(b"")
    path = write_lines(here / "list.jsonl", [{"file": value, "text": "rain"}])
    with pytest.raises(InputError, match=f"holds no recording .*looked for {value}.*.wav, .flac"):
        evaluate.match_captions(path, here)


LISTS = {
    "a.csv": "id,file_name,caption_1,caption_2\nYid01,Yid00.wav,one,two\n"
             "Yid00,Yid01.wav,three,four\n",                   # the ids name other files
    "a.tsv": "name\tcaption\nYid00\tone\nYid00\ttwo\nid01\tthree\nid01\tfour\n",
    "a.json": '[{"f": "Yid00.wav", "caption_1": NaN, "caption_2": "one", "caption_3": "two"},'
              ' {"f": "Yid01.wav", "caption_1": true, "captions_2": ["three", " four "]}]'}


@pytest.mark.parametrize("name", LISTS)
def test_all_kinds_of_lists_are_read(name, recordings, tmp_path):
    (tmp_path / name).write_text(LISTS[name])
    clips = evaluate.match_captions(tmp_path / name, recordings)
    assert clips == {"Yid00.wav": ["one", "two"], "Yid01.wav": ["three", "four"]}


def test_what_is_missing_is_told(recordings, here, capsys):
    names = [NAMES[0], "m1.wav", "m2", "m3", "m4", "m1", "file"]
    rows = ["file,text", *(f"{name},{'rain' if name != 'file' else 'text'}" for name in names), "x"]
    (here / "list.csv").write_text("\n".join(rows))
    evaluate.match_captions("list.csv", recordings)
    assert capsys.readouterr().out == (f"list.csv: N = 1 of 6 clips; 5 without a recording in "
                                       f"{recordings}: m1.wav, m2, m3, ...; 2 rows are not whole\n")


# ---- the paper's protocols ---------------------------------------------------------------------

def test_audiocaps_is_resumed_and_notices_another_system(recordings, plain, here, capsys):
    flags = ("audiocaps", "--captions", recordings / "list.csv", "--reference", recordings,
             "--out", "ac", "--teacher", plain, "--which", 2, "--precision", "fp32")
    go(*flags, "--teacher_steps", 10)
    output = capsys.readouterr().out
    assert f"N = 12 of 13 clips; 1 without a recording in {recordings}: gone_0\n" in output
    head, line = (line.split() for line in output.splitlines()[-3:-1])
    assert line[:2] == ["ac/clips", "12"] and line[-1] == "list.csv" and len(line) == len(head) + 1
    before, row = contents(here / "ac/clips"), read_json("ac/scores.json")
    listed = {clip["file"]: clip["prompt"] for clip in read_json("ac/clips/manifest.json")}
    assert listed == row["list"] == TEXTS
    assert row["captions"] == "list.csv" and row["crop_seed"] is None

    (here / "ac/clips" / NAMES[3]).unlink()
    go(*flags, "--teacher_steps", 10)
    after = contents(here / "ac/clips")
    assert [name for name in before if before[name][1] != after[name][1]] == [NAMES[3]]
    assert read_json("ac/scores.json")["FD"] == pytest.approx(row["FD"], rel=1e-3)
    refuses(*flags, "--teacher_steps", 20, says=["ac/clips", "steps differs"])
    refuses(*flags, "--which", 3, says=["fewer than 4 captions", "--which"])
    assert contents(here / "ac/clips") == after


def test_a_clip_depends_on_its_name_and_prompt_not_on_the_list(recordings, plain, here):
    flags = ("audiocaps", "--reference", recordings, "--teacher", plain,
             "--teacher_steps", 1, "--batch_size", 1, "--precision", "fp32")
    for out, names, changed in (("all", NAMES[:3], ()), ("one", NAMES[2:3], ()),
                                ("all", NAMES[:3], NAMES[2:3])):
        before = contents(here / "all/clips")
        rows = [{"file": name, "text": "rain" if name in changed else name} for name in names]
        go(*flags, "--captions", write_lines(here / "list.jsonl", rows), "--out", out)
    after = contents(here / "all/clips")
    one, = contents(here / "one/clips").values()
    assert before[NAMES[2]][0] == one[0] != before[NAMES[1]][0]
    assert [name for name in before if before[name] != after[name]] == [NAMES[2]]
    assert after[NAMES[2]][0] != one[0]                                 # made anew


def test_whatever_made_a_clip_is_noticed_when_it_changes(recordings, here, broken, monkeypatch):
    rows = [{"file": NAMES[0], "text": "a dog barks"}]
    shutil.copytree(broken / "unet", here / "student")
    (here / "student/swiftaudio.json").write_text(json.dumps({"teacher": str(broken)}))
    flags = ("audiocaps", "--captions", write_lines(here / "one.jsonl", rows), "--reference",
             recordings, "--precision", "fp32", "--out")
    both = ((*flags, "t", "--teacher", broken, "--teacher_steps", 1),
            (*flags, "s", "--student", "student"))
    for flags in both:
        go(*flags)
    before = [contents(here / out / "clips") for out in ("t", "s")]
    weights = "diffusion_pytorch_model.safetensors"
    parts = ("swiftaudio.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
             "text_encoder/config.json", "vae/config.json", "vocoder/config.json",
             "unet/config.json", f"unet/{weights}")
    for path, of in [(broken / "vae" / weights, both),
                     *((broken / name, both[:1]) for name in parts),
                     *((here / "student" / name, both[1:]) for name in ("config.json", weights))]:
        was = path.read_bytes()
        path.write_bytes(was + b"\n" if path.suffix == ".json" else was[:-1] + bytes([was[-1] ^ 1]))
        for flags in of:
            refuses(*flags, says=["/clips", "sha256 differs", "--out"])
        path.write_bytes(was)
    for other in (here / "student/README.md", broken / ".DS_Store", broken / "unet/.DS_Store"):
        other.write_text("no part of it")
    for flags in both:
        go(*flags)
    assert [contents(here / out / "clips") for out in ("t", "s")] == before
    monkeypatch.setattr(evaluate, "CLIPS_VERSION", 2)
    refuses(*both[0], says=["t/clips", "version differs"])


def test_processes_that_make_clips_of_one_folder(plain, here, monkeypatch):
    """Each waits for the other's manifest and adds to it, if they are of one system."""
    args = evaluate.parse_args(["audiocaps", "--captions", "", "--reference", "", "--out", "o",
                                "--teacher", str(plain), "--teacher_steps", "1"])
    system, path = evaluate.open_system(args), here / "manifest.json"
    about = evaluate.generate({"a.wav": "rain"}, here, args, system)
    meanwhile = [{"file": f"{k}.wav", "prompt": "rain", "k": 0, **about} for k in "ab"]
    with ThreadPoolExecutor() as pool:
        for differs in ({}, {"seed": 1}):
            with locked(path):
                this = pool.submit(evaluate.generate, {f"c{differs}": "wind"}, here, args, system)
                wait([this], 1.5)
                meanwhile[1] |= differs
                path.write_text(json.dumps(meanwhile))
            if differs:
                with pytest.raises(InputError, match="another system's clips .seed differs"):
                    this.result()
            else:
                this.result()
                listed = {row["file"]: row["prompt"] for row in read_json(path)}
                assert listed == {"a.wav": "rain", "b.wav": "rain", "c{}": "wind"}


def test_clotho_scores_crops_with_the_caption_that_clap_finds_closest(
        recordings, plain, here, clap):
    with open(here / "list.csv", "w", newline="") as f:
        head = ("file_name", *(f"caption_{k}" for k in range(1, 6)))
        csv.writer(f).writerows([head, *((name, *CAPTIONS) for name in NAMES[:3])])

    def run(out, *flags):
        go("clotho", "--captions", "list.csv", "--reference", recordings,
           "--clap", clap, "--seconds", 2.0, "--teacher", plain, "--teacher_steps", 1,
           "--out", out, *flags)
        return read_json(f"{out}/scores.json")

    def files(out, folder="reference"):
        return {name: content for name, (content, _) in contents(here / out / folder).items()}

    row = run("out")
    assert row["N"] == 3 and row["CLAP"] is not None and row["IS"] is None
    assert row["captions"] == "list.csv" and row["crop_seed"] == 0
    path = here / "out/reference" / NAMES[1]
    whole, crop = soundfile.read(recordings / NAMES[1])[0], soundfile.read(path)[0]
    starts = range(len(whole) - 32000 + 1)
    assert len(crop) == 32000
    assert any(np.array_equal(whole[start:start + 32000], crop) for start in starts)
    cosines = Clap(clap, "cpu")(path, CAPTIONS, 2.0)
    assert row["list"][NAMES[1]] == CAPTIONS[int(cosines.argmax())]
    first = files("out")
    assert run("out") == row and files("out") == first

    # the noise of the clips must not move the recordings that they are scored against
    assert run("noise", "--seed", 1)["list"] == row["list"] and files("noise") == first
    run("moved", "--crop_seed", 1)
    assert files("noise", "clips") != files("out", "clips") == files("moved", "clips")
    assert all(files("moved")[name] != content for name, content in first.items())
    assert read_json("moved/scores.json")["crop_seed"] == 1


@pytest.mark.parametrize("kind", ["MPEG_LAYER_III", "IMA_ADPCM", "PCM_24", "PCM_16", "FLOAT"])
def test_a_crop_loses_nothing(kind, tmp_path):
    ending = ".mp3" if kind == "MPEG_LAYER_III" else ".wav"
    wav = np.sin(np.arange(48000) / 9) / 3
    wav = 3 * np.sign(wav) / 3.1 if ending == ".mp3" else wav           # decodes to above 1
    source = tmp_path / f"a{ending}"
    soundfile.write(source, wav, 16000, kind)
    evaluate.crop(source, tmp_path / "b.wav", SimpleNamespace(seconds=2.0, crop_seed=0))
    whole, crop = (soundfile.read(path)[0] for path in (source, tmp_path / "b.wav"))
    assert len(crop) == 32000
    assert min(np.abs(whole[i:i + 32000] - crop).max() for i in range(len(whole) - 31999)) < 2e-7
