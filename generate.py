"""Draw samples, or edit images: python generate.py --checkpoint checkpoints/digits.pth"""

import signal
import sys
import time

import torch
from tqdm import tqdm

from ddp.data import load_dataset, to_pixels
from ddp.editing import EDITS, dropout_layers, edited_samples, sample_mc_dropout
from ddp.io import cli
from ddp.io.checkpoint import load_guide, load_model
from ddp.io.cli import add_flag
from ddp.io.device import sampling_dtype, select_device, set_tf32
from ddp.io.edit_inputs import DEFAULT_COUNT, check_edit, grid_options, read_edit_inputs
from ddp.io.writer import FORMATS, SampleWriter, parse_output
from ddp.options import SamplerOptions
from ddp.sampling import cycle_labels, sample, sample_trajectory


def parse(arguments=None):
    parser = cli.make_parser(__doc__)
    add_flag(parser, "checkpoint", required=True, help="a checkpoint that train.py wrote")
    add_flag(parser, "num_samples", type=int, help="default: 64, or one for each edited item")
    add_flag(parser, "out", help="a new folder, or a file .png, .npz or .gif")
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
    out, formats = parse_output(args.out, args.format, args.checkpoint)
    cli.reject_if((args.mc_dropout and "gif" in formats, "mc_dropout has no format=gif"))
    device = select_device(args.device)
    set_tf32(False)
    model, config, checkpoint = load_model(args.checkpoint, args.weights, device)
    dtype = sampling_dtype(sampler.precision, config.precision, device)
    model = model.for_inference(dtype)
    guide = load_guide(sampler.guide_checkpoint, device, dtype)
    options = sampler.resolve(model, guide)
    labels = cli.parse_labels(args.label, model, checkpoint["classes"])
    if edit["path"] and labels is None and model.num_classes and not model.has_null_label:
        raise ValueError("label=None: this model was never trained without a label; give it")
    inputs, total = None, DEFAULT_COUNT
    if edit["name"]:
        inputs, total, summary = read_edit_inputs(model, options, sampler.steps, args.seed, **edit)
        options = inputs.options
        print(*summary, sep="\n", end="\n" * bool(summary))
    if args.mc_dropout:
        dropout_layers(model)  # raises when there are none
    alone = model.is_image or edit["path"] or args.mc_dropout  # points are shown beside the data
    reference = None if alone else load_dataset(**config.data_options()).test
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it tidies up, too
    shown = grid_options(edit["name"], args.mc_dropout)
    total = args.num_samples or total
    with SampleWriter(out, formats, model.event, total, reference, **shown) as writer:
        write(args, model, options, labels, inputs, writer)
    print("wrote", *(f"  {path}" for path in writer.written[:5]), sep="\n")
    if len(writer.written) > 5:
        print(f"  and {len(writer.written) - 5:,} more in {out.absolute()}")
    return 0


def write(args, model, options, labels, inputs, writer):
    """Draw the samples, batch by batch, and hand them to the writer."""

    def labels_of(indices):
        return inputs.labels(indices, labels) if inputs else cycle_labels(model, indices, labels)

    started = time.monotonic()
    squared_errors = []
    with tqdm(total=writer.total, unit="sample", disable=None) as bar:
        for indices in torch.arange(writer.total).split(args.batch_size):
            label = labels_of(indices)  # (B,) or None
            given = std = latents = None
            if args.mc_dropout:
                passes = args.mc_dropout
                std, x0 = sample_mc_dropout(model, indices, args.seed, label, passes, **options)
                given = 4 * std - 1 if model.is_image else None
            elif inputs:
                x0, given, latents = edited_samples(inputs, indices, label)
            else:
                x0 = sample(model, indices, args.seed, label, **options)  # (B, *event)
            if latents is not None:
                squared_errors.append(((x0 - given) ** 2).flatten(1).mean(dim=1).cpu())
            reference = None if given is None else to_pixels(given).cpu()
            writer.add(to_pixels(x0).cpu(), reference, labels=label, std=std, latents=latents)
            bar.update(len(indices))
    seconds = time.monotonic() - started
    if "gif" in writer.formats:
        indices = torch.arange(writer.num_animated)
        label = labels_of(indices)
        changes = EDITS[inputs.name].function(inputs, indices, label) if inputs else {}
        states = sample_trajectory(model, indices, args.seed, label, **{**options, **changes})
        writer.animate(to_pixels(x_t).cpu() for _, x_t, _ in states)
    print(
        f"{writer.total:,} samples by {options['sampler']} in {options['steps']} steps: "
        f"{seconds:.1f} s, {writer.total / seconds:.1f} a second"
    )
    if squared_errors:
        rmse = torch.cat(squared_errors).sqrt()
        print(f"root mean square error {rmse.mean():.4f}, at most {rmse.max():.4f}, in units of x0")


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
