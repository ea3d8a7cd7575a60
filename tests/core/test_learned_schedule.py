"""The gradient of a learned schedule: against autograd, by hand, and by what it achieves; and the
loss that is reported of it, the whole bound."""

import math

import pytest
import torch
from oracles import Gaussian
from tiny import random_points, tiny_trainer

from ddp.forward import q_sample
from ddp.learned_schedule import backward_through_schedule, bound_terms
from ddp.loss import denoising_loss
from ddp.rng import normal
from ddp.training import EVERY

DATA = Gaussian(0.3, 0.5, (2,))


def learned_trainer(**fields):
    """Return a Trainer of points with a learned schedule."""
    return tiny_trainer(random_points(), schedule="learned", optimizer="adamw", **fields)


def gaussian_trainer(**fields):
    """Return the same with the exact denoiser of DATA in the network's place."""
    trainer = learned_trainer(**fields)
    trainer.model.denoise = lambda x_t, log_snr, *_: DATA.denoise(x_t, log_snr)
    trainer.ema.denoise = DATA.denoise
    return trainer


def losses_at(trainer, k, x0, log_snr):
    """Return the loss of each item of batch k, (B,), before its weight."""
    x_t = q_sample(x0, log_snr, trainer.eps(k, x0))
    x0_hat = trainer.model.denoise(x_t, log_snr)
    return denoising_loss(x0_hat, x0, log_snr, "vlb")


def schedule_gradients(trainer, k, x0):
    """Return the gradients of the schedule by name, as train_step adds them for one batch."""
    trainer.model.zero_grad()
    log_snr, weight = trainer.sample_log_snr(k, len(x0))
    loss = losses_at(trainer, k, x0, log_snr)
    trainer.backward((weight * loss).sum(), len(x0))
    backward_through_schedule(trainer, k, EVERY, x0, log_snr, loss)
    network = trainer.model.schedule.network
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("grad_accumulation", [1, 2])
def test_gradients_are_of_the_square_between_the_ends_and_of_the_vlb_at_the_ends(
    grad_accumulation,
):
    """Of f = weight * loss with its whole graph: of the mean of f^2, and of f plus two terms."""
    trainer = learned_trainer(norm="none", init="default", grad_accumulation=grad_accumulation)
    x0, _ = trainer.training_batch(3, 48)
    ours = schedule_gradients(trainer, 3, x0)

    schedule = trainer.model.schedule
    level, weight = trainer.draw_levels(3, len(x0))
    f = weight * losses_at(trainer, 3, x0, level)
    eps = normal(trainer.config.seed, "endpoint", 3, torch.arange(len(x0)), (2,))
    vlb = f.mean() + bound_terms(schedule, x0, eps, discrete=False).mean()
    (between,) = torch.autograd.grad((f**2).mean(), [schedule.network.logits], retain_graph=True)
    (ends,) = torch.autograd.grad(vlb, [schedule.network.endpoints])
    expected = {"logits": between / grad_accumulation, "endpoints": ends / grad_accumulation}
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-6)


def rate(log_snr):
    """The VLB's integrand in log_snr, nats a dimension: SNR / 2 E|x0 - x0_hat|^2."""
    snr = torch.exp(torch.as_tensor(log_snr, dtype=torch.float64))
    return 0.5 * snr * DATA.sd**2 / (1 + snr * DATA.sd**2)


def test_endpoints_follow_the_vlb():
    """The gradient by hand: d prior / d noisy - rate(noisy), and rate(clean) - 1 / 2, which is what
    a wider Gaussian about x_t / alpha costs."""
    trainer = gaussian_trainer()
    with torch.no_grad():
        trainer.model.schedule.network.endpoints.copy_(torch.tensor([2.0, -2.0]))
    gradients = []
    for k in range(40):
        gradients.append(schedule_gradients(trainer, k, DATA.sample(2000, seed=k))["endpoints"])
    gradients = torch.stack(gradients)
    error = gradients.std(dim=0) / len(gradients) ** 0.5
    alpha2 = torch.sigmoid(torch.tensor(-2.0))
    # prior = (alpha^2 E x0^2 + sigma^2 - 1 - log sigma^2) / 2; d alpha^2 / d log_snr is
    # alpha^2 sigma^2
    second_moment = DATA.mean**2 + DATA.sd**2
    prior = 0.5 * (alpha2 * (1 - alpha2) * (second_moment - 1) + alpha2)
    expected = torch.stack([rate(2.0) - 0.5, prior - rate(-2.0)])
    assert ((gradients.mean(dim=0) - expected).abs() < 4 * error + 1e-3).all()
    assert (error < 0.05).all()


def test_learned_schedule_lowers_the_variance_and_keeps_the_mean():
    trainer = gaussian_trainer(lr=5e-3, warmup=0, batch_size=256, noise_copies=1)
    trainer.dataset.train = DATA.sample(20_000)
    network = trainer.model.schedule.network
    x0 = DATA.sample(20_000, seed=1)

    def moments():
        with torch.no_grad():
            level, weight = trainer.draw_levels(0, len(x0), "test")
            f = (weight * losses_at(trainer, 0, x0, level)).double()
        return f.mean().item(), f.var().item()

    mean, variance = moments()
    endpoints = network.endpoints.detach().clone()
    for _ in range(120):
        trainer.train_step(0.0)
        with torch.no_grad():  # between fixed ends the mean cannot change
            network.endpoints.copy_(endpoints)
    mean_after, variance_after = moments()
    assert mean_after == pytest.approx(mean, rel=0.03)
    assert variance_after < 0.5 * variance


def set_ends(trainer, clean, noisy):
    """Move the ends of the schedule that is trained, and of its average."""
    for model in (trainer.model, trainer.ema):
        with torch.no_grad():
            model.schedule.network.endpoints.copy_(torch.tensor([clean, noisy]))


@pytest.mark.parametrize("ends", [(13.0, -9.0), (6.0, -4.0), (0.1, -0.1), (0.1, -9.0)])
def test_reported_loss_is_the_bound(ends):
    """Moving the ends alone takes the diffusion term to nothing while the bound gets worse."""
    trainer = gaussian_trainer()
    set_ends(trainer, *ends)
    x0 = DATA.sample(20_000)
    with torch.no_grad():
        level, weight = trainer.draw_levels(0, len(x0), "test")
        f = (weight * losses_at(trainer, 0, x0, level)).mean().item()
        terms = bound_terms(trainer.model.schedule, x0, trainer.eps(0, x0), discrete=False)
    assert terms.shape == (20_000,)
    assert terms.dtype == torch.float32
    bound, diffusion = DATA.vlb(*ends)
    tolerance = 0.02 * diffusion + 0.01  # f is an estimate, of one level for each item
    assert f == pytest.approx(diffusion, abs=tolerance)
    assert f + terms.mean().item() == pytest.approx(bound, abs=tolerance)


def test_bound_falls_only_where_it_is_better():
    wide, diffusion = DATA.vlb(13.0, -9.0)
    narrow, little = DATA.vlb(0.1, -0.1)
    assert little < 0.1 * diffusion  # what was reported before
    assert narrow > wide + 0.5


@pytest.mark.parametrize("dataset", ["points", "digits"])
def test_steps_loss_is_the_bound(dataset):
    data = random_points() if dataset == "points" else dataset
    trainer = tiny_trainer(data, schedule="learned", grad_accumulation=2)
    diffusion = ends = 0.0
    for k in range(2):
        x0, _ = trainer.training_batch(k, trainer.config.batch_size, trainer.config.noise_copies)
        log_snr, weight = trainer.sample_log_snr(k, len(x0))
        trainer.model.train()
        diffusion += (weight * losses_at(trainer, k, x0, log_snr)).mean().item() / 2
        some = x0[:64]
        eps = normal(trainer.config.seed, "endpoint", k, torch.arange(len(some)), x0.shape[1:])
        terms = bound_terms(trainer.model.schedule, some, eps, trainer.dataset.is_pixels)
        ends += terms.mean().item() / 2
    stats = trainer.train_step(0.0)
    assert stats.loss.item() == pytest.approx(diffusion + ends, rel=1e-3)


@pytest.mark.parametrize("ends", [(-9.0, 13.0), (3.0, 3.0), (math.nan, -9.0), (1e5, 1e6)])
def test_bound_of_a_schedule_whose_ends_crossed_is_infinite(ends):
    trainer = learned_trainer()
    set_ends(trainer, *ends)
    x0 = DATA.sample(5)
    terms = bound_terms(trainer.model.schedule, x0, torch.ones_like(x0), discrete=False)
    assert (terms == math.inf).all()


def test_train_step_trains_the_schedule_and_its_average():
    trainer = learned_trainer(warmup=0)
    before = {name: p.clone() for name, p in trainer.model.schedule.named_parameters()}
    trainer.train_step(0.0)
    averaged = dict(trainer.ema.schedule.named_parameters())
    for name, parameter in trainer.model.schedule.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert not torch.equal(averaged[name], before[name]), name
