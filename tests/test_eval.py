import csv
import importlib
import importlib.util
import json
import math
import sys
import types
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import refused
from transformers.audio_utils import mel_filter_bank

import eval as evaluate
from data import InputError
from tiny import world

G = torch.Generator().manual_seed(0)


def test_frechet_closed_forms():
    g = torch.Generator().manual_seed(0)
    for n, d in ((400, 8), (30, 50)):                               # N > D and N < D
        x = torch.randn(n, d, generator=g).double()
        assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-8)
        assert evaluate.frechet(x, x + 2) == pytest.approx(4 * d, rel=1e-9)
        variance = float(torch.trace(x.T.cov()))
        assert evaluate.frechet(x - x.mean(0), 2 * (x - x.mean(0))) == pytest.approx(variance, rel=1e-9)     # (2 - 1)^2 tr S
    # a float64 reference with eigenvalues: tr (Sx Sy)^(1/2) is the sum of the roots of the product's eigenvalues
    x, y = torch.randn(300, 6, generator=g).double(), torch.randn(200, 6, generator=g).double() @ torch.randn(6, 6, generator=g).double()
    sx, sy, dm = x.T.cov(), y.T.cov(), x.mean(0) - y.mean(0)
    expected = dm @ dm + sx.trace() + sy.trace() - 2 * torch.linalg.eigvals(sx @ sy).real.clamp(min=0).sqrt().sum()
    assert evaluate.frechet(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_kl_and_is_closed_forms():
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    uniform = torch.zeros(2, 3)
    kl = (0.5 * np.log(1.5) + 0.5 * np.log(0.75))
    assert evaluate.kl_divergence(z, uniform) == pytest.approx(kl, abs=1e-5) and evaluate.kl_divergence(z, z) == pytest.approx(0, abs=1e-5)
    assert evaluate.inception_score(torch.zeros(20, 3)) == pytest.approx(1) and evaluate.inception_score(torch.eye(3) * 100, 1) == pytest.approx(3)
    row = evaluate.scores((torch.randn(9, 4), torch.zeros(9, 3)), (torch.randn(9, 4), torch.zeros(9, 3)))
    assert row["FD"] > 0 and row["KL"] < 1e-5 and row["IS"] is None                         # too few for ten splits


def test_metrics_equal_an_independent_float64_computation():
    e, f = (torch.randn(64, 20, generator=G).relu() for _ in range(2))
    y, z = (3 * torch.randn(64, 12, generator=G) for _ in range(2))
    row = evaluate.scores((e, y), (f, z))
    a, b = e.double().numpy(), f.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T                # tr (Sa^1/2 Sb Sa^1/2)^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b.T) @ root).clip(0)).sum()
    fd = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross
    softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
    p, q = softmax(y.double().numpy()), softmax(z.double().numpy())
    kl = (p * np.log(p / (q + 1e-6))).sum(1).mean()
    shuffled = q[np.random.RandomState(2020).permutation(64)]
    parts = [shuffled[64 * k // 10:64 * (k + 1) // 10] for k in range(10)]
    inception = np.mean([np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in parts])
    assert (row["FD"], row["KL"], row["IS"]) == pytest.approx((fd, kl, inception), rel=1e-5)


# ---- audio ----------------------------------------------------------------------------------------------------------

def test_resampling_keeps_a_sine_and_removes_what_does_not_fit():
    for old, new in ((44100, 16000), (16000, 48000), (48000, 16000), (22050, 16000)):
        t = lambda rate: torch.arange(rate, dtype=torch.float64) / rate
        out = evaluate.resample((2 * math.pi * 997 * t(old)).sin(), old, new)
        assert len(out) == new and (out - (2 * math.pi * 997 * t(new)).sin())[100:-100].abs().max() < 2e-3
    gone = evaluate.resample((2 * math.pi * 15000 * t(48000)).sin(), 48000, 16000)
    assert gone[100:-100].abs().max() < 2e-3


def test_resampling_is_torchaudio_s():
    try:
        from torchaudio.functional import resample
    except (ImportError, OSError):                                  # not there, or built for another torch
        pytest.skip("needs torchaudio")
    x = torch.randn(5000, dtype=torch.float64)                      # in fp32 its own filter is 2e-5 off
    for old, new in ((44100, 16000), (16000, 48000), (22050, 16000)):
        assert torch.allclose(evaluate.resample(x, old, new), resample(x, old, new), atol=1e-12)


def test_audio_is_the_first_channel_without_its_mean_cut_and_padded(tmp_path):
    left = np.full(3 * 16000, 0.25, np.float32)
    left[::2] = 0.75
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], 1), 16000, "FLOAT")
    wav = evaluate.read_audio(tmp_path / "a.wav")
    assert torch.equal(wav, torch.tensor([0.25, -0.25]).repeat(24000))
    assert len(evaluate.read_audio(tmp_path / "a.wav", 2.5)) == 40000
    soundfile.write(tmp_path / "b.wav", left[:100], 16000)
    assert len(evaluate.read_audio(tmp_path / "b.wav")) == 32000
    (tmp_path / "c.wav").write_bytes(b"RIFF....WAVEfmt ")
    soundfile.write(tmp_path / "d.wav", left[:0], 16000)
    soundfile.write(tmp_path / "e.wav", left * np.nan, 16000, "FLOAT")
    for name in "cde":
        with pytest.raises(InputError, match=f"{name}.wav"):
            evaluate.read_audio(tmp_path / f"{name}.wav")


# ---- the two networks ----------------------------------------------------------------------------------------------

def cnn14_state():
    """Random weights under the published names, the front end as the published file holds it."""
    n, k = torch.arange(512), torch.arange(257)[:, None]
    window = torch.hann_window(512)
    state = {"spectrogram_extractor.stft.conv_real.weight": ((2 * math.pi * n * k / 512).cos() * window)[:, None],
             "spectrogram_extractor.stft.conv_imag.weight": (-(2 * math.pi * n * k / 512).sin() * window)[:, None],
             "logmel_extractor.melW": torch.from_numpy(mel_filter_bank(257, 64, 50.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")).float()}
    def norm(name, size):
        state.update({f"{name}.weight": torch.rand(size) + 0.5, f"{name}.bias": 0.1 * torch.randn(size), f"{name}.running_mean": 0.1 * torch.randn(size),
                      f"{name}.running_var": torch.rand(size) + 0.5, f"{name}.num_batches_tracked": torch.tensor(7)})
    norm("bn0", 64)
    i = 1
    for block, o in enumerate((64, 128, 256, 512, 1024, 2048), 1):
        for conv, width in ((1, i), (2, o)):
            state[f"conv_block{block}.conv{conv}.weight"] = torch.randn(o, width, 3, 3) * (2 / (9 * width)) ** 0.5
            norm(f"conv_block{block}.bn{conv}", o)
        i = o
    for name, o in (("fc1", 2048), ("fc_audioset", 527)):
        state |= {f"{name}.weight": torch.randn(o, 2048) / 45, f"{name}.bias": torch.randn(o) / 10}
    return state


def test_cnn14(tmp_path):
    state = cnn14_state()
    # the published file holds numpy counters, pickled under the names of numpy 1
    torch.save({"iteration": 3, "model": state, "sampler": {"state": np.arange(3), "at": np.float64(2)}}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / evaluate.CNN14[0], "w") as old:
        for item in new.infolist():
            old.writestr(item, new.read(item).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray") if item.filename.endswith("data.pkl")
                         else new.read(item))
    net, digest = evaluate.load_network(evaluate.Cnn14(), evaluate.CNN14, tmp_path, False)
    assert len(digest) == 64
    wav = 0.3 * torch.randn(1, 32000, generator=G)
    with torch.no_grad():
        e, logits = net(wav)
    # the same, layer by layer, from PyTorch's spectrogram and the state's tensors
    power = torch.stft(wav[0], 512, 160, window=torch.hann_window(512), center=True, pad_mode="reflect", return_complex=True).abs() ** 2
    x = 10 * torch.log10((power.T @ state["logmel_extractor.melW"]).clamp(min=1e-10))[None, None]                      # (1, 1, T, 64)
    def norm(x, name, axis):
        shape = [-1 if d == axis else 1 for d in range(x.ndim)]
        s = {k: state[f"{name}.{k}"].view(shape) for k in ("weight", "bias", "running_mean", "running_var")}
        return (x - s["running_mean"]) / (s["running_var"] + 1e-5).sqrt() * s["weight"] + s["bias"]
    x = norm(x, "bn0", 3)
    for block in range(1, 7):
        for conv in (1, 2):
            x = norm(F.conv2d(x, state[f"conv_block{block}.conv{conv}.weight"], padding=1), f"conv_block{block}.bn{conv}", 1).relu()
        if block < 6:
            t, m = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            x = (x[:, :, :t:2, :m:2] + x[:, :, 1:t:2, :m:2] + x[:, :, :t:2, 1:m:2] + x[:, :, 1:t:2, 1:m:2]) / 4
    x = x.mean(3)
    x = (x.max(2).values + x.mean(2)) @ state["fc1.weight"].T + state["fc1.bias"]
    assert e.shape == (1, 2048) and torch.allclose(e, x.relu(), atol=2e-3 * float(x.abs().max()))
    assert torch.allclose(logits, e @ state["fc_audioset.weight"].T + state["fc_audioset.bias"], atol=1e-4)


def test_vggish(tmp_path):
    shapes = {"features.0": (64, 1), "features.3": (128, 64), "features.6": (256, 128), "features.8": (256, 256), "features.11": (512, 256),
              "features.13": (512, 512), "embeddings.0": (4096, 12288), "embeddings.2": (4096, 4096), "embeddings.4": (128, 4096)}
    state = {}
    for name, (o, i) in shapes.items():
        state[f"{name}.weight"] = torch.randn((o, i, 3, 3) if "features" in name else (o, i)) * (2 / i / (9 if "features" in name else 1)) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(o)
    torch.save(state, tmp_path / evaluate.VGGISH[0])
    net, _ = evaluate.load_network(evaluate.VGGish(), evaluate.VGGISH, tmp_path, False)
    wav = 0.3 * torch.randn(1, 163840, generator=G)
    with torch.no_grad():
        out = net(wav)
        assert out.shape == (10, 128) and len(net(wav[:, :160000])) == 10 and out.min() < 0        # 10.24 s and 10 s: 10 patches
        # the second patch by numpy, TensorFlow's order of axes before the first linear layer
        frames = np.lib.stride_tricks.sliding_window_view(wav[0].numpy(), 400)[::160][96:192]
        magnitude = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1], 512))
        hertz = np.linspace(0, 8000, 257)
        mel = lambda f: 1127 * np.log(1 + f / 700)
        edges = np.linspace(mel(125), mel(7500), 66)
        up = (mel(hertz)[:, None] - edges[:-2]) / np.diff(edges)[:-1]
        down = (edges[2:] - mel(hertz)[:, None]) / np.diff(edges)[1:]
        x = torch.from_numpy(np.log(magnitude @ np.maximum(0, np.minimum(up, down)) + 0.01)).float()[None, None]
        for name in list(shapes)[:6]:
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
            x = F.max_pool2d(x, 2) if name not in ("features.6", "features.11") else x
        x = x[0].permute(1, 2, 0).flatten()                                                                # (time, mel, channel)
        for name in list(shapes)[6:]:
            x = F.linear(x.relu(), state[f"{name}.weight"], state[f"{name}.bias"])
    assert torch.allclose(out[1], x, atol=1e-3 * float(x.abs().max()))


PACKAGES = "panns_inference", "torchlibrosa", "torchvggish", "resampy"


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs {', '.join(PACKAGES)}")
def test_the_networks_are_those_of_the_public_packages(tmp_path, monkeypatch):
    """On random weights under the packages' own names, through their own code."""
    for name in ("panns_inference", "torchvggish"):                 # without running the packages' start, which downloads
        package = types.ModuleType(name)
        package.__path__ = importlib.util.find_spec(name).submodule_search_locations
        monkeypatch.setitem(sys.modules, name, package)
    models, examples, vggish = map(importlib.import_module, ("panns_inference.models", "torchvggish.vggish_input", "torchvggish.torchvggish"))
    wav = 0.1 * torch.randn(2, 160000, generator=G)
    theirs = models.Cnn14(sample_rate=16000, window_size=512, hop_size=160, mel_bins=64, fmin=50, fmax=8000, classes_num=527).eval()
    theirs.bn0.running_mean.fill_(-30)
    theirs.bn0.running_var.fill_(200)
    torch.save({"model": theirs.state_dict()}, tmp_path / evaluate.CNN14[0])
    ours, _ = evaluate.load_network(evaluate.Cnn14(), evaluate.CNN14, tmp_path, False)
    with torch.no_grad():
        expected, (e, z) = theirs(wav), ours(wav)
        assert torch.allclose(e, expected["embedding"], atol=1e-5) and torch.allclose(z.sigmoid(), expected["clipwise_output"], atol=1e-5)
        theirs = vggish.VGG(vggish.make_layers(), postprocess=False).eval()
        torch.save(theirs.state_dict(), tmp_path / evaluate.VGGISH[0])
        ours, _ = evaluate.load_network(evaluate.VGGish(), evaluate.VGGISH, tmp_path, False)
        x = examples.waveform_to_examples(wav[0].double().numpy(), 16000)
        assert torch.allclose(ours(wav[:1]), theirs.embeddings[:-1](theirs.features(x).permute(0, 2, 3, 1).flatten(1)), atol=1e-6)


def test_missing_or_wrong_network_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"Cnn14_16k_mAP=0.438.pth: not there; download it from https://zenodo"):
        evaluate.load_network(evaluate.Cnn14(), evaluate.CNN14, tmp_path, False)
    for content in ({"model": {"fc1.weight": torch.zeros(2)}}, {"model": print}):
        torch.save(content, tmp_path / evaluate.CNN14[0])
        with pytest.raises(InputError, match="is not the published file or is damaged"):
            evaluate.load_network(evaluate.Cnn14(), evaluate.CNN14, tmp_path, False)


# ---- command lines, offline ------------------------------------------------------------------------------------------

def go(*flags):
    """eval.py with these flags, in this process."""
    return evaluate.main([str(f) for f in flags])


def refuses(*flags, says):
    with pytest.raises(InputError) as error:
        go(*flags)
    assert all(word in str(error.value) for word in says), error.value


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twelve clips of the tiny world with AudioSet-like names, and a caption list of three captions each."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i, (text, events, join) in enumerate(world.captions()[1][40:52]):
        soundfile.write(folder / f"Yid{i:02d}.wav", world.render(np.random.default_rng(i), events, join)[0], 16000)
        rows += [(k, f"id{i:02d}", 30, text if k == 2 else f"caption {k}") for k in range(3)]
    with open(folder / "list.csv", "w", newline="") as f:
        csv.writer(f).writerows([("audiocap_id", "youtube_id", "start_time", "caption"), *rows, (1, "gone", 0, "no recording of this")])
    return folder


def test_score(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    go("score", "--generated", recordings, "--reference", recordings, "--features", "tiny", "--json", "new/s.json")
    row = json.loads((tmp_path / "new/s.json").read_text())
    assert row["N"] == 12 and row["FD"] == pytest.approx(0, abs=1e-6) and row["KL"] == pytest.approx(0, abs=1e-3) and row["IS"] >= 1
    assert row["FAD"] is None and row["CLAP"] is None and set(row["null"]) == {"FAD", "CLAP"}
    assert row["rate"] == 16000 and row["seconds"] == 10 and len(row["weights"]["classifier"]) == 64 and row["list"][0] == "Yid00.wav"
    (tmp_path / "t.json").write_text(json.dumps({**row, "N": 11}))
    refuses("table", "new/s.json", "t.json", says=["N differs (12, 11)"])
    go("table", "new/s.json", "t.json", "--anyway")
    output = capsys.readouterr().out
    assert "warning: these do not compare: N differs" in output and "t.json" in output


def test_score_names_what_is_wrong(recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "made/Yid00.wav").write_bytes((recordings / "Yid00.wav").read_bytes()[:40])
    flags = ("score", "--features", "tiny", "--reference", recordings, "--generated")
    refused("eval.py", *flags, "made", cwd=tmp_path, says=["made/Yid00.wav", "cannot be read"])
    refuses(*flags, "empty", says=["empty", "no WAV"])
    (tmp_path / "made/other.wav").write_bytes((recordings / "Yid00.wav").read_bytes())
    refuses(*flags, "made", says=["1 of 2 files", "other.wav"])
    refuses("score", "--reference", recordings, "--generated", recordings, "--weights", ".", says=["Cnn14", "zenodo"])
    refuses(*flags, recordings, "--clap", tmp_path / "empty", says=["--clap", "cannot be loaded"])
    refuses(*flags, recordings, "--seconds", 0, says=["--seconds"])
    (tmp_path / "other.json").write_text("{}")
    refuses("table", "other.json", says=["other.json", "not written by eval.py"])


def test_audiocaps_is_resumed_and_notices_another_system(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("audiocaps", "--captions", recordings / "list.csv", "--which", 2, "--reference", recordings, "--features", "tiny", "--out", "ac",
             "--teacher", "tiny", "--teacher_steps", 2)
    go(*flags)
    output = capsys.readouterr().out
    assert "13 clips, 1 of them without a recording" in output and "N = 12" in output
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "ac/clips").glob("*.wav")}
    row = json.loads((tmp_path / "ac/scores.json").read_text())
    assert json.loads((tmp_path / "ac/clips/manifest.json").read_text())["clips"]["Yid03.wav"] == world.captions()[1][43][0]
    (tmp_path / "ac/clips/Yid03.wav").unlink()
    go(*flags)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "ac/clips").glob("*.wav")}
    assert [n for n in before if before[n][1] != after[n][1]] == ["Yid03.wav"]
    again = json.loads((tmp_path / "ac/scores.json").read_text())
    for k in ("FD", "KL", "IS"):
        assert again.pop(k) == pytest.approx(row.pop(k), rel=1e-3)          # a batch of one rounds otherwise than one of eight
    assert again == row
    refuses(*flags[:-1], 3, says=["ac/clips", "steps differs"])
    refuses(*flags[:3], "--which", 3, *flags[5:], says=["fewer than 4 captions", "--which"])


def test_json_lines_are_a_caption_list_too(recordings, tmp_path):
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"location": f"data/wav/Yid{i:02d}.wav", "text": f"clip {i}"}) + "\n" for i in range(12)))
    clips = evaluate.read_clips(str(tmp_path / "list.jsonl"), recordings, 0)
    assert clips["Yid07.wav"] == "clip 7" and len(clips) == 12
    with pytest.raises(InputError, match="row 1 holds no caption"):
        (tmp_path / "bad.jsonl").write_text('{"location": "a.wav"}\n')
        evaluate.read_clips(str(tmp_path / "bad.jsonl"), recordings, 0)
    with pytest.raises(InputError, match="holds no WAV"):
        evaluate.read_clips(str(tmp_path / "list.jsonl"), tmp_path, 0)


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    """A small random CLAP model in the published layout."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizerFast
    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    text = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=80)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], hidden_size=128, num_mel_bins=64, spec_size=256)
    ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8)).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a dog barks"], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    ClapProcessor(ClapFeatureExtractor(truncation="rand_trunc"), tokenizer).save_pretrained(folder)
    return folder


def test_clap_is_a_cosine_and_does_not_depend_on_luck(clap, recordings, tmp_path):
    model = evaluate.Clap(str(clap), "cpu")
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).standard_normal(12 * 16000) * 0.1, 16000)
    a, b = (model(tmp_path / "long.wav", ["a dog barks", "rain"], 30) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (2,) and a.abs().max() <= 1 and a[0] != a[1]


def test_clotho(clap, recordings, tmp_path, monkeypatch):
    """Crops are functions of the seed and the name; the caption is CLAP's choice; a second call changes nothing."""
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "list.csv", "w", newline="") as f:
        csv.writer(f).writerows([("file_name", *(f"caption_{k}" for k in range(1, 6)))]
                                + [(f"Yid{i:02d}.wav", "a dog barks", "rain falls", "a bell rings", "wind blows", "a cat meows") for i in range(3)])
    flags = ("clotho", "--captions", "list.csv", "--reference", recordings, "--features", "tiny", "--clap", clap, "--seconds", 2.0, "--out", "out",
             "--teacher", "tiny", "--teacher_steps", 1)
    go(*flags)
    row, first = json.loads((tmp_path / "out/scores.json").read_text()), (tmp_path / "out/reference/Yid01.wav").read_bytes()
    assert row["N"] == 3 and row["CLAP"] is not None and row["IS"] is None and row["null"]["IS"] == "fewer than 10 clips"
    whole, crop = soundfile.read(recordings / "Yid01.wav")[0], soundfile.read(tmp_path / "out/reference/Yid01.wav")[0]
    assert len(crop) == 32000 and any(np.array_equal(whole[i:i + 32000], crop) for i in range(len(whole) - 32000 + 1))
    captions = ["a dog barks", "rain falls", "a bell rings", "wind blows", "a cat meows"]
    assert row["list"]["Yid01.wav"] == captions[int(evaluate.Clap(str(clap), "cpu")(tmp_path / "out/reference/Yid01.wav", captions, 2.0).argmax())]
    go(*flags)
    assert (tmp_path / "out/reference/Yid01.wav").read_bytes() == first and json.loads((tmp_path / "out/scores.json").read_text()) == row
    refuses(*flags, "--seed", 1, says=["out/clips", "seed differs"])
