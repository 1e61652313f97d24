"""Text to audio in one UNet pass: a WAV (16 kHz) and a picture of its mel spectrogram a prompt.

    python sample.py --prompt "a dog barks twice"                       # the student in out/student
    python sample.py --prompts prompts.txt --n 4 --student USER/MODEL   # four clips a line
"""
import json
import re
import time
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from data import Parser, cli, number, read_captions, read_json, replace_file, replace_text, require
from model import LOG_MAX, LOG_MIN, RATE, load_student


def add_system(add):
    """Add the flags that select the system; eval and control have them too."""
    add("--student", default="out/student", help="folder or hub name of it, or of a whole model")
    add("--teacher", help="hub name, folder or tiny; default: the student's own")
    add("--seed", type=number(int), default=0, help="of the noise")
    add("--batch_size", type=number(int, 1), default=8, help="clips at a time")
    add("--decoder", choices=("vae", "fast"), default="vae", help="fast: recipes' small parts")
    add("--precision", choices=("auto", "fp32"), default="auto", help="auto: half where it is fast")
    add("--device", help="cuda, mps or cpu; default: the first there is")


def open_system(args, seconds=None, prompts=()):
    """Load the System that add_system()'s flags select; warn of what it cannot read of prompts."""
    system = load_student(args.student, args.teacher, seconds, args.decoder, args.precision,
                          args.device)
    warn_unread(system, prompts)
    return system


def warn_unread(system, prompts):
    """Say what a system cannot read of prompts."""
    lines = [*system.encode_text.unread(prompts).values()]
    for line in [*lines[:9], f"{len(lines)} prompts are not read whole"][:len(lines)]:
        print(f"warning: {line}")


def add_clips(add):
    """Add the flags that say which clips to make."""
    add("--prompt", nargs="+", action="extend", default=[], help="one or more")
    add("--prompts", metavar="FILE", help="file of prompts: txt (one a line), csv, json, ...")
    add_system(add)
    add("--n", type=number(int, 1), default=1, help="clips for each prompt")
    add("--out", default="samples", help="folder for WAV, PNG and manifest.json")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--seconds", type=number(float, 0.16, 30), help="length; default: as in training, the best")


def read_prompts(args):
    """The distinct prompts of the command line and of --prompts: {prompt: where it stands}."""
    given = {" ".join(prompt.split()): "--prompt" for prompt in args.prompt}
    if args.prompts:
        found, counts = read_captions(args.prompts)
        given |= dict.fromkeys(found, args.prompts)
        print(f"{args.prompts}: {len(found)} prompts, of {counts}")
    require(given and "" not in given, "an empty prompt; pass --prompt WORDS or --prompts FILE")
    return given


def picture(mel):
    """Log-mel (n_mels, frames) -> an RGB image at least 256 pixels high, low frequencies below."""
    x = np.clip((np.asarray(mel) - LOG_MIN) / (LOG_MAX - LOG_MIN), 0, 1)[::-1]
    image = Image.fromarray((255 * x).astype(np.uint8))
    image = ImageOps.scale(image, max(1, 256 // len(x)), Image.Resampling.NEAREST)
    return ImageOps.colorize(image, (0, 0, 4), (252, 253, 190), (190, 65, 110), whitepoint=230)


def file_names(prompts, n, seed):
    """Name each clip readably and distinctly: {(prompt, k): a-dog-barks-twice_seed0_0.wav}."""
    names, count = {}, {}
    for prompt in prompts:
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "clip"
        count[slug] = count.get(slug, 0) + 1
        names[prompt] = slug if count[slug] == 1 else f"{slug}.{count[slug]}"   # no slug has a dot
    return {(p, k): f"{name}_seed{seed}_{k}.wav" for p, name in names.items() for k in range(n)}


def read_manifest(folder):
    """The rows of a folder's manifest.json, or [] where there is none."""
    path = Path(folder) / "manifest.json"
    rows = read_json(path) if path.exists() else []
    ours = isinstance(rows, list) and all(
        isinstance(r, dict) and {"file", "prompt", "seed", "k"} <= set(r) for r in rows)
    require(ours, f"{path}: is no list of clips; choose another folder")
    return rows


def add_to_manifest(folder, rows):
    """Put rows {file: row} into a folder's manifest.json, to which other processes may add too."""
    with data.locked(folder / "manifest.json"):
        rows = {row["file"]: row for row in read_manifest(folder)} | rows
        listed = json.dumps(list(rows.values()), indent=2, ensure_ascii=False)
        replace_text(folder / "manifest.json", listed + "\n")


def write_clips(args, prompts, load, more={}):
    """Make --n clips of each prompt and write them, with their pictures and the manifest.

    load: makes the system, once nothing is in the way. more: {prompt: what its rows say besides}.
    """
    out = Path(args.out)
    paths = {clip: out / name for clip, name in file_names(prompts, args.n, args.seed).items()}
    for path in (path.with_suffix(end) for path in paths.values() for end in (".wav", ".png")):
        require(args.overwrite or not path.exists(), f"{path} exists; pass --overwrite or --out")
    read_manifest(out)                                  # InputError before the work, not after
    system, clips, started = load(), list(paths), time.time()           # clips: [(prompt, k)]
    rows = {}
    try:
        for i in tqdm(range(0, len(clips), args.batch_size), "batches"):
            words, ks = zip(*clips[i:i + args.batch_size])
            mels, wavs = system.make(words, system.noise(ks, args.seed))
            out.mkdir(parents=True, exist_ok=True)
            for prompt, k, wav, mel in zip(words, ks, wavs, mels):
                path = paths[prompt, k]
                replace_file(path, lambda tmp: soundfile.write(tmp, wav, RATE, "PCM_16",
                                                               format="WAV"))
                rows[path.name] = {"file": path.name, "prompt": prompt, "seed": args.seed, "k": k,
                                   **system.about, **more.get(prompt, {})}
                replace_file(path.with_suffix(".png"), lambda tmp: picture(mel).save(tmp, "PNG"))
            if len(rows) < 1000 or i % (100 * args.batch_size) == 0:    # 45,000 take a second
                add_to_manifest(out, rows)
    finally:
        if rows:
            add_to_manifest(out, rows)
    seconds, length = (time.time() - started) / len(clips), wavs.shape[1] / RATE
    print(*list(paths.values())[:10], f"{len(clips)} clips, listed in {out / 'manifest.json'}: "
          f"{seconds:.2f} s a clip (real-time factor {seconds / length:.2f})", sep="\n")


def main(argv=None):
    p = Parser(__doc__)
    add_clips(p.add_argument)
    args = p.parse_args(argv)
    prompts = read_prompts(args)
    write_clips(args, prompts, lambda: open_system(args, args.seconds, prompts))


if __name__ == "__main__":
    cli(main)
