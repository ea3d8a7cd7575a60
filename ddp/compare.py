"""Put runs side by side: python -m ddp.compare checkpoints/a checkpoints/b

What differs in their settings, loss curves, figures of evaluate.py; as a page, and as tables for a
paper (Markdown, LaTeX, CSV). Runs that differ in their seed alone are pooled."""

import shlex
import sys
from pathlib import Path

from ddp.io import cli
from ddp.io.cli import add_flag
from ddp.io.compare_page import write_comparison
from ddp.io.files import next_free_path, require_absent, shown_path
from ddp.io.runs import group_runs, is_result, read_runs
from ddp.io.tables import table_lines, wrapped
from ddp.metrics.likelihood_metrics import LOSS_TABLE


def parse(arguments=None):
    parser = cli.make_parser(__doc__, "RUN RUN ... ", prog="-m ddp.compare")
    help = "folders of runs, or checkpoints; NAME=PATH to call it so; with * all that match"
    parser.add_argument("runs", nargs="+", type=cli.path, metavar="RUN", help=help)
    add_flag(parser, "out", type=cli.path, help="a new folder (default: comparison)")
    cli.add_plugin_flag(parser)
    return parser.parse_args(arguments)


def main(args):
    out = require_absent(Path(args.out)) if args.out else next_free_path(Path("comparison"))
    groups = group_runs(read_runs(args.runs))
    passed_over = [path for path in args.runs if is_result(path)]
    if passed_over:
        print(*wrapped(f"passed over, since they are no runs: {', '.join(passed_over)}"), sep="\n")
    command = shlex.join(["python", "-m", "ddp.compare", *sys.argv[1:]])
    out, tables, sentences, warnings = write_comparison(groups, out, command)
    shown = [table for table in tables if table.title != LOSS_TABLE]  # thirty rows, on the page
    print(*table_lines(shown), sep="\n")
    for line in [*sentences, *(f"warning: {line}" for line in warnings)]:
        print(*wrapped(line), sep="\n")
    print(f"wrote {shown_path(out)}: comparison.html; tables.md, .tex and .csv for a paper")
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main, parse))
