"""Samples that begin with what the user gives: pictures or points to reconstruct, to vary, to fill
in.

Each edit of a batch is a change of how ddp.reverse.generate runs: another start `xt`, other levels
`grid`, or a `project` after every step.
"""

import contextlib
import itertools
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddp import pictures
from ddp.data import to_float, to_pixels
from ddp.forward import diffuse, for_all, normal, uniform
from ddp.reverse import class_labels, ddim, denoiser, final

UNREADABLE = (ValueError, EOFError, IndexError, OSError, NotImplementedError)
UNREADABLE += (zipfile.BadZipFile, zlib.error)  # what numpy raises
FRAMES = 8  # of an interpolation, from one end to the other


def read_array(path, names=()):
    """The array in an .npy, or in an .npz the first of `names` that is there, or else its first;
    None when `path` is neither."""
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        return None
    try:
        array = np.load(path)  # no pickles
        if not isinstance(array, np.ndarray):
            found = [name for name in names or array.files if name in array.files]
            if not found:
                raise ValueError(f"it holds no {' or '.join(names)}")
            array = array[found[0]]
        if array.dtype.kind not in "fiub":
            raise ValueError(f"it holds {array.dtype}")
        return array
    except UNREADABLE as error:
        reason = "it holds objects" if "pickle" in str(error) else error
        raise OSError(f"{path} cannot be read as an array of numbers: {reason}") from None


def load_samples(path, event):
    """(items, what to tell about them): samples that some program wrote, uint8 pixels (N, C, H, W)
    or points (N, D), from what `load` reads. Numbers for pixels are refused: nobody knows their
    range."""
    names = ("images", "points", "samples", "arr_0")
    array = read_array(path, names)
    if array is not None and len(event) == 3 and array.dtype != np.uint8:
        raise ValueError(f"{path} holds {array.dtype}; expected uint8 pictures (N, H, W[, C])")
    x0, found = load(path, event, names)
    return to_pixels(x0), found


def load(path, event, names=("images", "points")):
    """(items, what to tell about them): x0 (N, *event) from a picture, a folder or .zip of
    pictures, or an .npy or .npz: uint8 (N, H, W[, C]), or numbers (N, *event) in the units of x0.
    names: of the array in an .npz that holds several.

    Raises OSError when it cannot be read, ValueError when it does not fit."""
    array, is_image = read_array(path, names), len(event) == 3
    if array is None and is_image and "noise" not in names:
        read = pictures.read(path, tuple(event[1:]), event[0])
        return to_float(read.items), read.found
    if array is None:
        raise ValueError(
            f"{path}: expected an .npy or .npz of shape (N, {', '.join(map(str, event))})"
        )
    if array.dtype == np.uint8 and is_image:
        pixels = array[..., None] if array.ndim == 3 else array
        x0 = to_float(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()))
    else:
        x0 = torch.from_numpy(array.astype(np.float32))
    fits = tuple(x0.shape[1:]) == tuple(event) and len(x0) and x0.isfinite().all()
    if is_image and fits and "noise" not in names and x0.abs().max() > 1.01:
        raise ValueError(f"{path} holds {array.dtype} beyond -1 to 1; pixels to 255 are uint8")
    if not fits:
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}; expected finite items of shape {event}, or "
            "uint8 pictures (N, H, W, C)"
        )
    return x0, [f"{len(x0)} items in {path}"]


def load_mask(path, event):
    """The part to fill in, bool, (N, *event) or spread over it: where a picture is light, or an
    array (N, H, W), (H, W), (N, D) or (D,) is not zero."""
    array = read_array(path)
    if array is None:
        mask = load(path, (1, *event[1:]))[0] > 0
    else:
        mask = torch.from_numpy(array.astype(bool))
        mask = mask[None] if mask.ndim < max(len(event), 2) else mask
        mask = mask[:, None] if len(event) == mask.ndim == 3 else mask
    channels = (1, event[0]) if len(event) == 3 else (event[0],)
    if mask.shape[1] not in channels or tuple(mask.shape[2:]) != tuple(event[1:]):
        raise ValueError(f"--mask {path}: {tuple(mask.shape)} does not fit items of {event}")
    if not mask.any() or mask.all():
        raise ValueError(f"--mask {path}: expected some of it light, to fill in, and some dark")
    return mask


def inverted(denoise, x0, model, grid):
    """The noise from which ddim comes to x0, and the levels between: ddim's step, backwards. Song
    et al. 2021, section 4.3. x0 is taken to stand at the schedule's cleanest level.

    Returns (xT, levels): xT (B, *event), levels rising from grid[0] to that level."""
    clean = model.schedule.log_snr(0.0).detach().cpu()
    levels = torch.cat([grid[grid < clean], clean[None]])
    if len(levels) < 2:
        raise ValueError("--steps 1 from the schedule's only level cannot be inverted; use more")
    xt = x0
    for log_snr, next_log_snr in itertools.pairwise(levels.flip(0)):
        x0_hat = denoise(xt, for_all(log_snr, xt))
        xt = ddim(x0_hat, xt, log_snr, next_log_snr)
    return xt, levels


def slerp(a, b, share):
    """From a to b, (B, *event), along the great circle: share (B,) of the way. In many dimensions
    noise lies on a sphere, and the straight line would leave it (Song et al. 2021, appendix
    D.5)."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = torch.acos(torch.cosine_similarity(flat_a, flat_b).clamp(-1 + 1e-6, 1 - 1e-6))[:, None]
    share = share.to(a)[:, None]
    path = torch.sin((1 - share) * angle) * flat_a + torch.sin(share * angle) * flat_b
    return (path / torch.sin(angle)).reshape(a.shape)


def image_to_image(x0, grid, strength, seed, indices):
    """Noised to the level at `strength` of the way, then denoised. Meng et al. 2022, algorithm
    1."""
    grid = grid[-(max(1, round(strength * (len(grid) - 1))) + 1) :]
    eps = normal(seed, "start", 0, indices, x0.shape[1:])
    return {"xt": diffuse(x0, grid[0], eps), "grid": grid}


def inpaint(x0, mask, grid, jump, resample, seed, indices):
    """What `mask` does not cover is put back after every step, noised to its level; every `jump`
    steps the last of them are undone and done again, `resample` times in all. Lugmayr et al. 2022,
    algorithm 1."""
    path, draws = [*grid[:1]], itertools.count(1)
    last = len(grid) - 2  # before the clean level
    for i in range(1, len(grid)):
        path.append(grid[i])
        if i >= jump and i <= last and (last - i) % jump == 0:
            path += [*grid[i - jump : i + 1]] * (resample - 1)

    def project(xs, log_snr):
        eps = normal(seed, "start", next(draws), indices, x0.shape[1:])
        return torch.where(mask, xs, diffuse(x0, log_snr, eps))

    return {"grid": torch.stack(path), "project": project}


def dropouts(model):
    """The dropout layers of a model. Raises ValueError when there are none."""
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    if not modules:
        raise ValueError("--mc_dropout needs a model that was trained with --dropout; this was not")
    return modules


@contextlib.contextmanager
def dropout(model, seed, indices, number):
    """Dropout as in training, in a model that is in eval mode: pass `number` of the Monte Carlo
    dropout of Gal & Ghahramani 2016. Masks are keyed by (seed, pass, call, index of the item)."""
    calls = itertools.count(number << 16)

    def drop(module, args, _):
        (x,) = args
        u = uniform(seed, "step", next(calls), indices.to(x.device), x.shape[1:])
        return x * (u >= module.p) / (1 - module.p)

    handles = [module.register_forward_hook(drop) for module in dropouts(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Edit:
    """What generate.py is asked to do with each batch: `args` are its flags, `options` those of
    ddp.reverse.generate.

    given: x0 (M, *event) of the user, or None; sample i is made from item i mod M. count: samples
    when their number is left open. found: what to tell of the items. shown: how figures.overview
    shows them."""

    def __init__(self, model, args, options):
        self.model, self.args, self.options = model, args, options
        self.squares, self.start, self.shown = [], None, {}
        path = args.image or args.inpaint or args.reconstruct or args.interpolate
        self.given, self.found = load(path, model.event) if path else (None, [])
        self.noise = load(args.noise, model.event, ["noise"])[0] if args.noise else None
        self.mask = load_mask(args.mask, model.event) if args.mask else None
        items = self.noise if self.given is None else self.given
        self.count = 64 if items is None else len(items)
        if args.interpolate is not None:
            self.shown = {"columns": FRAMES}
            self.count = 64 if items is None else FRAMES * (self.count - 1)
            if not self.count:
                raise ValueError("--interpolate: one item has no other to go to; give two or more")
        titles = {"image": "varied", "inpaint": "filled in", "reconstruct": "reconstructed"}
        for name, title in titles.items():
            if getattr(args, name):
                self.shown = {"titles": (title, "given")}
        if self.mask is not None and len(self.mask) not in (1, len(self.given)):
            raise ValueError(f"--mask: {len(self.mask)} masks for {len(self.given)} items")
        self.users = self.given is not None or self.noise is not None
        if self.users and model.classes and not (args.label or model.drops_label):
            raise ValueError("give --label: this model was never trained without one")
        if args.mc_dropout:
            dropouts(model)
            self.shown = {"titles": (f"mean of {args.mc_dropout}", "spread: white is 0.5 or more")}
        if (args.reconstruct or args.interpolate or args.noise) and args.steps is None:
            options["steps"] = min(100, model.schedule.timesteps or 100)
        self.jump = args.jump or max(1, min(10, options["steps"] // 2))
        if args.jump and args.jump >= options["steps"]:
            raise ValueError(
                f"--jump {args.jump}: expected fewer than the {options['steps']} steps"
            )

    def label(self, indices, chosen):
        """Labels (B,) or None: `chosen` ones or all, in turn; none for items that are the user's,
        of which only the user knows them."""
        if self.users and chosen is None:
            return None
        if self.args.interpolate is not None:
            indices = indices // FRAMES
        return class_labels(self.model, indices, chosen)

    def changes(self, indices, label):
        """The keyword arguments that make `generate` do the edit for samples `indices` (B,)."""
        args, event, device = self.args, self.model.event, indices.device
        grid = self.model.schedule.grid(self.options["steps"], self.options["spacing"])
        if args.noise:
            return {"xt": self.noise[indices.cpu() % len(self.noise)].to(device)}
        if args.interpolate is not None:
            row, share = indices // FRAMES, (indices % FRAMES) / (FRAMES - 1)
            if self.given is None:
                ends = [normal(args.seed, "start", 0, 2 * row + k, event) for k in (0, 1)]
                return {"xt": slerp(*ends, share)}
            # a row's frames have one label and the same ends, which are inverted once
            rows, back = row.unique(return_inverse=True)
            label = None if label is None else label[(row == rows[:, None]).int().argmax(dim=1)]
            (first, levels), (last, _) = (self.inverted(rows + k, label, grid) for k in (0, 1))
            return {"xt": slerp(first[back], last[back], share), "grid": levels}
        if self.given is None:
            return {}
        x0 = self.given[indices.cpu() % len(self.given)].to(device)
        if args.reconstruct:
            self.start, levels = self.inverted(indices, label, grid)
            return {"xt": self.start, "grid": levels}
        if args.image:
            strength = 0.5 if args.strength is None else args.strength
            return image_to_image(x0, grid, strength, args.seed, indices)
        mask = self.mask[indices.cpu() % len(self.mask)].to(device)
        return inpaint(x0, mask, grid, self.jump, args.resample or 5, args.seed, indices)

    @torch.no_grad()
    def inverted(self, indices, label, grid):
        """(xT, levels) of the given items `indices` (B,)."""
        names = ("guidance", "guidance_interval", "guidance_rescale", "guide", "clip")
        denoise = denoiser(self.model, label, **{name: self.options[name] for name in names})
        x0 = self.given[indices.cpu() % len(self.given)].to(indices.device)
        return inverted(denoise, x0, self.model, grid)

    def finish(self, indices, states):
        """(x0, what to show beside it, arrays to keep) of samples `indices` (B,), run by `states`.

        Raises FloatingPointError when a sample is not finite."""
        beside, kept = None, {}
        if self.args.mc_dropout:
            passes = []
            for k in range(self.args.mc_dropout):
                with dropout(self.model, self.args.seed, indices, k):
                    passes.append(final(states(indices)))
            spread, x0 = torch.std_mean(torch.stack(passes), dim=0)
            beside = to_pixels(4 * spread - 1).cpu() if self.model.is_image else None
            kept = {"std": spread}
        else:
            x0 = final(states(indices))
        if not x0.isfinite().all():
            raise FloatingPointError(
                "samples became infinite; try less --guidance, or other --steps"
            )
        if self.given is not None and not self.args.interpolate:
            given = self.given[indices % len(self.given)].to(x0.device)
            if self.args.reconstruct:
                self.squares.append(((x0 - given) ** 2).flatten(1).mean(dim=1).cpu())
                kept = {"noise": self.start}
            if self.args.inpaint:
                given = given.where(~self.mask[indices % len(self.mask)].to(given.device), 0.0)
            beside = to_pixels(given).cpu()
        return x0, beside, kept

    def report(self):
        """What to tell when all is done, a list of lines."""
        if not self.squares:
            return []
        error = torch.cat(self.squares).sqrt()
        return [
            f"root mean square error {error.mean():.4f}, at most {error.max():.4f}, in units of x0"
        ]
