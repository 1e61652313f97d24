"""A world of recordings: a folder of sounds in, a teacher with a vocoder of its own out."""
import numpy as np
import pytest
import soundfile
import torch

from data import InputError, read_rows
from extras.teacher import load_teacher
from model import HOP, FrameVocoder
from tiny import make
from tiny.recorded import CLASSES, HELD_OUT, Recordings, take


def write(path, wav):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, 16000)


class Few(Recordings):
    number = property(lambda self: 8, lambda self, number: None)


@pytest.fixture(scope="module", params=["ESC-10", "ESC-50"])
def sounds(request, tmp_path_factory):
    """Twelve seconds: of class i a tone at 110 i Hz in fold 1, an octave higher in fold 5."""
    folder, rows = tmp_path_factory.mktemp("sounds"), ["filename,category"]
    for i, names in enumerate(CLASSES.values(), 1):
        theirs = names.split(", ")[0 if request.param == "ESC-10" else -1]
        for fold in (1, 5):
            t, name = np.arange(9600) / 16000, f"{fold}-{i}-A.wav"
            tone = 0.3 * np.sin(2 * np.pi * 110 * i * (1 + fold // 5) * t) * (t < 0.3)
            wav = tone + 0.01 * np.random.default_rng(i).standard_normal(len(t))
            rows.append(f"{name},{theirs.replace(' ', '_')}")
            write(folder / (f"{i:03} - {theirs.capitalize()}" if request.param == "ESC-10"
                            else "audio") / name, wav)
    if request.param == "ESC-50":
        (folder / "meta").mkdir()
        (folder / "meta/esc50.csv").write_text("\n".join(rows))
    return folder


def test_the_folder_becomes_a_teacher(sounds, tmp_path, monkeypatch):
    """Of eight clips, in one step of each training."""
    monkeypatch.setattr(make, "Recordings", Few)
    for name, (stage, tiny, how) in make.STAGES.items():
        small = how and how | dict(steps=1, size=2)
        monkeypatch.setitem(make.STAGES, name, (stage, tiny, small))
    make.main(["--sounds", str(sounds), "--out", str(tmp_path)])
    system = load_teacher(str(tmp_path), 2)
    assert isinstance(system.decoder.vocoder, FrameVocoder)
    assert system(["a dog barks loudly"]).shape == (1, 40960)
    assert system.encode_text.unread(["a siren"]) and not system.encode_text.unread(["a"])
    train, held = ([row["caption"] for row in read_rows(tmp_path / name)]
                   for name in ("captions.csv", "heldout.csv"))
    assert len(set(train)) == 2000 and len(set(held)) == 512 and not set(train) & set(held)


def test_clips_are_what_their_captions_say(sounds):
    source, held = Recordings(sounds), Recordings(sounds, HELD_OUT)
    pairs = [{frozenset(event for event, _, _ in events) for _, events, join in rows if join}
             for rows in (source.clips(3000, True), source.captions()[0], source.held_out()[384:])]
    unseen = {frozenset(pair) for pair in source.unseen}
    assert not pairs[0] & unseen and not pairs[1] & unseen and pairs[2] == unseen

    def render(world, seed, *events):
        return world.render(np.random.default_rng(seed), events, "then" if events[1:] else "")[0]

    softly, loudly = ([render(source, seed, ("clock", 0, adverb)).std() for seed in range(20)]
                      for adverb in ("softly", "loudly"))
    assert max(softly) < min(loudly) and softly[0] != softly[1]
    assert softly[0] == render(source, 0, ("clock", 0, "softly")).std()
    for world, octave in ((source, 1), (held, 2)):
        halves = np.split(render(world, 0, ("dog", 0, ""), ("fire", 0, "loudly")), 2)
        peaks = [np.abs(np.fft.rfft(half)).argmax() * 16000 / len(half) for half in halves]
        assert peaks == pytest.approx([110 * octave, 1100 * octave], abs=5)


def test_a_take_lies_in_its_own_background(tmp_path):
    wav = np.random.default_rng(0).standard_normal(32000) * 0.01
    wav[8000:9600] *= 20
    write(tmp_path / "a.wav", np.where(np.arange(32000) < 16000, wav, 0))
    filled = take(tmp_path / "a.wav", np.random.default_rng(0))
    assert len(filled) == 40960 and filled[17000:].std() == pytest.approx(0.006, rel=0.2)


def test_wrong_sounds_get_one_line(sounds, tmp_path):
    write(tmp_path / "silent.wav", np.zeros(999))
    for wrong, message in (
            (lambda: make.main(["--sounds", str(tmp_path)]), r"no sounds of \['dog', 'rain"),
            (lambda: Recordings(sounds, "7"), "of dog, no file is named FOLD-"),
            (lambda: take(tmp_path / "silent.wav", None), "silent.wav: is silent")):
        with pytest.raises(InputError, match=message):
            wrong()


@pytest.mark.parametrize("noise", (0, 4))
def test_the_vocoder_is_the_same_in_any_batch(noise):
    torch.manual_seed(0)
    vocoder = FrameVocoder(64, width=8, hidden=8, blocks=1, noise=noise, n_fft=640, hop_size=HOP)
    mel, spectrum = torch.randn(3, 40, 64), torch.randn(2, 40, 642)
    torch.testing.assert_close(vocoder(mel)[1:2], vocoder(mel[1:2]), rtol=0, atol=1e-5)
    assert torch.allclose(vocoder(mel), vocoder(mel, torch.randn(3, 40, 642))) == (noise == 0)
    expected = torch.istft(torch.complex(*spectrum.split(321, 2)).mT, 640, HOP, 640,
                           torch.hann_window(640))[:, 640:-640]
    ours = vocoder.istft(spectrum)
    assert ours.shape == (2, 40 * HOP)
    torch.testing.assert_close(ours[:, 720:-720], expected, rtol=0, atol=1e-4)
