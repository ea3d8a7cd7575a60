"""Draw samples, or edit images: python generate.py --checkpoint checkpoints/digits.pth"""

import contextlib
import sys
import time
from functools import partial

import torch
from tqdm import tqdm

from ddp.data.files import counted
from ddp.distributed import in_order, is_main, world_size
from ddp.editing import dropout_layers
from ddp.io import cli
from ddp.io.checkpoint import load_guide, load_model
from ddp.io.cli import add_flag
from ddp.io.device import sampling_dtype, select_device, set_tf32
from ddp.io.download import locate
from ddp.io.edit_inputs import check_edit, grid_options, in_rows, parse_labels, read_edit_inputs
from ddp.io.progress import Pace, loading_bar
from ddp.io.sample_batches import data_to_compare, draw, states_of
from ddp.io.writer import FORMATS, SampleWriter, parse_output
from ddp.options import SamplerOptions
from ddp.threads import choose_sampling_threads


def parse(arguments=None):
    parser = cli.make_parser(__doc__)
    add_flag(parser, "checkpoint", type=cli.path, required=True, help="a checkpoint, run, or URL")
    add_flag(
        parser, "num_samples", type=int, help="default: 64, 2000 points, or all that is edited"
    )
    add_flag(parser, "out", type=cli.path, help="a new folder, or a file .png, .npz or .gif")
    add_flag(parser, "format", help=f"some of {','.join(FORMATS)} (default: grid)")
    add_flag(parser, "label", help="classes by name or number, such as 3,5 (default: all in turn)")
    add_flag(parser, "seed", type=int, default=0, help="sample i is a function of seed and i")
    add_flag(parser, "batch_size", type=int, default=256, help="samples at a time; for speed only")
    cli.add_machine_flags(parser)
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
    path, beside = locate(args.checkpoint, loading_bar)
    out, formats = parse_output(args.out, args.format, beside)
    of_states = {"gif", "strip"} & {*formats}
    cli.reject_if(
        (args.mc_dropout and of_states, f"mc_dropout has no format={','.join(of_states)}"),
        (edit["name"] == "interpolate" and "strip" in formats, "interpolate has no format=strip"),
    )
    device = select_device(args.device)
    set_tf32(False)
    model, config, checkpoint = load_model(path, args.weights, device)
    dtype = sampling_dtype(sampler.precision, config.precision, device)
    model = model.for_inference(dtype)
    guide = load_guide(sampler.guide_checkpoint, device, dtype)
    options = sampler.resolve(model, guide)
    labels = parse_labels(args.label, model, checkpoint["classes"], bool(edit["path"]))
    inputs, total, lines = read_edit_inputs(model, options, sampler.steps, args.seed, **edit)
    if args.mc_dropout:
        dropout_layers(model)  # raises when there are none
    named = edit["path"] or (edit["name"] and len(model.event) > 1)
    alone = model.is_pixels or named or args.mc_dropout  # others are shown beside the data
    alone = alone or formats == ["npz"] or not is_main()
    reference, lines = (None, lines) if alone else data_to_compare(config, path, model.event)
    lines += choose_sampling_threads(model, args.batch_size, args.threads)
    classes = [checkpoint["classes"][k] for k in labels or range(model.num_classes)]
    wanted = args.num_samples or total
    shown = grid_options(edit["name"], args.mc_dropout, classes if model.is_image else (), wanted)
    total = args.num_samples or in_rows(total, shown.get("columns"))
    if total <= args.batch_size * (world_size() - 1):
        line = f"batch_size={args.batch_size} leaves some of {world_size()} processes idle"
        lines = [*lines, f"{line}; a smaller one does not"]
    writer = SampleWriter(out, formats, model.event, total, reference, **shown)
    with writer if is_main() else contextlib.nullcontext():
        for line in lines + writer.bounds:
            print(line)
        lines = write(inputs, labels, args.batch_size, args.mc_dropout, writer)
    if is_main():
        print(*lines, *writer.summary, sep="\n")
    return 0


def write(inputs, labels, batch_size, passes, writer):
    """Draw samples, batch by batch, for the writer, and return lines to print."""
    total, options = writer.total, inputs.options
    started = time.monotonic()
    starts = range(0, total, batch_size)
    batches = (torch.arange(start, min(start + batch_size, total)) for start in starts)
    squared_errors = []
    pace = Pace()
    with tqdm(total=total, unit="sample", disable=None) as bar:
        for batch, errors in in_order(partial(draw, inputs, labels, passes), batches, False):
            writer.add(**batch)
            squared_errors += [] if errors is None else [errors]
            bar.update(len(batch["items"]))
            left = bar.disable and is_main() and pace.time_left(writer.count, total)
            if left:
                print(f"{writer.count:,} of {counted(total, 'sample')}, {left}", file=sys.stderr)
    seconds = time.monotonic() - started
    if writer.needs_states and is_main():
        writer.animate(states_of(inputs, labels, writer.num_animated))
    what = f"{counted(total, 'sample')} by {options['sampler']}"
    speed = f"{seconds:.1f} s, {total / seconds:.1f} a second"
    lines = [f"{what} in {counted(options['steps'], 'step')}: {speed}"]
    if squared_errors:
        rmse = torch.cat(squared_errors).sqrt()
        lines += [f"root mean square error {rmse.mean():.4f}, at most {rmse.max():.4f}, of x0"]
    return lines


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
