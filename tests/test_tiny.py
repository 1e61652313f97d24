import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import model
import sample
import train
from data import InputError
from extras.metrics import load_classifier
from model import TINY
from recipes import energy
from tiny import ablate, make, score, world


@pytest.fixture
def student(tmp_path):
    """A student that has learned nothing: the teacher's own UNet, in one step."""
    folder = shutil.copytree(TINY / "unet", tmp_path / "out/student")
    about = {"teacher": "tiny", "parameterization": "eps", "seconds": 2.56, "step": 7}
    (folder / "swiftaudio.json").write_text(json.dumps(about))
    return folder


def read(name):
    with open(TINY.parent / name, newline="") as f:
        return [row["caption"] for row in csv.DictReader(f)]


# ---- the world ---------------------------------------------------------------------------------

def test_the_shipped_weights_are_small_and_in_auffusion_s_layout():
    weights = [f for f in TINY.parent.rglob("*") if f.suffix in (".safetensors", ".pt")]
    shipped = [f for f in weights if "build" not in f.parts]
    assert sum(f.stat().st_size for f in shipped) <= 12 * 2 ** 20
    assert {p.name for p in TINY.iterdir()} >= {
        "unet", "vae", "text_encoder", "tokenizer", "scheduler", "vocoder", "model_index.json"}


def test_captions_are_the_world_s_and_held_out_ones_are_new():
    training, held = world.captions()
    texts, held_texts = ([text for text, _, _ in rows] for rows in (training, held))
    assert texts == read("captions.csv") and held_texts == read("heldout.csv")
    assert len(held) == 512 and not set(held_texts) & set(texts)
    assert "a dog barks twice" in texts + held_texts

    def pairs(rows):
        return [frozenset(e[0] for e in events) for _, events, _ in rows if len(events) == 2]

    unseen = {frozenset(pair) for pair in world.UNSEEN}
    assert not set(pairs(training)) & unseen and set(pairs(held)) >= unseen
    assert sum(pair in unseen for pair in pairs(held)) == 128
    assert {"dog", "rain"} not in unseen


def test_rendering_is_a_function_of_the_seed():
    for event, (subjects, _, _, adverbs) in world.EVENTS.items():
        for subject in range(len(subjects)):
            for adverb in adverbs:
                events = ((event, subject, adverb),)
                wav, labels = world.render(np.random.default_rng(1), events, "")
                assert wav.shape == (40960,) and np.isfinite(wav).all()
                assert np.abs(wav).max() == pytest.approx(0.95, abs=1e-3)
                assert [world.LABELS[i] for i in labels] == [f"{event} {adverb}"]
    again, _ = world.render(np.random.default_rng(1), events, "")
    other, _ = world.render(np.random.default_rng(2), events, "")
    assert np.array_equal(wav, again) and not np.array_equal(wav, other)


@pytest.mark.parametrize("join", world.JOINS)
def test_then_keeps_the_halves_apart_and_while_does_not(monkeypatch, join):
    """Of "rain falls heavily then a dog barks once", each event alone, the other one muted."""
    events = (("rain", 0, "heavily"), ("dog", 0, "once"))

    def alone(muted, seed):
        sound = world.SOUNDS[muted]
        with monkeypatch.context() as patch:
            patch.setitem(world.SOUNDS, muted, lambda *args: 0 * sound(*args))
            wav, _ = world.render(np.random.default_rng(seed), events, join)
        return [np.abs(half).max() for half in np.split(wav, 2)]

    rain, dogs = alone("dog", 0), [alone("rain", seed) for seed in range(8)]
    if join in ("followed by", "then"):
        assert rain[0] > 0.9 and rain[1] == 0
        assert all(before == 0 and after > 0.9 for before, after in dogs)
    else:
        assert min(rain) > 0.5                                      # it falls all the time
        assert any(before > 0.9 for before, _ in dogs)              # it may bark at any time
        assert any(after > 0.9 for _, after in dogs)


def test_a_network_is_saved_as_it_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "TEACHER", tmp_path)
    make.save(model.load_unet(TINY), "unet")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "unet" / name).read_bytes() == (TINY / "unet" / name).read_bytes()


# ---- the classifier and the scores -------------------------------------------------------------

def test_the_classifier_knows_the_world():
    rows = score.held_out(512)[:32]                                 # one event each
    _, logits = score.features(load_classifier(), score.real(rows, 9))
    labels = [world.render(np.random.default_rng((9, n)), events, join)[1][0]
              for n, _, events, join in rows]
    assert (logits.argmax(1) == torch.tensor(labels)).float().mean() > 0.9


def test_the_shipped_reference_is_what_the_classifier_hears():
    rows = [row for name in world.LISTS for row in score.held_out(9, name)]
    assert [n for n, *_ in rows] == [
        first + k * 512 // 9 for first in (0, 512, 1024) for k in range(9)]
    heard = score.features(load_classifier(), score.real(rows, score.REFERENCE))
    for shipped, again in zip(score.reference(rows)[:2], heard, strict=True):
        assert shipped.shape[0] == 27 and torch.allclose(shipped, again, atol=2e-2)     # fp16


@pytest.mark.slow
def test_the_shipped_teacher_s_clips_are_what_the_classifier_hears():
    rows = [row for name in world.LISTS for row in score.held_out(3, name)]
    teacher = score.generate(score.load_teacher(25), rows, "teacher", score.TEACHER_SEED)
    heard = score.features(load_classifier(), teacher)[0]
    assert torch.allclose(score.reference(rows)[2], heard, atol=2e-2)


def test_the_later_lists_are_of_the_same_kinds_and_new():
    train, held = world.captions()
    assert world.held_out("first") == held
    taken = {text for text, _, _ in held}
    unseen = [set(pair) for pair in world.UNSEEN]
    kinds = lambda rows: sorted((len(events) == 1, {name for name, *_ in events} in unseen)
                                for _, events, _ in rows)
    for name in ("second", "third"):
        rows = world.held_out(name)
        assert kinds(rows) == kinds(held) and kinds(rows).count((False, True)) == 128
        captions = [text for text, _, _ in rows]
        assert len(set(captions)) == 512 and not set(captions) & taken
        assert not set(captions[32:]) & {text for text, _, _ in train}
        taken |= set(captions)


@pytest.mark.parametrize("name", world.LISTS)
def test_one_kind_of_held_out_captions_keeps_their_numbers(name):
    whole = {n: row for n, *row in score.held_out(512, name)}
    unseen = [set(pair) for pair in world.UNSEEN]
    for kind, number in (("seen", 352), ("unseen", 128)):
        rows = score.held_out(512, name, kind)
        assert len(rows) == number and all(whole[n] == row for n, *row in rows)
        assert {({e for e, *_ in events} in unseen, len(events)) for _, _, events, _ in rows} == {
            (kind == "unseen", 2)}
        assert [n for n, *_ in score.held_out(2, name, kind)] == [rows[0][0], rows[number // 2][0]]


def test_ratios_are_taken_with_and_without_the_floor():
    table = {score.FLOOR_ROW: {"FD": 10.0}, "before": {"FD": 400.0},
             "teacher, 25 steps": {"FD": 20.0, "KL": 2.0, "FD to teacher": 11.0},
             "student": {"FD": 45.0, "KL": 2.4, "FD to teacher": 30.0}}
    assert score.ratios(table) == (
        "student / teacher: FD 2.25, FD above the floor of 10.0 3.50, KL 1.20. "
        "FD to teacher is 19.0 above its floor of 11.0")


def test_the_shipped_rows_are_those_measured_when_the_world_was_built():
    shipped = json.loads((score.HERE / "baselines.json").read_text())
    assert shipped["N"] == 512 and shipped["noise_seeds"] == [0, 1, 2]
    expected = {"real audio, rendered again": [10.6, None, None],
                "teacher, 25 steps": [20.8, 22.9, 18.3],
                "teacher, 1 step": [440.5, 453.1, 445.6]}
    assert list(shipped["systems"]) == list(expected)
    for name, row in shipped["systems"].items():
        for found, value in zip(row["seeds"], expected[name], strict=True):
            assert value is None or found["FD"] == pytest.approx(value, rel=0.02)
        for key in score.DIGITS:
            values = [found[key] for found in row["seeds"]]
            assert row[key] == pytest.approx(np.mean(values))
            assert row["std"][key] == pytest.approx(np.std(values, ddof=1))
    for name in ("second", "third"):
        real, teacher, before = score.shipped_rows(name).values()
        assert list(score.shipped_rows(name)) == list(expected)
        assert 10 < real["FD"] < teacher["FD"] < 30 and 400 < before["FD"] < 550
        assert teacher["FD to teacher"] < real["FD to teacher"] < 30


def test_what_is_shipped_of_the_lists_stands_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "load_teacher", lambda steps: None)
    monkeypatch.setattr(score, "real", lambda rows, seed: torch.tensor([n for n, *_ in rows]))
    monkeypatch.setattr(score, "generate", lambda system, rows, name, seed: torch.tensor(
        [n + seed for n, *_ in rows]))
    monkeypatch.setattr(score, "features", lambda classifier, mels: (
        mels[:, None].expand(-1, 128), 2 * mels[:, None].expand(-1, 28)))
    monkeypatch.setattr(score, "baselines", lambda rows, seeds: {
        "real": dict.fromkeys(score.DIGITS, rows[0][0]), "seeds": dict.fromkeys(
            score.DIGITS, len(seeds))})
    for module in (make, score):
        monkeypatch.setattr(module, "HERE", tmp_path)
    make.stage_baselines()
    heard = load_file(tmp_path / "reference.safetensors")
    for key, first in (("embeddings", 0), ("logits", 0), ("teacher", score.TEACHER_SEED)):
        shipped = load_file(TINY.parent / "reference.safetensors")[key]
        assert heard[key].shape == shipped.shape and heard[key].dtype == shipped.dtype
        expected = (1 + (key == "logits")) * torch.arange(first, first + 1536)
        assert torch.equal(heard[key][:, 0], expected.half())
    old, new = (json.loads((folder / "baselines.json").read_text())
                for folder in (TINY.parent, tmp_path))
    for k, name in enumerate(("systems", "second list", "third list")):
        assert new.pop(name) == {"real": dict.fromkeys(score.DIGITS, 512 * k),
                                 "seeds": dict.fromkeys(score.DIGITS, 1 if k else 3)}
        old.pop(name)
    assert old == new


def test_a_student_is_the_tiny_teacher_s_by_name_or_by_weights(student, plain):
    weights = train.fingerprint(model.load_unet(TINY))
    about = json.loads((student / "swiftaudio.json").read_text())
    for fine, teacher, flags in (
            (True, "gone", {"teacher's weights": weights}), (False, "gone", {}),
            (False, "gone", {"teacher's weights": "0" * 16}), (False, str(plain), {})):
        (student / "swiftaudio.json").write_text(
            json.dumps(about | {"teacher": teacher, "flags": flags}))
        if fine:
            assert score.load_student(student)[1]["teacher"] == teacher
        else:
            with pytest.raises(InputError, match="no student that train.py made of the tiny"):
                score.load_student(student)


@pytest.mark.slow
def test_the_shipped_rows_are_measured_again_alike():
    """Half a minute for real audio, minutes for the teacher."""
    shipped = json.loads((score.HERE / "baselines.json").read_text())
    for name, row in score.baselines(score.held_out(512), [1]).items():
        assert row["FD"] == pytest.approx(shipped["systems"][name]["seeds"][1]["FD"], rel=0.02)


def test_a_student_is_scored_beside_the_shipped_rows_or_those_measured_again(
        student, capsys, monkeypatch):
    """With --all the student that learned nothing scores like the teacher in one step."""
    with monkeypatch.context() as patch:
        patch.setattr(score, "STEPS", 2)
        score.main([str(student), "--clips", "12", "--all"])
    table = json.loads((student.parent / "scores.json").read_text())
    assert (table["clips"], table["list"]) == (12, "first") and list(table["systems"]) == [
        "real audio, rendered again", "teacher, 25 steps", "teacher, 1 step",
        "student after 7 steps"]
    real, _, before, after = table["systems"].values()
    assert after == before and 0 < real["FD"] < before["FD"]
    assert Image.open(student.parent / "spectrograms.png").size == (4 * 400, 6 * 144 + 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == "N = 12 held-out captions FD KL IS FD to teacher".split()
    assert lines[5].split() == ["student", "after", "7", "steps", *score.cells(after)]
    assert lines[5].split()[4:] == [f"{after[k]:.{d}f}" for k, d in score.DIGITS.items()]
    card = (student / "README.md").read_text()
    assert f"student after 7 steps FD {after['FD']:.1f}, KL {after['KL']:.2f}" in card
    assert "12 held-out captions of the tiny world (first list): real" in card

    monkeypatch.setattr(score, "sheet", lambda *args: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(score, "measure", lambda systems, rows, seed: {
        name: {"FD": 48.749, "KL": 2.333, "IS": None, "FD to teacher": 30.1} for name in systems})
    monkeypatch.setattr(score, "sheet", lambda *args: Image.new("RGB", (1, 1)))
    score.main([str(student)])                                      # all 512: the rows are shipped
    shipped = json.loads((score.HERE / "baselines.json").read_text())
    fd_of_teacher = shipped["systems"]["teacher, 25 steps"]["FD"]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1][:3] == ["N", "=", "512"] and shown[1][5:] == "FD KL IS FD to teacher".split()
    assert shown[3][:3] == ["teacher,", "25", "steps"] and shown[3][4] == "+-"
    assert 20 < float(shown[3][3]) < 22 and 2 < float(shown[3][5]) < 3
    assert shown[5] == ["student", "after", "7", "steps", "48.7", "2.33", "-", "30.1"]
    assert shown[6][:5] == ["student", "/", "teacher:", "FD", f"{48.749 / fd_of_teacher:.2f},"]
    assert not any("--all" in row for row in shown)

    for name in ("second", "third"):                                # other rows
        score.main([str(student), "--list", name])
        fd_of_teacher = score.shipped_rows(name)["teacher, 25 steps"]["FD"]
        assert f"student / teacher: FD {48.749 / fd_of_teacher:.2f}," in capsys.readouterr().out
        assert f"tiny world ({name} list): real" in (student / "README.md").read_text()
    score.main([str(student), "--list", "second", "--kind", "unseen"])
    assert "128 held-out captions of the tiny world (second list, unseen pairs of events): " in (
        student / "README.md").read_text()
    found = json.loads((student.parent / "scores.json").read_text())
    assert (found["list"], found["kind"]) == ("second", "unseen")


def test_one_seed_s_row_is_itself_and_several_have_a_spread():
    row = {"FD": 20.0, "KL": 2.0, "IS": None, "FD to teacher": 11.4}
    assert score.summary([row]) == row and score.cells(row) == ["20.0", "2.00", "-", "11.4"]
    rows = [{**row, "FD": fd, "IS": 15.0} for fd in (18.0, 20.0, 25.0)]
    assert score.cells(score.summary(rows)) == ["21.0 +- 3.6", "2.00 +- 0.00", "15.0 +- 0.0",
                                                "11.4 +- 0.0"]


def test_captions_in_the_picture_end_within_their_tile(monkeypatch):
    held = {text: (0, text, events, join) for name in world.LISTS
            for text, events, join in world.held_out(name)}
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    longest = held[max(held, key=draw.textlength)]
    silence = torch.zeros(1, 64, 256)
    monkeypatch.setattr(score, "real", lambda rows, seed: silence)
    monkeypatch.setattr(score, "generate", lambda *args: silence)
    image = np.asarray(score.sheet({"a system": None}, [longest], 0))
    gap = image[24:40, 400 - 8:400 + 8]                             # between two captions
    assert image.shape[1] == 800 and (gap == 255).all() and (image[24:40, 8:390] < 255).any()


def test_diversity_is_the_mean_distance_of_a_caption_s_pairs():
    """Of a system that knows one clip only: nothing."""
    still = score.load_teacher(1)
    still.latents = lambda z_T, text: torch.zeros_like(z_T)
    rows = score.held_out(2)
    found = score.diversity({"still": still}, rows, each=3)
    clips = [(n, *rows[n // 3][1:]) for n in range(6)]
    e, _ = score.features(load_classifier(), score.real(clips, score.DIVERSE))
    pairs = [(e[i] - e[j]).norm() for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))]
    assert found["real audio"] == pytest.approx(float(sum(pairs)) / 6, rel=1e-3)
    assert found["still"] == pytest.approx(0, abs=1e-2) and found["real audio"] > 1


def test_diversity_of_a_student_is_printed(student, capsys, monkeypatch):
    monkeypatch.setattr(score, "STEPS", 2)
    score.main([str(student), "--diversity", "2", "--clips", "4"])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("2 captions, 2 clips each: real audio") and "student / teacher" in line


def test_score_s_flags_reach_what_they_are_for(student, monkeypatch):
    row, asked = dict.fromkeys(score.DIGITS, 1.0), []
    numbers = lambda rows: [n for n, *_ in rows]
    monkeypatch.setattr(score, "measure", lambda systems, rows, seed: asked.append(
        (numbers(rows), seed)) or dict.fromkeys(systems, row))
    monkeypatch.setattr(score, "baselines", lambda rows, seeds: asked.append(
        (numbers(rows), seeds)) or {})
    monkeypatch.setattr(score, "sheet", lambda *args: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(score, "diversity", lambda systems, rows, each, seed: asked.append(
        (numbers(rows), each, seed)) or {"student": 1, "teacher": 2})
    monkeypatch.setattr(score, "load_teacher", lambda steps, **more: asked.append(steps))
    common = [str(student), "--seed", "5"]
    score.main([*common, "--list", "third", "--kind", "unseen", "--clips", "4", "--all"])
    rows = numbers(score.held_out(4, "third", "unseen"))
    assert asked[:2] == [(rows, [5]), (rows, 5)]
    asked.clear()
    score.main([*common, "--list", "second", "--kind", "seen", "--clips", "8", "--diversity", "4"])
    assert asked == [25, (numbers(score.held_out(2, "second", "seen")), 4, 5)]


def test_a_student_s_clips_are_of_the_seed_s_noise_and_at_its_own_t(student):
    about = json.loads((student / "swiftaudio.json").read_text())
    (student / "swiftaudio.json").write_text(json.dumps(about | {"timestep": 500}))
    (_, _, system), expected = score.load_student(student), model.load_student(
        student, "tiny", precision="fp32", device="cpu")
    rows = score.held_out(2, "second")
    with torch.no_grad():
        z_T = expected.noise([n for n, *_ in rows], 5)
        text = expected.encode_text([caption for _, caption, _, _ in rows])
        clips = expected.decoder.decode(expected.latents(z_T, text))
    torch.testing.assert_close(score.generate(system, rows, "", 5), clips, rtol=1e-3, atol=1e-2)


def test_what_cannot_be_scored_is_refused_in_one_line(student, tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, says in {
        (str(tmp_path / "empty"),): "neither a student",
        (str(tmp_path / "no"),): "no such folder",
        (str(TINY),): "no student that train.py made",              # a complete model
        (str(student), "--clips", "0"): "--clips",
        (str(student), "--seed", "-1"): "--seed",
        (str(student), "--list", "fourth"): "--list",
        (str(student), "--diversity", "1"): "--diversity",
        (str(student), "--diversity", "8", "--clips", "4"): "--diversity 8 needs",
        (str(student), "--diversity", "8", "--all"): "not allowed with",
    }.items():
        with pytest.raises(InputError) as stopped:
            score.main(list(flags))
        assert says in str(stopped.value) and "\n" not in str(stopped.value)

    assert not (student.parent / "scores.json").exists()


# ---- the teacher, and training it away ---------------------------------------------------------

def test_unknown_words_are_named():
    encode_text = model.TextEncoder(TINY)
    known, unknown = "a dog barks twice", "a Dog barks, in a cathedral"
    long = " ".join(["rain"] * 30)
    found = encode_text.unread([known, unknown, long])
    assert list(found) == [unknown, long] and found[long].startswith("32 tokens, 24 fit")
    assert "'in'" in found[unknown] and "'cathedral'" in found[unknown]
    assert "Dog" not in found[unknown].split("seen")[1]
    same, other = encode_text(["a dog barks"]), encode_text(["A dog, barks!"])
    assert torch.equal(same, other)


# step: vsd, lora, x0_std
GOLDEN = [(0.00359, 0.2602, 0.672), (0.00304, 0.3595, 0.687), (0.00314, 0.1773, 0.658)]


def test_the_first_losses_are_those_of_the_readme(tmp_path):
    train.main(["--teacher", "tiny", "--max_steps", "3", "--log_every", "1", "--no-decay",
                "--device", "cpu", "--out_dir", str(tmp_path)])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line, expected in zip(map(json.loads, lines), GOLDEN, strict=True):
        # Adam's first step is +-lr for every weight, so that rounding shows: hence 5 %
        found = [line[key] for key in ("vsd", "lora", "x0_std")]
        assert found == pytest.approx(expected, rel=5e-2)


def test_train_score_and_sample_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--teacher", "tiny", "--max_steps", "2", "--batch_size", "2", "--device", "cpu"])
    assert "python sample.py --student out/student" in capsys.readouterr().out

    code, said = run("tiny.score", tmp_path / "out/student", "--clips", "16", cwd=ROOT)
    assert code == 0, said
    rows = [line for line in said.splitlines() if line.startswith(("student", "teacher"))]
    row, = (row for row in rows if "%" not in row)                  # the others are progress bars
    assert row.startswith("student after 2 steps") and "N = 16 held-out" in said
    assert "N = 512; --all measures them" in said
    table = json.loads((tmp_path / "out/scores.json").read_text())
    assert table["clips"] == 16 and list(table["systems"]) == ["student after 2 steps"]
    assert table["systems"]["student after 2 steps"]["FD"] > 100
    assert (tmp_path / "out/spectrograms.png").stat().st_size > 10000
    assert "16 held-out captions" in (tmp_path / "out/student/README.md").read_text()

    sample.main(["--prompt", "a dog barks twice", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "samples/a-dog-barks-twice_seed0_0.wav" in output and "warning" not in output, output


@pytest.mark.slow
def test_a_file_like_audiocaps_is_read_at_once_and_trained_on(tmp_path):
    """50,000 rows of words that the tiny teacher never saw."""
    path = tmp_path / "train.csv"
    rows = "".join(f'{i},x,0,"Noise number {i}, far away"\n' for i in range(50000))
    path.write_text("audiocap_id,youtube_id,start_time,caption\n" + rows)
    code, output = run("train.py", "--teacher", "tiny", "--captions", path, "--max_steps", 5,
                       cwd=tmp_path, threads=2)
    assert code == 0 and "50000 captions used" in output, output


def test_one_distance_is_to_audio_and_one_to_the_teacher(monkeypatch):
    rows, mels = score.held_out(64), torch.zeros(64, 64, 256)
    audio, logits, teacher = score.reference(rows)
    monkeypatch.setattr(score, "features", lambda classifier, mels: (teacher, logits))
    row = score.scored(rows, mels)
    assert row["FD to teacher"] == pytest.approx(0, abs=0.1) and row["FD"] > 5
    monkeypatch.setattr(score, "features", lambda classifier, mels: (audio, logits))
    row = score.scored(rows, mels)
    assert row["FD"] == pytest.approx(0, abs=0.1) and row["FD to teacher"] > 5


# ---- ablations ---------------------------------------------------------------------------------

def test_an_ablation_s_students_are_scored_on_several_lists_and_trained_once(
        tmp_path, capsys, monkeypatch):
    def go(*more, clips=12):
        ablate.main(["table5", "--only", "100 captions", "--steps", "1", "--seeds", "2",
                     "--out", str(tmp_path), "--clips", str(clips), *more])
        return capsys.readouterr().out.splitlines()

    second = go()
    title = "N = 12 held-out captions, {} list, 2 seeds, 1 steps".format
    assert title("second") in second and "±" in second[-1]
    monkeypatch.setattr(train, "main", None)            # from here on nothing is trained
    both = go("--list", "third", "second")
    assert [line for line in both if line[:3] == "N ="] == [title("third"), title("second")]
    third, again = [line for line in both if line.startswith("| 100 captions")][1::2]
    assert again == second[-1] != third
    with monkeypatch.context() as patch:
        patch.setattr(score, "measure", None)           # nor scored
        assert go("--list", "third")[-1] == third
    folder = tmp_path / "1 steps/lora_weighting_alpha2_student_t_999_max_captions_100/seed 0"
    about = json.loads((folder / "student/swiftaudio.json").read_text())
    (folder / "student/swiftaudio.json").write_text(json.dumps(about | {"step": 0}))
    with pytest.raises(TypeError, match="NoneType"):    # it was not finished
        go("--list", "first")
    with pytest.raises(InputError, match="holds a run with other flags"):
        go("--list", "first", clips=16)
    with pytest.raises(InputError, match="table5 has no row '90 captions'"):
        ablate.main(["table5", "--only", "90 captions"])
    with pytest.raises(InputError, match="--seeds"):
        ablate.main(["table5", "--seeds", "0"])


def test_a_row_of_a_recipe_is_trained_on_the_clips_of_all_rows_and_may_be_stopped(
        tmp_path, capsys, monkeypatch):
    command = ["energy", "--seeds", "1", "--clips", "2", "--out", str(tmp_path)]
    row = "energy --clips 4 --clip_steps 1 --batch_size 2 --max_steps 1"
    monkeypatch.setitem(ablate.TABLES, "energy", {"default": row})
    ablate.main(command)
    assert (tmp_path / "clips of seed 0.safetensors").exists()
    said = capsys.readouterr().out
    assert "| default | " in said and "second list, 1 seeds\n" in said     # its steps are its own
    monkeypatch.setitem(ablate.TABLES, "energy", {"default": f"{row} --seed 0"})
    monkeypatch.setattr(energy, "main", lambda words: 128 + 2)
    with pytest.raises(SystemExit) as stopped:
        ablate.main(command)
    assert stopped.value.code == 130 and not list(tmp_path.glob("*/*seed_0/seed 0/row*"))


def test_the_rows_of_all_tables_have_flags_that_exist():
    rows = [flags for table in ablate.TABLES.values() for flags in table.values()]
    assert len(rows) > 40
    for flags in rows:
        module, words = ablate.program(flags)
        args = module.parse_args(["--teacher", "tiny", *words])
        assert module is train or args.clips == (3072 if "--clips 3072" in flags else 512)


def test_the_families_are_compared_at_about_one_cost():
    """UNet passes of a caption and step, a backward pass as two, and of the teacher's clips."""
    passes = {"train": 3 + 2 + 1 + 3, "recipes.energy": 2 * 3, "recipes.consistency": 3 + 2 + 1,
              "recipes.arc": 3 + 16.5 * 0.28}                   # D is an encoder without a decoder
    for table in ("objectives", "long"):
        costs = []
        for flags in ablate.TABLES[table].values():
            module, words = ablate.program(flags)
            args = module.parse_args(["--teacher", "tiny", *words])
            clips = 0 if module is train else args.clips * args.clip_steps * 2
            costs.append(args.max_steps * args.batch_size * passes[module.__name__] + clips)
        assert costs[0] == costs[1] and len(costs) > 2
        assert all(0.8 < cost / costs[0] < 1.07 for cost in costs), costs


def test_queries_compare_students_with_the_teacher_unguided_in_one_step(
        student, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "QUERIES", (2,))
    ablate.main(["queries", "--clips", "2", "--seeds", "2", "--student", str(student)])
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line[2:].split(" | ", 1) for line in lines[-4:])
    assert list(rows) == ["real audio, rendered again", "teacher, 1 step", "teacher, 2 steps",
                          str(student)]
    assert rows["teacher, 1 step"] == rows[str(student)] != rows["teacher, 2 steps"]


def test_ablate_s_flags_reach_what_they_are_for(tmp_path, monkeypatch, capsys):
    row, trained, measured, names = dict.fromkeys(score.DIGITS, 1.0), [], [], []
    rendered = []

    def main(words):
        trained.append(train.parse_args(words))
        Path(trained[-1].out_dir).mkdir(parents=True)

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(score, "load_student", lambda name: names.append(name) or [None] * 3)
    monkeypatch.setattr(score, "load_teacher", lambda *args, **more: None)
    monkeypatch.setattr(score, "scored", lambda rows, mels: row)
    monkeypatch.setattr(score, "real", lambda rows, seed: rendered.append(seed))
    monkeypatch.setattr(score, "measure", lambda systems, rows, seed: measured.append(
        ([n for n, *_ in rows], seed)) or dict.fromkeys(systems, row))
    ablate.main(["table5", "--only", "500 captions", "--steps", "7", "--seeds", "2", "--clips", "2",
                 "--list", "third", "--out", str(tmp_path)])
    for seed, args in enumerate(trained):
        assert (args.seed, args.max_steps, args.max_captions) == (seed, 7, 500)
        assert str(args.out_dir).startswith(str(tmp_path))
    numbers = [n for n, *_ in score.held_out(2, "third")]
    assert len(trained) == 2 and measured == [(numbers, 0), (numbers, 1)]
    names.clear()
    ablate.main(["queries", "--seeds", "2", "--clips", "2", "--student", "out{seed}/student"])
    assert names == ["out0/student", "out1/student"]
    assert rendered == [score.FLOOR, score.FLOOR + 1]
