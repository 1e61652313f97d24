"""A teacher's own clips, made once and kept: what posttrain.py learns from in place of recordings.
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import caption_at, sampling_noise
from extras.cli import InputError, replace_file
from extras.hub import full_name
from model import many_steps

SAVE_EVERY = 128        # clips


def read_clips(path, about, shape):
    """Read the clips of a file, (N, *shape); none if it does not exist.

    InputError if they were not made from what `about` names.
    """
    if not path.exists():
        return torch.zeros(0, *shape, dtype=torch.float16)
    try:
        with safe_open(path, "pt") as file:
            found, clips = json.loads(file.metadata()["about"]), file.get_tensor("clips")
    except Exception as e:                              # each kind of damage its own error
        raise InputError(f"{path}: is no file of clips ({type(e).__name__}); pass another "
                         "--cache")
    for key, value in about.items():
        if found.get(key) != value:
            what = "other captions" if key == "captions" else f"{key} {found.get(key)}, not {value}"
            raise InputError(f"{path}: its clips were made with {what}; pass another --cache")
    return clips


def teacher_clips(args, captions, digest, pipe, eps):
    """Latents (--clips, C, h, w) in fp16 by the guided teacher `eps`: clip n is of caption_at(n).

    --cache keeps them; where it holds fewer, it goes on.
    """
    path, shape = Path(args.cache), pipe.latent_shape
    about = {"teacher": full_name(args.teacher), "guidance": args.guidance,
             "clip_steps": args.clip_steps, "seed": args.seed, "captions": digest,
             "latents": list(shape)}
    clips = read_clips(path, about, shape)
    if len(clips) >= args.clips:
        return clips[:args.clips]
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=args.clips, initial=len(clips), desc="the teacher's clips")
    while len(clips) < args.clips:
        numbers = range(len(clips), min(len(clips) + args.batch_size, args.clips))
        text = pipe.encode_text([caption_at(captions, args.seed, n) for n in numbers])
        z_T = sampling_noise(numbers, args.seed, shape).to(pipe.device)
        x0 = many_steps(eps, z_T, text, pipe, args.clip_steps)
        clips = torch.cat([clips, x0.half().cpu()])
        bar.update(len(numbers))
        if len(clips) % SAVE_EVERY < len(numbers) or len(clips) == args.clips:
            replace_file(path, lambda tmp: save_file(
                {"clips": clips}, tmp, {"about": json.dumps(about)}))
    bar.close()
    return clips
