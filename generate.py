"""Draw samples, or edit images: python generate.py --checkpoint checkpoints/digits.pth"""

import sys
import time

import torch
from tqdm import tqdm

from ddp.data import load_dataset, to_pixels
from ddp.data.files import counted
from ddp.editing import EditInputs, changes, dropout_layers, edited_samples, sample_mc_dropout
from ddp.io import cli
from ddp.io.checkpoint import load_guide, load_model
from ddp.io.cli import add_flag
from ddp.io.device import sampling_dtype, select_device, set_tf32
from ddp.io.edit_inputs import DEFAULT_COUNT, check_edit, grid_options, read_edit_inputs
from ddp.io.files import find_checkpoint
from ddp.io.run_dir import data_source
from ddp.io.writer import FORMATS, SampleWriter, parse_output
from ddp.options import SamplerOptions
from ddp.sampling import sample_trajectory


def parse(arguments=None):
    parser = cli.make_parser(__doc__)
    add_flag(parser, "checkpoint", type=cli.path, required=True, help="a checkpoint, or run")
    add_flag(parser, "num_samples", type=int, help="default: 64, or one for each edited item")
    add_flag(parser, "out", type=cli.path, help="a new folder, or a file .png, .npz or .gif")
    add_flag(parser, "format", help=f"some of {','.join(FORMATS)} (default: grid)")
    add_flag(parser, "label", help="classes by name or number, such as 3,5 (default: all in turn)")
    add_flag(parser, "seed", type=int, default=0, help="sample i is a function of seed and i")
    add_flag(parser, "batch_size", type=int, default=256, help="samples at a time; for speed only")
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add_flag(parser, "weights", choices=("ema", "raw"), default="ema", help="EMA weights, or raw")
    cli.add_config_flags(parser, SamplerOptions, "sampling")
    cli.add_edit_flags(parser)
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    names = ("num_samples", "batch_size", "jump_length", "jump_n_sample")
    cli.require_at_least(args, seed=0, mc_dropout=2, **dict.fromkeys(names, 1))
    edit = cli.edit_options(args)
    sampler = check_edit(cli.sampler_options(args), **edit)
    path = find_checkpoint(args.checkpoint)
    out, formats = parse_output(args.out, args.format, path)
    cli.reject_if((args.mc_dropout and "gif" in formats, "mc_dropout has no format=gif"))
    device = select_device(args.device)
    set_tf32(False)
    model, config, checkpoint = load_model(path, args.weights, device)
    dtype = sampling_dtype(sampler.precision, config.precision, device)
    model = model.for_inference(dtype)
    guide = load_guide(sampler.guide_checkpoint, device, dtype)
    options = sampler.resolve(model, guide)
    labels = cli.parse_labels(args.label, model, checkpoint["classes"], bool(edit["path"]))
    inputs, total, lines = EditInputs(model, options, args.seed), DEFAULT_COUNT, []
    if edit["name"]:
        inputs, total, lines = read_edit_inputs(model, options, sampler.steps, args.seed, **edit)
    if args.mc_dropout:
        dropout_layers(model)  # raises when there are none
    alone = model.is_image or edit["path"] or args.mc_dropout  # points are shown beside the data
    reference, lines = (None, lines) if alone else points_to_compare(config, path)
    shown = grid_options(edit["name"], args.mc_dropout)
    total = args.num_samples or total
    with SampleWriter(out, formats, model.event, total, reference, **shown) as writer:
        for line in lines + writer.bounds:
            print(line)
        lines = write(inputs, labels, args.batch_size, args.mc_dropout, writer)
    print(*lines, *writer.summary, sep="\n")
    return 0


def points_to_compare(config, path):
    """Return the test points of a model's data and [], or None and a line that says why not."""
    try:
        return load_dataset(**data_source(config, path)).test, []
    except (OSError, ValueError) as error:
        return None, [f"samples alone, without the data ({error})"]


def write(inputs, labels, batch_size, passes, writer):
    """Draw samples, batch by batch, for the writer, and return lines to print."""
    model, seed, options = inputs.model, inputs.seed, inputs.options
    started = time.monotonic()
    squared_errors = []
    with tqdm(total=writer.total, unit="sample", disable=None) as bar:
        for start in range(0, writer.total, batch_size):
            indices = torch.arange(start, min(start + batch_size, writer.total))
            label = inputs.labels(indices, labels)  # (B,) or None
            std = latents = None
            if passes:
                std, x0 = sample_mc_dropout(model, indices, seed, label, passes, **options)
                given = 4 * std - 1 if model.is_image else None
            else:
                x0, given, latents = edited_samples(inputs, indices, label)  # (B, *event) each
            if latents is not None:
                squared_errors.append(((x0 - given) ** 2).flatten(1).mean(dim=1).cpu())
            reference = None if given is None else to_pixels(given).cpu()
            writer.add(to_pixels(x0).cpu(), reference, labels=label, std=std, latents=latents)
            bar.update(len(indices))
    seconds = time.monotonic() - started
    if writer.needs_states:
        indices = torch.arange(writer.num_animated)
        label = inputs.labels(indices, labels)
        changed = options | changes(inputs, indices, label)
        states = sample_trajectory(model, indices, seed, label, **changed)
        writer.animate(to_pixels(x_t).cpu() for _, x_t, _ in states)
    what = f"{counted(writer.total, 'sample')} by {options['sampler']}"
    speed = f"{seconds:.1f} s, {writer.total / seconds:.1f} a second"
    lines = [f"{what} in {counted(options['steps'], 'step')}: {speed}"]
    if squared_errors:
        rmse = torch.cat(squared_errors).sqrt()
        lines += [f"root mean square error {rmse.mean():.4f}, at most {rmse.max():.4f}, of x0"]
    return lines


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
