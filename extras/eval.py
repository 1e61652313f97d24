"""Score generated audio as the paper does (section IV, appendix C): FD, FAD, KL, IS and CLAP.

    python -m extras.eval score --generated samples --reference recordings            # by file name
    python -m extras.eval audiocaps --captions LIST --reference recordings --out eval/student
    python -m extras.eval clotho --captions LIST --reference recordings --out eval/clotho

LIST of Table II (audiocaps) is data/test_audiocaps.raw.json of Auffusion's authors on GitHub: 761
clips with a caption each. That of Table III (clotho) is clotho_captions_evaluation.csv.

FAD reads files as the public evaluation code does: the mean of the channels, with its DC. That code
resamples with resampy, this one as torchaudio does. All else takes the first channel less its mean.
"""
import json
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import data
from data import number, replace_text, require
from extras import metrics
from extras.audio import read_audio, read_file
from extras.metrics import SOUNDS, Cnn14, Ear, VGGish, recordings
from extras.teacher import add_teacher, open_system
from model import RATE, STUDENT, TO_HEAR, pick_device
from sample import add_system, add_to_manifest, read_manifest

DIGITS = {"N": 0, "FD": 2, "FAD": 2, "KL": 2, "IS": 2, "CLAP": 3}       # columns, and decimals
CLIPS_VERSION = 1       # to be raised when the code makes other clips of the same files and flags


def load_networks(args):
    """Load CNN14 and VGGish, or --ear, and --clap: (hear, clap, {file: sha256}).

    hear: (path, seconds that it is cut to) -> CNN14's embedding (1, 2048) and logits (1, 527),
    VGGish's patches (n, 128); or an Ear.
    """
    device = pick_device(args.device, exact=True)                       # TF32 would move scores
    clap = metrics.Clap(args.clap, device) if args.clap else None
    weights = {clap.file: clap.sha256} if clap else {}
    if args.ear:
        ear = Ear(args.ear, args.words)
        return ear, clap, weights | ear.files
    require(not args.words, "--words goes with --ear")
    read = lambda *how: read_audio(*how)[None].to(device)
    cnn, vgg = (metrics.load_network(kind, args.weights, args.download).to(device)
                for kind in (Cnn14, VGGish))
    hear = lambda path, seconds: (*cnn(read(path, seconds)), vgg(read(path, seconds, RATE, True)))
    return hear, clap, weights | {network.file: network.sha256 for network in (cnn, vgg)}


# ---- scores --------------------------------------------------------------------------------------

@torch.no_grad()
def report(generated, reference, args, networks, prompts=None, **more):
    """Score WAVs against the recordings of their names; print the row, write it with `more`.

    prompts: {file name: text} for CLAP; only these count. A metric that cannot be had is None.
    """
    (hear, clap, weights), paired = networks, metrics.pair(generated, reference, prompts)
    heard = [[hear(path, args.seconds) for path in both]
             for both in tqdm(paired.values(), desc="score")]
    made, real = ([torch.cat(column).cpu() for column in zip(*side)] for side in zip(*heard))
    cosines = [float(clap(path, [prompts[name]], args.seconds))
               for name, (path, _) in tqdm(paired.items(), desc="clap")] if clap and prompts else []
    row = {"N": len(paired), **metrics.scores(real[:2], made[:2]),
           "FAD": metrics.frechet(real[2], made[2]) if real[2:] else None,
           **(hear.hits(made[1], map(prompts.get, paired)) if getattr(hear, "fits", 0) else {}),
           "CLAP": sum(cosines) / len(cosines) if cosines else None,
           "weights": weights, "rate": RATE, "seconds": args.seconds, "fad_reads": "all channels",
           "generated": str(generated), "reference": str(reference), "crop_seed": args.crop_seed,
           "captions": args.captions and Path(args.captions).name,
           "list": {name: prompts[name] for name in paired} if prompts else [*paired], **more}
    print(line("") + "\n" + line(str(generated), row))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        replace_text(args.out / "scores.json", json.dumps(row, indent=2, ensure_ascii=False) + "\n")
        print(args.out / "scores.json")


def line(name, row=None):
    """A row of the printed table, or its head."""
    cells = [k if row is None else "-" if row[k] is None else f"{row[k]:.{n}f}"
             for k, n in DIGITS.items()]
    captions = row["captions"] or "-" if row else "captions"
    hit = f"  hit {row['hit']:.2f} of {row['hit_N']}" if row and row.get("hit_N") else ""
    return f"{name:40s}" + "".join(f"{cell:>8s}" for cell in cells) + f"  {captions}{hit}"


def score(args):
    """Score a folder of WAVs against another, paired by file name."""
    clips = read_manifest(args.generated) if args.clap or args.words else []
    prompts = {clip["file"]: clip.get("words", clip["prompt"]) for clip in clips}
    for path in recordings(args.generated).values() if prompts or args.words else ():
        require(path.name in prompts, f"{args.generated}/manifest.json: knows no prompt of "
                f"{path.name}; score without --clap or --words")
    report(args.generated, args.reference, args, load_networks(args), prompts or None)


# ---- the paper's protocols -----------------------------------------------------------------------

def audioset(stem):
    """Split a name that mirrors give a clip of AudioSet: (YouTube's id, where it starts or None).

    Y<id>_30.000_40.000, <id>_30 and <id> are of one clip; any other name is its own id.
    """
    found = re.fullmatch(r"Y?([\w-]{11})(?:_(\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?)?", stem)
    if not found:
        return stem.removeprefix("Y"), None
    return found[1], found[2] and float(found[2])


def normal(name):
    """A file's name as different systems and tables may write it: NFC, / for \\, no outer space."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").strip()


def match_captions(path, reference):
    """A caption list and a folder of recordings: {stem.wav of a recording: its captions}.

    A row belongs to the recording whose name is one of its values, with or without its folder, its
    ending, and what audioset() takes off. Several rows or columns may caption one clip. Prints how
    many clips there are, and which lack a recording.
    """
    real, by_id, found, missing = recordings(reference), {}, {}, {}
    plain = {normal(stem): stem for stem in real}
    for stem in real:
        name, start = audioset(stem)
        by_id.setdefault(name, {})[stem] = start

    def match(value):
        """The recording of this name as it is, in its normal form, or of this clip of AudioSet."""
        for stem in (value, Path(value).stem, normal(value), Path(normal(value)).stem):
            name, start = audioset(stem)
            starts = by_id.get(name, {})
            fits = [s for s, at in starts.items() if at == start or None in (at, start)]
            if stem in real or stem in plain or len(fits) == 1:
                return stem if stem in real else plain.get(stem) or fits[0]
        return None

    rows = data.read_rows(path)
    for n, row in enumerate(rows, 1):
        if row is None:                                 # not whole; counted below
            continue
        require(isinstance(row, dict), f"{path}: row {n} names no recording")
        columns = data.caption_columns(row)
        captions = [*filter(None, data.row_captions(row, f"{path}: row {n}"))]
        values = [str(v) for k, v in row.items() if v and k not in (*columns, "start_time")]
        # the name of a file counts before numbers, which may be other files' names
        values = [v for v in values if Path(v).suffix.lower() in SOUNDS] or values
        if "youtube_id" in row:                         # AudioCaps' own csv
            values = [f"{row['youtube_id']}_{row.get('start_time')}", *values]
        require(captions, f"{path}: row {n} holds no caption (text, caption, caption_1 ...)")
        if stem := next(filter(None, map(match, values)), None):
            found.setdefault(f"{stem}.wav", []).extend(captions)
        else:
            missing[(values or captions)[0]] = row
    names = ", ".join(list(missing)[:3]) + ", ..." * (len(missing) > 3)
    require(found, f"{reference}: holds no recording that {path} names (looked for {names}); read "
            f"are {', '.join(SOUNDS)}, in no folder below")
    print(f"{path}: N = {len(found)} of {len(found) + len(missing)} clips; {len(missing)} without "
          f"a recording in {reference}: {names}" + f"; {rows.count(None)} rows are not whole"
          * (None in rows))
    return found


def files_of(system, args):
    """Everything on disk that makes a system's clips."""
    unet = system.folder / "unet" if args.teacher_steps else Path(system.about["folder"])
    folders = [unet, *(Path(system.about[k]) for k in ("decoder", "vocoder") if k in system.about)]
    patterns = *STUDENT[:3], "model.safetensors"        # a small vocoder's
    tops = [p for folder in folders for pattern in patterns for p in folder.glob(pattern)]
    tops += [p for pattern in TO_HEAR for p in system.folder.glob(pattern) if pattern != "unet/*"]
    return sorted({p for top in tops for p in (top, *top.rglob("*"))
                   if p.is_file() and not p.name.startswith(".")})      # such as .DS_Store


def write_wav(path, *sound):
    data.replace_file(path, lambda temporary: soundfile.write(temporary, *sound, format="WAV"))


def generate(prompts, out, args, system):
    """Make the WAVs of {name: prompt} that this System has not made yet; return its identity."""
    about = {**system.about, "seed": args.seed, "version": CLIPS_VERSION,
             "sha256": metrics.sha256(*files_of(system, args))}

    def made():
        """The clips that are there, {name: prompt}; InputError where another system made them."""
        rows = read_manifest(out)
        for row in rows:
            for key in about | row:                     # in order: the line names the first
                require(key in ("file", "prompt", "k") or row.get(key) == about.get(key),
                        f"{out}: holds another system's clips ({key} differs); change --out")
        return {row["file"]: row["prompt"] for row in rows}

    clips = made()
    todo = [k for k in sorted(prompts) if clips.get(k) != prompts[k] or not (out / k).exists()]
    for i in tqdm(range(0, len(todo), args.batch_size), desc="batches of clips"):
        names = todo[i:i + args.batch_size]
        # a clip depends on its own name alone, whatever else is in the list
        z_T = system.noise([zlib.crc32(name.encode()) for name in names], args.seed)
        _, wavs = system.make([prompts[name] for name in names], z_T)
        out.mkdir(parents=True, exist_ok=True)
        for name, wav in zip(names, wavs):
            write_wav(out / name, wav, RATE, "PCM_16")
        with data.locked(out / "manifest.json"):        # another process may make others of them
            made()
            add_to_manifest(out, {name: {"file": name, "prompt": prompts[name], "k": 0, **about}
                                  for name in names})
    return about


def audiocaps(args):
    """Table II: make a clip for one caption of each recording and score it."""
    captions = match_captions(args.captions, args.reference)
    for name, found in captions.items():
        require(args.which < len(found), f"{args.captions}: {name} has fewer than {args.which + 1} "
                "captions; lower --which")
    prompts = {name: found[args.which] for name, found in captions.items()}
    system = open_system(args, prompts=prompts.values())
    networks, clips = load_networks(args), args.out / "clips"
    about = generate(prompts, clips, args, system)
    report(clips, args.reference, args, networks, prompts, system=about)


def crop(source, target, args):
    """Write --seconds of a recording; where they start depends on its name and --crop_seed."""
    wav, rate = read_file(source)
    length = min(len(wav), round(args.seconds * rate))
    rng = np.random.default_rng((args.crop_seed, zlib.crc32(target.name.encode())))
    start = int(rng.integers(len(wav) - length + 1))
    kind = soundfile.info(source).subtype               # an MP3 may exceed 1, which PCM cuts
    kind = kind if kind in ("PCM_16", "PCM_24", "PCM_32") else "FLOAT"
    write_wav(target, wav[start:start + length], rate, kind)


def clotho(args):
    """Table III: the same with random crops, each with the caption that CLAP finds closest."""
    captions, files = match_captions(args.captions, args.reference), recordings(args.reference)
    every = [caption for clip in captions.values() for caption in clip]
    system, networks = open_system(args, prompts=every), load_networks(args)
    clips, crops = args.out / "clips", args.out / "reference"
    (_, clap, _), prompts = networks, {}
    crops.mkdir(parents=True, exist_ok=True)
    for name in tqdm(sorted(captions), desc="crops"):
        crop(files[Path(name).stem], crops / name, args)
        prompts[name] = captions[name][clap(crops / name, captions[name], args.seconds).argmax()]
    about = generate(prompts, clips, args, system)
    report(clips, crops, args, networks, prompts, system=about)


# ---- the command ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = data.Parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="{score,audiocaps,clotho}")
    for command in (score, audiocaps, clotho):
        about = command.__doc__
        sub = commands.add_parser(command.__name__, description=about, help=about)
        sub.set_defaults(command=command, captions=None, crop_seed=None)
        add = sub.add_argument
        add("--reference", type=Path, required=True, help="folder of recordings (wav, flac, ...)")
        add("--weights", default="~/.cache/swiftaudio", help="folder of CNN14 and VGGish")
        add("--download", action="store_true", help="download them")
        add("--ear", metavar="TFLITE", help="YAMNet in the place of CNN14 and VGGish")
        add("--words", help="JSON as extras/esc10_words.json: what --ear hears of captions' words")
        add("--clap", default="laion/clap-htsat-unfused" if command is clotho else None,
            help="CLAP model: hub name or folder")
        add("--seconds", type=number(float, 0.1, 3600), default=10.0, help="what files are cut to")
        add("--out", type=Path, required=command is not score, help="folder of scores.json, clips")
        if command is score:
            add("--device", help="cuda, mps or cpu; default: the first there is")
            add("--generated", type=Path, required=True, help="folder of generated WAVs")
            continue
        if command is clotho:
            add("--crop_seed", type=number(int), default=0, help="of the recordings' crops")
        else:
            add("--which", type=number(int), default=0, help="which of a clip's captions, from 0; "
                "Auffusion's list has one each, which is caption 2 of AudioCaps' test.csv")
        add("--captions", required=True, help="csv, tsv, json or jsonl: LIST in extras/eval.py")
        add_system(add)
        add_teacher(add)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.captions:                                       # these write clips, and crops
        ours = [(args.out / name).resolve() for name in ("clips", "reference")]
        require(args.reference.resolve() not in ours, f"--reference {args.reference}: would be "
                "written to; change --out")
    args.command(args)


if __name__ == "__main__":
    data.cli(main)
