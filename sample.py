"""Text to audio in one UNet pass: a WAV (16 kHz) and a picture of its mel spectrogram a prompt.

    python sample.py --prompt "a dog barks twice"                       # the student in out/student
    python sample.py --prompts prompts.txt --n 4 --student USER/MODEL   # four clips a line
    python sample.py --prompt "rain falls" --teacher_steps 25           # its teacher, many steps
    python sample.py --prompt "a dog barks while (rain:2) falls"        # attend to rain twice
    python sample.py --prompt "a cat meows" --init dog.wav --init_prompt "a dog barks"    # edit
"""
import itertools
import json
import math
import re
import time
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from data import read_captions, sampling_noise
from extras.audio import picture
from extras.cli import InputError, Parser, number, replace_file, replace_text, run
from extras.device import pick_device, sampling_dtype
from extras.edit import invert_recording
from extras.hub import check_fit, open_student
from extras.listen import check_folders, read_manifest, write_page
from extras.prompts import parse_weights, reweighted, token_weights, unseen_words
from losses import guided, one_step
from model import RATE, Pipeline, denoiser, load_unet, many_steps


def add_system(add):
    """Add the flags that select the system; eval.py has them too."""
    count = number(int, 1)
    add("--student", default="out/student",
        help="folder of train.py, or a complete one-step model: folder or hub name")
    add("--teacher", help="hub name, folder or tiny; default: the student's own")
    add("--teacher_steps", type=number(int, 1, 1000), help="sample the teacher, in so many steps")
    add("--guidance", type=number(float), help="the teacher's; default: its folder's own, else 7.5")
    add("--seed", type=number(int), default=0, help="of the noise")
    add("--batch_size", type=count, default=8, help="clips at a time")
    add("--decoder", choices=("vae", "fast"), default="vae",
        help="fast: the small one that extras.decoder made for the student")
    add("--precision", choices=("auto", "fp32"), default="auto",
        help="auto: half where the machine is fast at it")
    add("--device", help="cuda, mps or cpu; default: the first there is")


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--prompt", nargs="+", action="extend", default=[], help="one or more")
    add("--prompts", metavar="FILE", help="file of prompts: txt (one a line), csv, json, ...")
    add_system(add)
    add("--n", type=number(int, 1), default=1, help="clips for each prompt")
    add("--out", default="samples", help="folder for WAV, PNG and manifest.json")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--seconds", type=number(float, 0.16, 30), help="length; default: as in training, the best")
    add("--init", metavar="WAV", help="edit this recording: start from noise that makes it")
    add("--init_prompt", help="what --init sounds like")
    add("--strength", type=number(float, 0, 1), default=0.2,
        help="0: closest to --init; 1: ignore it")
    add("--html", nargs="?", const="page", choices=("page", "blind"),
        help="write OUT/listen.html; blind: a listening test")
    add("--beside", nargs="+", default=[], metavar="DIR", help="other systems on that page")
    args = p.parse_args(argv)
    for flag, other in (("init_prompt", "init"), ("beside", "html")):
        if getattr(args, flag) and not getattr(args, other):
            raise InputError(f"--{flag} goes with --{other}")
    if args.init and args.teacher_steps:
        raise InputError("--init needs a one-step student, not --teacher_steps")

    given = [(prompt, "--prompt") for prompt in args.prompt]
    if args.prompts:
        given += [(prompt, args.prompts) for prompt in read_captions(args.prompts)[0]]
    given = [(" ".join(prompt.split()), where) for prompt, where in given]
    # {prompt as given: (its words, the weight of each character)}
    args.prompt = {prompt: parse_weights(prompt, where) for prompt, where in given}
    if not args.prompt or not all(words.strip() for words, _ in args.prompt.values()):
        raise InputError('an empty prompt; pass --prompt "what it should sound like" or --prompts '
                         "FILE")
    return args


def open_system(args, seconds=None):
    """Load what add_system()'s flags select: (pipe, latents, description).

    latents(z_T, text, weights=None) makes latents of noise and encoded prompts: the student in
    one step, or the teacher in many. weights: see extras.prompts.reweighted.
    """
    if args.guidance is not None and not args.teacher_steps:
        raise InputError("--guidance goes with --teacher_steps: a student's is trained in")
    device = pick_device(args.device, exact=args.precision == "fp32")
    dtype = sampling_dtype(device) if args.precision == "auto" else torch.float32
    about, decoder = {}, None
    if not (args.teacher and args.teacher_steps):
        folder, part, about = open_student(args.student)
    if args.decoder == "fast":
        if args.teacher_steps:
            raise InputError("--decoder fast needs a student; it does not go with --teacher_steps")
        decoder = folder / "decoder"
        if not (decoder / "config.json").exists():
            raise InputError(f"{decoder}: not there; make it: python -m extras.decoder --student "
                             f"{args.student}")
    skip = [] if args.teacher_steps else ["unet/diffusion*"]    # a student needs no other UNet
    pipe = Pipeline(args.teacher or about["teacher"], seconds or about.get("seconds"), skip, dtype,
                    decoder)
    pipe.to(device)
    if args.teacher_steps:
        if args.teacher_steps > 1:
            pipe.scheduler_of(args.teacher_steps)               # refuses too few
        scale = pipe.settings.get("sample", {}).get("guidance", 7.5)
        scale = scale if args.guidance is None else args.guidance
        folder, part = pipe.folder, "unet"
        system = {"teacher": str(folder), "steps": args.teacher_steps, "guidance": scale}
    else:
        system = {"student": args.student, "folder": str(folder / part), "steps": 1}
    if decoder:
        system["decoder"] = str(decoder)
    unet = load_unet(folder, part, dtype).to(device).requires_grad_(False)
    check_fit(unet.config, pipe.folder)
    null, eps = pipe.encode_text([""]), denoiser(unet)

    def latents(z_T, text, weights=None):
        with reweighted(unet, weights):
            if args.teacher_steps:
                return many_steps(guided(eps, null, scale), z_T, text, pipe, args.teacher_steps)
            return one_step(eps, z_T, text, pipe.alpha, pipe.sigma, about["parameterization"],
                            about.get("timestep"))

    return pipe, latents, {**system, "dtype": str(dtype)}


def draw_noise(pipe, numbers, seed):
    """z_T (B, 4, h, w) of clips with these numbers, on the pipeline's device."""
    return sampling_noise(numbers, seed, pipe.latent_shape).to(pipe.device)


@torch.no_grad()
def make_clips(pipe, latents, texts, z_T, weights=None):
    """Make log-mels (B, num_mels, frames) and waveforms (B, N), on the CPU."""
    mel = pipe.decode(latents(z_T, pipe.encode_text(texts), weights))
    return mel.cpu(), pipe.vocode(mel).cpu().numpy()


def file_names(prompts, n, seed):
    """Name each clip readably and distinctly, without ending: a-dog-barks-twice_seed0_0."""
    slugs = []
    for prompt in prompts:
        base = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "clip"
        numbered = (f"{base}-{i}" for i in itertools.count(2))
        slugs.append(next(s for s in itertools.chain([base], numbered) if s not in slugs))
    return {(prompt, k): f"{slug}_seed{seed}_{k}"
            for prompt, slug in zip(prompts, slugs) for k in range(n)}


def main(argv=None):
    args = parse_args(argv)
    out, names = Path(args.out), file_names(args.prompt, args.n, args.seed)
    for name in names.values():
        for path in (out / f"{name}.wav", out / f"{name}.png"):
            if path.exists() and not args.overwrite:
                raise InputError(f"{path} exists; pass --overwrite to replace it, or another "
                                 "--out or --seed")
    rows = {row["file"]: row for row in read_manifest(out)}
    check_folders(out, args.beside)
    pipe, latents, system = open_system(args, args.seconds)
    words = [words for words, _ in args.prompt.values()] + [args.init_prompt or ""]
    for line in unseen_words(pipe, words):
        tqdm.write(line)
    if args.init:
        start = invert_recording(args.init, args.init_prompt or "", pipe, latents, args.seed)
        system.update(init=args.init, init_prompt=args.init_prompt, strength=args.strength)

    out.mkdir(parents=True, exist_ok=True)
    jobs, started, bar = list(names), time.time(), tqdm(total=len(names), desc="clips")
    for i in range(0, len(jobs), args.batch_size):
        part = jobs[i:i + args.batch_size]                              # [(prompt, k)]
        z_T = draw_noise(pipe, [k for _, k in part], args.seed)
        if args.init:                                                   # of unit variance
            z_T = math.sqrt(1 - args.strength ** 2) * start + args.strength * z_T
        texts, weights = zip(*(args.prompt[prompt] for prompt, _ in part))
        plain = all(w == 1 for row in weights for w in row)
        weights = None if plain else token_weights(pipe, texts, weights)
        mels, wavs = make_clips(pipe, latents, texts, z_T, weights)
        for (prompt, k), wav, mel in zip(part, wavs, mels):
            path = out / f"{names[prompt, k]}.wav"
            replace_file(path, lambda tmp: soundfile.write(tmp, wav, RATE, "PCM_16", format="WAV"))
            replace_file(path.with_suffix(".png"), lambda tmp: picture(mel).save(tmp, "PNG"))
            rows[path.name] = {"file": path.name, "prompt": prompt, "seed": args.seed, "k": k,
                               **system}
        listed = json.dumps(list(rows.values()), indent=2, ensure_ascii=False)
        replace_text(out / "manifest.json", listed + "\n")
        bar.update(len(part))
    bar.close()

    seconds, length = (time.time() - started) / len(jobs), wavs.shape[1] / RATE
    if args.html:
        write_page(out / "listen.html", [out, *args.beside], args.html == "blind")
        print(out / "listen.html")
    for name in list(names.values())[:10]:
        print(f"{out / name}.wav  {out / name}.png")
    if len(names) > 10:
        print(f"... and {len(names) - 10} more, listed in {out / 'manifest.json'}")
    print(f"{seconds:.2f} s for a clip of {length:.2f} s (real-time factor {seconds / length:.2f})")


if __name__ == "__main__":
    run(main)
