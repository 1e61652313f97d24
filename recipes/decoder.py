"""Distil a small decoder that takes the VAE's place in sample.py and extras.eval: --decoder fast.

    python -m recipes.decoder --student out/student

Captions are enough here too: the student makes latents, the teacher's VAE decodes them, and a
diffusers AutoencoderTiny learns to make the same picture. The same command again resumes. Writes
to decoder/ in the student's folder: what diffusers reads, checkpoint.pt and metrics.jsonl.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm import tqdm

import data
import model
import train
from data import InputError, Parser, caption_at, cli, number, require
from extras.metrics import blocks
from losses import one_step


def parse_args(argv=None):
    p, count = Parser(__doc__, prog="python -m recipes.decoder"), number(int, 1)
    add = p.add_argument
    add("--student", default="out/student", help="folder of train.py; decoder/ is written to it")
    add("--teacher", help="folder or hub name, if not the student's own")
    add("--captions", help="csv, tsv, txt, json or jsonl file; default: the teacher's")
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
    p.set_defaults(warmup=50, decay=True, grad_accum=1, keep_every=0, log_every=10)
    args = p.parse_args(argv)
    args.defaults = {name: p.get_default(name) for name in vars(args)}
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


class DecoderRun(train.Run):
    """train.py's run: the same checkpoint, log, signals and lock, but another result."""

    def save_result(self, step):
        weights = {name: w.contiguous() for name, w in self.network.state_dict().items()}
        train.save_network(self.out, self.network, weights)


@torch.no_grad()
def make_pairs(run, unet, vae, encode_text):
    """Make latents (--clips, C, h, w) and the VAE's pictures (--clips, 1, mels, frames): fp16."""
    args, eps, pairs = run.args, model.denoiser(unet), []
    alpha, sigma = run.schedule
    for first in tqdm(range(0, args.clips, args.batch_size), "the student's clips"):
        numbers = range(first, min(first + args.batch_size, args.clips))
        z_T = data.draw_batch(numbers, args.seed, run.shape, 0, 1, len(alpha) - 1)[0].to(run.device)
        text = encode_text([caption_at(run.captions, args.seed, n) for n in numbers])
        x0 = one_step(eps, z_T, text, alpha, sigma, run.timestep).half()
        # one clip at a time, as each takes gigabytes at full size; only one channel is heard
        images = [vae.decode(z[None].float() / vae.config.scaling_factor).sample[:, :1] for z in x0]
        pairs.append((x0.cpu(), torch.cat(images).half().cpu()))
    return [torch.cat(column) for column in zip(*pairs)]


def first_decoder(args, home, vae):
    """Load --init, or make a decoder of the teacher's settings; InputError if it is no VAE's."""
    torch.manual_seed(args.seed)
    if args.init:
        network = model.load_part(model.find(args.init, model.STUDENT), "",
                                  model.pretrained(AutoencoderTiny))
    else:
        network = new_decoder(model.read_settings(home))
    theirs = len(vae.config.block_out_channels), vae.config.latent_channels
    ours = len(network.config.decoder_block_out_channels), network.config.latent_channels
    require(ours == theirs, f"{args.init or home}: its small decoder does not fit the VAE of "
            f"{home}: levels and channels of latents are {ours}, not {theirs}")
    return network.requires_grad_(False)


def start(args):
    """Load the decoder to train, in a DecoderRun, and what its clips need: UNet, VAE, encoder."""
    require(Path(args.student).is_dir() or args.student == "out/student", f"--student "
            f"{args.student}: must be a folder here, as decoder/ is written to it")
    folder, part, about = model.open_student(args.student)
    run = DecoderRun(args, folder / "decoder")
    require(run.ranks == 1, "recipes.decoder: runs in one process; start it without torchrun")
    run.device, run.timestep = model.pick_device(args.device), about.get("timestep")
    home = model.find(args.teacher or about.get("teacher", args.student),
                      [*model.TO_TRAIN, "vae/*"], skip=["unet/diffusion*"])
    own = model.read_settings(home).get("train", {}).get("captions")
    require(args.captions or own, f"--captions FILE is needed: {home} brings none")
    path = args.captions or home / own
    run.captions, n = data.read_captions(path, args.caption_column)
    run.say(f"{path}: {len(run.captions)} captions used, of {n}")
    run.shape = model.latent_shape(home, about.get("seconds"))
    run.schedule = model.noise_schedule(model.load_scheduler(home), run.device)
    unet = model.load_unet(folder, part).to(run.device)
    encode_text = model.TextEncoder(home).to(run.device)
    model.check_fit(home, unet, encode_text)
    vae = model.load_part(home, "vae", model.pretrained(AutoencoderKL))
    vae.to(run.device, memory_format=torch.channels_last)
    run.network = first_decoder(args, home, vae)
    run.network.to(run.device, memory_format=torch.channels_last)
    run.identity |= {"recipe": "decoder", "student's weights": train.fingerprint(unet),
                     "VAE's weights": train.fingerprint(vae),
                     "text encoder's weights": train.fingerprint(encode_text),
                     "first decoder's weights": train.fingerprint(run.network),
                     "captions' text": train.digest("\n".join(run.captions).encode()),
                     "captions a step": args.batch_size}
    return run, unet, vae, encode_text


def main(argv=None):
    args = parse_args(argv)
    run, *parts = start(args)
    decoder, scale = run.network.decoder.requires_grad_(True), run.network.config.scaling_factor
    weights = list(decoder.parameters())
    opt = torch.optim.Adam(weights, args.lr, betas=(0.9, 0.99))
    run.resume({"decoder": weights}, {"decoder": opt}, "config.json")
    if run.first_step < args.max_steps:
        x0, images = make_pairs(run, *parts)
    del parts                                   # at full size 4 GB

    for step in run.steps("decoder", "loss"):
        opt.param_groups[0]["lr"] = args.lr * train.learning_rate(step, args)
        rows = [caption_at(range(args.clips), args.seed, n) for n in run.numbers(step, 0)]
        z, target = x0[rows].to(run.device).float(), images[rows].to(run.device).float()
        loss = decoder_loss(decoder(z / scale), target)
        opt.zero_grad()
        loss.backward()
        run.log(loss=loss, grad=torch.nn.utils.clip_grad_norm_(weights, float("inf")))
        opt.step()
    return run.end(f'python sample.py --student {args.student} --decoder fast --prompt "..."')


if __name__ == "__main__":
    cli(main)
