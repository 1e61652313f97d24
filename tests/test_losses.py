import diffusers
import pytest
import torch

from losses import diffuse, lora_loss, tv_loss, vsd_loss
from model import guided, one_step

SCHEDULE = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
ALPHA, SIGMA = SCHEDULE.alphas_cumprod.sqrt(), (1 - SCHEDULE.alphas_cumprod).sqrt()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GaussianTeacher:
    """The exact denoiser of data N(mean, std^2), element by element: eps = sigma (x - alpha mean) / (alpha^2 std^2 + sigma^2)."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, x, t, text):
        a, s = ALPHA[t].view(-1, 1, 1, 1), SIGMA[t].view(-1, 1, 1, 1)
        return s * (x - a * self.mean) / (a ** 2 * self.std ** 2 + s ** 2)


def test_eq1_is_diffusers_one_step():
    eps, z = noise(2, 4, 8, 8, seed=1), noise(2, 4, 8, 8)
    seen = {}
    teacher = type("T", (), dict(T=999, alpha=ALPHA, sigma=SIGMA))
    def student(x, t, text):
        seen.update(x=x, t=t.tolist(), text=text)
        return eps
    SCHEDULE.set_timesteps(1)
    expected = SCHEDULE.step(eps, 999, z).pred_original_sample
    torch.testing.assert_close(one_step(student, z, "y", teacher), expected, rtol=1e-5, atol=1e-5)
    assert seen["t"] == [999, 999] and seen["text"] == "y" and seen["x"] is z
    assert one_step(student, z, "y", teacher, "direct") is eps
    assert ALPHA[-1] == pytest.approx(0.068265, abs=1e-6) and SIGMA[-1] == pytest.approx(0.997667, abs=1e-6)


def test_eq2_is_diffusers_add_noise():
    x, eps, t = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    torch.testing.assert_close(diffuse(x, t, eps, ALPHA, SIGMA), SCHEDULE.add_noise(x, eps, t))


def test_guidance():
    def eps(x, t, text):
        return text.sum((1, 2))[:, None, None, None] * torch.ones_like(x)
    x, t, text, null = noise(2, 1, 1, 3), torch.tensor([1, 2]), torch.tensor([3.0, 5.0])[:, None, None], torch.ones(1, 1, 1)
    assert guided(eps, x, t, text, null, 1)[:, 0, 0, 0].tolist() == [3, 5]
    assert guided(eps, x, t, text, null, 2.5)[:, 0, 0, 0].tolist() == [1 + 2.5 * 2, 1 + 2.5 * 4]
    assert guided(eps, x, t, text, null, 0)[:, 0, 0, 0].tolist() == [1, 1]


def test_dmd_s_weighting_is_its_published_form():
    """DMD's eq. 8 in x0: the difference of the two networks' clips over the mean distance of the teacher's from x0."""
    x0, t, eps = noise(3, 2, 4, 5).requires_grad_(), torch.tensor([30, 400, 970]), noise(3, 2, 4, 5, seed=1)
    teacher, fake = GaussianTeacher(1.0, 0.5), GaussianTeacher(0.0, 1.0)
    vsd_loss(x0, t, eps, None, teacher, fake, ALPHA, SIGMA, "dmd").sum().backward()
    a, s = ALPHA[t].view(-1, 1, 1, 1), SIGMA[t].view(-1, 1, 1, 1)
    x_t = a * x0.detach() + s * eps
    real, false = ((x_t - s * net(x_t, t, None)) / a for net in (teacher, fake))
    expected = (false - real) / (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True) / x0[0].numel()
    torch.testing.assert_close(x0.grad, expected, rtol=1e-3, atol=1e-6)


def test_eq3_gradient_value_and_zero():
    x0 = noise(3, 2, 4, 5).requires_grad_()
    t, eps = torch.tensor([30, 400, 970]), noise(3, 2, 4, 5, seed=1)
    teacher, fake = GaussianTeacher(1.0, 0.5), GaussianTeacher(0.0, 1.0)
    loss = vsd_loss(x0, t, eps, None, teacher, fake, ALPHA, SIGMA)
    loss.sum().backward()
    x_t = diffuse(x0.detach(), t, eps, ALPHA, SIGMA)
    expected = SIGMA[t].view(-1, 1, 1, 1) ** 2 * (teacher(x_t, t, None) - fake(x_t, t, None))
    torch.testing.assert_close(x0.grad * 40, expected, rtol=1e-4, atol=1e-6)       # 40 elements a sample
    torch.testing.assert_close(loss, 0.5 * expected.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-7)
    x0.grad = None
    vsd_loss(x0, t, eps, None, teacher, teacher, ALPHA, SIGMA).sum().backward()
    assert x0.grad.abs().max() == 0


def test_no_gradient_reaches_the_teachers():
    weight = torch.ones((), requires_grad=True)
    def network(x, t, text):
        return weight * x
    x0 = noise(1, 1, 1, 4).requires_grad_()
    loss = vsd_loss(x0, torch.tensor([500]), noise(1, 1, 1, 4), None, network, GaussianTeacher(0, 1), ALPHA, SIGMA)
    loss.sum().backward()
    assert weight.grad is None and x0.grad.abs().max() > 0
    x0.grad = None
    lora_loss(x0, torch.tensor([500]), noise(1, 1, 1, 4), None, network, ALPHA, SIGMA).sum().backward()
    assert x0.grad is None and weight.grad != 0


def test_eq6_total_variation_closed_forms():
    ramp = torch.arange(5.0).expand(2, 3, 4, 5)                     # steps of 1 along time, constant along frequency
    assert tv_loss(3 * ramp).tolist() == [3, 3] and tv_loss(3 * ramp, "l2").tolist() == [9, 9]
    assert tv_loss(ramp.transpose(2, 3)[..., :4]).tolist() == [0, 0]
    assert tv_loss(ramp, "none").tolist() == [0, 0]
    step = torch.zeros(1, 1, 1, 9)
    step[..., 4:] = 2.0
    assert tv_loss(step).item() == pytest.approx(2 / 8)


def test_eq8_closed_forms():
    x0, eps, t = noise(2, 2, 4, 5), noise(2, 2, 4, 5, seed=1), torch.tensor([100, 900])
    exact = lora_loss(x0, t, eps, None, lambda x, t, y: eps, ALPHA, SIGMA)
    assert exact.abs().max() == 0
    silent = lora_loss(x0, t, eps, None, lambda x, t, y: 0 * x, ALPHA, SIGMA)
    torch.testing.assert_close(silent, ALPHA[t] ** 2 * eps.square().mean((1, 2, 3)))


def test_eq8_weighted_like_v_is_the_error_of_v():
    x0, eps, t, guess = noise(2, 2, 4, 5), noise(2, 2, 4, 5, seed=1), torch.tensor([100, 900]), noise(2, 2, 4, 5, seed=2)
    x_t, schedule = diffuse(x0, t, eps, ALPHA, SIGMA), diffusers.DDIMScheduler.from_config(SCHEDULE.config)
    a, s = ALPHA[t].view(-1, 1, 1, 1), SIGMA[t].view(-1, 1, 1, 1)
    v_hat = a * guess - s * (x_t - s * guess) / a                   # of the clip that the guessed noise implies
    loss = lora_loss(x0, t, eps, None, lambda x, t, y: guess, ALPHA, SIGMA, "v")
    torch.testing.assert_close(loss, (v_hat - schedule.get_velocity(x0, eps, t)).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_distilling_a_gaussian_converges():
    """Eq. 1, 3 and 8 together, on data N(mean, std^2) in two dimensions: the student must find mean and std."""
    mean, std = torch.tensor([1.5, -0.5]).view(1, 1, 1, 2), torch.tensor([0.4, 0.8]).view(1, 1, 1, 2)
    teacher = GaussianTeacher(mean, std)
    a, b = torch.ones(1, 1, 1, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    m, log_s = torch.zeros(1, 1, 1, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    def fake(x, t, text):
        return GaussianTeacher(m, log_s.exp())(x, t, text)
    student, tracker = torch.optim.Adam([a, b], lr=1e-2), torch.optim.Adam([m, log_s], lr=5e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(700):
        z, eps, eps2 = torch.randn(3, 256, 1, 1, 2, generator=g)
        t, t2 = torch.randint(20, 981, (256,), generator=g), torch.randint(0, 1000, (256,), generator=g)
        x0 = a * z + b
        student.zero_grad()
        vsd_loss(x0, t, eps, None, teacher, fake, ALPHA, SIGMA).mean().backward()
        student.step()
        tracker.zero_grad()
        lora_loss(x0, t2, eps2, None, fake, ALPHA, SIGMA).mean().backward()
        tracker.step()
    torch.testing.assert_close(b.detach(), mean, rtol=0, atol=0.08)
    torch.testing.assert_close(a.detach().abs(), std, rtol=0, atol=0.08)
