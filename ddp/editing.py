"""Editing: samples that begin with what the user gives. Optional reading.

An edit is a function (inputs, indices (B,), label) -> keyword arguments of sampling.sample:
another start `x_t`, another `grid`, or a `project` after every step. MC dropout, at the end, is
another loop.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ddp.forward import q_sample
from ddp.rng import normal, uniform
from ddp.sampling import cycle_labels, ddim, make_denoiser, sample

FRAMES = 8  # of an interpolation, from one end to the other


@dataclass
class EditInputs:
    """What an edit works on."""

    model: object  # a DiffusionModel
    options: dict  # keyword arguments of sampling.sample, as SamplerOptions.resolve returns them
    seed: int = 0
    name: str | None = None  # a key of EDITS; None: plain samples
    items: torch.Tensor | None = None  # (M, *event) x0 of the user; sample i edits item i mod M
    latents: torch.Tensor | None = None  # (M, *event) noise to start from
    mask: torch.Tensor | None = None  # (1 or M, *event) bool: what to fill in
    strength: float = 0.7  # of SDEdit; measured, see docs/sampling.md
    jump_length: int = 10  # of RePaint
    jump_n_sample: int = 5

    @property
    def grid(self):
        """The schedule's sampling grid, (steps + 1,) log_snr."""
        return self.model.schedule.sampling_grid(self.options["steps"], self.options["spacing"])

    def take(self, tensor, indices):
        """Return the entries of a tensor (M, ...) for samples `indices` (B,), on the device."""
        return tensor[indices.cpu() % len(tensor)].to(self.model.device)

    def labels(self, indices, chosen):
        """Return the labels of samples `indices`; None for the user's items, if none is chosen.

        Only the user knows the class of theirs."""
        if chosen is None and (self.items is not None or self.latents is not None):
            return None
        row = indices // FRAMES if self.name == "interpolate" else indices
        return cycle_labels(self.model, row, chosen)

    def given(self, indices):
        """Return what the user gave for samples `indices`, the part to fill in left gray."""
        items = self.take(self.items, indices)
        return items if self.mask is None else items.where(~self.take(self.mask, indices), 0.0)

    @torch.no_grad()
    def invert(self, indices, label):
        """Return (x_T, grid) of the user's items for samples `indices`; see ddim_invert."""
        names = ("threshold", "cfg_scale", "guidance_interval", "guidance_rescale", "guide")
        denoise = make_denoiser(self.model, label, **{n: self.options[n] for n in names})
        return ddim_invert(denoise, self.take(self.items, indices), self.model.schedule, self.grid)


def sdedit(inputs, indices, label):
    """Noise the items to `strength` of the way, then denoise (Meng et al. 2022, algorithm 1)."""
    grid = inputs.grid
    steps = max(1, round(inputs.strength * (len(grid) - 1)))
    grid = grid[-(steps + 1) :]
    x0 = inputs.take(inputs.items, indices)
    eps = normal(inputs.seed, "x_T", 0, indices.to(x0.device), inputs.model.event)
    return {"x_t": q_sample(x0, grid[0], eps), "grid": grid}


def repaint(inputs, indices, label):
    """Inpaint: after every step put back what the mask does not cover, noised to the level.

    Every `jump_length` steps the last of them are undone and done again, `jump_n_sample` times in
    all. RePaint: Lugmayr et al. 2022, algorithm 1."""
    grid = inputs.grid
    jump = inputs.jump_length
    last = len(grid) - 2  # the index before the clean level
    path = [grid[0]]
    for i in range(1, len(grid)):
        path.append(grid[i])
        if jump <= i <= last and (last - i) % jump == 0:
            path += [*grid[i - jump : i + 1]] * (inputs.jump_n_sample - 1)
    x0 = inputs.take(inputs.items, indices)
    mask = inputs.take(inputs.mask, indices)
    indices = indices.to(x0.device)
    counter = itertools.count()

    def project(x_s, log_snr_s):
        eps = normal(inputs.seed, "repaint", next(counter), indices, inputs.model.event)
        return torch.where(mask, x_s, q_sample(x0, log_snr_s, eps))

    return {"grid": torch.stack(path), "project": project}


def reconstruct(inputs, indices, label):
    """Invert the items to their noise by DDIM, and come back."""
    x_T, grid = inputs.invert(indices, label)
    return {"x_t": x_T, "grid": grid}


def from_latents(inputs, indices, label):
    """Start from the user's noise."""
    return {"x_t": inputs.take(inputs.latents, indices)}


def interpolate(inputs, indices, label):
    """Interpolate between two noises, of new samples or of the user's items: FRAMES a row."""
    row = indices // FRAMES
    weight = (indices % FRAMES) / (FRAMES - 1)
    if inputs.items is None:
        row = row.to(inputs.model.device)
        ends = [normal(inputs.seed, "x_T", 0, 2 * row + k, inputs.model.event) for k in (0, 1)]
        return {"x_t": slerp(*ends, weight)}
    # a row's frames have one label and the same ends, which are inverted once
    rows, row_of_frame = row.unique(return_inverse=True)
    if label is not None:
        first_frame = (row == rows[:, None]).int().argmax(dim=1)  # (rows,)
        label = label[first_frame]
    first, grid = inputs.invert(rows, label)
    last, _ = inputs.invert(rows + 1, label)
    return {"x_t": slerp(first[row_of_frame], last[row_of_frame], weight), "grid": grid}


def ddim_invert(denoise, x0, schedule, grid):
    """Return (x_T, grid): the noise from which DDIM comes to x0, and the levels on the way.

    DDIM's step, backward (Song et al. 2021, section 4.3). x0 is taken to stand at the schedule's
    cleanest level, to which the returned grid rises."""
    clean = schedule.log_snr(0.0).detach().cpu()
    grid = torch.cat([grid[grid < clean], clean[None]])
    if len(grid) < 2:
        raise ValueError("steps=1 from the schedule's only level cannot be inverted; use more")
    x_t = x0
    for log_snr_s, log_snr_t in itertools.pairwise(grid.flip(0)):  # t is noisier
        x0_hat = denoise(x_t, log_snr_s.to(x_t))
        x_t = ddim(x0_hat, x_t, log_snr_s, log_snr_t)
    return x_t, grid


def slerp(a, b, weight):
    """Interpolate from a to b, (B, *event), along the great circle; weight (B,), 0 to 1.

    In many dimensions noise lies on a sphere, which the straight line would leave (Song et al.
    2021, appendix D.5)."""
    flat_a = a.flatten(1)
    flat_b = b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)[:, None]  # (B, 1)
    weight = weight.to(a)[:, None]
    path = torch.sin((1 - weight) * angle) * flat_a + torch.sin(weight * angle) * flat_b
    return (path / torch.sin(angle)).reshape(a.shape)


@dataclass(frozen=True)
class Edit:
    function: Callable  # (inputs, indices (B,), label) -> keyword arguments of sampling.sample
    help: str
    reads: str = "items"  # what the user gives: items or latents
    optional: bool = False  # works without that, too
    title: str | None = None  # of the results in a grid that also shows what was given
    keeps_latents: bool = False  # the noise goes into the .npz, and the error is told
    inverts: bool = False  # by DDIM, where the user gives items
    deterministic: bool = False  # needs a sampler without noise
    steps: int | None = None  # default, at most the schedule's
    defaults: dict = field(default_factory=dict)  # of SamplerOptions, where the user gives items


IMAGES = "an image, a folder or .zip of them, or an .npy or .npz"
FAITHFUL = {"sampler": "ddim", "threshold": "none", "precision": "fp32"}
WITHOUT_NOISE = "unipc"  # the sampler of edits in which new noise would get in the way

EDITS = {
    "image": Edit(
        sdedit, f"vary {IMAGES} (SDEdit)", title="varied", defaults={"sampler": WITHOUT_NOISE}
    ),
    "inpaint": Edit(
        repaint,
        f"fill in the mask of {IMAGES} (RePaint)",
        title="filled in",
        defaults={"sampler": "ddpm"},
    ),
    "reconstruct": Edit(
        reconstruct,
        f"take {IMAGES} to its noise by DDIM, and back",
        title="reconstructed",
        keeps_latents=True,
        inverts=True,
        deterministic=True,
        steps=100,
        defaults=FAITHFUL,
    ),
    "latents": Edit(
        from_latents,
        "start from this noise, an .npz that a reconstruction wrote",
        reads="latents",
        steps=100,
        defaults=FAITHFUL,
    ),
    "interpolate": Edit(
        interpolate,
        "interpolate between samples, or between these",
        optional=True,
        inverts=True,
        deterministic=True,
        steps=100,
        defaults=FAITHFUL,
    ),
}


def changes(inputs, indices, label):
    """Return what the edit changes of sampling.sample's keyword arguments: nothing without one."""
    return EDITS[inputs.name].function(inputs, indices, label) if inputs.name else {}


def edited_samples(inputs, indices, label):
    """Return (x0, given, latents) of samples `indices` (B,), edited; plain, if `inputs` name none.

    given: what the user gave for them, or None; latents: the noise they began with, or None."""
    edit = EDITS.get(inputs.name)
    changed = changes(inputs, indices, label)
    x0 = sample(inputs.model, indices, inputs.seed, label, **{**inputs.options, **changed})
    given = inputs.given(indices) if edit and edit.title else None
    latents = changed["x_t"] if edit and edit.keeps_latents else None
    return x0, given, latents


# ---- Monte Carlo dropout ----


def dropout_layers(model):
    """Return the dropout layers of a model. Raises ValueError when there are none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    if not layers:
        raise ValueError("mc_dropout needs a model that was trained with dropout; this one was not")
    return layers


@contextlib.contextmanager
def mc_dropout(model, seed, indices):
    """Drop activations as in training, in a model in eval mode (Gal & Ghahramani 2016).

    Masks are keyed by (seed, number of the call, index of the item)."""
    counter = itertools.count()

    def drop(module, inputs, _):
        (x,) = inputs
        u = uniform(seed, "mc_dropout", next(counter), indices.to(x.device), x.shape[1:])
        return x * (u >= module.p) / (1 - module.p)

    handles = [layer.register_forward_hook(drop) for layer in dropout_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_mc_dropout(model, indices, seed, label, passes, **options):
    """Return the standard deviation and the mean over `passes` samples with dropout."""
    samples = []
    with mc_dropout(model, seed, indices):
        for _ in range(passes):
            samples.append(sample(model, indices, seed, label, **options))
    return torch.std_mean(torch.stack(samples), dim=0)
