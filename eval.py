"""Score generated audio as the paper does (section IV, appendix C): FD, KL and IS on PANNs CNN14, FAD on VGGish, and CLAP.

    python eval.py score --generated samples --reference recordings              # two folders of WAVs paired by name
    python eval.py audiocaps --captions test.csv --reference recordings --out eval/student      # a row of Table II
    python eval.py clotho --captions clotho_captions_evaluation.csv --reference evaluation --out eval/clotho    # of Table III
    python eval.py table eval/*/scores.json                                      # rows side by side

The paper's text has the networks of FD and FAD the other way round; its numbers and the public code have them as here.
The two networks are downloaded with --download, or put into --weights. `--features tiny` uses the tiny world's classifier.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank

import sample
from data import InputError, read_json, write
from model import LOG_MAX, LOG_MIN, RATE, log_mel, pick_device

CNN14 = "Cnn14_16k_mAP=0.438.pth", "https://zenodo.org/record/3987831/files/Cnn14_16k_mAP%3D0.438.pth"
VGGISH = "vggish-10086976.pth", "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
EPS = 1e-6                                              # added to the generated clip's probabilities in KL


# ---- audio in ------------------------------------------------------------------------------------------------------

def resample(wav, old, new):
    """Waveform (N,) at `old` Hz -> (ceil(N new / old),) at `new` Hz: a Hann-windowed sinc of 6 zero crossings, cut-off at
    0.99 of the lower Nyquist frequency, which are torchaudio's defaults."""
    if old == new:
        return wav
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cut = 0.99 * min(old, new)
    reach = math.ceil(6 * old / cut)
    # one filter for each of the `new` phases of an output sample between `old` input samples
    t = torch.arange(-reach, reach + old, dtype=torch.float64) / old - torch.arange(new, dtype=torch.float64)[:, None] / new
    t = (t * cut).clamp(-6, 6)
    bank = torch.sinc(t) * (t * math.pi / 12).cos() ** 2 * cut / old
    out = F.conv1d(F.pad(wav, (reach, reach + old))[None, None], bank.to(wav)[:, None], stride=old)
    return out[0].T.reshape(-1)[:math.ceil(len(wav) * new / old)]


def read_audio(path, seconds=10.0, rate=RATE):
    """First channel of a file, minus its mean, at `rate`, cut to `seconds` and padded to 2 s at least: (N,)."""
    try:
        wav, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as e:
        raise InputError(f"{path}: cannot be read as audio ({e})")
    if not len(wav) or not np.isfinite(wav).all():
        raise InputError(f"{path}: holds {'samples that are not numbers' if len(wav) else 'no sound'}")
    wav = torch.from_numpy(wav[:, 0].copy())
    wav = resample(wav - wav.mean(), found, rate)[:round(seconds * rate)]
    return F.pad(wav, (0, max(0, 2 * rate - len(wav))))


# ---- the two networks, under the published parameter names ---------------------------------------------------------

class ConvBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(n, o, 3, padding=1, bias=False) for n in (i, o))
        self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Cnn14(nn.Module):
    """PANNs CNN14 at 16 kHz (Kong et al. 2020, arXiv 1912.10211): waveforms (B, N) -> embedding (B, 2048), logits (B, 527)."""

    def __init__(self):
        super().__init__()
        self.spectrogram_extractor = nn.ModuleDict({"stft": nn.ModuleDict({     # the STFT as convolutions, held in the file
            part: nn.Conv1d(1, 257, 512, stride=160, bias=False) for part in ("conv_real", "conv_imag")})})
        self.logmel_extractor = nn.ParameterDict({"melW": torch.zeros(257, 64)})
        self.bn0 = nn.BatchNorm2d(64)
        chans = [1, 64, 128, 256, 512, 1024, 2048]
        for n, (i, o) in enumerate(zip(chans, chans[1:]), 1):
            setattr(self, f"conv_block{n}", ConvBlock(i, o))
        self.fc1, self.fc_audioset = nn.Linear(2048, 2048), nn.Linear(2048, 527)

    def forward(self, wav):
        wav = F.pad(wav[:, None], (256, 256), mode="reflect")
        power = sum(conv(wav) ** 2 for conv in self.spectrogram_extractor["stft"].values())
        x = 10 * (power.transpose(1, 2) @ self.logmel_extractor["melW"]).clamp(min=1e-10).log10()       # (B, T, 64)
        x = self.bn0(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)[:, None]
        for n in range(1, 7):
            x = getattr(self, f"conv_block{n}")(x)
            x = F.avg_pool2d(x, 2) if n < 6 else x
        x = x.mean(3)                                                           # over mels; then max + mean over time
        e = F.relu(self.fc1(x.amax(2) + x.mean(2)))
        return e, self.fc_audioset(e)


class VGGish(nn.Module):
    """VGGish (Hershey et al. 2017), its last ReLU left out: waveforms (1, N) at 16 kHz -> (patches of 0.96 s, 128)."""

    def __init__(self):
        super().__init__()
        layers, i = [], 1
        for o in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M"):
            layers += [nn.MaxPool2d(2)] if o == "M" else [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
            i = i if o == "M" else o
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(nn.Linear(512 * 24, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128))
        bank = mel_filter_bank(257, 64, 125.0, 7500.0, RATE, mel_scale="htk", triangularize_in_mel_space=True)
        self.register_buffer("bank", torch.from_numpy(bank).float(), persistent=False)

    def forward(self, wav):
        window = torch.hann_window(400, device=wav.device)
        magnitude = torch.fft.rfft(wav[0].unfold(0, 400, 160) * window, 512).abs()                      # (frames, 257)
        x = (magnitude @ self.bank + 0.01).log()
        x = x[:len(x) // 96 * 96].reshape(-1, 1, 96, 64)                                                # the tail is dropped
        return self.embeddings(self.features(x).permute(0, 2, 3, 1).flatten(1))


def load_network(network, published, folder, download):
    """Fill a network from its published file: (network in eval mode, sha256 of the file)."""
    name, url = published
    path = Path(folder) / name
    if not path.exists():
        if not download:
            raise InputError(f"{path}: not there; download it from {url}, or pass --download, or --features tiny to try things out")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, progress=True)
        except OSError as e:
            raise InputError(f"{url}: cannot be downloaded ({e}); get it elsewhere and put it at {path}")
    core = getattr(np, "_core", None) or np.core        # PANNs' file holds numpy counters too, under numpy 1's names
    plain = [np.ndarray, np.dtype, *(type(np.dtype(k)) for k in "?bhilqBHILQfd"), *(
        (f, f"numpy.{c}.multiarray.{f.__name__}") for f in (core.multiarray.scalar, core.multiarray._reconstruct) for c in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state.get("model", state))
    except Exception as e:                              # torch.load fails in many ways
        raise InputError(f"{path}: is not the published file or is damaged; remove it and get it anew ({(str(e) or type(e).__name__).splitlines()[0][:150]})")
    return network.float().eval(), sha256(path)


def sha256(*paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# ---- the metrics ---------------------------------------------------------------------------------------------------

def frechet(x, y):
    """Fréchet distance of two samples (n, d) and (m, d) under a Gaussian fit, covariances over n - 1.

    tr (Sx Sy)^(1/2) is the nuclear norm of X Y^T, with X, Y the centred samples over sqrt(n - 1): no matrix square
    root is taken, so it is exact for n < d as well. QR first where n > d, so that the matrix is d x d at most.
    """
    x, y = x.double(), y.double()
    dm = x.mean(0) - y.mean(0)
    x, y = ((a - a.mean(0)) / (len(a) - 1) ** 0.5 for a in (x, y))
    rx, ry = (torch.linalg.qr(a, "r").R if len(a) > a.shape[1] else a for a in (x, y))
    cross = torch.linalg.matrix_norm(rx @ ry.T, "nuc")
    return float(dm @ dm + x.square().sum() + y.square().sum() - 2 * cross)


def kl_divergence(reference, generated):
    """Mean over rows of KL(softmax(reference) || softmax(generated) + 1e-6), logits (n, classes) paired by row."""
    p, q = reference.double().log_softmax(-1), generated.double().softmax(-1)
    return float((p.exp() * (p - (q + EPS).log())).sum(-1).mean())


def inception_score(logits, splits=10):
    """exp(mean KL(p(class | clip) || p(class))) in each tenth of the clips (shuffled, seed 2020), averaged; logits (n, classes)."""
    logits = logits.double()[np.random.RandomState(2020).permutation(len(logits))]
    n, found = len(logits), []
    for k in range(splits):
        p = logits[k * n // splits:(k + 1) * n // splits].log_softmax(-1)
        found.append((p.exp() * (p - p.exp().mean(0).log())).sum(-1).mean().exp())
    return float(torch.stack(found).mean())


def scores(reference, generated):
    """FD, KL and IS of two (embeddings, logits) paired by row. None where there are too few rows."""
    (re, rz), (ge, gz) = reference, generated
    return {"FD": frechet(re, ge) if len(ge) > 1 else None, "KL": kl_divergence(rz, gz), "IS": inception_score(gz) if len(gz) > 9 else None}


def features(args):
    """The networks that --features names: (wav (1, N) -> (embedding, logits), wav -> VGGish rows or None, {file: sha256})."""
    device = pick_device(args.device)
    if args.features == "tiny":
        from tiny import score
        net = score.load_classifier().to(device)
        return lambda wav: net(log_mel(wav.to(device), 64).clamp(LOG_MIN, LOG_MAX)), None, {"classifier": sha256(score.HERE / "classifier.safetensors")}
    cnn, a = load_network(Cnn14(), CNN14, args.weights, args.download)
    vgg, b = load_network(VGGish(), VGGISH, args.weights, args.download)
    cnn, vgg = cnn.to(device), vgg.to(device)
    return lambda wav: cnn(wav.to(device)), lambda wav: vgg(wav.to(device)), {CNN14[0]: a, VGGISH[0]: b}


class Clap:
    """Cosine similarity of sound and text by a CLAP model: a hub name, or a folder."""

    def __init__(self, name, device):
        from transformers import ClapModel, ClapProcessor
        try:
            self.model, self.processor = ClapModel.from_pretrained(name).to(device).eval(), ClapProcessor.from_pretrained(name)
        except (OSError, ValueError) as e:
            raise InputError(f"--clap {name}: cannot be loaded ({str(e).splitlines()[0][:150]}); download it elsewhere and pass its folder")
        digest = hashlib.sha256()
        for weight in self.model.parameters():
            digest.update(weight.detach().cpu().numpy().tobytes())
        self.weights = {name: digest.hexdigest()}

    @torch.no_grad()
    def __call__(self, path, texts, seconds):
        """(texts,) cosines of a file with each of the texts."""
        wav = read_audio(path, min(seconds, 10.0), 48000).numpy()   # a longer one would be cropped at random
        sound = self.processor(audio=[wav], sampling_rate=48000, return_tensors="pt").to(self.model.device)
        words = self.processor(text=list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        a, t = self.model.get_audio_features(**sound).pooler_output, self.model.get_text_features(**words).pooler_output
        return F.cosine_similarity(a, t).cpu()


def check(args):
    """What must be there before hours of generation: networks, folders, sensible numbers. Returns (networks, CLAP or None)."""
    if not args.seconds > 0 or getattr(args, "which", 0) < 0:
        raise InputError("--seconds must be above 0, --which at least 0")
    if args.command != "score":
        sample.check_system(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return features(args), Clap(args.clap, pick_device(args.device)) if args.clap else None


@torch.no_grad()
def score(generated, reference, args, networks, prompts=None, about={}):
    """Score a folder of WAVs against another by file name. Prints, writes and returns the row.

    prompts: {file name: text}, for CLAP; where given, only these files count. about: more to write into the JSON.
    """
    (classify, patches, weights), clap = networks
    made, real = ({p.name: p for p in sorted(Path(folder).glob("*.wav"))} for folder in (generated, reference))
    made = {name: path for name, path in made.items() if prompts is None or name in prompts}
    if not made or not real:
        raise InputError(f"{generated if not made else reference}: holds no WAV file")
    if alone := sorted(set(made) - set(real)):
        raise InputError(f"{generated}: {len(alone)} of {len(made)} files have no partner in {reference}, {alone[0]} for one")
    if len(real) > len(made):
        print(f"{len(real) - len(made)} of {len(real)} files of {reference} have no generated clip and are left out")
    rows = {"real": [], "made": []}
    for name in tqdm(made, desc="score"):
        for kind, path in (("real", real[name]), ("made", made[name])):
            wav = read_audio(path, args.seconds)[None]
            rows[kind].append((*classify(wav), patches(wav) if patches else torch.zeros(0)))
    stacked = {kind: [torch.cat(column).cpu() for column in zip(*found)] for kind, found in rows.items()}
    row = {"N": len(made), **scores(stacked["real"][:2], stacked["made"][:2])}
    row["FAD"] = frechet(stacked["real"][2], stacked["made"][2]) if patches else None
    row["CLAP"] = float(np.mean([float(clap(made[name], [prompts[name]], args.seconds)) for name in tqdm(made, desc="clap")])) if clap and prompts else None
    why = {"FD": "fewer than 2 clips", "IS": "fewer than 10 clips", "FAD": "not among --features tiny",
           "CLAP": "no --clap" if not clap else "no manifest.json with prompts"}
    about = {**row, "null": {k: why[k] for k, v in row.items() if v is None}, "features": args.features, "rate": RATE, "seconds": args.seconds,
             "weights": {**weights, **(clap.weights if clap else {})}, "generated": str(generated), "reference": str(reference),
             "list": prompts or list(made), **about}
    print(line("") + "\n" + line(str(generated), row))
    if args.json:
        write(args.json, lambda path: path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8"))
        print(args.json)
    return about


def line(name, row=None):
    keys = ("N", "FD", "FAD", "KL", "IS", "CLAP")
    cells = keys if row is None else ["-" if row[k] is None else f"{row[k]:.{0 if k == 'N' else 3 if k == 'CLAP' else 2}f}" for k in keys]
    return f"{name:40s}" + "".join(f"{c:>8s}" for c in cells)


# ---- the protocols -------------------------------------------------------------------------------------------------

def read_clips(path, reference, which=None):
    """A caption list and a folder of recordings: {name of the WAV: its captions}, or its caption number `which`.

    Rows are those of a csv, or of json lines. A row belongs to the recording whose name is one of its values, with or
    without its folder, ending, and the "Y" in front of AudioSet's ids. Several rows or columns may caption one clip.
    Clips without a recording are counted and printed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = text.lstrip().startswith("{")
        rows = [json.loads(row) for row in text.splitlines() if row.strip()] if lines else list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, csv.Error) as e:
        raise InputError(f"{path}: cannot be read as csv or json lines ({e})")
    files = {p.stem: p.name for p in Path(reference).glob("*.wav")}
    files = {**{stem[1:]: name for stem, name in files.items() if stem.startswith("Y")}, **files}
    found, missing = {}, set()
    for n, row in enumerate(rows, 1):
        captions = [str(v).strip() for k, v in row.items() if k and re.fullmatch(r"text|captions?(_\d+)?", k.lower()) and v]
        if not captions:
            raise InputError(f"{path}: row {n} holds no caption (text, caption, caption_1 ...)")
        values = [str(v) for k, v in row.items() if v and k != "start_time" and str(v).strip() not in captions]
        if "youtube_id" in row:
            values = [row["youtube_id"], f"{row['youtube_id']}_{row.get('start_time')}"] + values
        name = next((files[stem] for v in values for stem in (v, Path(v).stem) if stem in files), None)
        if name is None:
            missing.add(next((v for v in values if v.endswith((".wav", ".flac"))), (values or captions)[0]))
        else:
            found.setdefault(name, []).extend(captions)
    if not found:
        raise InputError(f"{reference}: holds no WAV that {path} names (looked for {sorted(missing)[:1]} among others)")
    if which is not None and (short := [name for name, captions in found.items() if len(captions) <= which]):
        raise InputError(f"{path}: {short[0]} has fewer than {which + 1} captions; choose a smaller --which")
    print(f"{path}: {len(found) + len(missing)} clips, {len(missing)} of them without a recording in {reference}; N = {len(found)}")
    return found if which is None else {name: captions[which] for name, captions in found.items()}


def number(name):
    """A clip's number for its random choices: a function of its name alone, whatever else is in the list."""
    return zlib.crc32(name.encode())


def generate(jobs, out, args):
    """A WAV for each of jobs {name: prompt}; those that this very system has made of this prompt are not made again."""
    teacher, latents, system = sample.open_system(args)
    folders = [teacher.folder / part for part in ("text_encoder", "text_encoder_0", "condition_adapter_0", "vae", "vocoder")]
    folders.append(teacher.folder / "unet" if args.teacher_steps else Path(system["folder"]))
    files = sorted(p for folder in folders for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".json"))
    system = {**system, "seed": args.seed, "sha256": sha256(*files)}
    out.mkdir(parents=True, exist_ok=True)
    manifest = read_json(out / "manifest.json") if (out / "manifest.json").exists() else {"system": system, "clips": {}}
    if manifest["system"] != system:
        changed = next(k for k in {**system, **manifest["system"]} if system.get(k) != manifest["system"].get(k))
        raise InputError(f"{out}: holds clips of another system ({changed} differs); choose another --out, or remove it")
    todo = [name for name in sorted(jobs) if not (manifest["clips"].get(name) == jobs[name] and (out / name).exists())]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="clips")
    for i in range(0, len(todo), args.batch_size):
        names = todo[i:i + args.batch_size]
        _, wavs = sample.make(teacher, latents, [jobs[name] for name in names], sample.noise(teacher, [number(name) for name in names], args.seed))
        for name, wav in zip(names, wavs):
            write(out / name, lambda path: soundfile.write(path, wav, RATE, "PCM_16", format="WAV"))
            manifest["clips"][name] = jobs[name]
        write(out / "manifest.json", lambda path: path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), "utf-8"))
        bar.update(len(names))
    bar.close()
    return system


def audiocaps(args, networks):
    """One caption a clip (--which of those listed), generated and scored against the recordings."""
    jobs = read_clips(args.captions, args.reference, args.which)
    system = generate(jobs, args.out / "clips", args)
    return score(args.out / "clips", args.reference, args, networks, jobs, {"system": system})


def clotho(args, networks):
    """Appendix C: a random crop of each recording, and of its captions the one that CLAP finds closest to the crop."""
    clips, crops, jobs = read_clips(args.captions, args.reference), args.out / "reference", {}
    crops.mkdir(parents=True, exist_ok=True)
    for name, captions in tqdm(sorted(clips.items()), desc="crops"):
        try:
            info = soundfile.info(args.reference / name)
            length = min(info.frames, round(args.seconds * info.samplerate))
            start = int(np.random.default_rng((args.seed, number(name))).integers(info.frames - length + 1))
            wav, rate = soundfile.read(args.reference / name, length, start, always_2d=True)
        except RuntimeError as e:
            raise InputError(f"{args.reference / name}: cannot be read as audio ({e})")
        write(crops / name, lambda tmp: soundfile.write(tmp, wav, rate, info.subtype, format="WAV"))
        jobs[name] = captions[int(networks[1](crops / name, captions, args.seconds).argmax())]
    system = generate(jobs, args.out / "clips", args)
    return score(args.out / "clips", crops, args, networks, jobs, {"system": system})


def table(paths, anyway):
    """Rows of several scores.json; refuses those that do not compare unless told to print them anyway."""
    rows = {path: read_json(path) for path in paths}
    for key in ("N", "features", "weights", "rate", "seconds", "list"):
        if missing := [path for path, row in rows.items() if key not in row]:
            raise InputError(f"{missing[0]}: was not written by eval.py ({key} is missing)")
        if len({json.dumps(row[key]) for row in rows.values()}) > 1:
            message = f"these do not compare: {key} differs" + (f" ({', '.join(str(row['N']) for row in rows.values())})" if key == "N" else "")
            if not anyway:
                raise InputError(message + "; pass --anyway to print them all the same")
            print("warning: " + message)
    print("\n".join([line("")] + [line(path, row) for path, row in rows.items()]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    for name in ("score", "audiocaps", "clotho"):
        add = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
        add("--reference", type=Path, required=True, help="folder of recordings (WAV)")
        add("--features", choices=("panns", "tiny"), default="panns", help="networks of FD, KL, IS (and FAD)")
        add("--weights", type=Path, default=Path.home() / ".cache/swiftaudio", help="folder of the two networks' files")
        add("--download", action="store_true", help="download them")
        add("--clap", default="laion/clap-htsat-unfused" if name == "clotho" else None, help="CLAP model: hub name or folder")
        add("--seconds", type=float, default=10.0, help="length that recordings and clips are cut to")
        add("--device", help="cuda, mps or cpu (default: the first there is)")
        if name == "score":
            add("--generated", type=Path, required=True, help="folder of generated WAVs")
            add("--json", type=Path, help="file to write")
            continue
        add("--captions", required=True, help="csv or json lines")
        add("--out", type=Path, required=True, help="folder for clips, manifest and scores.json")
        sample.add_system(add)
        if name == "audiocaps":
            add("--which", type=int, default=0, help="which of a clip's captions, from 0")
    add = commands.add_parser("table").add_argument
    add("files", nargs="+", help="scores.json files")
    add("--anyway", action="store_true", help="even if they do not compare")
    args = p.parse_args(argv)
    if args.command == "table":
        return table(args.files, args.anyway)
    if args.command != "score":
        args.json = args.out / "scores.json"
        return {"audiocaps": audiocaps, "clotho": clotho}[args.command](args, check(args))
    prompts = None
    if args.clap and (args.generated / "manifest.json").exists():       # of sample.py, or of the protocols here
        rows = read_json(args.generated / "manifest.json")
        prompts = rows["clips"] if isinstance(rows, dict) else {row["file"]: row["prompt"] for row in rows}
        if unknown := {p.name for p in args.generated.glob("*.wav")} - set(prompts):
            raise InputError(f"{args.generated}/manifest.json: knows no prompt of {sorted(unknown)[0]}; score without --clap")
    return score(args.generated, args.reference, args, check(args), prompts)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        raise InputError(e)
