"""Training: exact resume, the EMA and its BatchNorm statistics, and that it learns."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddp import data
from ddp.config import Config
from ddp.forward import alpha_sigma, diffuse
from ddp.training import Trainer

TINY = {"width": 8, "depth": 1, "batch_size": 16, "warmup": 2}


def trainer_for(name="digits", precision="fp32", **flags):
    dataset = data.load(name)
    config = Config(dataset=name, **{**TINY, **flags}).for_data(dataset)
    return Trainer(config, dataset, precision=precision)


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ({"dataset": "mnist"}, "normal"),
        ({"dataset": "some/folder"}, "normal"),
        ({"dataset": "digits"}, "stratified"),
        ({"dataset": "digits", "levels": "normal"}, "normal"),
        ({"dataset": "mnist", "schedule": "linear"}, "stratified"),
        ({"dataset": "mnist", "schedule": "linear", "levels": "normal"}, "normal"),
        ({"dataset": "mnist", "weighting": "bound"}, "stratified"),
    ],
)
def test_levels_suit_the_data(flags, levels):
    pictures = SimpleNamespace(classes=(), is_image=True)
    assert Config(**flags).for_data(pictures).levels == levels


def tensors(state):
    """All tensors of a nested state, by the path to them."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    if not isinstance(state, (dict, list, tuple)):
        return {}
    return {
        f"{k}.{path}": t
        for k, v in items
        if isinstance(v, (dict, list, tuple, torch.Tensor))
        for path, t in tensors(v).items()
    }


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"dropout": 0.3},
        {"conditional": True, "grad_accumulation": 2},
        {"optimizer": "adamw"},
        {"norm": "group", "predict": "eps", "weighting": "snr", "loss": "huber"},
        {"timesteps": 0, "schedule": "sigmoid", "attention": [4], "lr_schedule": "constant"},
        {"dataset": "moons", "dropout": 0.1},
        {"schedule": "learned", "grad_accumulation": 2},
        {"levels": "importance"},
        {"levels": "log_normal", "schedule": "karras", "weighting": "edm"},
        {"levels": "normal"},
        {"predict": "flow", "schedule": "flow", "shift": 2.0, "levels": "uniform"},
        {"zero_terminal_snr": True, "weighting": "truncated_snr"},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(flags, precision):
    flags = dict(flags)
    name, total, cut = flags.pop("dataset", "digits"), 6, 3

    def steps(trainer, until):
        return [
            trainer.train_step(trainer.step / total)[1].item() for _ in range(trainer.step, until)
        ]

    one = trainer_for(name, precision, **flags)
    losses = steps(one, total)
    one.average()
    other = trainer_for(name, precision, **flags)
    first = steps(other, cut)
    other.average()  # as every save does; it must leave no trace
    torch.manual_seed(1234)  # nor may the generator's state matter
    resumed = trainer_for(name, precision, **flags)
    resumed.load(other.state())
    assert first + steps(resumed, total) == losses
    resumed.average()
    a, b = tensors(one.state()), tensors(resumed.state())
    assert a.keys() == b.keys()
    assert len(a) > 50
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_resume_refuses_other_data():
    trainer = trainer_for()
    state = trainer.state()
    trainer.dataset = dataclasses.replace(trainer.dataset, train=trainer.dataset.train.flip(0))
    with pytest.raises(OSError, match="--data_dir"):
        trainer.load(state)


@pytest.fixture(scope="module")
def trained():
    trainer = trainer_for(width=16, lr=1e-2, lr_schedule="constant")
    for _ in range(250):
        trainer.train_step(0.0)
    return trainer


def test_it_learns(trained):
    trained.average()
    fresh = trainer_for(width=16)
    fresh.average()
    assert trained.test_loss() < 0.6 * fresh.test_loss()
    assert trained.test_loss() == trained.test_loss()


def test_ema_with_the_raw_models_statistics_is_a_worse_network(trained):
    """The reason for average(): skipping the recomputation loses quality."""
    trained.averaged = None
    trained.average()
    recomputed = trained.test_loss()
    raw = dict(trained.model.named_buffers())
    for name, buffer in trained.ema.named_buffers():
        buffer.copy_(raw[name])
    copied = trained.test_loss()
    for norm in trained.ema.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
    never = trained.test_loss()
    assert recomputed < 0.99 * copied
    assert recomputed < 0.9 * never


def test_statistics_are_those_of_the_whole_population(trained):
    """The first BatchNorm's statistics are its input's mean and variance over training draws."""
    trained.averaged = None
    model = trained.average()
    block = model.network.down[0][0]
    inputs = []
    hook = block.first.register_forward_hook(lambda m, i, out: inputs.append(out))
    with torch.no_grad():
        for step in range(1000, 1008):  # other draws than those of average()
            x0, label = trained.training_batch(step, 512)
            trained.loss(model, x0, label, step, "test")
    hook.remove()
    values = torch.cat(inputs).transpose(0, 1).flatten(1)
    sd = values.std(dim=1)
    assert ((block.norm1.running_mean - values.mean(dim=1)).abs() < 0.05 * sd).all()
    torch.testing.assert_close(block.norm1.running_var.sqrt(), sd, rtol=0.05, atol=1e-4)


def test_average_is_a_function_of_the_weights(trained):
    first = {k: v.clone() for k, v in trained.average().state_dict().items()}
    for norm in trained.ema.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.fill_(7)
            norm.num_batches_tracked.fill_(3)
    trained.averaged = None
    for key, value in trained.average().state_dict().items():
        assert torch.equal(value, first[key]), key
    assert all(n.momentum == 0.1 for n in trained.ema.modules() if isinstance(n, nn.BatchNorm2d))


def test_ema_is_the_recurrence():
    trainer = trainer_for(ema_decay=0.2)
    expected = [p.clone() for p in trainer.ema.parameters()]
    for i in range(4):
        trainer.train_step(0.0)
        decay = min(0.2, (i + 1) / (i + 10))
        expected = [
            decay * e + (1 - decay) * p.detach()
            for e, p in zip(expected, trainer.model.parameters(), strict=True)
        ]
    for e, p in zip(expected, trainer.ema.parameters(), strict=True):
        torch.testing.assert_close(e, p)
        assert not p.requires_grad  # else the graph of all steps would grow behind it


def test_accumulated_batches_are_one_large_batch_without_batchnorm():
    """Their gradient is the mean of the parts'."""
    parts = trainer_for(
        norm="none", grad_accumulation=4, batch_size=4, grad_clip=0.0, noise_draws=1
    )
    losses = []
    for batch in range(4):
        x0, label = parts.training_batch(batch, 4)
        losses.append(parts.loss(parts.model, x0, label, batch, "train").mean())
    expected = torch.autograd.grad(sum(losses) / 4, list(parts.model.network.out.parameters()))
    seen = []
    parts.optimizers[0].register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in parts.model.network.out.parameters())
    )
    _, loss, _, _ = parts.train_step(0.0)
    torch.testing.assert_close(loss, sum(losses).detach() / 4)
    for a, b in zip(expected, seen, strict=True):
        torch.testing.assert_close(a, b)


def test_learning_rate_warms_up_and_falls():
    trainer = trainer_for(warmup=3, lr=1e-2, lr_schedule="linear")
    rates = [trainer.train_step(p)[-1] for p in (0.0, 0.0, 0.0, 0.0, 0.5, 1.0)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.005, 0.0])


def test_hidden_labels_are_about_the_share_asked_for():
    trainer = trainer_for(conditional=True, label_dropout=0.25)
    labels = torch.cat([trainer.training_batch(i, 500)[1] for i in range(8)])
    assert abs((labels == 10).float().mean() - 0.25) < 0.03
    assert set(labels.tolist()) == set(range(11))


def test_muon_trains_what_a_norm_follows():
    trainer = trainer_for(warmup=0, grad_clip=0.0)
    weights = trainer.optimizers[1].param_groups[0]["params"]
    before = [weight.detach().clone() for weight in weights]
    for _ in range(4):  # output and residual branches start at zero, so gradients take a while
        trainer.train_step(0.0)
    assert len(before) == sum(1 for n, _ in trainer.model.named_parameters() if "norm" in n) / 2
    for old, weight in zip(before, weights, strict=True):
        assert not torch.equal(old, weight)
    fresh = trainer_for(warmup=0, grad_clip=0.0, optimizer="adamw")
    assert len(fresh.optimizers) == 1
    assert len(fresh.optimizers[0].param_groups[0]["params"]) == len(list(fresh.model.parameters()))


def test_noisy_copies_are_of_the_same_items_at_other_levels():
    trainer = trainer_for(conditional=True, label_dropout=0.0)
    x0, label = trainer.training_batch(3, 16, copies=2)
    assert torch.equal(x0[:16], x0[16:])
    assert torch.equal(label[:16], label[16:])
    one, _ = trainer.training_batch(3, 16)
    assert torch.equal(x0[:16], one)
    loss = trainer.loss(trainer.model, x0, label, 3, "train")
    assert not torch.isclose(loss[:16], loss[16:]).any()


# A trainer whose network is the exact denoiser of Gaussian data, so that every mean is known.

MEAN, SD = 0.3, 0.5


def gaussian_trainer(**flags):
    trainer = trainer_for("moons", optimizer="adamw", weighting="bound", **flags)

    def denoise(xt, log_snr, label=None):
        alpha, sigma = alpha_sigma(log_snr, xt)
        gain = alpha * SD**2 / (alpha**2 * SD**2 + sigma**2)
        return MEAN + gain * (xt - alpha * MEAN)

    trainer.model.denoise = denoise
    return trainer


def points(count, seed=0):
    return MEAN + SD * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def rate(log_snr):
    """The bound's integrand in log_snr, nats a dimension: SNR / 2 E |x0 - x0_hat|²."""
    snr = torch.exp(torch.as_tensor(log_snr, dtype=torch.float64))
    return 0.5 * snr * SD**2 / (1 + snr * SD**2)


@pytest.mark.parametrize("levels", ["stratified", "uniform", "importance"])
@pytest.mark.parametrize("flags", [{"timesteps": 20}, {"timesteps": 0}, {"schedule": "learned"}])
def test_the_loss_with_weighting_bound_is_the_bound(flags, levels):
    """Its diffusion term, and of a discrete process the first step, too."""
    if "schedule" in flags:
        levels = "stratified"
    trainer = gaussian_trainer(levels=levels, **flags)
    schedule = trainer.model.schedule
    with torch.no_grad():
        losses = trainer.loss(trainer.model, points(100_000), None, 0, "test")
    if schedule.table is None:
        t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        exact = (rate(schedule.log_snr(t)) * schedule.slope(t)).mean()
    else:
        snr = schedule.table.exp()
        least = 2 * rate(schedule.table) / snr
        exact = 0.5 * ((snr[:-1] - snr[1:]) * least[1:]).sum() + 0.5 * snr[0] * least[0]
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - exact) < 4 * error
    assert error < 0.05 * exact


def test_the_ends_of_a_learned_schedule_follow_the_bound():
    """The gradient by hand: d prior / d noisy - rate(noisy), and rate(clean) - 1 / 2, which is what
    a wider Gaussian about xt / alpha costs."""
    trainer = gaussian_trainer(schedule="learned")
    ends = trainer.model.schedule.network.ends
    with torch.no_grad():
        ends.copy_(torch.tensor([2.0, -2.0]))
    gradients = []
    for step in range(60):
        ends.grad = None
        trainer.backward(points(2000, step), None, step)
        gradients.append(ends.grad.clone())
    gradients = torch.stack(gradients)
    error = gradients.std(dim=0) / len(gradients) ** 0.5
    alpha2 = torch.sigmoid(torch.tensor(-2.0))
    # prior = (alpha² E x0² + sigma² - 1 - log sigma²) / 2, and d alpha² / d log_snr = alpha² sigma²
    prior = 0.5 * (alpha2 * (1 - alpha2) * (MEAN**2 + SD**2 - 1) + alpha2)
    expected = torch.stack([rate(2.0) - 0.5, prior - rate(-2.0)])
    assert ((gradients.mean(dim=0) - expected).abs() < 4 * error + 1e-3).all()
    assert (error < 0.05).all()


def test_a_learned_schedule_lowers_the_variance_of_the_bound():
    trainer = gaussian_trainer(schedule="learned", lr=3e-3, warmup=0, batch_size=256)
    trainer.dataset.train = points(50_000)

    def moments():
        with torch.no_grad():
            losses = trainer.loss(trainer.model, points(50_000, 1), None, 0, "test").double()
        return losses.mean().item(), losses.var().item()

    mean, variance = moments()
    ends = trainer.model.schedule.network.ends.detach().clone()
    for _ in range(400):
        trainer.train_step(0.0)
        with torch.no_grad():  # between fixed ends the mean cannot change
            trainer.model.schedule.network.ends.copy_(ends)
    after, less = moments()
    assert after == pytest.approx(mean, rel=0.03)
    assert less < 0.5 * variance


def test_memory_counts_what_a_step_keeps():
    small, large = (trainer_for(batch_size=b).memory() for b in (16, 64))
    trainer = trainer_for()
    weights = sum(4 * p.numel() for p in trainer.model.parameters())
    assert small["weights"] == small["gradients"] == small["their average"] == weights
    assert 1 <= small["optimiser"] / weights <= 2.1
    assert 2.5 < large["activations"] / small["activations"] < 5


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ["digits", "moons"])
def test_a_model_made_ready_for_sampling_denoises_alike(name, norm):
    """float32: to rounding, a 2^-23 of the range a layer; bfloat16, of 8 bits: to a twentieth."""
    attention = {"attention": [4]} if name == "digits" else {}
    trainer = trainer_for(name, norm=norm, init="default", **attention)
    model = trainer.average()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5, 0.5)
    x0 = data.to_float(trainer.dataset.test[:64])
    log_snr = torch.linspace(-6, 6, 64)
    xt = diffuse(x0, log_snr, torch.randn_like(x0))
    with torch.no_grad():
        before = model.denoise(xt, log_snr)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            ready = model.prepare_for_sampling(dtype)
            norms = [m for m in ready.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            assert not norms
            after = ready.denoise(xt, log_snr)
            assert after.dtype == torch.float32
            levels = (m.network.embedding(log_snr) for m in (ready, model))
            assert torch.equal(*levels)  # the noise level is told in full precision
            assert (after - before).abs().max() < tolerance
            assert norm != "batch" or not torch.equal(after, before)
            again = ready.prepare_for_sampling(dtype).denoise(xt, log_snr)
            assert torch.equal(again, after)
            for level in (-6.0, 0.0, 6.0):  # one for all, as samplers have it
                each = torch.full((64,), level)
                one = ready.denoise(xt, torch.tensor(level).expand(64))
                assert (one - model.denoise(xt, each)).abs().max() < tolerance
                fewer = ready.denoise(xt[:2], torch.tensor(level).expand(2))
                assert (fewer - one[:2]).abs().max() < tolerance
        torch.testing.assert_close(model.denoise(xt, log_snr), before)  # a copy was made ready
