"""Distil a small decoder that takes the VAE's place in sample.py and extras.eval: --decoder fast.

    python -m recipes.decoder --student out/student

Captions are enough here too: the student makes latents, the teacher's VAE decodes them, and a
diffusers AutoencoderTiny learns to make the same picture. The same command again resumes. Writes
to decoder/ in the student's folder: what diffusers reads, checkpoint.pt and metrics.jsonl.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from tqdm import tqdm

import data
import model
import train
from data import InputError, Parser, caption_at, cli, number, require
from extras.metrics import blocks
from recipes.clips import fit


def parse_args(argv=None, doc=__doc__, part="decoder", **defaults):
    p, count = Parser(doc, prog=f"python -m recipes.{part}"), number(int, 1)
    add = p.add_argument
    add("--student", default="out/student", help=f"folder of train.py; {part}/ is written to it")
    add("--teacher", help="folder or hub name, if not the student's own")
    add("--captions", help="csv, tsv, txt, json or jsonl file; default: the teacher's")
    add("--caption_column", help="their column or key, if its name is unusual")
    add("--clips", type=count, default=3072, help="training clips, made at the start")
    # in equal time, 4 clips a step beat 16 (docs/LOG.md, 2026-11-21)
    add("--max_steps", type=count, default=24000, help="optimizer steps")
    add("--batch_size", type=count, default=4, help="clips in a step")
    add("--lr", type=number(float), default=4e-3, help="rate, falling to zero at --max_steps")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add("--seed", type=number(int, 0, 2**63), default=0, help="random seed")
    add("--device", help="cuda, mps or cpu; default: the first there is")
    p.set_defaults(warmup=50, decay=True, grad_accum=1, grad_clip=0.0, keep_every=0,
                   log_every=10, **defaults)
    args = p.parse_args(argv)
    args.defaults = {name: p.get_default(name) for name in vars(args)}
    require(args.clips >= args.batch_size,
            f"--clips {args.clips}: fewer than a batch, --batch_size {args.batch_size}")
    return args


def start(args, part):
    """Load a student's System into a run whose folder is `part`/ in the student's."""
    require(Path(args.student).is_dir() or args.student == "out/student", f"--student "
            f"{args.student}: must be a folder here, as {part}/ is written to it")
    run = train.Run(args, model.open_student(args.student)[0] / part)
    require(run.ranks == 1, f"recipes.{part}: runs in one process; start it without torchrun")
    system = model.load_student(args.student, args.teacher, None, "vae", "fp32", args.device)
    torch.backends.cudnn.allow_tf32 = True              # PyTorch's own default, to train fast
    run.system, run.device, run.shape = system, system.device, system.shape
    own = model.read_settings(system.folder).get("train", {}).get("captions")
    require(args.captions or own, f"--captions FILE is needed: {system.folder} brings none")
    path = args.captions or system.folder / own
    run.captions, n = data.read_captions(path, args.caption_column)
    run.say(f"{path}: {len(run.captions)} captions used, of {n}")
    run.identity |= {"recipe": part, "student's weights": train.fingerprint(system.unet),
                     "text encoder's weights": train.fingerprint(system.encode_text),
                     "captions' text": train.digest("\n".join(run.captions).encode()),
                     "captions a step": args.batch_size}
    return run


@torch.no_grad()
def make_pairs(run, pair):
    """Make --clips latents and, of each, pair(its System's decoder, x0): a tensor of each, fp16."""
    args, system, pairs = run.args, run.system, []
    for first in tqdm(range(0, args.clips, args.batch_size), "the student's clips"):
        numbers = range(first, min(first + args.batch_size, args.clips))
        z_T = data.draw_batch(numbers, args.seed, run.shape, 0, 1, len(system.schedule[0]) - 1)[0]
        text = system.encode_text([caption_at(run.captions, args.seed, n) for n in numbers])
        x0 = system.latents(z_T.to(run.device), text).half().float()
        # one clip at a time, as each takes gigabytes at full size
        pairs += [[x.half().cpu() for x in pair(system.decoder, z[None])] for z in x0]
    return [torch.cat(column) for column in zip(*pairs)]


def learn(run, weights, pair, loss):
    """Train weights by loss(*pair) of make_pairs(), or go on: main()'s exit code."""
    args, part = run.args, run.identity["recipe"]
    weights, opts = {part: weights}, {part: torch.optim.Adam(weights, args.lr, betas=(0.9, 0.99))}
    run.resume(weights, opts, "config.json")
    pairs = make_pairs(run, pair) if run.first_step < args.max_steps else []
    del run.system                              # at full size 4 GB

    def backward(numbers):
        rows = [caption_at(range(args.clips), args.seed, n) for n in numbers]
        found = loss(*(x[rows].to(run.device).float() for x in pairs))
        found.backward()
        run.log(loss=found)

    return fit(run, [], weights, opts, backward, "loss", hear="python sample.py --student "
               f'{args.student} --decoder fast --prompt "..."')


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


def main(argv=None):
    args = parse_args(argv)
    run = start(args, "decoder")
    home, vae = run.system.folder, run.system.decoder.vae
    torch.manual_seed(args.seed)
    net = new_decoder(model.read_settings(home)).requires_grad_(False)
    ours, theirs = net.config, vae.config
    sizes = [(len(ours.decoder_block_out_channels), ours.latent_channels),
             (len(theirs.block_out_channels), theirs.latent_channels)]
    require(sizes[0] == sizes[1], f"{home}/swiftaudio.json: its decoder does not fit its VAE: "
            "levels and channels of latents are {}, not {}".format(*sizes))
    net.to(run.device, memory_format=torch.channels_last)
    run.identity |= {"VAE's weights": train.fingerprint(vae),
                     "first decoder's weights": train.fingerprint(net)}
    run.save_result = lambda step: train.save_network(run.out, net, net.state_dict())
    decoder, scale = net.decoder.requires_grad_(True), ours.scaling_factor
    # of what the VAE makes (B, 1, mels, frames) one channel is heard
    picture = lambda _, x0: (x0, vae.decode(x0 / theirs.scaling_factor).sample[:, :1])
    return learn(run, list(decoder.parameters()), picture,
                 lambda z, target: decoder_loss(decoder(z / scale), target))


if __name__ == "__main__":
    cli(main)
