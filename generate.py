"""Draw samples: python generate.py --checkpoint checkpoints/digits.pth"""

import argparse
import signal
import sys
import time

import torch
from tqdm import tqdm

from ddp import config, data, device, output, reverse
from ddp.checkpoint import load_model


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)

    def add(name, **kwargs):
        parser.add_argument(*config.spellings(name), dest=name, **kwargs)

    add("checkpoint", required=True, help="a checkpoint that train.py wrote")
    add("num_samples", type=int, default=64, help="(default: 64)")
    add("sampler", choices=reverse.SAMPLERS, help=f"(default: {reverse.DEFAULT_SAMPLER})")
    add("steps", type=int, help=f"of the sampler (default: {reverse.DEFAULT_STEPS})")
    add("eta", type=float, help="noise of ddim, from 0 (none) to 1 (as ddpm)")
    add("seed", type=int, default=0, help="sample i is a function of the seed and i (default: 0)")
    add("label", help="classes by name or number, such as 3 or 3,5 (default: all, in turn)")
    add("out", help="a new folder, or a file .png, .npz or .gif (default: beside the checkpoint)")
    add("format", help=f"some of {','.join(output.FORMATS)} (default: grid)")
    add("batch_size", type=int, default=256, help="samples at a time; no sample depends on it")
    add("device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("weights", choices=("ema", "raw"), default="ema", help="averaged or raw (default: ema)")
    return parser.parse_args(arguments)


def main(args):
    config.expect(args, num_samples=1, batch_size=1, seed=0)
    out, formats = output.plan(args.out, args.format, args.checkpoint)
    where = device.pick_device(args.device)
    model, settings, state = load_model(args.checkpoint, args.weights, where)
    options = reverse.options(model, args.sampler, args.steps, args.eta)
    chosen = reverse.chosen_labels(model, state["classes"], args.label)
    real = None if model.is_image else data.load(**settings.data()).test

    def states(indices):
        """Samples `indices` on their way from noise to data, state after state."""
        label = reverse.class_labels(model, indices, chosen)
        return reverse.generate(model, indices, args.seed, label, **options)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, tidies up
    started = time.monotonic()
    with output.Folder(out, formats, model.event, args.num_samples, real) as folder:
        with tqdm(total=args.num_samples, unit="sample", disable=None) as bar:
            for indices in torch.arange(args.num_samples).split(args.batch_size):
                items = data.to_pixels(reverse.final(states(indices))).cpu()
                folder.add(items, reverse.class_labels(model, indices, chosen))
                bar.update(len(indices))
        seconds = time.monotonic() - started
        if "gif" in formats:
            first = torch.arange(min(args.num_samples, output.ANIMATED[model.is_image]))
            folder.animate(data.to_pixels(xt).cpu() for _, xt, _ in states(first))
    print(
        f"{args.num_samples:,} samples by {options['sampler']} in {options['steps']} steps: "
        f"{seconds:.1f} s, {args.num_samples / seconds:.1f} a second"
    )
    print("wrote", *folder.written[:5], sep="\n  ")
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
