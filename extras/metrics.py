"""The metrics of the paper's section IV and the networks behind them.

FD, KL and IS are taken on PANNs CNN14, in the tiny world on a small classifier, FAD on VGGish. The
paper's text swaps the two networks; its numbers, and the public evaluation code, have them so.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ClapModel, ClapProcessor
from transformers.audio_utils import mel_filter_bank

from data import InputError, read_captions, read_json, require
from extras.audio import read_audio, read_file, resample
from model import RATE, TINY, cause

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
OTHERS = (".m4a", ".aac", ".mp4", ".webm", ".wma", ".aif", ".aiff", ".caf")  # sounds, not read


# ---- the two networks, under the published parameter names ---------------------------------------

class ConvBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(n, o, 3, padding=1, bias=False) for n in (i, o))
        self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Cnn14(nn.Module):
    """PANNs CNN14 at 16 kHz (Kong et al. 2020, arXiv 1912.10211).

    Waveforms (B, N) -> embedding (B, 2048) after its ReLU, logits (B, 527) of AudioSet's classes.
    """

    file = "Cnn14_16k_mAP=0.438.pth"
    url = "https://zenodo.org/record/3987831/files/Cnn14_16k_mAP%3D0.438.pth"

    def __init__(self):
        super().__init__()
        # the published file holds the STFT (as convolutions) and the mel filters too
        stft = nn.ModuleDict({name: nn.Conv1d(1, 257, 512, stride=160, bias=False)
                              for name in ("conv_real", "conv_imag")})
        self.spectrogram_extractor = nn.ModuleDict({"stft": stft})
        self.logmel_extractor = nn.ParameterDict({"melW": torch.zeros(257, 64)})
        self.bn0 = nn.BatchNorm2d(64)
        chans = [1, 64, 128, 256, 512, 1024, 2048]
        for n, (i, o) in enumerate(zip(chans, chans[1:]), 1):
            setattr(self, f"conv_block{n}", ConvBlock(i, o))
        self.fc1, self.fc_audioset = nn.Linear(2048, 2048), nn.Linear(2048, 527)

    def forward(self, wav):
        wav = F.pad(wav[:, None], (256, 256), mode="reflect")
        power = sum(conv(wav) ** 2 for conv in self.spectrogram_extractor["stft"].values())
        mel = power.transpose(1, 2) @ self.logmel_extractor["melW"]             # (B, frames, 64)
        x = 10 * mel.clamp(min=1e-10).log10()
        x = self.bn0(x.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)          # (B, 1, frames, 64)
        for n in range(1, 7):
            x = getattr(self, f"conv_block{n}")(x)
            x = F.avg_pool2d(x, 2) if n < 6 else x
        x = x.mean(3)                                                           # (B, 2048, frames)
        e = F.relu(self.fc1(x.amax(2) + x.mean(2)))
        return e, self.fc_audioset(e)


class VGGish(nn.Module):
    """VGGish (arXiv 1609.09430) less its last ReLU: waveform (1, N) -> (patches of 0.96 s, 128)."""

    file = "vggish-10086976.pth"
    url = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"

    def __init__(self):
        super().__init__()
        layers, chans = [], [1, 64, 128, 256, 256, 512, 512]
        for n, io in enumerate(zip(chans, chans[1:])):
            pool = [] if n in (2, 4) else [nn.MaxPool2d(2)]
            layers += [nn.Conv2d(*io, 3, padding=1), nn.ReLU(), *pool]
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(nn.Linear(512 * 24, 4096), nn.ReLU(),
                                        nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128))
        bank = mel_filter_bank(257, 64, 125.0, 7500.0, RATE, mel_scale="htk",
                               triangularize_in_mel_space=True)
        self.register_buffer("bank", torch.from_numpy(bank).float(), persistent=False)

    def forward(self, wav):
        window = torch.hann_window(400, device=wav.device)
        frames = wav[0].unfold(0, 400, 160) * window
        x = (torch.fft.rfft(frames, 512).abs() @ self.bank + 0.01).log()        # (frames, 64)
        x = x[:len(x) // 96 * 96].reshape(-1, 1, 96, 64)                        # drops the tail
        x = self.features(x).permute(0, 2, 3, 1).flatten(1)                     # TensorFlow's order
        return self.embeddings(x)


def load_network(kind, folder, download=False):
    """Load Cnn14 or VGGish from its published file, in eval mode; its sha256 is the file's."""
    path, network = Path(os.path.expanduser(folder)) / kind.file, kind()
    elsewhere = f"get {kind.url} and pass its folder as --weights"
    require(str(path)[0] != "~", f"{path}: there is no home folder; {elsewhere}")
    require(download or path.exists(), f"{path}: missing; {elsewhere}, or pass --download")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(kind.url, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be downloaded ({e}); {elsewhere}")
    # PANNs' file holds counters of numpy 1, which a pickle names in either of two ways
    core = getattr(np, "_core", None) or np.core
    plain = [(f, f"numpy.{name}.multiarray.{f.__name__}") for name in ("core", "_core")
             for f in (core.multiarray.scalar, core.multiarray._reconstruct)]
    plain += [np.ndarray, np.dtype, *(type(np.dtype(k)) for k in "?bhilqBHILQfd")]
    try:
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state.get("model", state))
    except Exception as e:                              # torch.load fails in many ways
        raise InputError(f"{path}: not the published file, or damaged; remove it ({cause(e)})")
    network.sha256 = sha256(path)
    return network.float().eval()


def sha256(*paths):
    """Hash the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


# ---- the tiny world's network --------------------------------------------------------------------

def blocks(mel):
    """Log energy of a log-mel (B, 64, frames) in blocks of 2 mels x 40 ms, offset as in VGGish."""
    return (F.avg_pool2d(mel.exp()[:, None], (2, 4))[:, 0] + 0.01).log()    # (B, 32, frames / 4)


class Classifier(nn.Module):
    """Log-mel (B, 64, 256) -> embedding (B, 128) after its ReLU, logits (B, labels)."""

    def __init__(self, labels):
        super().__init__()
        chans = [1, 16, 32, 64, 64]
        self.convs = nn.ModuleList(nn.Conv2d(*io, 3, padding=1) for io in zip(chans, chans[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in chans[1:])
        self.embed, self.head = nn.Linear(4 * chans[-1], 128), nn.Linear(128, labels)

    def forward(self, mel):
        return self.of_blocks(blocks(mel))

    def of_blocks(self, x):
        x = (x[:, None] + 2) / 2.5                                          # (B, 1, 32, 64)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if i else x
        x = x.flatten(1, 2)                                                 # (B, 64 x 4, 8)
        e = F.relu(self.embed(x.amax(-1) + x.mean(-1)))                     # pools time as CNN14
        return e, self.head(e)


def load_classifier():
    """Load the classifier that is shipped with the tiny world, in eval mode."""
    state = load_file(TINY.parent / "classifier.safetensors")
    net = Classifier(len(state["head.weight"]))
    net.load_state_dict(state)
    return net.float().eval()


# ---- the metrics ---------------------------------------------------------------------------------

def frechet(x, y):
    """Fréchet distance of samples (n, d) and (m, d) under Gaussian fits, covariances over n - 1.

    tr (Sx Sy)^(1/2) is the nuclear norm of X Y^T, with X, Y the centred samples over sqrt(n - 1),
    which is exact for n < d too. Where n > d, QR first makes the matrix d x d at most.
    """
    x, y = x.double(), y.double()
    dm = x.mean(0) - y.mean(0)
    x, y = ((a - a.mean(0)) / (len(a) - 1) ** 0.5 for a in (x, y))
    rx, ry = (torch.linalg.qr(a, "r").R if len(a) > a.shape[1] else a for a in (x, y))
    cross = torch.linalg.matrix_norm(rx @ ry.T, "nuc")
    return float(dm @ dm + x.square().sum() + y.square().sum() - 2 * cross)


def kl_divergence(reference, generated):
    """Mean of KL(softmax(reference) || softmax(generated) + 1e-6) of logits (n, classes)."""
    p, q = reference.double().log_softmax(-1), generated.double().softmax(-1) + 1e-6
    return float((p.exp() * (p - q.log())).sum(-1).mean())


def inception_score(logits, splits=10):
    """exp(mean KL(p(class | clip) || p(class))) of logits (n, classes), the mean over ten parts.

    The clips are shuffled with seed 2020 first, as in the public evaluation code.
    """
    logits = logits.double()[np.random.RandomState(2020).permutation(len(logits))]
    n, found = len(logits), []
    for k in range(splits):
        p = logits[k * n // splits:(k + 1) * n // splits].log_softmax(-1)
        marginal = p.exp().mean(0)
        found.append((p.exp() * (p - marginal.log())).sum(-1).mean().exp())
    return float(torch.stack(found).mean())


def scores(reference, generated):
    """FD, KL and IS of two (embeddings, logits) paired by row; None where the rows are too few."""
    (real, real_logits), (made, made_logits) = reference, generated
    return {"FD": frechet(real, made) if len(made) > 1 else None,
            "KL": kl_divergence(real_logits, made_logits),
            "IS": inception_score(made_logits) if len(made) > 9 else None}


class Clap:
    """Cosine similarity of sound and text by a CLAP model: a hub name, or a folder."""

    def __init__(self, name, device):
        try:
            model, found = ClapModel.from_pretrained(name, output_loading_info=True)
            self.processor = ClapProcessor.from_pretrained(name)
        except Exception as e:                          # each kind of damage its own error
            raise InputError(f"--clap {name}: cannot be loaded ({cause(e)}); "
                             "download it elsewhere and pass its folder")
        lost = [k for k in found["missing_keys"] if model.state_dict()[k].is_floating_point()]
        require(not lost, f"--clap {name}: {len(lost)} weights are missing, {', '.join(lost[:2])}")
        self.model = model.to(device).eval()
        weights = b"".join(w.detach().cpu().numpy().tobytes() for w in self.model.parameters())
        self.file, self.sha256 = str(name), hashlib.sha256(weights).hexdigest()

    @torch.no_grad()
    def __call__(self, path, texts, seconds):
        """Compare the first `seconds` of a file, 10 at most, with a list of texts: (texts,)."""
        seconds = min(seconds, 10.0)                    # a longer one would be cropped at random
        wav = read_audio(path, seconds, 48000).numpy()
        sound = self.processor(audio=[wav], sampling_rate=48000, return_tensors="pt")
        words = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        a = self.model.get_audio_features(**sound.to(self.model.device)).pooler_output
        t = self.model.get_text_features(**words.to(self.model.device)).pooler_output
        return F.cosine_similarity(a, t).cpu()


class Ear:
    """YAMNet: a file, seconds -> embedding (1, 1024), logits (1, 521): of means over its windows.

    words: JSON, {"dog, hound": [classes that fit a caption with one of these words], ...}.
    """

    def __init__(self, path, words=None):
        try:
            from ai_edge_litert.interpreter import Interpreter
            self.net = net = Interpreter(str(path), experimental_preserve_all_tensors=True)
            net.allocate_tensors()                      # all, as the embedding is inside
        except Exception as e:
            raise InputError(f"--ear {path}: not loaded ({cause(e)}); pip install ai-edge-litert?")
        table = Path(path).with_name("yamnet_class_map.csv")
        self.names = read_captions(table, "display_name")[0]
        self.files = {Path(p).name: sha256(p) for p in (path, words) if p}
        sizes = {"input": [15600], "output": [1, len(self.names)], "tensor": [1, 1024]}
        self.ports = [t["index"] for kind, size in sizes.items()
                      for t in getattr(net, f"get_{kind}_details")() if [*t["shape"]] == size]
        require(len(self.ports) == 3, f"--ear {path}: is not YAMNet, or not of its class map")
        self.fits = read_json(words) if words else {}
        lost = {name for fit in self.fits.values() for name in fit} - {*self.names}
        require(not lost, f"{words}: YAMNet has no class {sorted(lost)[:3]}")

    def windows(self, wav):
        """Scores (n, 521), embeddings (n, 1024) of n windows spread over a waveform at 16 kHz."""
        wav, found = np.pad(wav, (0, max(0, 15600 - len(wav)))).astype(np.float32), []
        for start in np.linspace(0, len(wav) - 15600, -(-len(wav) // 15600)).astype(int):
            self.net.set_tensor(self.ports[0], wav[start:start + 15600])
            self.net.invoke()
            found.append([self.net.get_tensor(port)[0].copy() for port in self.ports[1:]])
        return [np.stack(column) for column in zip(*found)]

    def __call__(self, path, seconds):
        wav, rate = read_file(path)
        wav = resample(torch.from_numpy(wav.mean(1)), rate, RATE)[:round(seconds * RATE)]
        scores, embeddings = (torch.from_numpy(x.mean(0))[None] for x in self.windows(wav.numpy()))
        return embeddings, scores.logit(1e-6)

    def hits(self, logits, captions):
        """How often the top 3 has a class that fits the first key with a word of the caption."""
        found, share = {}, lambda hits: sum(hits) / len(hits) if hits else None
        for top, caption in zip(logits.topk(3).indices.tolist(), captions):
            said = {word.strip(".,;:!?\"'()") for word in caption.lower().split()}
            for key in [key for key in self.fits if said & {*key.split(", ")}][:1]:
                hit = any(self.names[i] in self.fits[key] for i in top)
                found.setdefault(key, []).append(hit)
        every = sum(found.values(), [])
        return {"hit": share(every), "hit_N": len(every),
                "hits": {key: share(hits) for key, hits in found.items()}}


# ---- folders -------------------------------------------------------------------------------------

def recordings(folder):
    """The sound files of a folder: {name without its ending: path}. Prints what is not read."""
    files = sorted(Path(folder).glob("*"))
    found = {p.stem: p for p in files if p.suffix.lower() in SOUNDS}
    others = sorted({p.suffix.lower() for p in files}.intersection(OTHERS))
    if others or not found:
        print(f"{folder}: only {', '.join(SOUNDS)} are read; no {', '.join([*others, 'folders'])}")
    return found


def pair(generated, reference, prompts=None):
    """Pair two folders by name: {name of a generated file: (its path, its recording's)}.

    prompts: {file name: text}; only these count. InputError where a file has no recording.
    """
    real, made = recordings(reference), recordings(generated)
    for folder, files in ((generated, made), (reference, real)):
        require(files, f"{folder}: holds no sound file")
    made = {p.name: p for p in made.values() if prompts is None or p.name in prompts}
    alone = [name for name, p in made.items() if p.stem not in real]
    require(not alone, f"{generated}: {len(alone)} of {len(made)} files have no partner in "
            f"{reference}: {', '.join(alone[:3])}")
    if left := len(real) - len(made):
        print(f"{left} of {len(real)} files of {reference} have no generated clip and are left out")
    return {name: (p, real[p.stem]) for name, p in made.items()}
