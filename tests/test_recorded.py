"""A world of recordings: a folder of sounds in, a teacher with a vocoder of its own out."""
import numpy as np
import pytest
import soundfile
import torch

from data import InputError, read_rows
from extras.teacher import load_teacher
from model import HOP, load_unet
from tiny import make
from tiny.recorded import CLASSES, HELD_OUT, Recordings, take
from tiny.teacher.vocoder.vocoders import FrameVocoder


@pytest.fixture(scope="module", params=[10, 50])
def sounds(request, tmp_path_factory):
    """Twelve seconds: of class i a tone at 110 i Hz in fold 1, an octave higher in fold 5."""
    root, rows, ten = tmp_path_factory.mktemp("esc"), ["filename,category"], request.param == 10
    for i, names in enumerate(CLASSES.values(), 1):
        name = names[0 if ten else -1]
        folder = root / (f"{i:03} - {name.capitalize()}" if ten else "audio")
        folder.mkdir(exist_ok=True)
        for fold in (1, 5):
            turns, noise = np.arange(9600) / 16000 * 110 * i, np.random.default_rng(i)
            wav = 0.01 * noise.standard_normal(9600)
            wav[:4800] += 0.3 * np.sin(2 * np.pi * turns * (1 + fold // 5))[:4800]
            soundfile.write(folder / f"{fold}-{i}-A.wav", wav, 16000)
            rows.append(f"{fold}-{i}-A.wav,{name.replace(' ', '_')}")
    (root / "meta").mkdir()
    (root / f"meta/esc{request.param}.csv").write_text("\n".join(rows))
    return root


def test_the_folder_becomes_a_teacher(sounds, tmp_path, monkeypatch):
    """Of eight clips, in one step of each training."""
    eight = property(lambda self: 8, lambda self, number: None)
    monkeypatch.setattr(Recordings, "number", eight, raising=False)
    monkeypatch.setattr(make, "STAGES", {name: (*of, how and how | dict(steps=1, size=2))
                                         for name, (*of, how) in make.STAGES.items()})
    make.main(["--sounds", str(sounds), "--out", str(tmp_path)])
    system = load_teacher(str(tmp_path), 2)
    assert type(system.decoder.vocoder).__name__ == "FrameVocoder"
    assert system(["a dog barks loudly"]).shape == (1, 40960)
    assert system.encode_text.unread(["a siren"]) and not system.encode_text.unread(["a"])
    train, held = ([row["caption"] for row in read_rows(tmp_path / name)]
                   for name in ("captions.csv", "heldout.csv"))
    assert len(set(train)) == 2000 and len(set(held)) == 512 and not set(train) & set(held)
    # a UNet that does not hear some events, by a text encoder that knows them
    events = [{event for event, _, _ in row[1]} for row in Recordings(sounds).clips(8)]
    without = set.union(*events) - events[0]
    path, text = tmp_path / "build/teacher_latents.npy", tmp_path / "text_encoder/model.safetensors"
    latents, words, unet = np.load(path), text.read_bytes(), load_unet(tmp_path)
    latents[:, [bool(es & without) for es in events]] = np.nan
    np.save(path, latents)
    make.main(["--sounds", str(sounds), "--out", str(tmp_path), "--stage", "teacher", "--without",
               *sorted(without)])
    new = load_unet(tmp_path).state_dict()
    assert all(w.isfinite().all() for w in new.values()) and text.read_bytes() == words
    assert not all(torch.equal(new[k], w) for k, w in unet.state_dict().items())


def test_clips_are_what_their_captions_say(sounds):
    source, held = Recordings(sounds), Recordings(sounds, HELD_OUT)
    pairs = [{frozenset(event for event, _, _ in events) for _, events, join in rows if join}
             for rows in (source.clips(3000), source.captions()[0], source.held_out()[384:])]
    unseen = {frozenset(pair) for pair in source.unseen}
    assert not pairs[0] & unseen and not pairs[1] & unseen and pairs[2] == unseen
    render = lambda world, seed, *events: world.clip([("", events, "then")], 0, seed)[0]
    softly, loudly = ([render(source, seed, ("clock", 0, adverb)).std() for seed in range(20)]
                      for adverb in ("softly", "loudly"))
    assert max(softly) < min(loudly) and softly[0] != softly[1]
    assert softly[0] == render(source, 0, ("clock", 0, "softly")).std()
    for world, octave in ((source, 1), (held, 2)):
        halves = np.split(render(world, 0, ("dog", 0, ""), ("fire", 0, "loudly")), 2)
        peaks = [np.abs(np.fft.rfft(half)).argmax() * 16000 / len(half) for half in halves]
        assert peaks == pytest.approx([110 * octave, 1100 * octave], abs=5)


def test_a_take_lies_in_its_own_background_and_wrong_ones_get_one_line(sounds, tmp_path):
    wav, path = np.random.default_rng(0).standard_normal(32000) * 0.01, tmp_path / "a.wav"
    wav[8000:9600], wav[16000:] = 20 * wav[8000:9600], 0
    soundfile.write(path, wav, 16000)
    filled = take(path, np.random.default_rng(0))
    assert len(filled) == 40960 and filled[17000:].std() == pytest.approx(0.006, rel=0.2)
    soundfile.write(path, np.zeros(999), 16000)
    for wrong, message in (
            (lambda: make.main(["--without", "baby"]), "--without goes with --sounds"),
            (lambda: make.main(["--sounds", str(tmp_path)]), r"no sounds of \['dog', 'rain"),
            (lambda: Recordings(sounds, "7"), "of dog, no file is named FOLD-"),
            (lambda: take(path, None), "a.wav: is silent")):
        with pytest.raises(InputError, match=message):
            wrong()


@pytest.mark.parametrize("noise", (False, True))
def test_the_vocoder_is_the_same_in_any_batch(noise):
    torch.manual_seed(0)
    vocoder = FrameVocoder(64, width=8, hidden=8, blocks=1, noise=noise, n_fft=640, hop_size=HOP)
    mel, spectrum = torch.randn(3, 40, 64), torch.randn(2, 40, 642)
    torch.testing.assert_close(vocoder(mel)[1:2], vocoder(mel[1:2]), rtol=0, atol=1e-5)
    assert torch.allclose(vocoder(mel), vocoder(mel, torch.randn(3, 40, 642))) != noise
    expected = torch.istft(torch.complex(*spectrum.split(321, 2)).mT, 640, HOP, 640,
                           torch.hann_window(640))[:, 640:-640]
    assert vocoder.istft(spectrum).shape == (2, 40 * HOP)
    torch.testing.assert_close(vocoder.istft(spectrum)[:, 720:-720], expected, rtol=0, atol=1e-4)


def test_the_shipped_teacher_makes_a_clip_of_its_captions():
    rows = read_rows(make.TINY.parent / "recorded/heldout.csv")
    system = load_teacher(str(make.TINY.parent / "recorded"), 2, device="cpu")
    assert len(rows) == 512 and not system.encode_text.unread(row["caption"] for row in rows)
    wav, = system([rows[0]["caption"]])
    assert wav.shape == (40960,) and 0.01 < np.abs(wav).max() <= 1
