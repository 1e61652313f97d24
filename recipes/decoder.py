"""Distil a small decoder that takes the VAE's place in sample.py and extras.eval: --decoder fast.

    python -m recipes.decoder --student out/student

Captions are enough here too: the student makes latents, the teacher's VAE decodes them, and a
diffusers AutoencoderTiny learns to make the same picture. The same command again resumes. Writes
to decoder/ in the student's folder: what diffusers reads, checkpoint.pt and metrics.jsonl.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from tqdm import tqdm

import data
import model
import train
from data import InputError, Parser, caption_at, cli, number, replace_file, require
from extras.metrics import blocks
from losses import one_step


def parse_args(argv=None):
    p, count = Parser(__doc__, prog="python -m recipes.decoder"), number(int, 1)
    add = p.add_argument
    add("--student", default="out/student", help="folder of train.py; decoder/ is written to it")
    add("--captions", help="csv, tsv, txt, json or jsonl file; default: the student's")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--init", help="start from this AutoencoderTiny: folder, or hub name (untested)")
    add("--clips", type=count, default=3072, help="training clips, made at the start")
    # in equal time, 4 clips a step beat 16 (docs/LOG.md, 2026-11-21)
    add("--max_steps", type=count, default=24000, help="optimizer steps")
    add("--batch_size", type=count, default=4, help="clips in a step")
    add("--lr", type=number(float), default=4e-3, help="rate, falling to zero at --max_steps")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--seed", type=number(int, 0, 2**63), default=0, help="random seed")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    p.set_defaults(warmup=50, decay=True)
    args = p.parse_args(argv)
    require(args.clips >= args.batch_size,
            f"--clips {args.clips}: fewer than a batch, --batch_size {args.batch_size}")
    return args


def new_decoder(settings):
    """Make an AutoencoderTiny of TAESD's size, or the settings'; its encoder is unused."""
    own = settings.get("decoder", {})
    unused = dict(encoder_block_out_channels=(4,) * 4, num_encoder_blocks=(0,) * 4)
    try:
        return AutoencoderTiny(**unused, **own)
    except (TypeError, ValueError) as e:
        raise InputError(f"swiftaudio.json of the teacher: its decoder {own} is none ({e})")


def energy(image):
    """blocks() of an image (B, channels, mels, frames), of which the first channel is heard."""
    return blocks(model.image_to_mel(image))


def decoder_loss(image, target, weight=0.1):
    """L1 of the pictures (B, channels, mels, frames), and of their blocks' log energy: a number.

    L1 alone makes noise too quiet: its optimum is the median, which has less energy than noise.
    The weight is the tiny VAE's (docs/LOG.md, 2026-11-20).
    """
    of_blocks = F.l1_loss(energy(image), energy(target))
    return F.l1_loss(image, target.expand_as(image)) + weight * of_blocks


@torch.no_grad()
def make_pairs(args, run, unet, vae):
    """Make latents (--clips, C, h, w) and the VAE's pictures (--clips, 1, mels, frames): fp16."""
    encode_text, pairs = model.TextEncoder(run.home).to(run.device), []
    shape = model.latent_shape(run.home, run.about.get("seconds"))
    alpha, sigma = model.noise_schedule(model.load_scheduler(run.home), run.device)
    for first in tqdm(range(0, args.clips, args.batch_size), "the student's clips"):
        numbers = range(first, min(first + args.batch_size, args.clips))
        z_T = data.draw_batch(numbers, args.seed, shape, 0, 1, len(alpha) - 1)[0].to(run.device)
        text = encode_text([caption_at(run.captions, args.seed, n) for n in numbers])
        x0 = one_step(model.denoiser(unet), z_T, text, alpha, sigma, run.about.get("timestep"))
        x0 = x0.half()
        # one clip at a time, as each takes gigabytes at full size; only one channel is heard
        images = [vae.decode(z[None].float() / vae.config.scaling_factor).sample[:, :1] for z in x0]
        pairs.append((x0.cpu(), torch.cat(images).half().cpu()))
    return [torch.cat(column) for column in zip(*pairs)]


def main(argv=None):
    args = parse_args(argv)
    require(Path(args.student).is_dir() or args.student == "out/student", f"--student "
            f"{args.student}: must be a folder here, as decoder/ is written to it")
    folder, part, about = model.open_student(args.student)
    out, device = folder / "decoder", model.pick_device(args.device)
    flags = {} if args.captions else about.get("flags", {})
    path, column = (getattr(args, key) or flags.get(key) for key in ("captions", "caption_column"))
    require(path, "--captions FILE is needed: this student does not record its own")
    captions, _ = data.read_captions(path, column, flags.get("max_captions"))
    require((out / "checkpoint.pt").exists() or not (out / "config.json").exists(),
            f"{out}: holds a decoder but no checkpoint to resume from; remove {out}")

    home = model.find(about.get("teacher", args.student), [*model.TO_TRAIN, "vae/*"],
                      skip=["unet/diffusion*"])
    unet = model.load_unet(folder, part, fits=home).to(device)
    vae = model.load_part(home, "vae", model.pretrained(AutoencoderKL))
    vae.to(device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    network = (model.load_part(model.find(args.init, model.STUDENT), "", model.pretrained(
        AutoencoderTiny)) if args.init else new_decoder(model.read_settings(home)))
    network.requires_grad_(False).to(device, memory_format=torch.channels_last)
    theirs = len(vae.config.block_out_channels), vae.config.latent_channels
    ours = len(network.config.decoder_block_out_channels), network.config.latent_channels
    require(ours == theirs, f"{args.init or home}: its small decoder does not fit the VAE of "
            f"{home}: levels and channels of latents are {ours}, not {theirs}")

    # ---- one network, with train.py's checkpoint and log ---------------------------------------
    config = {**vars(args), "captions a step": args.batch_size,
              "student": train.fingerprint(unet), "starting decoder": train.fingerprint(network),
              "captions' text": train.digest("\n".join(captions).encode())}
    run = SimpleNamespace(out=out, config=config, captions=captions, home=home, rank=0,
                          about=about, ranks=1, device=device, first_step=0, lines=[])
    decoder, scale = network.decoder.requires_grad_(True), network.config.scaling_factor
    weights = {"decoder": list(decoder.parameters())}
    opt = torch.optim.Adam(weights["decoder"], args.lr, betas=(0.9, 0.99))
    train.resume(run, weights, {"decoder": opt}, f"remove {out}")
    log = train.Log(run)

    def save(step):
        replace_file(out / "checkpoint.pt", lambda path: torch.save({
            "step": step, "config": config, "lines": log.lines, "weights": weights,
            "opts": {"decoder": opt.state_dict()}}, path))
        state = {name: w.contiguous() for name, w in network.state_dict().items()}
        replace_file(out / "diffusion_pytorch_model.safetensors",
                     lambda path: save_file(state, path, {"format": "pt"}))
        data.replace_text(out / "config.json", network.to_json_string())

    if run.first_step >= args.max_steps:        # finished, but perhaps killed between two files
        return save(run.first_step)
    x0, images = make_pairs(args, run, unet, vae)
    del unet, vae                               # at full size 4 GB
    bar = tqdm(range(run.first_step, args.max_steps), initial=run.first_step, total=args.max_steps,
               desc="decoder")
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * train.learning_rate(step, args)
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        rows = [caption_at(range(args.clips), args.seed, n) for n in numbers]
        z, target = x0[rows].to(device).float(), images[rows].to(device).float()
        loss = decoder_loss(decoder(z / scale), target)
        opt.zero_grad()
        loss.backward()
        log.add("loss", loss)
        log.add("grad", torch.nn.utils.clip_grad_norm_(weights["decoder"], float("inf")))
        opt.step()
        done = step + 1
        due = done == args.max_steps or done % args.save_every == 0
        if due or done % 10 == 0:
            bar.set_postfix(loss=f"{log.write(done)['loss']:.3g}")
        if due:
            save(done)
    print(f"hear it: python sample.py --student {args.student} --decoder fast --prompt \"...\"")


if __name__ == "__main__":
    cli(main)
