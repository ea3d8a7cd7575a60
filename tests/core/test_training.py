"""Training: exact resume, the EMA and its BatchNorm statistics, and that it learns."""

import copy
import dataclasses
import math

import pytest
import torch
from oracles import Gaussian
from tiny import random_points, tiny_trainer
from torch import nn

from ddp.config import RESUMABLE_FIELDS, Config, resume_config
from ddp.learned_schedule import bound_terms
from ddp.optim import SCHEDULE_LR
from ddp.training import LR_SCHEDULES, Trainer, load_moments
from ddp.validation import fitting_batch

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
        *("step", "ema", "model", "optimizer", "lr_scales", "scaler", "noise_dist", "best"),
        "seconds",
    ]
    assert state["step"] == 1
    assert list(state["noise_dist"]) == ["loss_sq_ema"]
    assert tiny_trainer(random_points()).state_dict()["noise_dist"] == {}


# What a trainer does by each field that may change on resume, and another value of it.
HELD = {
    "epochs": (7.0, lambda t: t.num_steps * 16 / 64),
    "max_steps": (7, lambda t: t.num_steps),
    "max_minutes": (7.0, lambda t: t.config.seconds_limit() / 60),
    "lr": (0.5, lambda t: t.set_lr(0.0)),
    "lr_schedule": ("constant", lambda t: "constant" if t.set_lr(0.5) == 1e-3 else "linear"),
    "warmup": (9, lambda t: (t.step + 1) * t.config.lr / t.set_lr(0.0) - 1),
    "weight_decay": (0.5, lambda t: t.optimizers[0].param_groups[0]["weight_decay"]),
    "grad_clip": (1e-3, lambda t: clipped_norm(t)),
    "ema_decay": (0.0, lambda t: 0.0 if ema_is_the_model(t) else 0.999),
    "reduce": ("fast", lambda t: t.sums.reduce),
    "checkpoint_activations": (True, lambda t: t.model.network.checkpoint_activations),
    "precision": ("fp16", lambda t: "fp16" if t.scaler.is_enabled() else "fp32"),
}
# fields that are no matter of the trainer, but of who builds it or writes its files
ELSEWHERE = {"planned_steps", "device", "compile", "name", "data_dir", "out_dir"}
ELSEWHERE |= {"threads", "cache", "labels", "save_every", "keep_checkpoints", "sample_every"}
ELSEWHERE |= {"tensorboard"}  # tests/io/test_board.py


def ema_is_the_model(trainer):
    pairs = zip(trainer.ema.parameters(), trainer.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def clipped_norm(trainer):
    norms = []

    def remember(*_):
        norms.append(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item())

    trainer.optimizers[0].register_step_pre_hook(remember)
    trainer.train_step(0.01)
    return norms[-1]


def test_every_field_that_may_change_on_resume_is_looked_at():
    assert HELD.keys() | ELSEWHERE == RESUMABLE_FIELDS


@pytest.mark.parametrize("name", HELD)
def test_field_that_may_change_on_resume_does_change(name, small_bn_batches):
    value, held = HELD[name]
    first = tiny_trainer(random_points(), warmup=0, lr_schedule="linear", max_steps=400)
    for step in range(4):
        first.train_step(step / 400)
    overrides = {name: value}
    if name == "max_minutes":
        overrides["max_steps"] = 400  # or it would say how many steps are planned
    config = resume_config(first.config, overrides)
    precision = "fp16" if config.precision == "fp16" else "fp32"
    resumed = Trainer(config, first.dataset, precision=precision)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.train_step(0.01)
    assert resumed.step == 5
    same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
    assert held(resumed) == same
    assert held(first) != same


def test_precision_may_change_back_from_fp16():
    first = tiny_trainer(random_points(), precision="fp16")
    first.train_step(0.0)
    assert first.state_dict()["scaler"]
    resumed = tiny_trainer(random_points(), precision="bf16")
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict()["scaler"] == {}
    resumed.train_step(0.0)


def test_hyper_parameters_of_an_optimizer_are_those_of_the_config():
    """Whatever a file says of them."""
    trainer = tiny_trainer()
    trainer.train_step(0.0)
    state = copy.deepcopy(trainer.state_dict())
    for optimizer in state["optimizer"]:
        for group in optimizer["param_groups"]:
            group.update(betas=(0.0, 0.0), maximize=True, momentum=0.0, weight_decay=9.0, eps=1.0)
    resumed = tiny_trainer()
    resumed.load_state_dict(state)
    assert resumed.train_step(0.1).loss == trainer.train_step(0.1).loss
    for ours, theirs in zip(resumed.optimizers, trainer.optimizers, strict=True):
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for path, tensor in tensors(trainer.state_dict()):
        assert torch.equal(dict(tensors(resumed.state_dict()))[path], tensor), path


def test_moments_of_another_size_than_their_weight_are_refused():
    """An optimizer would read beyond their end."""
    trainer = tiny_trainer(random_points())
    trainer.train_step(0.0)
    for number, optimizer in enumerate(trainer.optimizers):
        for name, moment in optimizer.state_dict()["state"][0].items():
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0][name] = torch.zeros(moment.numel() + 1)
            if name != "step":
                with pytest.raises(ValueError, match=f"{name} of weight 0"):
                    load_moments(trainer.optimizers[number], saved)


def test_moments_are_loaded_in_the_order_of_their_weights():
    """A file may hold the numbers of a channels-last tensor in another order in memory."""
    trainer = tiny_trainer(optimizer="adamw")
    trainer.train_step(0.0)
    state = copy.deepcopy(trainer.state_dict())
    for moments in state["optimizer"][0]["state"].values():
        for name, moment in moments.items():
            moments[name] = moment.contiguous()
    resumed = tiny_trainer(optimizer="adamw")
    resumed.load_state_dict(state)
    trainer.train_step(0.0)
    resumed.train_step(0.0)
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("best", value) for value in (math.nan, math.inf, -math.inf, -1e9)),
        *(("seconds", value) for value in (math.nan, math.inf, -math.inf, -1e9)),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "learned"])
def test_impossible_figures_of_a_run_are_refused(name, value, schedule):
    trainer = tiny_trainer(random_points(), schedule=schedule)
    with pytest.raises(ValueError, match=f"^{name}="):
        trainer.load_state_dict({**trainer.state_dict(), name: value})


def test_least_loss_of_zero_is_one_that_a_density_alone_can_have():
    fixed = tiny_trainer(random_points())
    with pytest.raises(ValueError, match="best=0"):  # nothing could be below it ever after
        fixed.load_state_dict(fixed.state_dict() | {"best": 0.0})
    learned = tiny_trainer(random_points(), schedule="learned")
    learned.load_state_dict(learned.state_dict() | {"best": 0.0})


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
    trainer = tiny_trainer(channels_base=16, prediction="x0", **fields)
    for _ in range(200):
        trainer.train_step(0.0)
    return trainer


def test_training_lowers_the_val_loss(trained):
    trained.recalibrated_ema()
    fresh = tiny_trainer(channels_base=16)
    fresh.recalibrated_ema()
    assert trained.val_loss() < 0.6 * fresh.val_loss()
    assert trained.val_loss() == trained.val_loss()


def test_val_loss_is_of_items_of_every_class_that_no_gradient_sees():
    """Of a set in the order of its classes, too, and not of the test items."""
    dataset = random_points(classes=3)
    val = torch.randn(3000, 2)
    val_labels = torch.arange(3000) // 1000
    dataset = dataclasses.replace(dataset, val=val, val_labels=val_labels)
    trainer = tiny_trainer(dataset, class_cond=True)
    seen = []
    ema_loss = trainer.ema_loss
    trainer.ema_loss = lambda x0, label, *rest: seen.append(label) or ema_loss(x0, label, *rest)
    loss = trainer.val_loss()
    counts = torch.bincount(torch.cat(seen))
    assert counts.sum() == 2000
    assert (counts > 600).all()
    trainer.dataset = dataclasses.replace(dataset, test=9 + dataset.test)
    assert trainer.val_loss() == loss
    trainer.dataset = dataclasses.replace(dataset, val=9 + val)
    assert trainer.val_loss() != loss


def test_val_loss_needs_no_labels_of_a_test_set():
    dataset = dataclasses.replace(random_points(classes=3), test_labels=None)
    assert tiny_trainer(dataset, class_cond=True).val_loss() > 0


def test_loss_with_a_learned_schedule_is_the_whole_bound():
    """Ends drawn together leave next to nothing of the diffusion term, but not of the others."""
    losses = []
    data = Gaussian(DATA.mean, DATA.sd, (64,))
    dataset = dataclasses.replace(random_points(event=(64,)), test=data.sample(500))
    for ends in ([13.0, -9.0], [0.0, -0.1]):
        trainer = tiny_trainer(dataset, schedule="learned")
        trainer.ema.denoise = data.denoise  # no model is better
        trainer.ema.schedule.network.endpoints.data = torch.tensor(ends)
        losses.append(trainer.val_loss())
    entropy = 0.5 * math.log(2 * math.pi * math.e * data.sd**2)  # the least bound, nats a dimension
    assert losses[0] == pytest.approx(entropy, abs=0.1)
    assert losses[1] > entropy + 0.3


def test_loss_of_a_step_with_a_learned_schedule_is_the_whole_bound():
    trainer = tiny_trainer(schedule="learned", grad_accumulation=2)
    trainer.model.schedule.network.endpoints.data = torch.tensor([0.0, -0.1])
    x0, _ = trainer.training_batch(0, 64)
    others = bound_terms(trainer.model.schedule, x0, trainer.eps(0, x0), discrete=True).mean()
    assert others > 2
    assert trainer.train_step(0.0).loss.item() == pytest.approx(others.item(), rel=0.1)


# ---- a run gone wrong ----


def with_weights_times(trainer, factor):
    """Return a Trainer like this one whose output layer is larger."""
    worse = copy.copy(trainer)
    worse.ema = copy.deepcopy(trainer.ema)
    worse.ema.network.conv_out.weight.data *= factor
    return worse


@pytest.mark.parametrize("has_best", [True, False])
def test_run_gone_wrong_is_told_from_one_that_learns(trained, has_best):
    trained.recalibrated_ema()
    loss = trained.val_loss()
    trained.best = loss if has_best else None
    fresh = tiny_trainer(channels_base=16, prediction="x0")
    fresh.recalibrated_ema()
    assert not fresh.is_diverged(fresh.val_loss())
    assert not trained.is_diverged(loss)
    for factor, wrong in ((1.1, False), (100, True)):
        worse = with_weights_times(trained, factor)
        assert worse.is_diverged(worse.val_loss()) == wrong
    dead = with_weights_times(trained, 0.0)  # no better than at the start
    assert dead.is_diverged(dead.val_loss()) == has_best
    for impossible in (math.nan, math.inf, -math.inf, 0.0, -1.0):
        assert trained.is_diverged(impossible)
    trained.best = None


@pytest.mark.parametrize("has_best", [True, False])
def test_bound_of_points_is_no_run_gone_wrong_though_it_is_about_zero(has_best):
    """And uncertain by as much; but far above, it is."""
    trainer = tiny_trainer("moons", schedule="learned", timesteps=0)
    trainer.recalibrated_ema()
    loss = trainer.val_loss()
    trainer.best = -0.4 if has_best else None
    assert not trainer.is_diverged(loss)
    trainer.ema.network.proj_out.weight.data.normal_(0, 100)
    assert trainer.is_diverged(trainer.val_loss())


def test_overfitted_run_is_not_gone_wrong():
    """Its loss on other items may rise without bound, while it learns its own by heart."""
    dataset = random_points()
    trainer = tiny_trainer(dataset)
    trainer.recalibrated_ema()
    trainer.best = 0.01
    trainer.dataset = dataclasses.replace(dataset, val=100 * dataset.test)
    loss = trainer.val_loss()
    assert loss > 1000
    # an untrained model is as far from its training items as one that outputs 0
    trainer.best = 1.0
    assert not trainer.is_diverged(loss)


@pytest.mark.parametrize("dataset", ["digits", "moons"])
def test_learned_schedule_at_a_huge_rate_never_seems_to_be_good(dataset, small_bn_batches):
    trainer = tiny_trainer(dataset, schedule="learned", lr=1e3, warmup=0)
    trainer.recalibrated_ema()
    at_first = trainer.val_loss()
    for _ in range(4):
        trainer.train_step(0.0)
        trainer.recalibrated_ema()
        loss = trainer.val_loss()
        assert loss > at_first or trainer.is_diverged(loss)


def test_batches_for_testing_are_smaller_of_large_images():
    """As many numbers as of 512 images of 64x64."""
    assert fitting_batch((2,), 8192) == 8192
    assert fitting_batch((3, 28, 28), 512) == fitting_batch((3, 64, 64), 512) == 512
    assert fitting_batch((3, 512, 512), 512) == 8
    assert fitting_batch((1, 8192, 8192), 512) == 1


def test_ema_with_the_raw_models_statistics_is_a_worse_network(trained):
    """The reason for recalibrated_ema: skipping the recomputation loses quality."""
    trained.bn_fresh_at_step = None
    trained.recalibrated_ema()
    recomputed = trained.val_loss()
    raw = dict(trained.model.named_buffers())
    for name, buffer in trained.ema.named_buffers():
        buffer.copy_(raw[name])
    copied = trained.val_loss()
    for norm in norms_of(trained.ema):
        norm.reset_running_stats()
    never = trained.val_loss()
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


@pytest.mark.parametrize("event", [(2,), (5,), (1, 8, 8), (3, 7, 9)])
def test_trainer_with_all_defaults_trains_on_any_data(event):
    trainer = Trainer(Config(), random_points(event=event))
    assert trainer.train_step(0.0).loss.isfinite()


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
    fields["prediction"] = "v"  # whose weighting twin_loss has
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


def test_huge_gradient_of_a_schedule_moves_it_no_further():
    """It is not clipped: AdamW's step does not depend on its size."""
    trainer = tiny_trainer(random_points(), schedule="learned", warmup=0)
    endpoints = trainer.model.schedule.network.endpoints
    endpoints.register_hook(lambda grad: 1e15 * grad if trainer.step == 2 else grad)
    for _ in range(4):
        before = endpoints.detach().clone()
        trainer.train_step(0.0)
        assert (endpoints - before).abs().max() < 3 * SCHEDULE_LR * 1e-3


def test_learning_rate_warms_up_and_falls():
    trainer = tiny_trainer(random_points(), warmup=3, lr=1e-2, lr_schedule="linear")
    progress = (0.0, 0.0, 0.0, 0.0, 0.5, 1.0)
    rates = [trainer.train_step(p).lr for p in progress]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.005, 0.0])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0]


@pytest.mark.parametrize("steps", [1, 5, 12, 50, 1000])
def test_learning_rate_reaches_its_peak_in_runs_of_any_length(steps):
    """It rises for no more than a tenth of a run."""
    trainer = tiny_trainer(random_points(), warmup=100, lr=1e-2, max_steps=steps)
    rates = []
    for step in range(steps):
        trainer.step = step
        rates.append(trainer.set_lr(step / steps))
    assert max(rates) > 0.975e-2
    assert rates.index(max(rates)) <= steps / 10
    if steps >= 1000:  # the whole of what was asked for
        slow = [min(1, (i + 1) / 101) * LR_SCHEDULES["cosine"](i / steps) for i in range(steps)]
        assert rates == pytest.approx([1e-2 * factor for factor in slow])


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
    x0 = DATA.sample(50_000)
    with torch.no_grad():
        losses = trainer.ema_loss(x0, None, 0, "test")
        if schedule.network is not None:  # the bound is told: leave one of its terms
            losses -= bound_terms(schedule, x0, trainer.eps(0, x0, purpose="test"), discrete=False)
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


@pytest.fixture
def clock(monkeypatch, small_bn_batches):
    """A clock, `clock.now` in seconds, by which a step takes 1 and a test 0.5."""

    class Clock:
        now = 100.0

    clock = Clock()

    def timed(method, seconds):
        def call(self, *args):
            clock.now += seconds
            return method(self, *args)

        return call

    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr(Trainer, "train_step", timed(Trainer.train_step, 1.0))
    monkeypatch.setattr(Trainer, "val_loss", timed(Trainer.val_loss, 0.5))
    return clock


def test_minutes_alone_become_a_number_of_steps(clock):
    trainer = tiny_trainer(random_points(), max_minutes=1.0, lr_schedule="linear", warmup=0, lr=1.0)
    assert trainer.num_steps is None
    trainer.plan_steps()
    # a minute without the trial, of 6 steps and a test, and without ten tests
    assert trainer.num_steps == trainer.config.planned_steps == 48
    config = trainer.config
    trainer.plan_steps()  # once is enough
    assert trainer.config is config
    stats = list(trainer.run())
    assert [s.lr for s in stats] == pytest.approx([1 - i / 48 for i in range(48)])
    assert [s.progress for s in stats] == pytest.approx([i / 48 for i in range(1, 49)])
    assert list(trainer.run()) == []


def test_plan_counts_the_saves_that_were_asked_for(clock):
    trainer = tiny_trainer(random_points(), max_minutes=1.0, save_every=2)
    trainer.plan_steps()
    assert trainer.num_steps == 42  # of 1.25 seconds each, in what the trial left of the minute


@pytest.mark.parametrize("fields", [{}, {"noise_dist": "importance"}, {"schedule": "learned"}])
def test_planning_leaves_no_trace(fields, small_bn_batches):
    """Bit for bit: in the state, and in the run that follows."""
    trainer = tiny_trainer(random_points(), max_minutes=0.002, **fields)
    before = copy.deepcopy(trainer.state_dict())
    trainer.plan_steps()
    after = dict(tensors(trainer.state_dict()))
    for path, tensor in tensors(before):
        assert torch.equal(after.pop(path), tensor), path
    assert not after
    assert (trainer.step, trainer.seconds, trainer.best) == (0, 0.0, None)
    steps = trainer.num_steps
    untried = tiny_trainer(random_points(), max_steps=steps, **fields)
    count = min(3, steps)
    ours = [trainer.train_step(i / steps).loss.item() for i in range(count)]
    assert ours == [untried.train_step(i / steps).loss.item() for i in range(count)]


@pytest.mark.parametrize("jump", [-1e6, 0.0, 1e6])
def test_resumed_run_by_minutes_equals_uninterrupted(clock, jump):
    """Wherever the clock is set to, and however fast the machine is by then."""
    config = {"max_minutes": 0.4}
    whole = tiny_trainer(random_points(), **config)
    expected = [(stats.loss.item(), stats.lr) for stats in whole.run()]
    assert len(expected) > 5
    first = tiny_trainer(random_points(), **config)
    seen = []
    for stats in first.run():
        seen.append((stats.loss.item(), stats.lr))
        if first.step == 3:
            break
    state = copy.deepcopy(first.state_dict())
    clock.now += jump
    resumed = Trainer(resume_config(first.config, config), first.dataset)
    resumed.load_state_dict(state)
    for stats in resumed.run():
        seen.append((stats.loss.item(), stats.lr))
        clock.now += jump / 7 + 3
    assert seen == expected
    for path, tensor in tensors(whole.state_dict()):
        assert torch.equal(dict(tensors(resumed.state_dict()))[path], tensor), path


def test_resume_with_other_minutes_plans_anew(clock):
    first = tiny_trainer(random_points(), max_minutes=0.4)
    first.plan_steps()
    for _ in range(3):
        first.train_step(0.0)
    first.seconds = 9.0
    longer = Trainer(resume_config(first.config, {"max_minutes": 2.0}), first.dataset)
    longer.load_state_dict(first.state_dict())
    longer.plan_steps()
    assert longer.num_steps == 3 + 120 - 9 - 6 - 5 - 1
    shorter = Trainer(resume_config(first.config, {"max_minutes": 0.1}), first.dataset)
    shorter.load_state_dict(first.state_dict())
    assert list(shorter.run()) == []  # that time is over


def test_minutes_cut_off_a_run_of_known_length(clock):
    trainer = tiny_trainer(random_points(), max_minutes=0.5, max_steps=100, lr_schedule="linear")
    stats = list(trainer.run())
    assert len(stats) == trainer.step == trainer.seconds == 30
    assert stats[-1].lr == pytest.approx(1e-3 * (1 - 29 / 100))  # the lr follows the steps
    assert stats[-1].progress == 1
