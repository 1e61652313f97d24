"""The equations against closed forms, diffusers, and the papers' own notation."""
import diffusers
import pytest
import torch
from runs import noise, of

from losses import diffuse, guided, lora_loss, one_step, tv_loss, vsd_loss

SCHEDULE = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085,
                                   beta_end=0.012, clip_sample=False)
ALPHA, SIGMA = SCHEDULE.alphas_cumprod.sqrt(), (1 - SCHEDULE.alphas_cumprod).sqrt()


class Gaussian:
    """The exact denoiser of data N(mean, std^2), element by element."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, x, t, text):
        a, s = of(ALPHA, t), of(SIGMA, t)
        return s * (x - a * self.mean) / (a ** 2 * self.std ** 2 + s ** 2)


REAL, LEARNED = Gaussian(1.0, 0.5), Gaussian(0.0, 1.0)


@pytest.mark.parametrize("t", [999, 625])
def test_eq1_is_diffusers_one_step_and_below_T_that_of_a_clip_of_zeros_noised_to_t(t):
    eps, z, seen = noise(2, 4, 8, 8, seed=1), noise(2, 4, 8, 8), {}

    def student(x, t, text):
        seen.update(x=x, t=t.tolist(), text=text)
        return eps

    x_t = z if t == 999 else SCHEDULE.add_noise(torch.zeros_like(z), z, torch.tensor([t, t]))
    SCHEDULE.set_timesteps(1)
    expected = SCHEDULE.step(eps, t, x_t).pred_original_sample
    found = one_step(student, z, "y", ALPHA, SIGMA, t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["x"], x_t)
    assert seen["t"] == [t, t] and seen["text"] == "y"
    if t == 999:                                            # T is eq. 1 bit for bit
        assert torch.equal(found, one_step(student, z, "y", ALPHA, SIGMA)) and seen["x"] is z
    error = {999: 14.6, 625: 2.5}[t]                        # of one of eps, in x0
    assert SIGMA[t] / ALPHA[t] == pytest.approx(error, abs=0.05)


def test_eq2_is_diffusers_add_noise():
    x, eps, t = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    torch.testing.assert_close(diffuse(x, t, eps, ALPHA, SIGMA), SCHEDULE.add_noise(x, eps, t))


def test_guidance():
    batches = []

    def eps(x, t, text):
        batches.append((x.tolist(), t.tolist()))
        return text.sum((1, 2))[:, None, None, None] * torch.ones_like(x)

    x, t = noise(2, 1, 1, 3), torch.tensor([1, 2])
    text, null = torch.tensor([3.0, 5.0])[:, None, None], torch.ones(1, 1, 1)
    for scale, expected in ((2.5, [1 + 2.5 * 2, 1 + 2.5 * 4]), (0, [1, 1])):
        assert guided(eps, null, scale)(x, t, text)[:, 0, 0, 0].tolist() == expected
    assert batches == 2 * [(2 * x.tolist(), [1, 2, 1, 2])]     # one batch of both halves
    assert guided(eps, null, 1) is eps


def test_eq3_gradient_value_and_zero():
    x0 = noise(3, 2, 4, 5).requires_grad_()
    t, eps = torch.tensor([30, 400, 970]), noise(3, 2, 4, 5, seed=1)
    loss = vsd_loss(x0, t, eps, None, REAL, LEARNED, ALPHA, SIGMA)
    loss.sum().backward()

    x_t = diffuse(x0.detach(), t, eps, ALPHA, SIGMA)
    expected = of(SIGMA, t) ** 2 * (REAL(x_t, t, None) - LEARNED(x_t, t, None))
    torch.testing.assert_close(x0.grad * 40, expected, rtol=1e-4, atol=1e-6)    # 40 elements each
    torch.testing.assert_close(loss, 0.5 * expected.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-7)

    x0.grad = None
    vsd_loss(x0, t, eps, None, REAL, REAL, ALPHA, SIGMA).sum().backward()
    assert x0.grad.abs().max() == 0


def test_no_gradient_reaches_the_teachers():
    weight = torch.ones((), requires_grad=True)

    def network(x, t, text):
        return weight * x

    x0, t, eps = noise(1, 1, 1, 4).requires_grad_(), torch.tensor([500]), noise(1, 1, 1, 4)
    vsd_loss(x0, t, eps, None, network, LEARNED, ALPHA, SIGMA).sum().backward()
    vsd_loss(x0, t, eps, None, REAL, network, ALPHA, SIGMA).sum().backward()
    assert weight.grad is None and x0.grad.abs().max() > 0

    x0.grad = None
    lora_loss(x0, t, eps, None, network, ALPHA, SIGMA).sum().backward()
    assert x0.grad is None and weight.grad != 0


def test_eq6_total_variation_closed_forms():
    ramp = torch.arange(5.0).expand(2, 3, 4, 5)             # rises by 1 a frame, alike in all rows
    assert tv_loss(3 * ramp).tolist() == [3, 3]
    assert tv_loss(3 * ramp, "l2").tolist() == [9, 9]
    assert tv_loss(ramp.transpose(2, 3)[..., :4]).tolist() == [0, 0]

    step = torch.zeros(1, 1, 1, 9)
    step[..., 4:] = 2.0
    assert tv_loss(step).item() == pytest.approx(2 / 8)


def test_eq8_and_its_other_weight_which_makes_it_the_error_of_v():
    x0, eps, t = noise(2, 2, 4, 5), noise(2, 2, 4, 5, seed=1), torch.tensor([100, 900])
    silent = lora_loss(x0, t, eps, None, lambda x, t, y: 0 * x, ALPHA, SIGMA)
    torch.testing.assert_close(silent, ALPHA[t] ** 2 * eps.square().mean((1, 2, 3)))

    guess = noise(2, 2, 4, 5, seed=2)
    x_t, a, s = diffuse(x0, t, eps, ALPHA, SIGMA), of(ALPHA, t), of(SIGMA, t)
    v_guessed = a * guess - s * (x_t - s * guess) / a       # of the clip that the guess implies
    error = v_guessed - SCHEDULE.get_velocity(x0, eps, t)
    loss = lora_loss(x0, t, eps, None, lambda x, t, y: guess, ALPHA, SIGMA, "v")
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_distilling_a_gaussian_converges():
    """Eq. 1, 3 and 8 together on N(mean, std^2) in two dimensions: the student finds both."""
    mean = torch.tensor([1.5, -0.5]).view(1, 1, 1, 2)
    std = torch.tensor([0.4, 0.8]).view(1, 1, 1, 2)
    teacher, zero = Gaussian(mean, std), torch.zeros(1, 1, 1, 2)
    a, b = torch.ones_like(zero).requires_grad_(), zero.clone().requires_grad_()
    m, log_s = zero.clone().requires_grad_(), zero.clone().requires_grad_()

    def lora_teacher(x, t, text):
        return Gaussian(m, log_s.exp())(x, t, text)

    student, tracker = torch.optim.Adam([a, b], lr=1e-2), torch.optim.Adam([m, log_s], lr=5e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(700):
        z, eps, eps_lora = torch.randn(3, 256, 1, 1, 2, generator=g)
        t = torch.randint(20, 981, (256,), generator=g)
        t_lora = torch.randint(0, 1000, (256,), generator=g)
        x0 = a * z + b
        student.zero_grad()
        vsd_loss(x0, t, eps, None, teacher, lora_teacher, ALPHA, SIGMA).mean().backward()
        student.step()
        tracker.zero_grad()
        lora_loss(x0, t_lora, eps_lora, None, lora_teacher, ALPHA, SIGMA).mean().backward()
        tracker.step()
    torch.testing.assert_close(b.detach(), mean, rtol=0, atol=0.08)
    torch.testing.assert_close(a.detach().abs(), std, rtol=0, atol=0.08)
