"""Teach a teacher your own sounds: fine-tune it on recordings with captions, then distil that.

    python -m recipes.sounds --teacher tiny/recorded --sounds FOLDER
    python train.py --teacher out_sounds/teacher --captions out_sounds/captions.csv

Captions, by the first of these that FOLDER has: x.txt beside x.wav, one a line; metadata.csv or
.jsonl with file_name and caption; folders' names less their numbers, as of "001 - Dog bark". Writes
teacher/, complete, with the adapter merged; lora/, it alone in PEFT's format; and captions.csv.
"""
import glob
import os
import re
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import data
import model
import train
from extras.audio import encode_audio, read_file, resample
from extras.metrics import OTHERS, SOUNDS, sha256
from lora import inject, lora_layers, save_lora
from losses import lora_loss
from recipes.clips import fit, keep_clips, read_clips

FILE = ("file_name", "file", "wav", "location")         # columns of metadata that name a sound
UNUSED = ("init captions max_captions student_t guidance keep_every ema lr lora_guidance tv t_min "
          "lora_weighting tv_weight lora_lr lora_drop t_max").split()       # flags of train.py


def parse_args(argv=None):
    add = (p := data.Parser(__doc__, prog="python -m recipes.sounds")).add_argument
    add("--sounds", required=True, help="folder of recordings; layouts: top of recipes/sounds.py")
    add("--old_captions", metavar="FILE", help="mix old ones into captions.csv, against forgetting")
    add("--old", type=data.number(int), default=100, help="how many of them, from the first")
    add("--all_weights", action="store_true", help="train the UNet itself, without an adapter")
    add("--lr", type=data.number(float), default=1e-4, help="rate; for --all_weights try a tenth")
    for group in train.add_run, train.add_vsd:
        group(lambda name, **kw: None if name[2:] in UNUSED else add(name, **kw))
    p.set_defaults(out_dir="out_sounds", max_steps=2000, grad_accum=1, warmup=50, decay=True,
                   captions="captions.csv", max_captions=None, init=None)
    return train.parse_run(p, argv, "sounds")


def files(folder):
    """Files in a folder and in those below, linked ones too, none that is hidden: paths."""
    found = [folder / n for n in sorted(glob.glob("**", root_dir=folder, recursive=True))]
    return [path for path in found if path.is_file()]


def from_metadata(folder, every, sounds, column):
    """{sound: its captions} by metadata.csv or .jsonl of the folder and of those below, or {}."""
    tables = [p for p in every if p.name in ("metadata.csv", "metadata.jsonl")]
    known, found = {os.path.abspath(p): p for p in sounds}, {p: [] for p in sounds if tables}
    for table in tables:
        for n, row in enumerate(data.read_rows(table), 1):
            where, names = f"{table}: row {n}", row if isinstance(row, dict) else ()
            keys = [key for name in FILE for key in names if key.strip().lower() == name]
            path = known.get(os.path.abspath(table.parent / str(row[keys[0]]))) if keys else None
            data.require(path, f"{where}: its {' or '.join(FILE)} is no sound of {folder}: {row}")
            found[path] += data.row_captions(row, where, column)
    return found


def read_sounds(folder, column=None):
    """A folder's sounds, {path: its captions}; InputError where one has none or is not read."""
    every = files(folder)
    sounds = [p for p in every if p.suffix.lower() in SOUNDS]
    data.require(sounds, f"{folder}: holds no sound ({', '.join(SOUNDS)})")
    words = {p: re.split(r"[\s_.-]+", p.parent.name.lower()) for p in sounds if p.parent != folder}
    found = ({p: data.read_captions(p.with_suffix(".txt"))[0] for p in sounds
              if p.with_suffix(".txt").is_file()} or from_metadata(folder, every, sounds, column)
             or {p: [" ".join(w for w in ws if not w.isdigit())] for p, ws in words.items()})
    found = {p: [*dict.fromkeys(filter(None, found.get(p, [])))] for p in sounds}
    for what, bad in (("are not read; convert", [p for p in every if p.suffix.lower() in OTHERS]),
                      ("have no caption; write one,", [p for p in sounds if not found[p]])):
        data.require(not bad, f"{folder}: {len(bad)} of {len(every)} files {what} or remove: "
                     + ", ".join(map(str, bad[:3])) + ", ..." * (len(bad) > 3))
    return found


def write_captions(args, new):
    """Write captions.csv, of new captions and --old ones, for this run and the next."""
    old = args.old_captions and data.read_captions(args.old_captions, limit=args.old)[0] or []
    cells = [line.replace('"', '""') for line in dict.fromkeys(["caption", *new, *old])]
    text, path = "".join(map('"{}"\n'.format, cells)), Path(args.out_dir, "captions.csv").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.require(not path.exists() or path.read_text("utf-8", "replace") == text,
                 f"{path}: is of other sounds; remove it, or pass another --out_dir")
    data.replace_text(path, text)
    args.captions, args.caption_column = str(path), None


def encode(run, paths):
    """Latents (paths, C, h, w) in fp16 of each sound's loudest part, kept in a file."""
    path, n = run.out / "latents.safetensors", run.shape[2] * 8 * model.HOP
    about = {key: run.identity[key] for key in ("VAE's weights", "sounds", "latents")}
    if len(found := read_clips(path, about, run.shape)):
        return found
    z, longer = [], []      # of each process; those of the first are kept
    for wav, rate in map(read_file, tqdm(paths, "latents", disable=run.rank > 0)):
        wav = resample(torch.from_numpy(wav.mean(1)), rate, model.RATE)
        longer.append(len(wav) - n)
        wav = torch.nn.functional.pad(wav, (0, max(0, n - len(wav))))
        start = wav.square().unfold(0, n, n // 8).sum(1).argmax() * (n // 8)
        z.append(encode_audio(run, wav[None, start:start + n].to(run.device)).half().cpu())
    run.say(f"{len(paths)} sounds: {sum(x > 0 for x in longer)} were cut to their loudest "
            f"{n / model.RATE:g} s, {sum(x < 0 for x in longer)} padded")
    return keep_clips(path, about, torch.cat(z))


def save_teacher(run):
    """Write teacher/, its UNet last with W + (alpha / rank) B A for adapted weights, and lora/."""
    folder, unet, args = run.out / "teacher", run.student, run.args
    state = {k: w.detach().clone() for k, w in unet.named_parameters() if ".lora_" not in k}
    for name, layer in lora_layers(unet).items():
        A, B = (m.weight.detach().flatten(1) for m in (layer.lora_A, layer.lora_B))
        state[f"{name}.weight"] += layer.scale * (B @ A).view_as(layer.weight)
    if not (folder / "unet/config.json").exists():      # the last file: the rest is there, too
        for path in files(run.folder):                  # --out_dir may be in there
            to = folder / (name := path.relative_to(run.folder))
            if not {"unet", run.out.name} & {*name.parts}:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    train.save_network(folder / "unet", unet, state)
    if not args.all_weights:
        save_lora(unet, run.out / "lora", args.lora_rank, args.lora_alpha)


def main(argv=None):
    args = parse_args(argv)
    args.student_t, args.keep_every = None, 0           # start() and Run look at them
    sounds = read_sounds(Path(vars(args).pop("sounds")), args.caption_column)
    write_captions(args, sum(sounds.values(), []))
    model.find(args.teacher, model.TO_HEAR)             # all of it, as all of it is copied
    run = train.start(args)
    run.decoder = model.Decoder(run.folder).to(run.device)
    run.identity |= {
        "recipe": "sounds", "sounds": sha256(*sounds)[:16], "latents": list(run.shape),
        "sounds' captions": train.digest(str([*sounds.values()]).encode()),
        "VAE's weights": train.fingerprint(run.decoder.vae)}
    run.save_result = lambda step: save_teacher(run)
    torch.manual_seed(args.seed)
    learn = [*run.student.parameters()] if args.all_weights else inject(
        run.student, args.lora_targets, args.lora_rank, args.lora_alpha)
    weights, opts = {"teacher": learn}, {"teacher": train.adamw(args, learn, args.lr)}
    run.resume(weights, opts, "teacher")
    latents = encode(run, [*sounds])
    del run.decoder, run.unet                           # gigabytes at full size
    pairs = [(row, text) for row, texts in enumerate(sounds.values()) for text in texts]
    net = train.prepare(run, run.student)
    eps_teacher = model.denoiser(net, run.amp)

    def backward(numbers):
        rows, texts = zip(*(data.caption_at(pairs, args.seed, n) for n in numbers))
        _, eps, _, _, t, u = data.draw_batch(numbers, args.seed, run.shape, 0, 1, run.T)
        x0, eps, t, u = (x.to(run.device) for x in (latents[[*rows]].float(), eps, t, u))
        text = torch.where((u < 0.1)[:, None, None], run.null, run.encode_text(texts))
        loss = lora_loss(x0, t, eps, text, eps_teacher, run.alpha, run.sigma, "v")
        (loss.mean() / args.grad_accum).backward()
        run.log(loss=loss)

    return fit(run, [net], weights, opts, backward, "loss", hear="python train.py --teacher "
               f"{run.out}/teacher --captions {args.captions}")


if __name__ == "__main__":
    data.cli(main)
