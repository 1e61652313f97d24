"""Distil a small decoder that takes the VAE's place in sample.py and eval.py: --decoder fast.

    python -m extras.decoder --student out/student          # on the student's own captions
    python -m extras.decoder --student out/student --init madebyollin/taesd     # not from scratch

Captions are enough here too: the student makes latents, the teacher's VAE decodes them, and a
diffusers AutoencoderTiny learns to make the same picture. The same command again resumes, bit for
bit (a GPU's own nondeterminism aside). Writes to decoder/ in the student's folder: config.json and
diffusion_pytorch_model.safetensors, as diffusers reads them, checkpoint.pt and metrics.jsonl.
"""
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from tqdm import tqdm

from data import caption_at, draw_batch, read_captions
from extras.cli import InputError, Parser, number, replace_file, replace_text, run
from extras.device import pick_device
from extras.hub import find, open_student
from extras.log import Log
from extras.publish import write_card
from extras.resume import read_checkpoint
from losses import one_step
from model import Pipeline, denoiser, image_to_mel, load_part, load_unet, pretrained
from tiny.score import blocks

ENERGY = 0.1            # weight of the blocks' log energy, as for the tiny VAE (LOG.md, 2026-11-20)
WARMUP = 50             # steps


def parse_args(argv=None):
    p, count = Parser(__doc__), number(int, 1)
    add = p.add_argument
    add("--student", default="out/student", help="folder of train.py; decoder/ is written to it")
    add("--captions", help="csv, tsv, txt, json or jsonl file; default: the student's")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--init", help="start from this AutoencoderTiny: folder, or hub name (untested)")
    add("--clips", type=count, default=3072, help="training clips, made at the start")
    # in equal time, 4 clips a step beat 16 (LOG.md, 2026-11-21)
    add("--max_steps", type=count, default=24000, help="optimizer steps")
    add("--batch_size", type=count, default=4, help="clips in a step")
    add("--lr", type=number(float), default=4e-3, help="rate, falling to zero at --max_steps")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--seed", type=number(int), default=0, help="of all that is drawn at random")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    return p.parse_args(argv)


def new_decoder(settings):
    """An untrained AutoencoderTiny, of TAESD's size unless the teacher's settings have another.

    Its encoder is unused, so as small as possible.
    """
    own = settings.get("decoder", {})
    try:
        return AutoencoderTiny(encoder_block_out_channels=(4,) * 4, num_encoder_blocks=(0,) * 4,
                               **own)
    except (TypeError, ValueError) as e:
        raise InputError(f"swiftaudio.json of the teacher: its decoder {own} is none ({e})")


def energy(image):
    """tiny.score.blocks() of an image (B, channels, mels, frames), of which the first counts."""
    return blocks(image_to_mel(image))


def decoder_loss(image, target, weight=ENERGY):
    """L1 of the pictures (B, channels, mels, frames), and of their blocks' log energy: a number.

    L1 alone makes noise too quiet: its optimum is the median, which has less energy than noise.
    """
    of_blocks = F.l1_loss(energy(image), energy(target))
    return F.l1_loss(image, target.expand_as(image)) + weight * of_blocks


@torch.no_grad()
def make_pairs(args, pipe, eps, captions, about):
    """Latents of the student (--clips, C, h, w) and the VAE's pictures of them, both in fp16.

    Of each picture (--clips, 1, mels, frames) only the channel that is heard is kept.
    """
    pairs, bar = [], tqdm(total=args.clips, desc="the student's clips")
    for i in range(0, args.clips, args.batch_size):
        numbers = range(i, min(i + args.batch_size, args.clips))
        z_T = draw_batch(numbers, args.seed, pipe.latent_shape, 0, 1, pipe.T)[0].to(pipe.device)
        text = pipe.encode_text([caption_at(captions, args.seed, n) for n in numbers])
        x0 = one_step(eps, z_T, text, pipe.alpha, pipe.sigma, about["parameterization"],
                      about.get("timestep")).half()
        # one clip at a time: at full size each takes gigabytes
        images = [pipe.vae.decode(z[None].float() / pipe.vae.config.scaling_factor).sample[:, :1]
                  for z in x0]
        pairs.append((x0.cpu(), torch.cat(images).half().cpu()))
        bar.update(len(numbers))
    bar.close()
    return [torch.cat(column) for column in zip(*pairs)]


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    if not Path(args.student).is_dir() and args.student != "out/student":
        raise InputError(f"--student {args.student}: must be a folder here, as decoder/ is written "
                         "to it")
    folder, part, about = open_student(args.student)
    flags = {} if args.captions else about.get("flags", {})
    args.captions = args.captions or flags.get("captions")
    if args.captions is None:
        raise InputError("--captions FILE is needed: this student does not record its own")
    if args.clips < args.batch_size:
        raise InputError(f"--clips {args.clips}: fewer than a batch, --batch_size "
                         f"{args.batch_size}")
    column = args.caption_column or flags.get("caption_column")
    captions, _ = read_captions(args.captions, column, flags.get("max_captions"))
    out, config = folder / "decoder", {**vars(args), "decay": True}
    config["student"] = about.get("step")               # whatever its folder is called
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    found = read_checkpoint(out / "checkpoint.pt", config, digest, f"remove {out}")
    if (out / "config.json").exists() and not found:
        raise InputError(f"{out}: holds a decoder but no checkpoint to resume from; remove {out}")
    first_step = found["step"] if found else 0

    pipe = Pipeline(about["teacher"], about.get("seconds")).to(device)
    unet = load_unet(folder, part).to(device)
    torch.manual_seed(args.seed)
    if args.init:
        network = load_part(find(args.init), "", pretrained(AutoencoderTiny))
    else:
        network = new_decoder(pipe.settings)
    theirs, ours = pipe.vae.config, network.config
    if (len(ours.decoder_block_out_channels), ours.latent_channels) != (
            len(theirs.block_out_channels), theirs.latent_channels):
        raise InputError(f"{args.init or pipe.folder}: its small decoder does not fit the VAE of "
                         f"{pipe.folder} (levels, or channels of the latents)")
    decoder = network.to(device, memory_format=torch.channels_last).decoder
    optimizer = torch.optim.Adam(decoder.parameters(), args.lr, betas=(0.9, 0.99))
    if found:
        decoder.load_state_dict(found["decoder"])
        optimizer.load_state_dict(found["optimizer"])

    def save(step):
        """Write the checkpoint and the decoder; each file is replaced whole."""
        replace_file(out / "checkpoint.pt", lambda path: torch.save({
            "step": step, "config": config, "digest": digest, "decoder": decoder.state_dict(),
            "optimizer": optimizer.state_dict()}, path))
        state = {name: w.contiguous() for name, w in network.state_dict().items()}
        replace_file(out / "diffusion_pytorch_model.safetensors",
                     lambda path: save_file(state, path, {"format": "pt"}))
        replace_text(out / "config.json", network.to_json_string())
        if not part:                        # a student of train.py
            write_card(folder)

    if first_step >= args.max_steps:        # finished, but perhaps killed between two files
        return save(first_step)
    x0, images = make_pairs(args, pipe, denoiser(unet), captions, about)
    del pipe, unet                          # at full size 4 GB
    log = Log(out, first_step, "a smaller --lr")
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps,
               desc="decoder")
    for step in bar:
        rate = min(1, (step + 1) / WARMUP) * (1 - step / args.max_steps)
        optimizer.param_groups[0]["lr"] = args.lr * rate
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        rows = [caption_at(range(args.clips), args.seed, n) for n in numbers]
        z, target = x0[rows].to(device).float(), images[rows].to(device).float()
        loss = decoder_loss(decoder(z / network.config.scaling_factor), target)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), math.inf)
        optimizer.step()

        log.add("loss", loss)
        log.add_gradient("grad", norm, step)
        done = step + 1
        due_save = done == args.max_steps or done % args.save_every == 0
        if due_save or done % 10 == 0:
            line = log.write(done, args.batch_size)
            bar.set_postfix(loss=f"{line['loss']:.3g}")
        if due_save:
            save(done)
    print(f"{out}; hear it: python sample.py --student {args.student} --decoder fast --prompt "
          '"..."')


if __name__ == "__main__":
    run(main)
