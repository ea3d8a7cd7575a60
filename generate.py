"""Draw samples, or edit pictures: python generate.py --checkpoint checkpoints/digits.pth"""

import argparse
import dataclasses
import signal
import sys
import time

import torch
from tqdm import tqdm

from ddp import config, data, device, editing, output, reverse
from ddp.checkpoint import load_model

PATHS = ("image", "inpaint", "reconstruct", "noise", "mask")
PICTURES = "a picture, a folder or .zip of them, or an .npy or .npz: "


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)

    def add(name, to=parser, **kwargs):
        to.add_argument(*config.spellings(name), dest=name, **kwargs)

    add("checkpoint", required=True, help="a checkpoint that train.py wrote")
    add("num_samples", type=int, help="(default: 64, or one for each item that is edited)")
    config.add_flags(parser, config.Sampling)
    add("seed", type=int, default=0, help="sample i is a function of the seed and i (default: 0)")
    add("label", help="classes by name or number, such as 3 or 3,5 (default: all, in turn)")
    add("out", help="a new folder, or a file .png, .npz or .gif (default: beside the checkpoint)")
    add("format", help=f"some of {','.join(output.FORMATS)} (default: grid)")
    add("batch_size", type=int, default=256, help="samples at a time; no sample depends on it")
    add("device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("weights", choices=("ema", "raw"), default="ema", help="averaged or raw (default: ema)")
    edits = parser.add_argument_group("editing, one of").add_mutually_exclusive_group()
    add("image", edits, metavar="PATH", help=PICTURES + "vary it, as much as --strength says")
    add("inpaint", edits, metavar="PATH", help=PICTURES + "fill in what --mask covers")
    add("reconstruct", edits, metavar="PATH", help=PICTURES + "to its noise by ddim, and back")
    add("noise", edits, metavar="PATH", help="start from this noise, an .npz of --reconstruct")
    add("interpolate", edits, nargs="?", const="", metavar="PATH", help="between samples, or these")
    add("mc_dropout", edits, type=int, metavar="K", help="mean and spread of K passes with dropout")
    add("strength", type=float, help="of --image: above 0, to 1, which forgets it (default: 0.5)")
    add("mask", help="of --inpaint: a picture or an array; what is light is filled in")
    add("jump", type=int, help="of --inpaint: steps that are undone at a time (default: 10)")
    add("resample", type=int, help="of --inpaint: how often each is done (default: 5)")
    return parser.parse_args(arguments)


def sampling_of(args):
    """How to sample, by what the edit needs."""
    sampling = config.sampling_of(args)
    random = sampling.sampler in reverse.STOCHASTIC or sampling.eta or sampling.churn
    inverts = args.reconstruct or args.interpolate
    config.refuse(
        *((getattr(args, n) == "", f"--{n}: expected a path") for n in PATHS),
        (args.strength is not None and not args.image, "--strength is for --image"),
        (
            args.strength is not None and not 0 < args.strength <= 1,
            "--strength: expected more than 0, at most 1",
        ),
        (bool(args.mask) != bool(args.inpaint), "--inpaint and --mask go together"),
        ((args.jump or args.resample) and not args.inpaint, "--jump, --resample: for --inpaint"),
        (random and args.interpolate is not None, "--interpolate needs a sampler without noise"),
        (inverts and sampling.sampler not in (None, "ddim"), "--sampler: ddim alone is inverted"),
        (inverts and random, "--eta, --churn: ddim is inverted without noise"),
    )
    if inverts or args.noise:
        suited = {"sampler": "ddim", "clip": "none", "precision": "fp32"}
    else:
        suited = {"sampler": "ddpm"} if args.inpaint and sampling.eta is None else {}
    missing = {k: v for k, v in suited.items() if getattr(sampling, k) is None}
    return dataclasses.replace(sampling, **missing)


def main(args):
    config.expect(args, num_samples=1, batch_size=1, seed=0, mc_dropout=2, jump=1, resample=1)
    sampling = sampling_of(args)
    out, formats = output.plan(args.out, args.format, args.checkpoint)
    config.refuse((args.mc_dropout and "gif" in formats, "--mc_dropout has no --format gif"))
    where = device.pick_device(args.device)
    device.use_tf32(False)
    model, settings, state = load_model(args.checkpoint, args.weights, where)
    guide = load_model(sampling.guide, "ema", where)[0] if sampling.guide else None
    dtype = device.sampling_dtype(sampling.precision, settings.precision, where)
    model, guide = (m and m.prepare_for_sampling(dtype) for m in (model, guide))
    options = sampling.options(model, guide)
    chosen = reverse.chosen_labels(model, state["classes"], args.label)
    edit = editing.Edit(model, args, options)
    print(*edit.found, sep="\n", end="\n" * bool(edit.found))
    total = args.num_samples or edit.count
    alone = model.is_image or edit.given is not None or args.mc_dropout
    real = None if alone else data.load(**settings.data()).test

    def states(indices):
        """Samples `indices` on their way from noise to data, state after state."""
        label = edit.label(indices, chosen)
        changes = edit.changes(indices.to(where), label)
        return reverse.generate(model, indices, args.seed, label, **{**options, **changes})

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, tidies up
    started = time.monotonic()
    with output.Folder(out, formats, model.event, total, real, **edit.shown) as folder:
        with tqdm(total=total, unit="sample", disable=None) as bar:
            for indices in torch.arange(total).split(args.batch_size):
                x0, beside, arrays = edit.finish(indices, states)
                label = edit.label(indices, chosen)
                folder.add(data.to_pixels(x0).cpu(), beside, labels=label, **arrays)
                bar.update(len(indices))
        seconds = time.monotonic() - started
        if "gif" in formats:
            first = torch.arange(min(total, output.ANIMATED[model.is_image]))
            folder.animate(data.to_pixels(xt).cpu() for _, xt, _ in states(first))
    print(
        f"{total:,} samples by {options['sampler']} in {options['steps']} steps: "
        f"{seconds:.1f} s, {total / seconds:.1f} a second",
        *edit.report(),
        "wrote",
        *(f"  {path}" for path in folder.written[:5]),
        sep="\n",
    )
    if len(folder.written) > 5:
        print(f"  and {len(folder.written) - 5:,} more in {out.absolute()}")
    return 0


def command(arguments=None):
    """Run the script -> its exit code, 2 for a wrong flag and 1 for a failed run."""
    given = parse(arguments)
    try:
        return main(given)
    except (Exception, KeyboardInterrupt) as error:
        code, line = config.verdict(error)
        print(f"generate.py: {line}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(command())
