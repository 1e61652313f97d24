"""The method's losses (SwiftAudio, arXiv 2606.31259, section III-E), as pure functions.

A denoiser is any callable eps(x_t, t, text) -> the predicted noise: a UNet here, a Gaussian's exact score in the tests.
Shapes: latents (B, C, H, W) with time last, t (B,) integers, alpha and sigma (T + 1,) indexed by t.
"""
import torch


def at(values, t):
    """Pick schedule values for timesteps t (B,), shaped to multiply latents (B, C, H, W)."""
    return values[t].view(-1, 1, 1, 1)


def diffuse(x0, t, eps, alpha, sigma):
    """Eq. 2: the noisy latent x_t = alpha_t x0 + sigma_t eps."""
    return at(alpha, t) * x0 + at(sigma, t) * eps


def vsd_loss(x0, t, eps, text, teacher, fake, alpha, sigma, weighting="sigma2"):
    """Eq. 3, variational score distillation: a loss (B,) whose gradient to x0 is w (eps_teacher - eps_fake).

    teacher, fake: denoisers, guidance included. w is sigma_t^2, or for weighting "dmd" 1 / mean |eps_teacher - eps|, which is
    eq. 8 of DMD (arXiv 2311.18828) written in eps: more weight at high t. No gradient flows through either network. The value
    0.5 mean((w (eps_teacher - eps_fake))^2) says how far apart they are; it need not fall while the student learns.
    The mean is over a sample's elements, so the gradient is divided by C H W.
    """
    with torch.no_grad():
        x_t = diffuse(x0, t, eps, alpha, sigma)
        eps_teacher = teacher(x_t, t, text)
        w = at(sigma, t) ** 2 if weighting == "sigma2" else 1 / (eps_teacher - eps).abs().mean((1, 2, 3), keepdim=True)
        gradient = w * (eps_teacher - fake(x_t, t, text))
        target = x0 - gradient
    return 0.5 * (x0 - target).square().mean((1, 2, 3))


def tv_loss(x0, kind="l1"):
    """Eq. 6, temporal total variation (B,): mean |x0[..., w] - x0[..., w - 1]|; "l2" squares instead, "none" is zero."""
    d = x0[..., 1:] - x0[..., :-1]
    return {"l1": d.abs, "l2": d.square, "none": lambda: 0 * d}[kind]().mean((1, 2, 3))


def lora_loss(x0, t, eps, text, fake, alpha, sigma, weighting="alpha2"):
    """Eq. 8, the LoRA teacher's denoising loss (B,) on the student's detached samples: mean (alpha_t (eps_hat - eps))^2.

    weighting "v" divides by alpha_t instead. That is the error of v = alpha_t eps - sigma_t x0 (arXiv 2202.00512), alike in size
    at every t; alpha_t^2 all but leaves out the high t where the student's gradient decides what happens when (ours, see LOG.md).
    """
    x_t = diffuse(x0.detach(), t, eps, alpha, sigma)
    w = at(alpha, t) if weighting == "alpha2" else 1 / at(alpha, t)
    return (w * (fake(x_t, t, text) - eps)).square().mean((1, 2, 3))
