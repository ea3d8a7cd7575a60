"""DDP as a library: public names, a network and data of one's own, the loop, a new entry of each
registry."""

import ast
import copy

import pytest
import torch
from conftest import ROOT
from tiny import TINY, random_points, tiny_trainer
from torch import nn

import ddp
from ddp.config import Config
from ddp.data import Dataset
from ddp.editing import mc_dropout
from ddp.loss import LOSSES, WEIGHTINGS
from ddp.model import PREDICTIONS, DiffusionModel
from ddp.noise_dist import NOISE_DISTS, NoiseDist
from ddp.options import SamplerOptions
from ddp.presets import PRESETS
from ddp.reverse import NETWORKS
from ddp.sampling import SAMPLERS, THRESHOLDS, Sampler, ddim, sample
from ddp.schedule import SCHEDULES, SPACINGS, Schedule, ScheduleEntry, cosine
from ddp.training import Trainer, train

NUMBERS = torch.arange(6)
pytestmark = pytest.mark.usefixtures("small_bn_batches")


# ---- the public names ----


def public_names():
    names = []
    for node in ast.parse((ROOT / "ddp" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names]
    return names


def test_public_names_are_there():
    needed = {
        *("Schedule", "DiffusionModel", "Config", "SamplerOptions", "Dataset", "Trainer"),
        *("load_dataset", "build_model", "train", "sample", "sample_loop", "q_sample"),
    }
    assert needed <= set(public_names())
    for name in public_names():
        assert getattr(ddp, name) is not None


def test_public_registries_are_not_empty():
    registries = [name for name in public_names() if name.isupper() and name != "MLP"]
    assert len(registries) >= 8
    for name in registries:
        assert len(getattr(ddp, name)) > 1


def test_version_is_a_version():
    assert ddp.__version__.replace(".", "").isdigit()


# ---- a network of one's own ----


class Foreign(nn.Module):
    """Knows nothing of this project: no `event`, no folding, a plain BatchNorm, labels unread."""

    def __init__(self, size, hidden=16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 1, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, size),
        )

    def forward(self, x_t, log_snr, label=None):
        level = log_snr.clamp(-20, 20).expand(len(x_t))[:, None] / 10  # of a 0-d one, too
        return self.layers(torch.cat([x_t.flatten(1), level], dim=1)).reshape(x_t.shape)


@pytest.fixture
def foreign(monkeypatch):
    """Register the network, and return a Trainer of it after three steps."""

    def build(event, num_classes, channels_base=16, **_):
        return Foreign(event[0], channels_base)

    monkeypatch.setitem(NETWORKS, "foreign", build)
    trainer = tiny_trainer(random_points(classes=3), network="foreign", class_cond=True)
    for _ in range(3):
        trainer.train_step(0.0)
    return trainer


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_model_joins_any_network_with_any_schedule(prediction):
    model = DiffusionModel(Schedule(), Foreign(2), prediction, event=(2,)).eval()
    x_t = torch.randn(6, 2)
    for level in (torch.tensor(1.0), torch.full((6,), 1.0)):
        assert model.denoise(x_t, level).shape == (6, 2)
    assert sample(model, NUMBERS, steps=4).shape == (6, 2)


def test_foreign_network_trains(foreign):
    assert isinstance(foreign.model.network, Foreign)
    assert len(foreign.optimizers) == 1  # AdamW: it names no weights for Muon
    before = copy.deepcopy(foreign.model.state_dict())
    assert foreign.train_step(0.0).loss.isfinite()
    for name, parameter in foreign.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_foreign_network_is_recalibrated(foreign):
    norm = foreign.recalibrated_ema().network.layers[1]
    assert norm.num_batches_tracked == ddp.validation.BN_BATCHES
    assert not torch.equal(norm.running_mean, foreign.model.network.layers[1].running_mean)
    assert foreign.val_loss() > 0


def test_foreign_network_goes_on_from_its_state(foreign):
    state = copy.deepcopy(foreign.state_dict())
    resumed = tiny_trainer(random_points(classes=3), network="foreign", class_cond=True)
    resumed.load_state_dict(state)
    assert resumed.train_step(0.0).loss == foreign.train_step(0.0).loss
    for a, b in zip(resumed.model.parameters(), foreign.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_network_samples(foreign, dtype):
    model = foreign.recalibrated_ema().for_inference(dtype)
    options = SamplerOptions(steps=5, cfg_scale=2.0).resolve(model)
    label = NUMBERS % 3
    x0 = sample(model, NUMBERS, 0, label, **options)
    assert x0.shape == (6, 2)
    part = sample(model, NUMBERS[4:], 0, label[4:], **options)
    torch.testing.assert_close(part, x0[4:], rtol=1e-4, atol=1e-5)


def test_foreign_network_does_mc_dropout(foreign):
    model = foreign.recalibrated_ema().for_inference()
    with mc_dropout(model, 0, NUMBERS):
        one = sample(model, NUMBERS, steps=3)
        other = sample(model, NUMBERS, steps=3)
    assert not torch.allclose(one, other, atol=1e-3)


# ---- data of one's own, and the loop ----


@pytest.mark.parametrize("event", [(2,), (5,), (3, 9, 7)])
def test_own_tensors_train_at_once(event):
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(40, *event, generator=generator)
    if len(event) == 3:
        items = torch.randint(0, 256, (40, *event), generator=generator).byte()
    dataset = Dataset("mine", items[:32], items[32:])
    config = Config(dataset="mine", max_steps=3, **TINY)
    trainer = train(config, dataset)
    assert trainer.step == 3
    model = trainer.recalibrated_ema()
    assert trainer.val_loss() > 0
    assert sample(model, NUMBERS, steps=3).shape == (6, *event)


def test_train_calls_back_after_each_step():
    seen = []

    def callback(trainer, stats):
        assert isinstance(trainer, Trainer)
        assert trainer.step == stats.step
        seen.append(stats)

    trainer = train(Config(dataset="mine", max_steps=4, **TINY), random_points(), callback)
    assert [stats.step for stats in seen] == [1, 2, 3, 4]
    assert seen[-1].progress == 1
    assert trainer.step == 4


def test_train_stops_when_the_callback_says_so():
    config = Config(dataset="mine", max_steps=9, **TINY)
    trainer = train(config, random_points(), lambda trainer, stats: stats.step == 2)
    assert trainer.step == 2


def test_train_is_the_trainers_run_step_by_step():
    config = Config(dataset="mine", max_steps=4, **TINY)
    losses = []
    one = train(config, random_points(), lambda _, stats: losses.append(stats.loss.item()))
    other = Trainer(config, random_points())
    assert losses == [stats.loss.item() for stats in other.run()]
    for a, b in zip(one.ema.parameters(), other.ema.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- one new entry of each registry ----


def trains_and_samples(sampling=None, data=None, **fields):
    """Train two steps of a Config and sample; return the Trainer and the samples."""
    data = random_points() if data is None else data
    config = Config(dataset=data.name, max_steps=2, **{**TINY, **fields})
    trainer = train(config, data)
    assert trainer.val_loss() > 0
    model = trainer.recalibrated_ema().for_inference()
    options = SamplerOptions(**{"steps": 3, **(sampling or {})}).resolve(model)
    return trainer, sample(model, NUMBERS, **options)


def noisier(t):
    return cosine(t) - 1.0


@pytest.mark.parametrize("timesteps", [0, 50])
def test_new_schedule_is_one_entry(monkeypatch, timesteps):
    monkeypatch.setitem(SCHEDULES, "noisier", ScheduleEntry(noisier))
    trainer, _ = trains_and_samples(schedule="noisier", timesteps=timesteps)
    assert trainer.model.schedule.name == "noisier"
    assert trainer.model.schedule.log_snr(0.5) < Schedule("cosine", timesteps).log_snr(0.5)


def test_new_spacing_is_one_entry(monkeypatch):
    def early(schedule, steps):
        return schedule.log_snr(torch.linspace(1, 0.5, steps, dtype=torch.float64))

    monkeypatch.setitem(SPACINGS, "early", early)
    trains_and_samples(sampling={"spacing": "early"})
    grid = Schedule().sampling_grid(3, "early")
    assert grid[-2] == Schedule().log_snr(0.5)


def test_new_noise_dist_is_one_entry(monkeypatch):
    def halfway(schedule, u, per_log_snr=False):
        return schedule.log_snr(torch.full_like(u, 0.5)).float(), torch.ones(len(u))

    monkeypatch.setitem(NOISE_DISTS, "halfway", NoiseDist(halfway, over_t=False))
    trainer, _ = trains_and_samples(noise_dist="halfway")
    log_snr, _ = trainer.sample_log_snr(0, 4)
    assert (log_snr == trainer.model.schedule.log_snr(0.5).float()).all()
    with pytest.raises(ValueError, match="noise_dist"):  # what the record says is heeded
        Config(noise_dist="halfway", weighting="vlb")


class Counting:
    """A noise distribution that learns: it remembers how many losses it was shown."""

    def __init__(self, schedule):
        self.count = torch.zeros(())

    def __call__(self, schedule, u, per_log_snr=False):
        return schedule.log_snr(u).float(), torch.ones(len(u))

    def update(self, schedule, log_snr, weighted_loss):
        self.count += len(log_snr)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count.copy_(state["count"])


def test_new_noise_dist_may_learn_from_the_loss(monkeypatch):
    monkeypatch.setitem(NOISE_DISTS, "counting", NoiseDist(Counting))
    trainer, _ = trains_and_samples(noise_dist="counting", noise_copies=1)
    assert trainer.noise_dist.count == 2 * TINY["batch_size"]
    resumed = tiny_trainer(random_points(), noise_dist="counting", noise_copies=1)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.noise_dist.count == 2 * TINY["batch_size"]


def test_new_prediction_is_one_entry(monkeypatch):
    monkeypatch.setitem(PREDICTIONS, "residual", lambda alpha, sigma: (alpha, 1.0))
    trainer, x0 = trains_and_samples(prediction="residual")
    assert trainer.config.weighting == "uniform"  # where nothing else is said
    assert x0.isfinite().all()


def test_new_weighting_is_one_entry(monkeypatch):
    monkeypatch.setitem(WEIGHTINGS, "double", lambda log_snr: 2 * WEIGHTINGS["v"](log_snr))
    trainer, _ = trains_and_samples(weighting="double")
    x0 = random_points().test
    twice = trainer.ema_loss(x0, None, 0, "test")
    trainer.config.weighting = "v"
    torch.testing.assert_close(twice, 2 * trainer.ema_loss(x0, None, 0, "test"))


def test_new_loss_is_one_entry(monkeypatch):
    monkeypatch.setitem(LOSSES, "log_cosh", lambda residual: residual.cosh().log())
    trainer, _ = trains_and_samples(loss="log_cosh")
    x0 = random_points().test
    small = trainer.ema_loss(x0, None, 0, "test")
    trainer.config.loss = "mse"
    assert (small <= trainer.ema_loss(x0, None, 0, "test") / 2).all()  # log cosh r <= r^2 / 2


def test_new_sampler_is_one_entry(monkeypatch):
    steps = []

    def counted(x0_hat, x_t, log_snr_t, log_snr_s, *, noise, **_):
        steps.append(noise().shape)
        return ddim(x0_hat, x_t, log_snr_t, log_snr_s)

    record = Sampler(counted, stochastic=True, steps=4, spacing="uniform")
    monkeypatch.setitem(SAMPLERS, "counted", record)
    trainer, _ = trains_and_samples(sampling={"sampler": "counted", "steps": None})
    assert steps == [(6, 2)] * 4
    model = trainer.recalibrated_ema()
    x0 = sample(model, NUMBERS, sampler="counted")
    theirs = sample(model, NUMBERS, sampler="ddim", steps=4, spacing="uniform")
    assert torch.equal(x0, theirs)
    for option in ({"eta": 0.5}, {"s_churn": 1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            SamplerOptions(sampler="counted", **option).resolve(model)


def test_new_threshold_is_one_entry(monkeypatch):
    monkeypatch.setitem(THRESHOLDS, "positive", lambda x0_hat: x0_hat.clamp(0, 1))
    data = random_points(event=(1, 4, 4))
    _, x0 = trains_and_samples(sampling={"threshold": "positive"}, data=data)
    assert x0.min() >= 0


def test_new_network_is_one_entry(monkeypatch):
    monkeypatch.setitem(NETWORKS, "plain", lambda event, num_classes, **_: Foreign(event[0]))
    trainer, x0 = trains_and_samples(network="plain")
    assert isinstance(trainer.model.network, Foreign)
    assert trainer.model.event == (2,)
    assert x0.isfinite().all()


def test_new_preset_is_one_entry(monkeypatch):
    preset = {"channels_base": 8, "blocks_per_level": 1, "noise_copies": 3, "noise_dist": "edm"}
    monkeypatch.setitem(PRESETS, "mine", PRESETS["points"] | preset)
    trainer = Trainer(Config(dataset="mine", batch_size=4), random_points())
    for name, value in preset.items():
        assert getattr(trainer.config, name) == value
    chosen = Trainer(Config(dataset="mine", batch_size=4, noise_copies=1), random_points())
    assert chosen.config.noise_copies == 1
    assert chosen.config.noise_dist == "edm"


def test_an_entry_that_was_removed_is_unknown():
    for field in ("schedule", "noise_dist", "prediction", "weighting", "loss", "network"):
        with pytest.raises(ValueError, match=field):
            Config(**{field: "noisier"})
    for field in ("sampler", "spacing", "threshold"):
        with pytest.raises(ValueError, match=field):
            SamplerOptions(**{field: "noisier"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "nonsense"}, "sampler"),
        ({"spacing": "nonsense"}, "spacing"),
        ({"threshold": "nonsense"}, "threshold"),
        ({"eta": 1.0}, "eta"),  # of the default sampler
        ({"s_churn": 1.0}, "s_churn"),
        ({"cfg_scale": 3.0}, "cfg_scale"),  # without a null label
        ({"steps": 0}, "steps"),
    ],
)
def test_sample_refuses_what_the_command_line_refuses(options, named):
    model = tiny_trainer(random_points()).recalibrated_ema()
    with pytest.raises(ValueError, match=named):
        sample(model, torch.arange(2), **options)


def test_sample_refuses_a_model_in_training_mode():
    trainer = tiny_trainer(random_points())
    with pytest.raises(ValueError, match="training"):
        sample(trainer.model.train(), torch.arange(2))


def test_model_refuses_an_unknown_prediction():
    with pytest.raises(ValueError, match="prediction"):
        DiffusionModel(Schedule(), nn.Identity(), prediction="nonsense", event=(2,))


# ---- what is shown of an object ----


def test_repr_says_what_it_is_without_its_numbers():
    dataset = Dataset("mine", torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 1, 8, 8))
    assert repr(dataset) == "Dataset('mine', items (1, 8, 8): 5 train, 0 val, 3 test)"
    assert "cosine, 1000 steps, shift 2" in repr(Schedule("cosine", shift=2.0))
    assert "flow, continuous time, shift 1" in repr(Schedule("flow", timesteps=0))
    model = tiny_trainer().model
    weights = sum(weight.numel() for weight in model.network.parameters())
    first = repr(model).splitlines()[1].strip()
    assert first == f"{model.prediction}-prediction of items {model.event}, {weights:,} weights"
