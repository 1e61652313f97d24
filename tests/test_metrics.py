import hashlib
import math
import shutil
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ClapModel, ClapProcessor
from transformers.audio_utils import mel_filter_bank

from data import InputError
from extras import metrics
from extras.metrics import Cnn14, VGGish, frechet, load_network, pair, scores


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n, d", [(400, 8), (30, 50)])                  # n > d and n < d
def test_frechet_distance_has_its_closed_forms(g, n, d):
    x = torch.randn(n, d, generator=g).double()
    centred, variance = x - x.mean(0), float(x.T.cov().trace())
    assert frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet(x, x + 2) == pytest.approx(4 * d, rel=1e-9)
    assert frechet(centred, 2 * centred) == pytest.approx(variance, rel=1e-9)   # (2 - 1)^2 tr S


def test_scores_equal_an_independent_float64_computation(g):
    e, f = (torch.randn(64, 20, generator=g).relu() for _ in range(2))
    y, z = (3 * torch.randn(64, 12, generator=g) for _ in range(2))
    row = scores((e, y), (f, z))

    a, b = e.double().numpy(), f.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T                # tr (Sa^1/2 Sb Sa^1/2)^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b.T) @ root).clip(0)).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    fd = means + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross

    softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
    p, q = softmax(y.double().numpy()), softmax(z.double().numpy())
    kl = (p * np.log(p / (q + 1e-6))).sum(1).mean()

    shuffled = q[np.random.RandomState(2020).permutation(64)]
    parts = [shuffled[64 * k // 10:64 * (k + 1) // 10] for k in range(10)]
    inception = np.mean([np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in parts])
    assert (row["FD"], row["KL"], row["IS"]) == pytest.approx((fd, kl, inception), rel=1e-5)

    some = lambda n: scores((e[:n], y[:n]), (f[:n], z[:n]))             # too few for some of them
    assert some(1)["FD"] is None and some(9)["FD"] > 0
    assert some(9)["IS"] is None and some(10)["IS"] == pytest.approx(1)


def norm_state(name, size):
    return {f"{name}.weight": torch.rand(size) + 0.5, f"{name}.bias": 0.1 * torch.randn(size),
            f"{name}.running_mean": 0.1 * torch.randn(size),
            f"{name}.running_var": torch.rand(size) + 0.5,
            f"{name}.num_batches_tracked": torch.tensor(7)}


def cnn14_state():
    """Random weights under the published names, the front end as the published file holds it."""
    n, k = torch.arange(512), torch.arange(257)[:, None]
    angle, window = 2 * math.pi * n * k / 512, torch.hann_window(512)
    mel = mel_filter_bank(257, 64, 50.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    state = {"spectrogram_extractor.stft.conv_real.weight": (angle.cos() * window)[:, None],
             "spectrogram_extractor.stft.conv_imag.weight": (-angle.sin() * window)[:, None],
             "logmel_extractor.melW": torch.from_numpy(mel).float(), **norm_state("bn0", 64)}
    i = 1
    for block, o in enumerate((64, 128, 256, 512, 1024, 2048), 1):
        for conv, width in ((1, i), (2, o)):
            weight = torch.randn(o, width, 3, 3) * (2 / (9 * width)) ** 0.5
            state[f"conv_block{block}.conv{conv}.weight"] = weight
            state |= norm_state(f"conv_block{block}.bn{conv}", o)
        i = o
    for name, o in (("fc1", 2048), ("fc_audioset", 527)):
        state |= {f"{name}.weight": torch.randn(o, 2048) / 45, f"{name}.bias": torch.randn(o) / 10}
    return state


def cnn14_by_layer(wav, s):
    """What CNN14 is, from PyTorch's spectrogram and the state's tensors: (embedding, logits)."""
    def norm(x, name):
        return F.batch_norm(x, *(s[f"{name}.{k}"] for k in (
            "running_mean", "running_var", "weight", "bias")))

    spectrum = torch.stft(wav[0], 512, 160, window=torch.hann_window(512), center=True,
                          pad_mode="reflect", return_complex=True)
    mel = (spectrum.abs() ** 2).T @ s["logmel_extractor.melW"]
    x = norm(10 * torch.log10(mel.clamp(min=1e-10)), "bn0")[None, None]         # (1, 1, T, 64)
    for block in range(1, 7):
        for conv in (1, 2):
            x = F.conv2d(x, s[f"conv_block{block}.conv{conv}.weight"], padding=1)
            x = norm(x, f"conv_block{block}.bn{conv}").relu()
        x = F.avg_pool2d(x, 2) if block < 6 else x
    x = x.mean(3)
    x = (x.max(2).values + x.mean(2)) @ s["fc1.weight"].T + s["fc1.bias"]
    return x.relu(), x.relu() @ s["fc_audioset.weight"].T + s["fc_audioset.bias"]


def test_cnn14_is_its_layers_and_is_read_from_a_file_of_numpy_1(tmp_path, g):
    state = cnn14_state()
    # the published file holds numpy counters, pickled under the names of numpy 1
    counters = {"state": np.arange(3), "at": np.float64(2)}
    torch.save({"iteration": 3, "model": state, "sampler": counters}, tmp_path / "new.pth")
    new, old = b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"
    with zipfile.ZipFile(tmp_path / "new.pth") as source:
        with zipfile.ZipFile(tmp_path / Cnn14.file, "w") as target:
            for item in source.infolist():
                content = source.read(item)
                pickled = item.filename.endswith("data.pkl")
                target.writestr(item, content.replace(new, old) if pickled else content)

    net = load_network(Cnn14, tmp_path)
    content = (tmp_path / Cnn14.file).read_bytes()
    assert net.sha256 == hashlib.sha256(content).hexdigest()
    assert not net.training
    wav = 0.3 * torch.randn(1, 32000, generator=g)
    with torch.no_grad():
        e, logits = net(wav)
    expected, expected_logits = cnn14_by_layer(wav, state)
    assert e.shape == (1, 2048) and (e > 0).float().mean() > 0.2
    torch.testing.assert_close(e, expected, rtol=0, atol=2e-3 * float(expected.max()))
    scale = float(expected_logits.abs().max())
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-3 * scale)


VGGISH = {
    "features.0": (64, 1, 3, 3), "features.3": (128, 64, 3, 3), "features.6": (256, 128, 3, 3),
    "features.8": (256, 256, 3, 3), "features.11": (512, 256, 3, 3),
    "features.13": (512, 512, 3, 3), "embeddings.0": (4096, 12288), "embeddings.2": (4096, 4096),
    "embeddings.4": (128, 4096)}


def vggish_patch(wav, k, s):
    """Row k of VGGish by numpy and the state's tensors."""
    frames = np.lib.stride_tricks.sliding_window_view(wav[0].numpy(), 400)[::160]
    frames = frames[96 * k:96 * k + 96] * np.hanning(401)[:-1]
    magnitude = np.abs(np.fft.rfft(frames, 512))
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)
    bins, edges = mel(np.linspace(0, 8000, 257))[:, None], np.linspace(mel(125), mel(7500), 66)
    up = (bins - edges[:-2]) / np.diff(edges)[:-1]
    down = (edges[2:] - bins) / np.diff(edges)[1:]
    bank = np.maximum(0, np.minimum(up, down))
    x = torch.from_numpy(np.log(magnitude @ bank + 0.01)).float()[None, None]

    for name in list(VGGISH)[:6]:
        x = F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2) if name not in ("features.6", "features.11") else x
    x = x[0].permute(1, 2, 0).flatten()                                 # (time, mel, channel)
    for name in list(VGGISH)[6:]:
        x = F.linear(x.relu(), s[f"{name}.weight"], s[f"{name}.bias"])
    return x


def test_vggish_is_its_layers(tmp_path, g):
    state = {}
    for name, shape in VGGISH.items():
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape) * (2 / fan_in) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0])
    torch.save(state, tmp_path / VGGish.file)
    net = load_network(VGGish, tmp_path)
    wav = 0.3 * torch.randn(1, 163840, generator=g)
    wav *= 10 ** torch.linspace(-3, 0, 163840)          # a quiet start shows the log's offset
    with torch.no_grad():
        out, ten = net(wav), net(wav[:, :160000])
        expected = vggish_patch(wav, 1, state)
    assert out.shape == ten.shape == (10, 128)                          # of 10.24 s and of 10 s
    assert out.min() < 0                                                # no ReLU behind
    torch.testing.assert_close(out[1], expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


class Small(torch.nn.Linear):
    """A network to load in the place of the two, which are large."""

    file, url = "small.pth", "https://somewhere/small.pth"

    def __init__(self):
        super().__init__(2, 3)


def test_network_files_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    missing = r"mAP=0.438.pth: missing; get https://zenodo.* as --weights, or pass --download"
    with pytest.raises(InputError, match=missing):
        load_network(Cnn14, tmp_path)
    for content in ({"model": {"weight": torch.zeros(2)}}, {"model": print}):
        torch.save(content, tmp_path / Small.file)
        with pytest.raises(InputError, match="small.pth: not the published file, or damaged"):
            load_network(Small, tmp_path)
    with pytest.raises(InputError, match=r"cannot be downloaded \(.*Not a dir.* as --weights"):
        load_network(Small, tmp_path / Small.file / "below", download=True)     # as in no home
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="there is no home folder; .* as --weights"):
        load_network(Small, "~/.cache/swiftaudio", download=True)


def test_a_network_is_downloaded_once(tmp_path, monkeypatch):
    calls, folder, network = [], tmp_path / "new/weights", Small()

    def works(url, path):
        calls.append(url)
        torch.save({"model": network.state_dict()}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", works)
    found = [load_network(Small, folder, download=True) for _ in range(2)]
    assert calls == [Small.url] and torch.equal(found[1].weight, network.weight)


def files(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_folders_are_paired_by_name(tmp_path, capsys):
    real = files(tmp_path / "real", "a.WAV", "b.flac", "c.ogg", "d.Mp3", "e.opus", "f.wav")
    made = files(tmp_path / "made", "b.wav", "a.wav", "c.wav", "d.wav", "e.wav", "notes.txt")
    assert [(name, p.name) for name, (_, p) in pair(made, real).items()] == [
        ("a.wav", "a.WAV"), ("b.wav", "b.flac"), ("c.wav", "c.ogg"), ("d.wav", "d.Mp3"),
        ("e.wav", "e.opus")]
    assert capsys.readouterr().out.startswith("1 of 6 files")
    assert pair(made, real, {"b.wav": "rain"}) == {"b.wav": (made / "b.wav", real / "b.flac")}
    files(made, "g.wav")
    with pytest.raises(InputError, match="made: 1 of 6 files have no partner in .*real: g.wav"):
        pair(made, real)


def test_what_is_not_read_is_told(tmp_path, capsys):
    folder = files(tmp_path / "some", "a.wav", "e.m4a", "f.M4A", "g.webm", "notes.txt")
    assert list(metrics.recordings(folder)) == ["a"]
    read = "only .wav, .flac, .mp3, .ogg, .opus are read; no"
    assert capsys.readouterr().out == f"{folder}: {read} .m4a, .webm, folders\n"
    for pairs in ((folder, tmp_path / "none"), (tmp_path / "none", folder)):
        with pytest.raises(InputError, match="none: holds no sound file"):
            pair(*pairs)
        assert f"none: {read} folders\n" in capsys.readouterr().out


def test_clap_is_a_cosine_of_the_first_seconds_at_48_khz(clap, tmp_path):
    """transformers' own similarity, of the sound that is asked for; 10 s at most, not at random."""
    wav = 0.1 * np.random.default_rng(0).standard_normal(12 * 48000).astype(np.float32)
    wav[:96000] -= wav[:96000].mean()
    wav[96000:] = np.sin(np.arange(480000) / 5)
    soundfile.write(tmp_path / "a.wav", wav, 48000, "FLOAT")
    texts, processor = ["a dog barks", "rain"], ClapProcessor.from_pretrained(clap)
    asked = processor(audio=[wav[:96000]], text=texts, sampling_rate=48000, padding=True,
                      return_tensors="pt")
    with torch.no_grad():
        out = ClapModel.from_pretrained(clap).eval()(**asked)
    expected = (F.normalize(out.text_embeds, dim=1) @ F.normalize(out.audio_embeds, dim=1).T)[:, 0]
    model = metrics.Clap(clap, "cpu")
    torch.testing.assert_close(model(tmp_path / "a.wav", texts, 2.0), expected, rtol=0, atol=2e-4)
    a, b = (model(tmp_path / "a.wav", texts, 30) for _ in range(2))
    assert torch.equal(a, b) and (a - expected).abs().max() > 2e-3


def test_a_clap_model_that_is_not_there_or_damaged_is_named(clap, tmp_path):
    with pytest.raises(InputError, match=f"--clap {tmp_path}: cannot be loaded"):
        metrics.Clap(tmp_path, "cpu")
    weights = shutil.copytree(clap, tmp_path / "cut") / "model.safetensors"
    state = load_file(weights)
    for name in ("text_projection.linear1.weight", "audio_model.audio_encoder.norm.bias"):
        del state[name]
    del state["text_model.embeddings.position_ids"]         # not learned: older files lack it
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(InputError, match="cut: 2 weights are missing, .*text_projection.linear1"):
        metrics.Clap(weights.parent, "cpu")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cut: cannot be loaded"):
        metrics.Clap(weights.parent, "cpu")
