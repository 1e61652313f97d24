"""Text to audio in one UNet pass: a WAV (16 kHz) and a picture of its mel spectrogram for every prompt.

    python sample.py --prompt "a dog barks twice"                       # the student in out/student
    python sample.py --prompts prompts.txt --n 4 --student USER/MODEL   # four clips a line, a student from the hub
    python sample.py --prompt "rain falls" --teacher_steps 25           # its teacher instead, in many steps
    python sample.py --prompt "a dog barks while (rain:2) falls"        # more rain: attention to it is doubled
    python sample.py --prompt "a cat meows" --init dog.wav --init_prompt "a dog barks"    # edit a recording
"""
import argparse
import base64
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import InputError, read_captions, read_json, sampling_noise, write
from model import (LOG_MAX, LOG_MIN, RATE, Teacher, denoiser, find, invert, load_unet, many_steps, one_step, pick_device, reweighted,
                   sampling_dtype)


def add_system(add):
    """The flags that say what makes clips, for here and eval.py; --device is its caller's."""
    add("--student", default="out/student", help="folder that train.py wrote, or a complete one-step model: folder or hub name")
    add("--teacher", help="hub name, folder or tiny (default: the one the student was distilled from)")
    add("--teacher_steps", type=int, help="sample the teacher instead, in so many steps")
    add("--guidance", type=float, help="the teacher's classifier-free guidance (default: the folder's own, else 7.5)")
    add("--seed", type=int, default=0, help="of the noise, and of what else is drawn")
    add("--batch_size", type=int, default=8, help="clips at a time")
    add("--precision", choices=("auto", "fp32"), default="auto", help="auto: half where the machine is fast at it")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--prompt", nargs="+", action="extend", default=[], help="one or more")
    add("--prompts", metavar="FILE", help="file of prompts: txt (one a line), csv, tsv, json or jsonl")
    add_system(add)
    add("--out", default="samples", help="folder for WAV, PNG and manifest.json")
    add("--seconds", dest="length", type=float, metavar="S", help="length (default: that of training, at which it is best)")
    add("--init", metavar="WAV", help="edit this recording: start from noise that makes it")
    add("--init_prompt", help="what --init sounds like (default: nothing said)")
    add("--strength", type=float, default=0.2, help="of an edit: 0 keeps most of --init, 1 all but its length is new")
    add("--html", nargs="?", const="page", choices=("page", "blind"), help="write OUT/listen.html; blind: a listening test")
    add("--beside", nargs="+", default=[], metavar="DIR", help="for --html: folders of other systems, a column each")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--n", type=int, default=1, help="clips for each prompt")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    if args.n < 1:
        raise InputError("--n must be at least 1")
    if not 0 <= args.strength <= 1 or args.length is not None and not 0.16 <= args.length <= 30:
        raise InputError("--strength must be between 0 and 1, --seconds between 0.16 and 30")
    if args.init and args.teacher_steps or args.init_prompt and not args.init:
        raise InputError("--init needs a one-step student, not --teacher_steps; and --init_prompt needs --init")
    if args.beside and not args.html:
        raise InputError("--beside goes with --html")
    check_system(args)
    given = [(p, "--prompt") for p in args.prompt] + [(p, args.prompts) for p in (read_captions(args.prompts)[0] if args.prompts else [])]
    args.parsed = {prompt: parse_weights(prompt, where) for p, where in given for prompt in [" ".join(p.split())]}
    args.prompt = list(args.parsed)
    if not args.prompt or any(not plain.strip() for plain, _ in args.parsed.values()):
        raise InputError('an empty prompt; pass --prompt "what it shall sound like" or --prompts FILE')
    return args


def parse_weights(prompt, where="--prompt"):
    r"""A prompt with weights, "a (loud dog:1.5) barks", -> ("a loud dog barks", the weight of each character).

    Brackets nest and multiply. A bracket, colon or backslash after a backslash is itself. InputError points at what is broken.
    """
    def broken(i, why):
        raise InputError(f"{where}: {why} at character {i + 1}, {prompt[i:i + 20]!r}: weights look like (rain:1.5), and "
                         r"plain brackets like \( and \)")
    plain, weights, opened, i = [], [], [], 0
    while i < len(prompt):
        if prompt[i] == "\\" and prompt[i + 1:i + 2] in ("(", ")", ":", "\\"):
            plain.append(prompt[i + 1])
            weights.append(1.0)
            i += 1
        elif prompt[i] == "(":
            opened.append((len(plain), i))
        elif opened and prompt[i] in ":)":
            found = re.compile(r":\s*(\d+\.?\d*|\.\d+)\s*\)").match(prompt, i)
            if not found:
                broken(i, "a bracket without its number")
            start, _ = opened.pop()
            weights[start:] = [w * float(found[1]) for w in weights[start:]]
            if max(weights, default=0) > 100:           # fp16 ends at 65504
                broken(i, "a weight above 100")
            i = found.end() - 1
        elif prompt[i] == ")":
            broken(i, "a bracket that nothing opens")
        else:
            plain.append(prompt[i])
            weights.append(1.0)
        i += 1
    if opened:
        broken(opened[-1][1], "a bracket that nothing closes")
    return "".join(plain), weights


def open_student(name):
    """Where a student's UNet is and what is known of it: (folder, subfolder, its swiftaudio.json or the like)."""
    if name == "out/student" and not Path(name).exists():
        raise InputError("out/student: no student there yet; train one (python train.py --teacher tiny) or pass --student")
    folder = find(name)
    if (folder / "swiftaudio.json").exists() and (folder / "config.json").exists():
        return folder, "", read_json(folder / "swiftaudio.json")
    if (folder / "unet").is_dir():                      # a complete model, such as the paper authors' own
        return folder, "unet", {"teacher": name, "parameterization": "eps"}
    raise InputError(f"{name}: neither a student of train.py (config.json and swiftaudio.json) nor a complete model (unet/, ...)")


def check_architecture(student, teacher_folder):
    """InputError where a student's UNet cannot be fed by this teacher's text encoder and VAE."""
    path = Path(teacher_folder) / "unet/config.json"
    theirs = read_json(path) if path.exists() else {}
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        mine = student.config[key]
        if theirs.get(key, mine) != mine:
            raise InputError(f"the student is of another architecture than its teacher {teacher_folder}: {key} {mine}, "
                             f"the teacher has {theirs[key]}; pass the right --teacher")


def file_names(prompts, n, seed):
    """A readable name for each clip, without ending: a-dog-barks-twice_seed0_0, distinct within the call."""
    names, taken = {}, set()
    for prompt in prompts:
        slug = base = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "clip"
        count = 1
        while slug in taken:
            count += 1
            slug = f"{base}-{count}"
        taken.add(slug)
        for k in range(n):
            names[prompt, k] = f"{slug}_seed{seed}_{k}"
    return names


def picture(mel):
    """Log-mel (n_mels, frames) -> an RGB image, low frequencies at the bottom, at least 256 pixels high."""
    x = np.clip((np.asarray(mel) - LOG_MIN) / (LOG_MAX - LOG_MIN), 0, 1)[::-1]
    stops = np.array([(0, 0, 4), (60, 15, 110), (150, 40, 125), (235, 90, 95), (253, 180, 110), (252, 253, 190)])
    rgb = np.stack([np.interp(x, np.linspace(0, 0.9, len(stops)), stops[:, c]) for c in range(3)], -1).astype(np.uint8)
    scale = max(1, 256 // rgb.shape[0])
    return Image.fromarray(rgb.repeat(scale, 0).repeat(scale, 1))


def check_system(args):
    """InputError where the flags that open_system and make read are impossible."""
    if args.batch_size < 1 or args.seed < 0 or args.teacher_steps is not None and not 1 <= args.teacher_steps <= 1000:
        raise InputError("--batch_size must be at least 1, --seed at least 0, --teacher_steps between 1 and 1000")
    if args.guidance is not None and not args.teacher_steps:
        raise InputError("--guidance goes with --teacher_steps N: the student has its guidance trained in")


def open_system(args):
    """What flags --student, --teacher, --teacher_steps, --guidance and --device mean: (teacher, latents, description).

    latents(z_T, text, weights=None) makes latents of noise and encoded prompts, by the student in one step or by the teacher in many.
    """
    device, about = pick_device(args.device), {}
    dtype = sampling_dtype(device) if args.precision == "auto" else torch.float32
    if not (args.teacher_steps and args.teacher):
        folder, part, about = open_student(args.student)
    teacher = Teacher(args.teacher or about["teacher"], getattr(args, "length", None) or about.get("seconds"),
                      skip=() if args.teacher_steps else "unet/diffusion", dtype=dtype).to(device)      # a student needs no teacher's UNet
    if args.teacher_steps:
        unet, null = load_unet(teacher.folder, dtype=dtype).to(device), teacher.encode_text([""])
        guidance = teacher.defaults.get("sample", {}).get("guidance", 7.5) if args.guidance is None else args.guidance
        def latents(z_T, text, weights=None):
            with reweighted(unet, weights):
                return many_steps(denoiser(unet), z_T, text, null, teacher, args.teacher_steps, guidance)
        return teacher, latents, {"teacher": str(teacher.folder), "steps": args.teacher_steps, "guidance": guidance, "dtype": str(dtype)}
    unet = load_unet(folder, part, dtype).to(device).requires_grad_(False)
    check_architecture(unet, teacher.folder)
    def latents(z_T, text, weights=None):
        with reweighted(unet, weights):
            return one_step(denoiser(unet), z_T, text, teacher, about["parameterization"])
    return teacher, latents, {"student": args.student, "folder": str(folder / part), "steps": 1, "dtype": str(dtype)}


def noise(teacher, numbers, seed):
    """z_T (B, 4, h, w): the seed's noises of these numbers."""
    return torch.stack([sampling_noise(seed, k, teacher.latent_shape) for k in numbers]).to(teacher.device)


@torch.no_grad()
def make(teacher, latents, prompts, z_T, weights=None):
    """Log-mels (B, num_mels, frames) and waveforms (B, N), on the CPU, of prompts and noise."""
    mel = teacher.decode(latents(z_T, teacher.encode_text(prompts), weights))
    return mel.cpu(), teacher.vocode(mel).cpu().numpy()


def invert_recording(path, prompt, teacher, latents, seed):
    """The noise (1, 4, h, w) of which a student makes a recording, cut or padded with silence to the teacher's length."""
    from eval import read_audio
    length = round(teacher.seconds * RATE)
    wav = read_audio(path, teacher.seconds)[:length]
    x0 = teacher.encode_audio(F.pad(wav, (0, length - len(wav)))[None].to(teacher.device))
    text = teacher.encode_text([prompt])
    z, error = invert(lambda z: latents(z, text), x0, noise(teacher, [2 ** 32], seed))       # a noise that no clip is mixed with
    print(f"{path}: found noise that makes it but for {error.item() / x0.var().item():.0%} of its latents' variance")
    return z


def manifests(folders):
    """{folder: the rows of its manifest.json} of folders of sample.py, with all their files there."""
    found = {}
    for folder in map(Path, folders):
        path = folder / "manifest.json"
        if not path.exists():
            raise InputError(f"{folder}: holds no manifest.json of sample.py")
        found[folder] = read_manifest(path)
        for clip in found[folder]:
            for file in ((folder / clip["file"]).with_suffix(ending) for ending in (".wav", ".png")):
                if not file.exists():
                    raise InputError(f"{file}: is missing, though {path} lists it; make it again")
    return found


def read_manifest(path):
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: is not sample.py's; choose another folder")
    return rows


def listen(folders, blind):
    """One self-contained page of the clips in folders of sample.py, a column a folder, a row a (prompt, seed, clip)."""
    def embed(path, kind):
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    rows, found = {}, manifests(folders)
    for column, (folder, clips) in enumerate(found.items()):
        for clip in clips:
            wav = folder / clip["file"]
            rows.setdefault((clip["prompt"], clip["seed"], clip["k"]), {})[column] = {
                "wav": embed(wav, "audio/wav"), "png": None if blind else embed(wav.with_suffix(".png"), "image/png"),
                "seconds": soundfile.info(wav).duration}
    known = {"blind": blind, "systems": [folder.resolve().name for folder in found],
             "rows": [{"prompt": p, "seed": s, "k": k, "clips": clips} for (p, s, k), clips in rows.items()]}
    template = (Path(__file__).resolve().parent / "assets/listen.html").read_text("utf-8")
    return template.replace("/*DATA*/", json.dumps(known).replace("<", "\\u003c"))


def main(argv=None):
    args = parse_args(argv)
    out, names = Path(args.out), file_names(args.prompt, args.n, args.seed)
    if not args.overwrite:
        for name in names.values():
            for path in (out / f"{name}.wav", out / f"{name}.png"):
                if path.exists():
                    raise InputError(f"{path} exists; pass --overwrite to replace it, or another --out or --seed")
    manifest = out / "manifest.json"                    # what a page needs is looked at before the work
    rows = {row["file"]: row for row in (read_manifest(manifest) if manifest.exists() else [])}
    manifests(args.beside)
    if len({Path(folder).resolve().name for folder in (out, *args.beside)}) < 1 + len(args.beside):
        raise InputError("--beside: two folders, --out's included, have the same name, which names the system; rename one")
    teacher, latents, system = open_system(args)
    for line in teacher.check([*(plain for plain, _ in args.parsed.values()), *filter(None, [args.init_prompt])]):
        tqdm.write(line)
    start = invert_recording(args.init, args.init_prompt or "", teacher, latents, args.seed) if args.init else None
    out.mkdir(parents=True, exist_ok=True)
    jobs, started = list(names), time.time()
    bar = tqdm(total=len(jobs), desc="clips")
    for i in range(0, len(jobs), args.batch_size):
        part = jobs[i:i + args.batch_size]
        z_T, (texts, weights) = noise(teacher, [k for _, k in part], args.seed), zip(*(args.parsed[prompt] for prompt, _ in part))
        if args.init:                                   # of unit variance, as noise has
            z_T = math.sqrt(1 - args.strength ** 2) * start + args.strength * z_T
        plain = all(w == 1 for row in weights for w in row)
        mel, wav = make(teacher, latents, texts, z_T, None if plain else teacher.token_weights(texts, weights))
        for (prompt, k), w, m in zip(part, wav, mel):
            path = out / names[prompt, k]
            try:
                soundfile.write(f"{path}.wav", w, RATE, "PCM_16")
                picture(m).save(f"{path}.png")
            except (OSError, RuntimeError) as e:        # soundfile's own error is a RuntimeError
                raise InputError(f"{path}: not written ({e})")
            rows[f"{path.name}.wav"] = {"file": f"{path.name}.wav", "prompt": prompt, "seed": args.seed, "k": k, **system,
                                         **({"init": args.init, "init_prompt": args.init_prompt, "strength": args.strength} if args.init else {})}
        write(manifest, lambda path: path.write_text(json.dumps(list(rows.values()), indent=2, ensure_ascii=False) + "\n", "utf-8"))
        bar.update(len(part))
    bar.close()
    seconds = (time.time() - started) / len(jobs)
    if args.html:
        write(out / "listen.html", lambda path: path.write_text(listen([out, *args.beside], args.html == "blind"), "utf-8"))
        print(f"{out / 'listen.html'}")
    for name in list(names.values())[:10]:
        print(f"{out / name}.wav  {out / name}.png")
    if len(names) > 10:
        print(f"... and {len(names) - 10} more, listed in {manifest}")
    length = wav.shape[1] / RATE
    print(f"{seconds:.2f} s for a clip of {length:.2f} s (real-time factor {seconds / length:.2f})")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        raise InputError(e)
