"""Say what a checkpoint is: python -m ddp.inspect checkpoints/digits.pth"""

import sys

from ddp.io import cli
from ddp.io.describe import inspect_checkpoint
from ddp.io.download import locate


def parse(arguments=None):
    parser = cli.make_parser(__doc__, "CHECKPOINT ", prog="-m ddp.inspect")
    help = "a checkpoint, a run's folder, or a URL"
    parser.add_argument("checkpoint", type=cli.path, help=help)
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    path, _ = locate(args.checkpoint)
    print(*inspect_checkpoint(path), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
