"""Training: exact resume, the EMA and its BatchNorm statistics, and that it learns."""

import copy
import math

import pytest
import torch
from oracles import Gaussian
from tiny import random_points, tiny_trainer
from torch import nn

from ddp.training import LR_SCHEDULES, Trainer

DATA = Gaussian(0.3, 0.5, (2,))


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def tensors(state, path=""):
    """Yield (path, tensor) of every tensor in a nested state."""
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}.{key}")
    elif isinstance(state, (list, tuple)):
        for i, value in enumerate(state):
            yield from tensors(value, f"{path}.{i}")


# ---- a resumed run ----

RESUMED = [
    {},
    {"dropout": 0.3},
    {"class_cond": True, "grad_accumulation": 2},
    {"optimizer": "adamw"},
    {"norm": "group", "prediction": "eps", "weighting": "snr", "loss": "huber"},
    {
        "timesteps": 0,
        "schedule": "sigmoid",
        "attention_resolutions": [4],
        "lr_schedule": "constant",
    },
    {"dataset": "moons", "dropout": 0.1},
    {"schedule": "learned", "grad_accumulation": 2},
    {"noise_dist": "importance"},
    {"noise_dist": "edm", "schedule": "karras", "weighting": "edm"},
    {"noise_dist": "lognormal"},
    {"prediction": "flow", "schedule": "flow", "shift": 2.0, "noise_dist": "uniform"},
    {"zero_terminal_snr": True, "weighting": "truncated_snr"},
]


@pytest.mark.parametrize("fields", RESUMED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(fields, precision, small_bn_batches):
    """Bit for bit: every loss, and every tensor of the state."""
    total = 3
    cut = 2

    def take_steps(trainer, until):
        losses = []
        while trainer.step < until:
            losses.append(trainer.train_step(trainer.step / total).loss.item())
        return losses

    whole = tiny_trainer(precision=precision, **fields)
    losses = take_steps(whole, total)
    whole.recalibrated_ema()
    first = tiny_trainer(precision=precision, **fields)
    first_losses = take_steps(first, cut)
    first.recalibrated_ema()  # as every save does; it must leave no trace
    state = copy.deepcopy(first.state_dict())
    torch.manual_seed(1234)  # nor may the generator's state matter
    resumed = tiny_trainer(precision=precision, **fields)
    resumed.load_state_dict(state)
    assert first_losses + take_steps(resumed, total) == losses
    resumed.recalibrated_ema()
    expected = dict(tensors(whole.state_dict()))
    ours = dict(tensors(resumed.state_dict()))
    assert ours.keys() == expected.keys()
    assert len(ours) > 50
    for path in expected:
        assert torch.equal(ours[path], expected[path]), path


def test_state_dict_holds_what_a_run_must_remember():
    trainer = tiny_trainer(random_points(), noise_dist="importance")
    trainer.train_step(0.0)
    state = trainer.state_dict()
    assert list(state) == [
        *("step", "ema", "model", "optimizer", "scaler", "noise_dist", "best", "seconds")
    ]
    assert state["step"] == 1
    assert list(state["noise_dist"]) == ["loss_sq_ema"]
    assert tiny_trainer(random_points()).state_dict()["noise_dist"] == {}


def test_same_seed_is_the_same_run_and_another_is_another():
    losses = []
    for seed in (3, 3, 4):
        trainer = tiny_trainer(random_points(), seed=seed)
        losses.append([trainer.train_step(0.0).loss.item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]


# ---- it learns, and BatchNorm under the EMA weights ----


@pytest.fixture(scope="module")
def trained():
    fields = {"lr": 1e-2, "lr_schedule": "constant", "batch_size": 4, "noise_copies": 1}
    trainer = tiny_trainer(channels_base=16, **fields)
    for _ in range(200):
        trainer.train_step(0.0)
    return trainer


def test_training_lowers_the_test_loss(trained):
    trained.recalibrated_ema()
    fresh = tiny_trainer(channels_base=16)
    fresh.recalibrated_ema()
    assert trained.test_loss() < 0.6 * fresh.test_loss()
    assert trained.test_loss() == trained.test_loss()


def test_ema_with_the_raw_models_statistics_is_a_worse_network(trained):
    """The reason for recalibrated_ema: skipping the recomputation loses quality."""
    trained.bn_fresh_at_step = None
    trained.recalibrated_ema()
    recomputed = trained.test_loss()
    raw = dict(trained.model.named_buffers())
    for name, buffer in trained.ema.named_buffers():
        buffer.copy_(raw[name])
    copied = trained.test_loss()
    for norm in norms_of(trained.ema):
        norm.reset_running_stats()
    never = trained.test_loss()
    trained.bn_fresh_at_step = None
    assert recomputed < 0.996 * copied
    assert recomputed < 0.9 * never


def test_recalibrated_statistics_are_those_of_the_whole_population(trained):
    """The first BatchNorm's are its input's mean and variance over noised training items."""
    model = trained.recalibrated_ema()
    block = model.network.down[0][0]
    outputs = []
    hook = block.layer1.register_forward_hook(lambda m, i, out: outputs.append(out))
    with torch.no_grad():
        for k in range(1000, 1008):  # others than those of recalibrated_ema
            x0, label = trained.training_batch(k, 512)
            trained.ema_loss(x0, label, k, "test")
    hook.remove()
    values = torch.cat(outputs).transpose(0, 1).flatten(1)
    std = values.std(dim=1)
    assert ((block.norm1.running_mean - values.mean(dim=1)).abs() < 0.05 * std).all()
    torch.testing.assert_close(block.norm1.running_var.sqrt(), std, rtol=0.05, atol=1e-4)


def test_recalibrated_ema_is_a_function_of_the_weights():
    trainer = tiny_trainer(random_points(event=(1, 8, 8)), dropout=0.2)
    trainer.train_step(0.0)
    first = copy.deepcopy(trainer.recalibrated_ema().state_dict())
    for norm in norms_of(trainer.ema):
        norm.running_mean.fill_(7)
        norm.num_batches_tracked.fill_(3)
    assert trainer.recalibrated_ema() is trainer.ema  # fresh at this step: nothing is done
    assert norms_of(trainer.ema)[0].running_mean[0] == 7
    trainer.bn_fresh_at_step = None
    for name, value in trainer.recalibrated_ema().state_dict().items():
        assert torch.equal(value, first[name]), name
    assert all(norm.momentum == 0.1 for norm in norms_of(trainer.ema))
    assert not trainer.ema.training


def test_a_step_makes_the_statistics_stale(small_bn_batches):
    trainer = tiny_trainer(random_points())
    before = norms_of(trainer.recalibrated_ema())[0].running_var.clone()
    for _ in range(3):
        trainer.train_step(0.0)
    assert not torch.equal(norms_of(trainer.recalibrated_ema())[0].running_var, before)


# ---- the step ----


def test_ema_is_the_recurrence():
    trainer = tiny_trainer(random_points(), ema_decay=0.2)
    expected = [p.clone() for p in trainer.ema.parameters()]
    for i in range(4):
        trainer.train_step(0.0)
        decay = min(0.2, (i + 1) / (i + 10))
        for j, parameter in enumerate(trainer.model.parameters()):
            expected[j] = decay * expected[j] + (1 - decay) * parameter.detach()
    for e, parameter in zip(expected, trainer.ema.parameters(), strict=True):
        torch.testing.assert_close(e, parameter)
        assert not parameter.requires_grad  # else the graph of all steps would grow behind it


def test_gradient_accumulation_is_the_mean_of_its_batches():
    """Without BatchNorm, they are one large batch."""
    fields = {"norm": "none", "batch_size": 4, "grad_clip": 0.0, "noise_copies": 1, "seed": 3}
    trainer = tiny_trainer(grad_accumulation=4, **fields)
    twin = tiny_trainer(**fields)
    losses = []
    for k in range(4):  # the batches' numbers
        x0, _ = twin.training_batch(k, 4)
        log_snr, weight = twin.sample_log_snr(k, 4)
        v_loss = twin_loss(twin, x0, log_snr, k)
        losses.append((weight * v_loss).mean())
    params = list(twin.model.network.conv_out.parameters())
    expected = torch.autograd.grad(sum(losses) / 4, params)
    seen = []

    def remember(*_):
        for parameter in trainer.model.network.conv_out.parameters():
            seen.append(parameter.grad.clone())

    trainer.optimizers[0].register_step_pre_hook(remember)
    stats = trainer.train_step(0.0)
    torch.testing.assert_close(stats.loss, sum(losses).detach() / 4)
    for a, b in zip(expected, seen, strict=True):
        torch.testing.assert_close(a, b)


def twin_loss(trainer, x0, log_snr, k):
    """Return the plain MSE of v of each item of batch k, written out: Salimans & Ho 2022."""
    alpha = torch.sigmoid(log_snr).sqrt().reshape(-1, 1, 1, 1)
    sigma = torch.sigmoid(-log_snr).sqrt().reshape(-1, 1, 1, 1)
    eps = trainer.eps(k, x0)
    v = trainer.model.network(alpha * x0 + sigma * eps, log_snr)
    return ((v - (alpha * eps - sigma * x0)) ** 2).mean(dim=(1, 2, 3))


def test_gradients_are_clipped_to_the_norm():
    seen = []
    trainer = tiny_trainer(random_points(), grad_clip=0.01, lr=1e-9)

    def remember(*_):
        grads = [p.grad for p in trainer.model.network.parameters()]
        seen.append(nn.utils.get_total_norm(grads).item())

    trainer.optimizers[0].register_step_pre_hook(remember)
    stats = trainer.train_step(0.0)
    assert stats.grad_norm > 0.02  # that before clipping
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_warms_up_and_falls():
    trainer = tiny_trainer(random_points(), warmup=3, lr=1e-2, lr_schedule="linear")
    progress = (0.0, 0.0, 0.0, 0.0, 0.5, 1.0)
    rates = [trainer.train_step(p).lr for p in progress]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.005, 0.0])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0]


def test_lr_schedules_fall_from_one():
    for name, factor in LR_SCHEDULES.items():
        values = [factor(p / 10) for p in range(11)]
        assert values[0] == 1
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(1 if name == "constant" else 0)


def test_stats_say_what_the_step_was():
    trainer = tiny_trainer(random_points(64), batch_size=16, noise_copies=2, grad_accumulation=2)
    stats = [trainer.train_step(0.0) for _ in range(3)]
    assert [s.step for s in stats] == [1, 2, 3] == list(range(1, trainer.step + 1))
    assert [s.epoch for s in stats] == [0.5, 1.0, 1.5]  # copies are no new items
    assert all(s.loss.ndim == s.grad_norm.ndim == 0 for s in stats)
    assert not stats[0].loss.requires_grad


def test_dropped_labels_are_about_the_fraction_asked_for():
    trainer = tiny_trainer(random_points(classes=3), class_cond=True, label_dropout=0.25)
    labels = torch.cat([trainer.training_batch(k, 500)[1] for k in range(8)])
    assert abs((labels == 3).float().mean() - 0.25) < 0.03
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_labels_are_for_conditional_models_only():
    trainer = tiny_trainer(random_points(classes=3))
    assert trainer.training_batch(0, 16)[1] is None
    assert trainer.model.num_classes == 0


def test_muon_trains_what_a_norm_follows():
    trainer = tiny_trainer(warmup=0, grad_clip=0.0)
    weights = trainer.optimizers[1].param_groups[0]["params"]
    before = [weight.detach().clone() for weight in weights]
    for _ in range(4):  # output and residual branches start at zero, so gradients take a while
        trainer.train_step(0.0)
    assert len(before) == len(norms_of(trainer.model))
    for old, weight in zip(before, weights, strict=True):
        assert not torch.equal(old, weight)
    adamw = tiny_trainer(optimizer="adamw")
    assert len(adamw.optimizers) == 1
    count = len(list(adamw.model.parameters()))
    assert len(adamw.optimizers[0].param_groups[0]["params"]) == count


def test_noise_copies_are_of_the_same_items_at_other_levels():
    trainer = tiny_trainer(random_points(classes=3), class_cond=True, label_dropout=0.0)
    x0, label = trainer.training_batch(3, 16, noise_copies=2)
    assert torch.equal(x0[:16], x0[16:])
    assert torch.equal(label[:16], label[16:])
    alone, _ = trainer.training_batch(3, 16)
    assert torch.equal(x0[:16], alone)
    log_snr, _ = trainer.sample_log_snr(3, 32)
    assert not torch.isclose(log_snr[:16], log_snr[16:]).any()
    eps = trainer.eps(3, x0)
    assert not torch.isclose(eps[:16], eps[16:]).all(dim=1).any()


# ---- the loss that training takes the mean of ----


def rate(log_snr):
    """The VLB's integrand in log_snr, nats a dimension: SNR / 2 E|x0 - x0_hat|^2."""
    snr = torch.exp(torch.as_tensor(log_snr, dtype=torch.float64))
    return 0.5 * snr * DATA.sd**2 / (1 + snr * DATA.sd**2)


@pytest.mark.parametrize("noise_dist", ["stratified", "uniform", "importance"])
@pytest.mark.parametrize("fields", [{"timesteps": 20}, {"timesteps": 0}, {"schedule": "learned"}])
def test_loss_with_weighting_vlb_is_the_vlb(fields, noise_dist):
    """Its diffusion term, and of a discrete process the first step, too."""
    if "schedule" in fields:
        noise_dist = "stratified"
    trainer = tiny_trainer(random_points(), weighting="vlb", noise_dist=noise_dist, **fields)
    trainer.ema.denoise = DATA.denoise  # the exact denoiser of Gaussian data
    schedule = trainer.ema.schedule
    with torch.no_grad():
        losses = trainer.ema_loss(DATA.sample(50_000), None, 0, "test")
    if schedule.table is None:
        t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        exact = (rate(schedule.log_snr(t)) * schedule.neg_dlogsnr_dt(t)).mean()
    else:
        snr = schedule.table.exp()
        least = 2 * rate(schedule.table) / snr  # E|x0 - x0_hat|^2
        exact = 0.5 * ((snr[:-1] - snr[1:]) * least[1:]).sum() + 0.5 * snr[0] * least[0]
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - exact) < 4 * error
    assert error < 0.05 * exact


# ---- the run ----


def test_run_ends_where_the_config_says():
    trainer = tiny_trainer(random_points(64), batch_size=16, epochs=2)
    stats = list(trainer.run())
    assert len(stats) == trainer.step == 8  # 2 x 64 / 16
    assert [s.progress for s in stats] == pytest.approx([i / 8 for i in range(1, 9)])
    assert [s.previous_progress for s in stats] == pytest.approx([i / 8 for i in range(8)])
    assert list(trainer.run()) == []  # nothing is left to do
    assert trainer.seconds > 0


def test_run_goes_on_from_the_present_step():
    whole = tiny_trainer(random_points(), max_steps=6)
    expected = [stats.loss.item() for stats in whole.run()]
    trainer = tiny_trainer(random_points(), max_steps=6)
    losses = []
    for stats in trainer.run():
        losses.append(stats.loss.item())
        if trainer.step == 2:
            break
    for stats in trainer.run():
        losses.append(stats.loss.item())
    assert losses == expected


def test_run_by_the_clock_ends_by_the_clock(monkeypatch):
    """A step takes a second on this clock, so a minute takes 60."""
    now = [100.0]

    def step(self, lr_progress, train_step=Trainer.train_step):
        now[0] += 1
        return train_step(self, lr_progress)

    monkeypatch.setattr("ddp.training.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer, "train_step", step)
    trainer = tiny_trainer(random_points(), max_minutes=0.5, lr_schedule="linear", warmup=0, lr=1.0)
    rates = [stats.lr for stats in trainer.run()]
    assert rates == pytest.approx([1 - i / 30 for i in range(30)])
    assert trainer.seconds == 30
    assert math.isfinite(trainer.train_step(1.0).loss)
