"""Text to audio in one UNet pass: a WAV (16 kHz) and a picture of its mel spectrogram for every prompt.

    python sample.py --prompt "a dog barks twice"                       # the student in out/student
    python sample.py --prompts prompts.txt --n 4 --student USER/MODEL   # four clips a line, a student from the hub
    python sample.py --prompt "rain falls" --teacher_steps 25           # its teacher instead, in many steps
"""
import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from tqdm import tqdm

from data import InputError, read_captions, read_json, sampling_noise, write
from model import LOG_MAX, LOG_MIN, RATE, Teacher, denoiser, find, load_unet, many_steps, one_step, pick_device, sampling_dtype


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--prompt", nargs="+", action="extend", default=[], help="one or more")
    add("--prompts", metavar="FILE", help="file of prompts: txt (one a line), csv, tsv, json or jsonl")
    add("--student", default="out/student", help="folder that train.py wrote, or a complete one-step model: folder or hub name")
    add("--teacher", help="hub name, folder or tiny (default: the one the student was distilled from)")
    add("--teacher_steps", type=int, help="sample the teacher instead, in so many steps")
    add("--guidance", type=float, help="the teacher's classifier-free guidance (default: the folder's own, else 7.5)")
    add("--out", default="samples", help="folder for WAV, PNG and manifest.json")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--seed", type=int, default=0, help="of the noise; clip k of a seed has the same noise for every prompt")
    add("--n", type=int, default=1, help="clips for each prompt")
    add("--batch_size", type=int, default=8, help="clips at a time")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--precision", choices=("auto", "fp32"), default="auto", help="auto: half where the machine is fast at it")
    args = p.parse_args(argv)
    if args.n < 1:
        raise InputError("--n must be at least 1")
    check_system(args)
    if args.prompts:
        args.prompt += read_captions(args.prompts)[0]
    args.prompt = list(dict.fromkeys(" ".join(p.split()) for p in args.prompt))
    if not args.prompt or "" in args.prompt:
        raise InputError('an empty prompt; pass --prompt "what it shall sound like" or --prompts FILE')
    return args


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

    latents(z_T, text) makes latents of noise and encoded prompts, by the student in one step or by the teacher in many.
    """
    device, about = pick_device(args.device), {}
    dtype = sampling_dtype(device) if args.precision == "auto" else torch.float32
    if not (args.teacher_steps and args.teacher):
        folder, part, about = open_student(args.student)
    teacher = Teacher(args.teacher or about["teacher"], about.get("seconds"),
                      skip=() if args.teacher_steps else "unet/diffusion", dtype=dtype).to(device)      # a student needs no teacher's UNet
    if args.teacher_steps:
        eps, null = denoiser(load_unet(teacher.folder, dtype=dtype).to(device)), teacher.encode_text([""])
        guidance = teacher.defaults.get("sample", {}).get("guidance", 7.5) if args.guidance is None else args.guidance
        def latents(z_T, text):
            return many_steps(eps, z_T, text, null, teacher, args.teacher_steps, guidance)
        return teacher, latents, {"teacher": str(teacher.folder), "steps": args.teacher_steps, "guidance": guidance, "dtype": str(dtype)}
    unet = load_unet(folder, part, dtype).to(device)
    check_architecture(unet, teacher.folder)
    def latents(z_T, text):
        return one_step(denoiser(unet), z_T, text, teacher, about["parameterization"])
    return teacher, latents, {"student": args.student, "folder": str(folder / part), "steps": 1, "dtype": str(dtype)}


@torch.no_grad()
def make(teacher, latents, prompts, numbers, seed):
    """Log-mels (B, num_mels, frames) and waveforms (B, N), on the CPU, of prompts with the seed's noises of these numbers."""
    z_T = torch.stack([sampling_noise(seed, k, teacher.latent_shape) for k in numbers]).to(teacher.device)
    mel = teacher.decode(latents(z_T, teacher.encode_text(prompts)))
    return mel.cpu(), teacher.vocode(mel).cpu().numpy()


def main(argv=None):
    args = parse_args(argv)
    out, names = Path(args.out), file_names(args.prompt, args.n, args.seed)
    if not args.overwrite:
        for name in names.values():
            for path in (out / f"{name}.wav", out / f"{name}.png"):
                if path.exists():
                    raise InputError(f"{path} exists; pass --overwrite to replace it, or another --out or --seed")
    teacher, latents, system = open_system(args)
    for line in teacher.check(args.prompt):
        tqdm.write(line)
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.json"
    rows = {row["file"]: row for row in (read_json(manifest) if manifest.exists() else [])}
    jobs, started = list(names), time.time()
    bar = tqdm(total=len(jobs), desc="clips")
    for i in range(0, len(jobs), args.batch_size):
        part = jobs[i:i + args.batch_size]
        mel, wav = make(teacher, latents, [prompt for prompt, _ in part], [k for _, k in part], args.seed)
        for (prompt, k), w, m in zip(part, wav, mel):
            path = out / names[prompt, k]
            try:
                soundfile.write(f"{path}.wav", w, RATE, "PCM_16")
                picture(m).save(f"{path}.png")
            except (OSError, RuntimeError) as e:        # soundfile's own error is a RuntimeError
                raise InputError(f"{path}: not written ({e})")
            rows[f"{path.name}.wav"] = {"file": f"{path.name}.wav", "prompt": prompt, "seed": args.seed, "k": k, **system}
        write(manifest, lambda path: path.write_text(json.dumps(list(rows.values()), indent=2, ensure_ascii=False) + "\n", "utf-8"))
        bar.update(len(part))
    bar.close()
    seconds = (time.time() - started) / len(jobs)
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
