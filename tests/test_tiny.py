import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run

import train
from model import TINY, Teacher
from tiny import ablate, control, score, world


@pytest.fixture(scope="module")
def teacher():
    return Teacher("tiny")


def read(name):
    with open(TINY.parent / name, newline="") as f:
        return [row["caption"] for row in csv.DictReader(f)]


def test_size_and_layout():
    total = sum(f.stat().st_size for f in TINY.parent.rglob("*") if f.suffix in (".safetensors", ".pt") and "build" not in f.parts)
    assert total <= 12 * 2 ** 20
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "vocoder", "model_index.json"} <= {p.name for p in TINY.iterdir()}


def test_captions_are_the_world_s_and_held_out_ones_are_new():
    training, held = world.captions()
    assert [t for t, _, _ in training] == read("captions.csv") and [t for t, _, _ in held] == read("heldout.csv")
    assert len(held) == 512 and not {t for t, _, _ in held} & {t for t, _, _ in training}
    pairs = lambda rows: {frozenset(e[0] for e in events) for _, events, _ in rows if len(events) == 2}
    unseen = {frozenset(pair) for pair in world.UNSEEN}
    assert not pairs(training) & unseen and pairs(held) & unseen == unseen
    assert sum(frozenset(e[0] for e in events) in unseen for _, events, _ in held) == 128
    assert {"dog", "rain"} not in unseen and "a dog barks twice" in {t for t, _, _ in training + held}


def test_rendering_is_a_function_of_the_seed():
    for event in world.NAMES:
        for subject in range(len(world.EVENTS[event][0])):
            for adverb in world.EVENTS[event][3]:
                a, labels = world.render(np.random.default_rng(1), ((event, subject, adverb),), "")
                assert a.shape == (40960,) and np.isfinite(a).all() and np.abs(a).max() == pytest.approx(0.95, abs=1e-3)
                assert [world.LABELS[i] for i in labels] == [f"{event} {adverb}"]
    again, _ = world.render(np.random.default_rng(1), ((event, subject, adverb),), "")
    other, _ = world.render(np.random.default_rng(2), ((event, subject, adverb),), "")
    assert np.array_equal(a, again) and not np.array_equal(a, other)
    # "followed by" keeps the halves apart
    a, _ = world.render(np.random.default_rng(0), (("rain", 0, "heavily"), ("dog", 0, "once")), "followed by")
    assert np.abs(a[:20000]).max() > 0.1


def test_the_classifier_knows_the_world():
    net, held = score.load_classifier(), world.captions()[1][:32]   # one event each
    _, logits = score.features(net, score.real(held, 9))
    labels = [world.render(np.random.default_rng((9, i)), events, join)[1] for i, (_, events, join) in enumerate(held)]
    assert (logits.argmax(1) == torch.tensor(labels)[:, 0]).float().mean() > 0.9


def test_unknown_words_are_named(teacher):
    warning, = teacher.check(["a dog barks twice", "a Dog barks, in a cathedral"])
    assert "'in'" in warning and "'cathedral'" in warning and "Dog" not in warning.split("seen")[1]
    assert teacher.check([" ".join(["rain"] * 30)])[0].startswith("warning: 32 tokens, 24 fit")
    assert torch.equal(teacher.encode_text(["a dog barks"]), teacher.encode_text(["A dog, barks!"]))


def test_ablate(tmp_path, capsys, monkeypatch):
    """A row of a table; the second call takes it from the disk, and refuses to take another's."""
    def go(clips):
        ablate.main(["table5", "--only", "100 captions", "--steps", "1", "--seeds", "2", "--out", str(tmp_path), "--clips", str(clips)])
        return capsys.readouterr().out.splitlines()
    first = go(12)
    assert "N = 12 held-out captions, 2 seeds, 1 steps" in first and "±" in first[-1]
    monkeypatch.setattr(train, "main", None)
    assert go(12)[-1] == first[-1]
    with pytest.raises(SystemExit, match="holds a run with other flags"):
        go(16)
    with pytest.raises(SystemExit, match="table5 has no row '90 captions'"):
        ablate.main(["table5", "--only", "90 captions"])


GOLDEN = [(0.00327, 0.2833, 0.738), (0.00396, 0.4438, 0.765), (0.00220, 0.1475, 0.816)]      # vsd, lora, x0_std


def test_the_first_losses_are_those_of_the_readme(tmp_path, monkeypatch):
    """Golden: the default run's first three steps."""
    train.main(["--teacher", "tiny", "--max_steps", "3", "--log_every", "1", "--eval_clips", "0", "--no-decay", "--device", "cpu", "--out_dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line, (vsd, lora, x0_std) in zip(lines, GOLDEN, strict=True):
        # Adam's first step is +-lr for every weight, so that rounding shows: hence 5 %
        assert (line["vsd"], line["lora"], line["x0_std"]) == pytest.approx((vsd, lora, x0_std), rel=5e-2)


def test_train_score_and_sample_end_to_end(tmp_path):
    code, output = run("train.py", "--teacher", "tiny", "--max_steps", 2, "--batch_size", 2, "--eval_clips", 8, cwd=tmp_path, threads=2)
    assert code == 0 and "student after 2 steps" in output and "teacher, 25 steps" in output, output
    table = json.loads((tmp_path / "out/scores.json").read_text())
    assert table["clips"] == 8 and len(table["systems"]) == 4 and all(row["FD"] > 0 for row in table["systems"].values())
    assert (tmp_path / "out/spectrograms.png").stat().st_size > 10000
    code, output = run("sample.py", "--prompt", "a dog barks twice", cwd=tmp_path)
    assert code == 0 and "samples/a-dog-barks-twice_seed0_0.wav" in output and "warning" not in output, output


@pytest.mark.slow
def test_audiocaps_like_file(tmp_path):
    """50,000 rows of words the tiny teacher never saw: read at once, and trained on."""
    path = Path(tmp_path / "train.csv")
    path.write_text("audiocap_id,youtube_id,start_time,caption\n" + "".join(f'{i},x,0,"Noise number {i}, far away"\n' for i in range(50000)))
    code, output = run("train.py", "--teacher", "tiny", "--captions", path, "--max_steps", 5, "--eval_clips", 0, cwd=tmp_path, threads=2)
    assert code == 0 and "50000 captions used" in output, output


def test_control(monkeypatch, capsys, tmp_path):
    """The measurements of control.py run, on a few captions, with the teacher itself as a one-step student."""
    teacher, pairs = str(TINY), control.pairs
    assert all(text in {t for t, _, _ in world.captions()[1]} for text in (f"{a} {join} {b}" for _, a, join, _, b in pairs(16)))
    monkeypatch.setattr(control, "pairs", lambda n: pairs(4))
    control.sweep(teacher, tmp_path / "figure.png")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[1:]] == ["0", "0.5", "1", "1.5", "2", "3", "4"] and (tmp_path / "figure.png").exists()
    system, held = control.System(teacher), world.captions()[1][:24]
    right = system.heard(score.real(held, 9), [events[0][0] for _, events, _ in held])
    wrong = system.heard(score.real(held, 9), [events[0][0] for _, events, _ in held[1:] + held[:1]])
    assert right.mean() > 0.8 and wrong.mean() < 0.4


def test_diversity_is_the_mean_distance_of_pairs(teacher):
    """Of a system that knows one clip only: nothing; of real audio: something."""
    held = score.held_out(2)
    still = score.diversity(teacher, {"still": lambda z, y: torch.zeros_like(z)}, held, each=3)
    assert still["still"] == pytest.approx(0, abs=1e-2) and still["real audio"] > 1
