"""Write a model as files to share: python -m ddp.export checkpoints/digits.pth

Into a new folder beside it, with a model card."""

import sys

from ddp.io import cli
from ddp.io.cli import add_flag
from ddp.io.download import locate
from ddp.io.export import EXPORTS, default_folder, export, parse_formats
from ddp.io.files import shown_path


def parse(arguments=None):
    parser = cli.make_parser(__doc__, "CHECKPOINT ", prog="-m ddp.export")
    help = "a checkpoint, a run's folder, or a URL"
    parser.add_argument("checkpoint", type=cli.path, help=help)
    add_flag(parser, "out", type=cli.path, help="a new folder (default: beside the checkpoint)")
    help = f"some of {','.join(EXPORTS)} (default: safetensors)"
    add_flag(parser, "format", default="safetensors", help=help)
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    formats = parse_formats(args.format)
    path, beside = locate(args.checkpoint)
    out = export(path, formats, args.out or default_folder(beside), print)
    print(f"wrote {shown_path(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
