"""Edit a recording: find noise that makes it, then make another prompt from that noise."""
import torch
import torch.nn.functional as F

from data import sampling_noise
from extras.audio import encode_audio, read_audio
from model import RATE


def invert(latents, x0, z_T, steps=30, rate=0.1):
    """Find noise (B, 4, h, w) from which latents(z_T) makes nearly x0; also its squared error (B,).

    Adam on z_T itself. The result stays as wide as noise by itself (measured: 1.00). It starts
    with a fifth of x0 in the noise, of which a student's clip is half as far from x0 as of another
    noise (python -m tiny.control edit).
    """
    z = (0.2 * x0 / x0.std((1, 2, 3), keepdim=True) + 0.98 * z_T).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            error = (latents(z) - x0).square().mean((1, 2, 3))
            # Adam does not mind the factor, and fp16 would round small gradients to zero
            z.grad, = torch.autograd.grad(1024 * error.sum(), z)
            optimizer.step()
    return z.detach(), error.detach()


def invert_recording(path, prompt, pipe, latents, seed):
    """Find the noise (1, 4, h, w) of a recording, cut or padded to the pipeline's length."""
    length = round(pipe.seconds * RATE)
    wav = read_audio(path, pipe.seconds)[:length]
    wav = F.pad(wav, (0, length - len(wav)))[None]
    x0, text = encode_audio(pipe, wav.to(pipe.device)), pipe.encode_text([prompt])
    other = sampling_noise([2 ** 32], seed, pipe.latent_shape).to(pipe.device)  # no clip has it
    z_T, error = invert(lambda z: latents(z, text), x0, other)
    print(f"{path}: found noise that makes it but for {error.item() / x0.var().item():.0%} of its "
          "latents' variance")
    return z_T
