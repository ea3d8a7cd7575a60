"""The two networks as one: what the output means, and the copy that is made for inference."""

import pytest
import torch
from oracles import edm_target
from torch import nn

from ddp.blocks import NORMS
from ddp.config import Config
from ddp.forward import alpha_sigma, q_sample
from ddp.model import PREDICTIONS, DiffusionModel, build_model
from ddp.schedule import Schedule

EVENTS = [(1, 8, 8), (2, 9), (2,)]


class Fixed(nn.Module):
    """A network whose output is given, whatever it sees."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x_t, log_snr, label=None):
        return self.output


def targets(x0, eps, log_snr):
    """Return what each prediction is of, in its paper's terms."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    known = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    return known | {"edm": edm_target(x0, eps, log_snr)}


def small_model(event, num_classes=0, seed=0, **fields):
    """Return a DiffusionModel with random weights and BatchNorm statistics, in eval mode."""
    torch.manual_seed(seed)
    mult = [1, 2] if len(event) == 3 else [1]
    config = Config(channels_base=16, blocks_per_level=2, channel_mult=mult, init="default")
    for name, value in {"patch_size": 1, **fields}.items():
        setattr(config, name, value)
    model = build_model(config, event, num_classes).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.requires_grad_(False)


def noised_items(event, count=64):
    """Return x_t (B, *event) and the log_snr (B,) of each item."""
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, count, *event, generator=generator)
    log_snr = torch.linspace(-6, 6, count)
    return q_sample(x0.clamp(-1, 1), log_snr, eps), log_snr


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_gives_x0_back_for_the_right_output(prediction):
    x0, eps = torch.randn(2, 16, 3, 4, 5, dtype=torch.float64)
    log_snr = torch.linspace(-8, 8, 16, dtype=torch.float64)
    output = targets(x0, eps, log_snr)[prediction]
    model = DiffusionModel(Schedule(), Fixed(output), prediction, (3, 4, 5))
    torch.testing.assert_close(model.denoise(q_sample(x0, log_snr, eps), log_snr), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_hat_is_made_in_the_dtype_of_x_t_whatever_the_network_computes_in(prediction):
    """What bfloat16 costs is the error of its output, times c_out: most of all of eps."""
    x_t = torch.randn(16, 2)
    output = torch.randn(16, 2).bfloat16()
    log_snr = torch.tensor(-8.0)
    model = DiffusionModel(Schedule(), Fixed(output), prediction, (2,))
    c_skip, c_out = PREDICTIONS[prediction](*alpha_sigma(log_snr, x_t))
    expected = c_skip * x_t + c_out * output.float()
    x0_hat = model.denoise(x_t, log_snr)
    assert x0_hat.dtype == torch.float32
    assert torch.equal(x0_hat, expected)
    gain = abs(float(c_out))
    assert (gain > 50) == (prediction == "eps")  # 2^-9 of it is a tenth of the range
    assert gain <= 1 or prediction == "eps"


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm"])
def test_denoise_of_noise_alone_is_finite(prediction):
    """As zero_terminal_snr needs; eps says nothing of x0 there, and Config refuses it."""
    output = torch.randn(3, 2)
    model = DiffusionModel(Schedule(), Fixed(output), prediction, (2,))
    x0_hat = model.denoise(torch.randn(3, 2), torch.tensor(-torch.inf))
    assert x0_hat.isfinite().all()


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_of_a_level_for_all_equals_a_level_for_each(event, num_classes, prediction):
    model = small_model(event, num_classes, prediction=prediction)
    x_t, _ = noised_items(event, 6)
    label = torch.arange(6) % 3 if num_classes else None
    for level in (-6.0, 0.0, 6.0):
        log_snr = torch.tensor(level)
        for_all = model.denoise(x_t, log_snr, label)
        for_each = model.denoise(x_t, log_snr.expand(6), label)
        torch.testing.assert_close(for_all, for_each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("event", EVENTS)
def test_event_is_the_networks_own_where_it_says(event):
    model = small_model(event)
    assert DiffusionModel(Schedule(), model.network).event == event
    assert model.is_image == (len(event) == 3)


def test_event_is_needed_where_the_network_says_nothing():
    with pytest.raises(ValueError, match="event"):
        DiffusionModel(Schedule(), nn.Linear(2, 2))


def test_null_label_is_there_where_labels_were_dropped():
    for num_classes, label_dropout, expected in ((3, 0.1, True), (3, 0.0, False), (0, 0.1, False)):
        model = small_model((2,), num_classes, label_dropout=label_dropout)
        assert model.has_null_label == expected
        assert model.num_classes == num_classes


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # of float32 the rounding, of the 8 bits of bfloat16 a twentieth
    [(torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("event", EVENTS)
def test_for_inference_denoises_alike(event, norm, dtype, tolerance):
    attention = {"attention_resolutions": [4]} if len(event) == 3 else {}
    model = small_model(event, norm=norm, channels_base=32, **attention)
    x_t, log_snr = noised_items(event)
    expected = model.denoise(x_t, log_snr)
    scale = expected.abs().max()
    ready = model.for_inference(dtype)
    x0_hat = ready.denoise(x_t, log_snr)
    assert x0_hat.dtype == torch.float32
    assert (x0_hat - expected).abs().max() < tolerance * scale
    if norm == "batch":
        assert not torch.equal(x0_hat, expected)  # something was fused
    for level in (-6.0, 0.0, 6.0):  # one for all, as samplers have it
        for_all = ready.denoise(x_t, torch.tensor(level))
        for_each = model.denoise(x_t, torch.full((64,), level))
        assert (for_all - for_each).abs().max() < tolerance * scale
        fewer = ready.denoise(x_t[:2], torch.tensor(level))
        assert (fewer - for_all[:2]).abs().max() < tolerance * scale


@pytest.mark.parametrize("event", EVENTS)
def test_for_inference_leaves_no_batchnorm_and_a_float32_embedding(event):
    model = small_model(event)
    ready = model.for_inference(torch.bfloat16)
    kinds = [isinstance(m, nn.modules.batchnorm._BatchNorm) for m in ready.modules()]
    assert not any(kinds)
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    _, log_snr = noised_items(event)
    assert torch.equal(ready.network.embedding(log_snr), model.network.embedding(log_snr))
    for name, parameter in ready.network.named_parameters():
        embedding = name.startswith("embedding.")
        assert parameter.dtype == (torch.float32 if embedding else torch.bfloat16), name


@pytest.mark.parametrize("event", EVENTS)
def test_for_inference_is_a_copy_and_may_be_repeated(event):
    model = small_model(event)
    x_t, log_snr = noised_items(event)
    before = model.denoise(x_t, log_snr)
    ready = model.for_inference(torch.bfloat16)
    assert torch.equal(model.denoise(x_t, log_snr), before)
    again = ready.for_inference(torch.bfloat16)
    assert torch.equal(again.denoise(x_t, log_snr), ready.denoise(x_t, log_snr))


def test_for_inference_copies_a_foreign_network_as_it_is():
    model = DiffusionModel(Schedule(), nn.Bilinear(2, 1, 2), "x0", (2,))
    ready = model.for_inference(torch.bfloat16)
    assert not ready.training
    for a, b in zip(model.parameters(), ready.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.dtype == torch.float32
        assert not b.requires_grad
