"""Words that weigh more, recordings to edit, teachers in many steps: sample.py's flags and more.

    python -m extras.control --prompt "a dog barks while (rain:2) falls"    # attend to rain twice
    python -m extras.control --prompt "a cat meows" --init dog.wav --init_prompt "a dog barks"
    python -m extras.control --prompt "rain falls" --teacher tiny --teacher_steps 25    # no student

From Python, with system = model.load_student(...): make_weighted() and invert_recording().
"""
import contextlib
import math
import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import sample
from data import Parser, cli, number, require
from extras.audio import encode_audio, read_audio, read_file
from extras.teacher import add_teacher, open_system
from model import RATE

WEIGHTED = re.compile(r"\(([^()]*):\s*(\d+\.?\d*|\.\d+)\s*\)")    # (rain:1.5)


def parse_weights(prompt, where="--prompt"):
    """Split "a (loud dog:1.5) barks" into "a loud dog barks" and the weight of each character."""
    parts = WEIGHTED.split(prompt)          # words, weighted words and their weight, words, ...
    plain = not re.search("[()]", "".join(parts[::3]))
    require(plain and all(float(weight) <= 100 for weight in parts[2::3]),  # fp16 ends at 65504
            f"{where}: {prompt!r}: weights look like (rain:1.5), at most 100; no other brackets")
    weights = [1.0] * len(parts[0])
    for words, weight, after in zip(parts[1::3], parts[2::3], parts[3::3]):
        weights += [float(weight)] * len(words) + [1.0] * len(after)
    return WEIGHTED.sub(r"\1", prompt), weights


def token_weights(system, prompts, weights):
    """Weights of each prompt's characters -> of its tokens (B, tokens), by their first letters."""
    spans = system.encode_text.tokenize(prompts, return_offsets_mapping=True)["offset_mapping"]
    rows = [[w[a] if b > a else 1.0 for a, b in row] for row, w in zip(spans, weights)]
    return torch.tensor(rows, device=system.device)


@contextlib.contextmanager
def reweighted(unet, weights):
    """Multiply each token's part in every cross-attention by weights (B, tokens).

    Prompt-to-prompt (arXiv 2208.01626) scales attention probabilities; scaling the token's value
    is the same and keeps fused kernels. It does not reach into a network that is compiled already.
    """
    def scale(layer, _, value):     # the unconditional half of a guided batch, 2 B, is as it is
        w = F.pad(weights, (0, 0, 0, len(value) - len(weights)), value=1)
        return value * w[..., None].to(value.dtype)

    with contextlib.ExitStack() as hooks:
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                hooks.enter_context(layer.to_v.register_forward_hook(scale))
        yield


def make_weighted(system, prompts, z_T):
    """system.make() of prompts with weights: log-mels (B, num_mels, frames), waveforms (B, N)."""
    words, weights = zip(*map(parse_weights, prompts))
    with reweighted(system.unet, token_weights(system, words, weights)):
        return system.make(words, z_T)


def invert(latents, x0, z_T, steps=30, rate=0.1):
    """Find noise (B, 4, h, w) from which latents(z_T) makes nearly x0; also its squared error (B,).

    Adam on z_T itself, which stays as wide as noise (measured: 1.00). It starts with a fifth of x0
    in it, which alone halves the distance of a student's clip from x0 (tiny.control of 3d9e313).
    """
    z = (0.2 * x0 / x0.std((1, 2, 3), keepdim=True) + 0.98 * z_T).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            error = (latents(z) - x0).square().mean((1, 2, 3))
            z.grad, = torch.autograd.grad(1024 * error.sum(), z)    # fp16 rounds small ones to 0
            optimizer.step()
    return z.detach(), error.detach()


def invert_recording(path, prompt, system, seed=0):
    """Find the noise (1, 4, h, w) of a recording, and the share of its variance that is missed."""
    wav = read_audio(path, system.seconds)
    wav = F.pad(wav, (0, round(system.seconds * RATE) - len(wav)))      # or cut it
    x0 = encode_audio(system, wav[None].to(system.device))
    text, other = system.encode_text([prompt]), system.noise([2 ** 32], seed)   # no clip has it
    z_T, error = invert(lambda z: system.latents(z, text), x0, other)
    return z_T, error.item() / x0.var().item()


def main(argv=None):
    p = Parser(__doc__)
    sample.add_clips(p.add_argument)
    add_teacher(p.add_argument)
    p.add_argument("--init", metavar="WAV", help="edit this recording: start from its noise")
    p.add_argument("--init_prompt", default="", help="what --init sounds like")
    p.add_argument("--strength", type=number(float, 0, 1), default=0.2, help="1: ignore --init")
    args = p.parse_args(argv)
    require(args.init or not args.init_prompt, "--init_prompt goes with --init")
    require(not (args.init and args.teacher_steps), "--init does not go with --teacher_steps")
    words = {p: parse_weights(p, where)[0] for p, where in sample.read_prompts(args).items()}
    require("" not in map(str.strip, words.values()), "an empty prompt; say what it sounds like")
    if args.init:
        read_file(args.init)                            # InputError before the work, not after

    def opened():
        system = open_system(args, args.seconds, [*words.values(), args.init_prompt])
        about, noise = system.about, system.noise
        if args.init:
            start, left = invert_recording(args.init, args.init_prompt, system, args.seed)
            print(f"{args.init}: noise that makes all but {left:.0%} of its latents' variance")
            a, b = math.sqrt(1 - args.strength ** 2), args.strength     # unit variance again
            noise = lambda numbers, seed: a * start + b * system.noise(numbers, seed)
            about = about | {k: getattr(args, k) for k in ("init", "init_prompt", "strength")}
        return SimpleNamespace(about=about, noise=noise, make=lambda *a: make_weighted(system, *a))

    sample.write_clips(args, words, opened, {p: {"words": w} for p, w in words.items() if w != p})


if __name__ == "__main__":
    cli(main)
