"""Score generated audio as the paper does (section IV, appendix C): FD, FAD, KL, IS and CLAP.

    python eval.py score --generated samples --reference recordings               # by file name
    python eval.py audiocaps --captions LIST --reference recordings --out eval/student    # Table II
    python eval.py clotho --captions LIST --reference recordings --out eval/clotho       # Table III
    python eval.py table eval/*/scores.json                                       # side by side

Take as LIST of Table II what Auffusion's authors publish, data/test_audiocaps.raw.json in
github.com/happylittlecat2333/Auffusion: 761 clips, where the paper has "around 750", each with
the third of its captions in AudioCaps. AudioCaps' own test.csv has 975 clips of five captions, and
another N or other prompts give other scores. Of Table III: clotho_captions_evaluation.csv.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from data import caption_columns, read_rows
from extras.audio import log_mel
from extras.cli import InputError, Parser, number, read_json, replace_file, replace_text, run
from extras.device import pick_device
from extras.metrics import Clap, Cnn14, VGGish, load_network, score_folders, sha256
from model import LOG_MAX, LOG_MIN, RATE
from sample import add_system, draw_noise, make_clips, open_system
from tiny.score import HERE, load_classifier

DIGITS = {"N": 0, "FD": 2, "FAD": 2, "KL": 2, "IS": 2, "CLAP": 3}       # columns, and decimals
COMPARED = ("N", "features", "weights", "rate", "seconds", "crop_seed", "list")


def parse_args(argv=None):
    p = Parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="{score,audiocaps,clotho,table}")
    for name, command in (("score", score), ("audiocaps", audiocaps), ("clotho", clotho)):
        sub = commands.add_parser(name, description=command.__doc__, help=command.__doc__)
        sub.set_defaults(command=command, captions=None, crop_seed=None)
        add = sub.add_argument
        add("--reference", type=Path, required=True, help="folder of recordings (WAV)")
        add("--features", choices=("panns", "tiny"), default="panns",
            help="CNN14 for FD, KL and IS, VGGish for FAD; or the tiny world's classifier")
        add("--weights", type=Path, default=Path.home() / ".cache/swiftaudio",
            help="folder of the two networks' files")
        add("--download", action="store_true", help="download them")
        add("--clap", default="laion/clap-htsat-unfused" if name == "clotho" else None,
            help="CLAP model: hub name or folder")
        add("--seconds", type=number(float, 0.1, 3600), default=10.0,
            help="length that recordings and clips are cut to")
        if name == "score":
            add("--device", help="cuda, mps or cpu; default: the first there is")
            add("--generated", type=Path, required=True, help="folder of generated WAVs")
            add("--json", type=Path, help="file to write")
            continue
        theirs = {"audiocaps": "data/test_audiocaps.raw.json of "
                               "github.com/happylittlecat2333/Auffusion (761 clips)",
                  "clotho": "clotho_captions_evaluation.csv"}[name]
        add("--captions", required=True, help=f"csv, tsv, json or jsonl; for the table: {theirs}")
        add("--out", type=Path, required=True, help="folder for clips, manifest and scores.json")
        add_system(add)
        if name == "audiocaps":
            add("--which", type=number(int), default=0,
                help="which of a clip's captions, from 0; Auffusion's list has one each, which "
                     "is caption 2 of AudioCaps' test.csv")
        else:
            add("--crop_seed", type=number(int), default=0, help="of the recordings' crops")
    sub = commands.add_parser("table", description=table.__doc__, help=table.__doc__)
    sub.set_defaults(command=table)
    sub.add_argument("files", nargs="+", help="scores.json files")
    sub.add_argument("--anyway", action="store_true", help="even if they do not compare")
    args = p.parse_args(argv)
    if "out" in args:
        args.json = args.out / "scores.json"
    return args


def load_networks(args):
    """Load what --features and --clap name: (hear, see score_folders(), clap, {file: sha256})."""
    device = pick_device(args.device, exact=True)                       # TF32 would move scores
    if args.features == "tiny":
        classifier = load_classifier().to(device)
        hear = lambda wav: classifier(log_mel(wav.to(device), 64).clamp(LOG_MIN, LOG_MAX))
        weights = {"classifier": sha256(HERE / "classifier.safetensors")}
    else:
        cnn, digest = load_network(Cnn14, args.weights, args.download)
        vgg, other = load_network(VGGish, args.weights, args.download)
        cnn, vgg = cnn.to(device), vgg.to(device)
        hear = lambda wav: (*cnn(wav.to(device)), vgg(wav.to(device)))
        weights = {Cnn14.file: digest, VGGish.file: other}
    clap = None if args.clap is None else Clap(args.clap, device)
    return hear, clap, {**weights, **(clap.weights if clap else {})}


# ---- scores ------------------------------------------------------------------------------------

def report(generated, reference, args, networks, prompts=None, **more):
    """Score a folder of WAVs against another; print, write (with `more`) and return the row."""
    hear, clap, weights = networks
    names, row = score_folders(generated, reference, hear, args.seconds, clap, prompts)
    why = {"FD": "fewer than 2 clips", "IS": "fewer than 10 clips",
           "FAD": "not among --features tiny",
           "CLAP": "no manifest.json with prompts" if clap else "no --clap"}
    row |= {"null": {k: why[k] for k, v in row.items() if v is None},
            "features": args.features, "rate": RATE, "seconds": args.seconds, "weights": weights,
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
    cells, captions = list(DIGITS), "captions"
    if row:
        cells = ["-" if row[k] is None else f"{row[k]:.{n}f}" for k, n in DIGITS.items()]
        captions = row["captions"] or "-"
    return f"{name:40s}" + "".join(f"{cell:>8s}" for cell in cells) + f"  {captions}"


def table(args):
    """Print the rows of several scores.json side by side, if they compare."""
    rows = {}
    for path in args.files:
        found = read_json(path)
        row = {"captions": None, "crop_seed": None}                     # older files lack them
        rows[path] = row = {**row, **(found if isinstance(found, dict) else {})}
        if missing := [key for key in (*COMPARED, *DIGITS) if key not in row]:
            raise InputError(f"{path}: was not written by eval.py ({missing[0]} is missing)")
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
        by_file = isinstance(rows, dict)
        prompts = rows["clips"] if by_file else {row["file"]: row["prompt"] for row in rows}
        if unknown := {p.name for p in args.generated.glob("*.wav")} - set(prompts):
            raise InputError(f"{path}: knows no prompt of {min(unknown)}; score without --clap")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return report(args.generated, args.reference, args, load_networks(args), prompts)


# ---- the paper's protocols ---------------------------------------------------------------------

def split_row(row):
    """A caption list's row: its captions, and its other values, which may name a recording."""
    if not isinstance(row, dict):
        return [], []
    columns = caption_columns(tuple(row))
    cells = [row[name] if isinstance(row[name], list) else [row[name]] for name in columns]
    captions = [str(c).strip() for cell in cells for c in cell if c is not None]
    values = [str(v) for k, v in row.items() if v and k not in (*columns, "start_time")]
    if "youtube_id" in row:                             # AudioCaps' own csv
        values = [f"{row['youtube_id']}", f"{row['youtube_id']}_{row.get('start_time')}", *values]
    return list(filter(None, captions)), values


def read_clips(path, reference, which=None):
    """A caption list and a folder of recordings: {name of the WAV: its captions}.

    A row belongs to the recording whose name is one of its values, with or without its folder, its
    ending, and the "Y" in front of AudioSet's ids. Several rows or columns may caption one clip;
    which: keep the caption of this number alone. Clips without a recording are counted.
    """
    files = {p.stem: p.name for p in reference.glob("*.wav")}
    files = {**{stem[1:]: files[stem] for stem in files if stem.startswith("Y")}, **files}
    found, missing = {}, set()
    for n, row in enumerate(read_rows(path), 1):
        captions, values = split_row(row)
        if not captions:
            raise InputError(f"{path}: row {n} holds no caption (text, caption, caption_1 ...)")
        stems = [stem for value in values for stem in (value, Path(value).stem)]
        name = next((files[stem] for stem in stems if stem in files), None)
        if name:
            found.setdefault(name, []).extend(captions)
        else:
            sounds = [value for value in values if value.endswith((".wav", ".flac"))]
            missing.add((sounds or values or captions)[0])
    if not found:
        raise InputError(f"{reference}: holds no WAV that {path} names (looked for "
                         f"{sorted(missing)[:1]} among others)")
    print(f"{path}: {len(found) + len(missing)} clips, {len(missing)} of them without a recording "
          f"in {reference}; N = {len(found)}")
    if which is None:
        return found
    if short := [name for name, captions in found.items() if len(captions) <= which]:
        raise InputError(f"{path}: {short[0]} has fewer than {which + 1} captions; choose a "
                         "smaller --which")
    return {name: captions[which] for name, captions in found.items()}


def clip_number(name):
    """A clip's number for its random choices: of its name alone, whatever else is in the list."""
    return zlib.crc32(name.encode())


def generate(prompts, out, args, opened):
    """Make a WAV for each of {name: prompt}, and return a description of the system.

    opened: by open_system(). Clips that this very system made of these prompts are not made again.
    """
    pipe, latents, system = opened
    parts = "text_encoder", "text_encoder_0", "condition_adapter_0", "vae", "vocoder"
    unet = pipe.folder / "unet" if args.teacher_steps else Path(system["folder"])
    folders = {unet, Path(system.get("decoder", unet)), *(pipe.folder / part for part in parts)}
    files = [p for folder in folders
             for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".json")
             and p.name != "checkpoint.pt"]
    system = {**system, "seed": args.seed, "sha256": sha256(*sorted(files))}
    path = out / "manifest.json"
    manifest = read_json(path) if path.exists() else {"system": system, "clips": {}}
    for key in {**system, **manifest["system"]}:
        if system.get(key) != manifest["system"].get(key):
            raise InputError(f"{out}: holds clips of another system ({key} differs); choose "
                             "another --out, or remove it")

    out.mkdir(parents=True, exist_ok=True)
    clips = manifest["clips"]
    todo = [k for k in sorted(prompts) if clips.get(k) != prompts[k] or not (out / k).exists()]
    bar = tqdm(total=len(prompts), initial=len(prompts) - len(todo), desc="clips")
    for i in range(0, len(todo), args.batch_size):
        names = todo[i:i + args.batch_size]
        z_T = draw_noise(pipe, [clip_number(name) for name in names], args.seed)
        _, wavs = make_clips(pipe, latents, [prompts[name] for name in names], z_T)
        for name, wav in zip(names, wavs):
            save = lambda path: soundfile.write(path, wav, RATE, "PCM_16", format="WAV")
            replace_file(out / name, save)
            clips[name] = prompts[name]
        replace_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        bar.update(len(names))
    bar.close()
    return system


def audiocaps(args):
    """Table II: make a clip for one caption of each recording and score it."""
    prompts = read_clips(args.captions, args.reference, args.which)
    opened, networks, clips = open_system(args), load_networks(args), args.out / "clips"
    system = generate(prompts, clips, args, opened)
    return report(clips, args.reference, args, networks, prompts, system=system)


def crop(source, target, args):
    """Write --seconds of a recording; where they start depends on its name and --crop_seed."""
    try:
        info = soundfile.info(source)
        length = min(info.frames, round(args.seconds * info.samplerate))
        rng = np.random.default_rng((args.crop_seed, clip_number(source.name)))
        start = int(rng.integers(info.frames - length + 1))
        wav, rate = soundfile.read(source, length, start, always_2d=True)
    except RuntimeError as e:
        raise InputError(f"{source}: cannot be read as audio ({e})")
    replace_file(target, lambda path: soundfile.write(path, wav, rate, info.subtype, format="WAV"))


def clotho(args):
    """Table III: the same with random crops, each with the caption that CLAP finds closest."""
    captions = read_clips(args.captions, args.reference)
    opened, networks = open_system(args), load_networks(args)
    clips, crops = args.out / "clips", args.out / "reference"
    clap, prompts = networks[1], {}
    crops.mkdir(parents=True, exist_ok=True)
    for name in tqdm(sorted(captions), desc="crops"):
        crop(args.reference / name, crops / name, args)
        closest = clap(crops / name, captions[name], args.seconds).argmax()
        prompts[name] = captions[name][int(closest)]
    system = generate(prompts, clips, args, opened)
    return report(clips, crops, args, networks, prompts, system=system)


def main(argv=None):
    args = parse_args(argv)
    return args.command(args)


if __name__ == "__main__":
    run(main)
