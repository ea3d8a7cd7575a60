"""Data whose denoiser, density and samples are known, and a model that uses them.

    data = GaussianMixture(torch.tensor([[1.0, 0.5], [-0.8, 0.9]]), sd=0.3)
    model = OracleModel(data, Schedule("cosine", 1000))
    x0 = data.sample(100)                       # (100, 2)
    x0_hat = model.denoise(x_t, log_snr)        # E[x0 | x_t], exactly
    nats = -data.log_prob(x0)                   # what a likelihood must come out as

Every `denoise` takes x_t (B, *event), log_snr 0-d or (B,), and a label, and gives x0_hat like x_t.
"""

import math

import torch

from ddp.forward import alpha_sigma


class Gaussian:
    """Independent N(mean, sd^2) in every number of an item."""

    def __init__(
        self,
        mean=0.0,  # a float
        sd=1.0,  # a float
        event=(2,),  # shape of one item
    ):
        self.mean = mean
        self.sd = sd
        self.event = tuple(event)

    def denoise(self, x_t, log_snr, label=None):
        alpha, sigma = alpha_sigma(log_snr, x_t)
        variance = alpha**2 * self.sd**2 + sigma**2  # of x_t
        gain = alpha * self.sd**2 / variance  # covariance of x0 and x_t, over that
        return self.mean + gain * (x_t - alpha * self.mean)

    def log_prob(self, x0):
        """The log-density in nats, (B,)."""
        normal = torch.distributions.Normal(self.mean, self.sd)
        return normal.log_prob(x0).flatten(1).sum(dim=1)

    def vlb(self, clean, noisy):
        """The bound between two levels and its diffusion term alone, floats, nats a dimension.

        In continuous time, with the reconstruction term of x_t / alpha."""
        level = torch.linspace(noisy, clean, 20_001, dtype=torch.float64)
        signal = level.exp() * self.sd**2
        rate = 0.5 * signal / (1 + signal)  # SNR / 2 E|x0 - x0_hat|^2
        diffusion = torch.trapezoid(rate, level).item()
        sigma2 = 1 / (1 + math.exp(noisy))
        prior = (1 - sigma2) * (self.mean**2 + self.sd**2) + sigma2 - 1 - math.log(sigma2)
        reconstruction = 1 + math.log(2 * math.pi) - clean
        return 0.5 * prior + diffusion + 0.5 * reconstruction, diffusion

    def sample(self, count, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return self.mean + self.sd * torch.randn(
            count, *self.event, generator=generator, dtype=dtype
        )


class CorrelatedGaussian:
    """N(0, covariance): the Jacobian of its denoiser is not diagonal."""

    def __init__(
        self,
        covariance,  # (D, D), symmetric, positive definite
    ):
        self.covariance = covariance
        self.event = (len(covariance),)
        self.values, self.vectors = torch.linalg.eigh(covariance)  # (D,), (D, D)

    def denoise(self, x_t, log_snr, label=None):
        alpha, sigma = alpha_sigma(log_snr, x_t)
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)  # along each eigenvector
        return (x_t @ self.vectors * gain) @ self.vectors.T

    def log_prob(self, x0):
        """The log-density in nats, (B,)."""
        mean = torch.zeros_like(x0[0])
        return torch.distributions.MultivariateNormal(mean, self.covariance).log_prob(x0)

    def sample(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(count, *self.event, generator=generator).to(self.covariance)
        return normal @ (self.vectors * self.values.sqrt()).T


class GaussianMixture:
    """A mixture of Gaussians of one standard deviation; a label names the component."""

    def __init__(
        self,
        means,  # (K, *event)
        sd,  # a float, the same for all components
        weights=None,  # (K,), sum 1; equal when None
    ):
        self.means = means
        self.sd = sd
        self.event = tuple(means.shape[1:])
        self.weights = torch.full((len(means),), 1 / len(means)).to(means)
        if weights is not None:
            self.weights = weights

    def denoise(self, x_t, log_snr, label=None):
        """E[x0 | x_t] or, of items with a label (B,) below K, E[x0 | x_t, label]."""
        x = x_t.flatten(1)  # (B, D)
        means = self.means.flatten(1).to(x)  # (K, D)
        alpha, sigma = alpha_sigma(log_snr, x)  # () or (B, 1)
        variance = alpha**2 * self.sd**2 + sigma**2  # of x_t within a component
        offset = x[:, None] - alpha[..., None] * means  # (B, K, D), from each component's mean
        logits = self.weights.log().to(x) - offset.square().sum(dim=2) / (2 * variance)  # (B, K)
        if label is not None:
            components = torch.arange(len(means)).to(label)
            other = (label[:, None] != components) & (label[:, None] < len(means))
            logits = logits.masked_fill(other, -math.inf)
        probability = logits.softmax(dim=1)  # p(component | x_t)
        gain = alpha * self.sd**2 / variance  # () or (B, 1)
        component_x0 = means + gain[..., None] * offset  # (B, K, D), E[x0 | x_t, component]
        x0_hat = (probability[..., None] * component_x0).sum(dim=1)
        return x0_hat.reshape(x_t.shape)

    def log_prob(self, x0, label=None):
        """The log-density in nats, (B,), given the label (B,) if there is one."""
        offset = x0.flatten(1)[:, None] - self.means.flatten(1).to(x0)  # (B, K, D)
        dimensions = offset.shape[2]
        log_norm = dimensions / 2 * math.log(2 * math.pi * self.sd**2)
        each = -offset.square().sum(dim=2) / (2 * self.sd**2) - log_norm  # (B, K)
        if label is not None:
            return each.gather(1, label[:, None])[:, 0]
        return torch.logsumexp(each + self.weights.log().to(x0), dim=1)

    def sample(self, count, seed=0, label=None):
        """(count, *event), of the components `label` (count,) or of random ones."""
        generator = torch.Generator().manual_seed(seed)
        if label is None:
            label = self.weights.multinomial(count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.event, generator=generator, dtype=self.means.dtype)
        return self.means[label] + self.sd * noise

    def mean(self):
        """The mean of the mixture, (*event)."""
        return (self.weights.reshape(-1, *[1] * len(self.event)) * self.means).sum(dim=0)

    def covariance(self):
        """The covariance of the mixture, (D, D)."""
        offset = (self.means - self.mean()).flatten(1)  # (K, D)
        within = self.sd**2 * torch.eye(offset.shape[1]).to(offset)
        return offset.T @ (self.weights[:, None] * offset) + within


class OracleModel:
    """Stands in for a DiffusionModel whose network has learned `data` perfectly."""

    training = False

    def __init__(
        self,
        data,  # one of the classes above, or anything with event and denoise
        schedule,  # a ddp.schedule.Schedule
        num_classes=0,  # labels that it is conditional on
        has_null_label=False,  # whether it denoises without a label, too
    ):
        self.data = data
        self.schedule = schedule
        self.event = data.event
        self.num_classes = num_classes
        self.has_null_label = has_null_label
        self.units = None

    @property
    def is_image(self):
        return len(self.event) == 3

    @property
    def is_pixels(self):
        return self.is_image and self.units is None

    @property
    def device(self):
        return torch.device("cpu")

    def denoise(self, x_t, log_snr, label=None):
        return self.data.denoise(x_t, log_snr, label)

    def parameters(self):
        return iter([torch.zeros(1)])  # tells the device

    def for_inference(self, dtype=torch.float32):
        return self

    def eval(self):
        return self


class WithoutFloat64(torch.Tensor):
    """A tensor of a device without float64, such as Apple's MPS."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def edm_target(x0, eps, log_snr):
    """What EDM's network is to predict of y = x0 + s eps, s = sigma / alpha, with sigma_data = 0.5.

    Karras et al. 2022, eqs. 7 and 8, table 1."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    s = sigma / alpha
    c_skip = 0.5**2 / (s**2 + 0.5**2)
    c_out = s * 0.5 / (s**2 + 0.5**2).sqrt()
    return (x0 - c_skip * (x0 + s * eps)) / c_out
