"""Score generated audio as the paper does (section IV, appendix C): FD, FAD, KL, IS and CLAP.

    python -m extras.eval score --generated samples --reference recordings            # by file name
    python -m extras.eval audiocaps --captions LIST --reference recordings --out eval/student
    python -m extras.eval clotho --captions LIST --reference recordings --out eval/clotho
    python -m extras.eval table eval/*/scores.json                                  # side by side

LIST of Table II (audiocaps) is data/test_audiocaps.raw.json of Auffusion's authors on GitHub: 761
clips, where the paper has "around 750", each with the third of its captions in AudioCaps, whose own
test.csv has 975 clips of five. That of Table III (clotho) is clotho_captions_evaluation.csv.

FAD reads files as the public evaluation code does: the mean of the channels, with its DC. That code
resamples with resampy, this one as torchaudio does. All else takes the first channel less its mean.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

import data
from data import InputError, number, read_json, replace_text, require
from extras import metrics
from extras.audio import log_mel, read_audio
from extras.metrics import TINY_FILE, recordings, sha256
from model import LOG_MAX, LOG_MIN, RATE, STUDENT, TO_HEAR, pick_device
from sample import add_system, open_system

DIGITS = {"N": 0, "FD": 2, "FAD": 2, "KL": 2, "IS": 2, "CLAP": 3}       # columns, and decimals
COMPARED = ("N", "features", "weights", "rate", "seconds", "crop_seed", "list", "fad_reads")
NEWER = dict.fromkeys(("captions", "crop_seed", "fad_reads"))           # not in older files
CLIPS_VERSION = 1       # to be raised when the code makes other clips of the same files and flags


def load_networks(args):
    """Load what --features and --clap name: (hear, see score_folders(), clap, {file: sha256})."""
    device = pick_device(args.device, exact=True)                       # TF32 would move scores
    read = lambda *how: read_audio(*how)[None].to(device)
    if args.features == "tiny":
        net, weights = metrics.load_classifier().to(device), {"classifier": sha256(TINY_FILE)}
        hear = lambda *cut: net(log_mel(read(*cut), 64).clamp(LOG_MIN, LOG_MAX))
    else:
        loaded = {kind.file: metrics.load_network(kind, args.weights, args.download)
                  for kind in (metrics.Cnn14, metrics.VGGish)}
        cnn, vgg = (net.to(device) for net, _ in loaded.values())
        hear = lambda *cut: (*cnn(read(*cut)), vgg(read(*cut, RATE, True)))
        weights = {file: digest for file, (_, digest) in loaded.items()}
    clap = None if args.clap is None else metrics.Clap(args.clap, device)
    return hear, clap, {**weights, **(clap.weights if clap else {})}


# ---- scores --------------------------------------------------------------------------------------

def report(generated, reference, args, networks, prompts=None, **more):
    """Score a folder of WAVs against another; print, write (with `more`) and return the row."""
    hear, clap, weights = networks
    names, row = metrics.score_folders(generated, reference, hear, args.seconds, clap, prompts)
    why = {"FD": "fewer than 2 clips", "IS": "fewer than 10 clips", "FAD": "not in --features tiny",
           "CLAP": "no manifest.json with prompts" if clap else "no --clap"}
    row |= {"null": {k: why[k] for k, v in row.items() if v is None},
            "features": args.features, "rate": RATE, "seconds": args.seconds, "weights": weights,
            "fad_reads": None if args.features == "tiny" else "mean of channels",
            "generated": str(generated), "reference": str(reference),
            "captions": args.captions and Path(args.captions).name, "crop_seed": args.crop_seed,
            "list": prompts or names, **more}
    print(line("") + "\n" + line(str(generated), row))
    if args.json:
        replace_text(args.json, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
        print(args.json)
    return row


def line(name, row=None):
    """A row of the printed table, or its head."""
    cell = lambda k, n: "-" if row[k] is None else f"{row[k]:.{n}f}"
    cells = [cell(k, n) if row else k for k, n in DIGITS.items()]
    captions = row["captions"] or "-" if row else "captions"
    return f"{name:40s}" + "".join(f"{cell:>8s}" for cell in cells) + f"  {captions}"


def table(args):
    """Print the rows of several scores.json side by side, if they compare."""
    rows = {}
    for path in args.files:
        found = read_json(path)
        rows[path] = row = {**NEWER, **(found if isinstance(found, dict) else {})}
        if missing := [key for key in (*COMPARED, *DIGITS) if key not in row]:
            raise InputError(f"{path}: was not written by extras.eval ({missing[0]} is missing)")
    for key in COMPARED:
        values = [row[key] for row in rows.values()]
        if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
            which = f" ({', '.join(map(str, values))})" if key in ("N", "crop_seed") else ""
            message = f"these do not compare: {key} differs{which}"
            if not args.anyway:
                raise InputError(f"{message}; pass --anyway to print them all the same")
            print(f"warning: {message}")
    print("\n".join([line(""), *(line(path, row) for path, row in rows.items())]))


def score(args):
    """Score a folder of WAVs against another, paired by file name."""
    prompts, path = None, args.generated / "manifest.json"
    if args.clap is not None and path.exists():         # of sample.py, or of generate() here
        rows = read_json(path)
        prompts = rows["clips"] if isinstance(rows, dict) else {
            row["file"]: row.get("words", row["prompt"]) for row in rows}
        if unknown := {p.name for p in recordings(args.generated).values()} - set(prompts):
            raise InputError(f"{path}: knows no prompt of {min(unknown)}; score without --clap")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return report(args.generated, args.reference, args, load_networks(args), prompts)


# ---- the paper's protocols -----------------------------------------------------------------------

def split_row(row):
    """A caption list's row: its captions, and its other values, which may name a recording."""
    if not isinstance(row, dict):
        return [], []
    columns = data.caption_columns(tuple(row))
    cells = [row[name] if isinstance(row[name], list) else [row[name]] for name in columns]
    captions = [str(c).strip() for cell in cells for c in cell if c is not None]
    values = [str(v) for k, v in row.items() if v and k not in (*columns, "start_time")]
    if "youtube_id" in row:                             # AudioCaps' own csv
        values = [f"{row['youtube_id']}", f"{row['youtube_id']}_{row.get('start_time')}", *values]
    return list(filter(None, captions)), values


def audioset(stem):
    """Take what mirrors put around AudioSet's ids off a name, "Y" and times: (id, times)."""
    found = re.fullmatch(r"Y?([\w-]{11})(?:_(\d+(?:[._]\d+)*))?", stem)
    return found.groups() if found else (stem.removeprefix("Y"), None)


def read_clips(path, reference, which=None):
    """A caption list and a folder of recordings: {stem.wav of a recording: its captions}.

    A row belongs to the recording whose name is one of its values, with or without its folder, its
    ending, and what audioset() takes off. Several rows or columns may caption one clip; which: keep
    the caption of this number alone. Prints how many clips there are, and which lack a recording.
    """
    real, by_id, found, missing = recordings(reference), {}, {}, {}
    for stem in real:
        by_id.setdefault(audioset(stem)[0], []).append(stem)

    def match(stem):
        name, times = audioset(stem)
        fits = [s for s in by_id.get(name, []) if audioset(s)[1] in (times, None) or not times]
        return stem if stem in real else fits[0] if len(fits) == 1 else None

    for n, row in enumerate(data.read_rows(path), 1):
        captions, values = split_row(row)
        require(captions, f"{path}: row {n} holds no caption (text, caption, caption_1 ...)")
        stems = [stem for value in values for stem in (value, Path(value).stem)]
        if stem := next(filter(None, map(match, stems)), None):
            found.setdefault(f"{stem}.wav", []).extend(captions)
        else:
            files = [value for value in values if Path(value).suffix.lower() in metrics.SOUNDS]
            missing[(files or values or captions)[0]] = row
    names = ", ".join(list(missing)[:3]) + ", ..." * (len(missing) > 3)
    require(found, f"{reference}: holds no recording that {path} names (looked for {names})")
    print(f"{path}: N = {len(found)} of {len(found) + len(missing)} clips"
          + f"; {len(missing)} without a recording in {reference}: {names}" * bool(missing))
    if which is None:
        return found
    if short := [name for name, captions in found.items() if len(captions) <= which]:
        raise InputError(f"{path}: {short[0]} has fewer than {which + 1} captions; lower --which")
    return {name: captions[which] for name, captions in found.items()}


def files_of(system, args):
    """Everything on disk that makes a system's clips."""
    unet = system.folder / "unet" if args.teacher_steps else Path(system.about["folder"])
    found = {p for folder in (unet, Path(system.about.get("decoder", unet)))
             for pattern in STUDENT[:3] for p in folder.glob(pattern)}
    tops = [p for pattern in TO_HEAR for p in system.folder.glob(pattern) if pattern != "unet/*"]
    return sorted(p for p in found.union(tops, *(p.rglob("*") for p in tops)) if p.is_file())


def generate(prompts, out, args, system):
    """Make the WAVs of {name: prompt} that this System has not made yet; return its identity."""
    about = {**system.about, "seed": args.seed, "version": CLIPS_VERSION,
             "sha256": sha256(*files_of(system, args))}
    path = out / "manifest.json"
    manifest = read_json(path) if path.exists() else {"system": about, "clips": {}}
    for key in {**about, **manifest["system"]}:
        if about.get(key) != manifest["system"].get(key):
            raise InputError(f"{out}: holds another system's clips ({key} differs); change --out")
    clips = manifest["clips"]
    todo = [k for k in sorted(prompts) if clips.get(k) != prompts[k] or not (out / k).exists()]
    for i in tqdm(range(0, len(todo), args.batch_size), desc="batches of clips"):
        names = todo[i:i + args.batch_size]
        # a clip depends on its own name alone, whatever else is in the list
        z_T = system.noise([zlib.crc32(name.encode()) for name in names], args.seed)
        _, wavs = system.make([prompts[name] for name in names], z_T)
        out.mkdir(parents=True, exist_ok=True)
        for name, wav in zip(names, wavs):
            data.replace_file(out / name, lambda path: soundfile.write(path, wav, RATE, "PCM_16",
                                                                       format="WAV"))
            clips[name] = prompts[name]
        replace_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return about


def audiocaps(args):
    """Table II: make a clip for one caption of each recording and score it."""
    prompts = read_clips(args.captions, args.reference, args.which)
    system, networks, clips = open_system(args), load_networks(args), args.out / "clips"
    about = generate(prompts, clips, args, system)
    return report(clips, args.reference, args, networks, prompts, system=about)


def crop(source, target, args):
    """Write --seconds of a recording; where they start depends on its name and --crop_seed."""
    try:
        info = soundfile.info(source)
        length = min(info.frames, round(args.seconds * info.samplerate))
        rng = np.random.default_rng((args.crop_seed, zlib.crc32(target.name.encode())))
        start = int(rng.integers(info.frames - length + 1))
        wav, rate = soundfile.read(source, length, start, always_2d=True)
    except RuntimeError as e:
        raise InputError(f"{source}: cannot be read as audio ({e})")
    kind = info.subtype if soundfile.check_format("WAV", info.subtype) else "PCM_24"
    data.replace_file(target, lambda path: soundfile.write(path, wav, rate, kind, format="WAV"))


def clotho(args):
    """Table III: the same with random crops, each with the caption that CLAP finds closest."""
    captions, files = read_clips(args.captions, args.reference), recordings(args.reference)
    system, networks = open_system(args), load_networks(args)
    clips, crops = args.out / "clips", args.out / "reference"
    clap, prompts = networks[1], {}
    crops.mkdir(parents=True, exist_ok=True)
    for name in tqdm(sorted(captions), desc="crops"):
        crop(files[Path(name).stem], crops / name, args)
        prompts[name] = captions[name][clap(crops / name, captions[name], args.seconds).argmax()]
    about = generate(prompts, clips, args, system)
    return report(clips, crops, args, networks, prompts, system=about)


# ---- the command ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = data.Parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="{score,audiocaps,clotho,table}")
    for name, command in (("score", score), ("audiocaps", audiocaps), ("clotho", clotho)):
        sub = commands.add_parser(name, description=command.__doc__, help=command.__doc__)
        sub.set_defaults(command=command, captions=None, crop_seed=None)
        add = sub.add_argument
        add("--reference", type=Path, required=True, help="folder of recordings (wav, flac, ...)")
        add("--features", choices=("panns", "tiny"), default="panns",
            help="CNN14 for FD, KL and IS, VGGish for FAD; or the tiny world's classifier")
        add("--weights", type=Path, default=Path.home() / ".cache/swiftaudio", help="their folder")
        add("--download", action="store_true", help="download them")
        add("--clap", default="laion/clap-htsat-unfused" if name == "clotho" else None,
            help="CLAP model: hub name or folder")
        add("--seconds", type=number(float, 0.1, 3600), default=10.0, help="what files are cut to")
        if name == "score":
            add("--device", help="cuda, mps or cpu; default: the first there is")
            add("--generated", type=Path, required=True, help="folder of generated WAVs")
            add("--json", type=Path, help="file to write")
            continue
        if name == "clotho":
            add("--crop_seed", type=number(int), default=0, help="of the recordings' crops")
        else:
            add("--which", type=number(int), default=0, help="which of a clip's captions, from 0; "
                "Auffusion's list has one each, which is caption 2 of AudioCaps' test.csv")
        add("--captions", required=True, help="csv, tsv, json or jsonl: LIST in extras/eval.py")
        add("--out", type=Path, required=True, help="folder for clips, manifest and scores.json")
        add_system(add)
    sub = commands.add_parser("table", description=table.__doc__, help=table.__doc__)
    sub.set_defaults(command=table)
    sub.add_argument("files", nargs="+", help="scores.json files")
    sub.add_argument("--anyway", action="store_true", help="even if they do not compare")
    args = p.parse_args(argv)
    if "out" in args:
        args.json = args.out / "scores.json"
    return args


def main(argv=None):
    args = parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    data.cli(main)
