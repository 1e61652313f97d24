"""The method's equations (SwiftAudio, arXiv 2606.31259, section III) as pure functions.

A denoiser is any callable eps(x_t, t, text) that predicts the noise in x_t: a UNet in train.py,
a Gaussian's exact score in the tests. So nothing here knows of LoRA, optimizers or audio.

Shapes: latents (B, C, H, W) with time last, t (B,) integers in [0, T], alpha and sigma (T + 1,)
indexed by t. Every loss is (B,), the mean over a sample's elements; train.py averages the batch.
"""
import torch


def at(values, t):
    """Pick the schedule's values for timesteps t (B,), shaped to multiply latents."""
    return values[t].view(-1, 1, 1, 1)                                      # (B, 1, 1, 1)


def one_step(eps, z_T, text, alpha, sigma, t=None):
    """Eq. 1, the student's clip in one pass: x0 = (z_T - sigma_T eps(z_T, T, text)) / alpha_T.

    alpha_T is 0.068 for Auffusion, so an error of eps is 14.6 times as large in x0.
    t below T takes the step from x_t = sigma_t z_T instead, a clip of zeros noised to t, as
    SiD-LSG does at t = 625 (arXiv 2406.01561), where an error is 2.5 times as large.
    """
    T = len(alpha) - 1
    x_t = z_T if t in (None, T) else sigma[t] * z_T
    t = torch.full((z_T.shape[0],), T if t is None else t, device=z_T.device)
    return (x_t - at(sigma, t) * eps(x_t, t, text)) / at(alpha, t)


def diffuse(x0, t, eps, alpha, sigma):
    """Eq. 2, forward diffusion: x_t = alpha_t x0 + sigma_t eps."""
    return at(alpha, t) * x0 + at(sigma, t) * eps


def guided(eps, null, scale):
    """Classifier-free guidance (arXiv 2207.12598): eps(null) + scale (eps(text) - eps(null)).

    Evaluates both in one batch of 2 B. null (1, tokens, dim) encodes the empty caption.
    """
    if scale == 1:
        return eps

    def guided_eps(x, t, text):
        texts = torch.cat([text, null.expand_as(text)])                     # (2 B, tokens, dim)
        cond, uncond = eps(torch.cat([x, x]), torch.cat([t, t]), texts).chunk(2)
        return uncond + scale * (cond - uncond)
    return guided_eps


def vsd_loss(x0, t, eps, text, teacher, lora_teacher, alpha, sigma):
    """Eq. 3, variational score distillation: its gradient to x0 is w (eps_teacher - eps_lora).

    Divided by the number of a sample's elements, as the loss is their mean. w = sigma_t^2 as in
    SwiftBrush. teacher, lora_teacher: denoisers, guidance included; neither gets a gradient.
    The value, 0.5 mean (w (eps_teacher - eps_lora))^2, need not fall while the student learns.
    """
    with torch.no_grad():
        x_t = diffuse(x0, t, eps, alpha, sigma)
        towards = teacher(x_t, t, text) - lora_teacher(x_t, t, text)
        target = x0 - at(sigma, t) ** 2 * towards
    return 0.5 * (x0 - target).square().mean((1, 2, 3))


def tv_loss(x0, kind="l1"):
    """Eq. 6, total variation along time: mean |x0[..., w] - x0[..., w - 1]|, or squared ("l2")."""
    d = x0[..., 1:] - x0[..., :-1]
    return (d.abs() if kind == "l1" else d.square()).mean((1, 2, 3))


def lora_loss(x0, t, eps, text, lora_teacher, alpha, sigma, weighting="alpha2"):
    """Eq. 8, denoising of the student's own clips: mean (alpha_t (eps_lora - eps))^2.

    weighting "v" has 1 / alpha_t in its place: the error of v = alpha_t eps - sigma_t x0
    (arXiv 2202.00512). That is similar in size at every t; alpha_t^2 all but leaves out the high
    t, where the student's gradient decides what happens when (ours: docs/RESULTS.md).
    """
    x_t = diffuse(x0.detach(), t, eps, alpha, sigma)
    w = at(alpha, t) if weighting == "alpha2" else 1 / at(alpha, t)
    return (w * (lora_teacher(x_t, t, text) - eps)).square().mean((1, 2, 3))
