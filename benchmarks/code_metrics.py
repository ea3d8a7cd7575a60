"""Size and density of the code in ddp/: its root, each folder in it, and the total.

python benchmarks/code_metrics.py [PATH of a checkout] [--json FILE]

tokens        of Python's tokenize, without comments, line ends and indentation
chars/4       characters over 4, about the tokens that a language model sees
code          lines that are neither blank, nor docstring, nor comment alone
comp          comprehensions for each 100 lines of code
nested        comprehensions that hold another one, or more than one `for`
packed        assignments such as `a, b = x, y`, of a tuple to a tuple, in % of all assignments
unpacked      assignments to a tuple of whatever it is, `packed` ones included, in the same %
comments      lines that carry a comment, at their end or alone: in % of all lines; and in % of the
              lines of code and of comment, where blank lines and docstrings do not count
"""

import ast
import io
import json
import sys
import tokenize
from pathlib import Path

from _common import ROOT, make_parser

from ddp.io.cli import add_flag, command

TITLES = "files  lines  tokens  chars/4   code  comp nested  packed unpacked comments of code "
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Module)


def scan_tokens(text):
    """Return the number of tokens, the lines that hold some, and the lines that hold comments."""
    count = 0
    code_lines = set()
    comment_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment_lines.add(token.start[0])
        elif token.type not in LAYOUT:
            count += 1
            code_lines.update(range(token.start[0], token.end[0] + 1))
    return count, code_lines, comment_lines


def docstring_lines(tree):
    """Return the numbers of the lines that are docstring."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, SCOPES) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def is_nested(node):
    """Return whether a comprehension holds another one, or more than one `for`."""
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
    return len(inner) > 1 or len(node.generators) > 1


def is_unpacked(node):
    """Return whether an assignment has a tuple as target: `a, b = anything`."""
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def measure_file(path):
    """Return the counts of one file, a dict that can be added up, but for the longest function."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens, code_lines, comment_lines = scan_tokens(text)
    code_lines -= docstring_lines(tree)
    nodes = list(ast.walk(tree))
    comprehensions = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    unpacked = [node for node in assignments if is_unpacked(node)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    lengths = [(f.end_lineno - f.lineno + 1, f"{path.name}:{f.name}") for f in functions]
    return {
        "files": 1,
        "lines": len(text.splitlines()),
        "tokens": tokens,
        "characters": len(text),
        "code": len(code_lines),
        "commented": len(comment_lines),
        "code_or_comment": len(code_lines | comment_lines),
        "comprehensions": len(comprehensions),
        "nested": sum(is_nested(node) for node in comprehensions),
        "assignments": len(assignments),
        "unpacked": len(unpacked),
        "packed": sum(isinstance(node.value, ast.Tuple) for node in unpacked),
        "longest_function": max(lengths, default=(0, "")),
        "longest_file": (len(text.splitlines()), path.name),
    }


def measure(name, paths):
    """Return the row of some files: sums, the longest of each kind, and rates."""
    row = {"name": name}
    for path in paths:
        for key, value in measure_file(path).items():
            if key.startswith("longest"):
                row[key] = max(row.get(key, (0, "")), value)
            else:
                row[key] = row.get(key, 0) + value
    row["estimated_tokens"] = round(row["characters"] / 4)
    row["comprehensions_per_100"] = 100 * row["comprehensions"] / max(row["code"], 1)
    row["packed_percent"] = 100 * row["packed"] / max(row["assignments"], 1)
    row["unpacked_percent"] = 100 * row["unpacked"] / max(row["assignments"], 1)
    row["comments_percent"] = 100 * row["commented"] / max(row["lines"], 1)
    row["comments_percent_of_code"] = 100 * row["commented"] / max(row["code_or_comment"], 1)
    return row


def line_of(row):
    """Return a row of the table as text."""
    function_lines, function = row["longest_function"]
    file_lines, file = row["longest_file"]
    cells = (
        f"{row['name']:<12}",
        f"{row['files']:5}",
        f"{row['lines']:6,}",
        f"{row['tokens']:7,}",
        f"{row['estimated_tokens']:8,}",
        f"{row['code']:6,}",
        f"{row['comprehensions_per_100']:5.1f}",
        f"{row['nested']:6}",
        f"{row['packed_percent']:6.1f}%",
        f"{row['unpacked_percent']:7.1f}%",
        f"{row['comments_percent']:7.1f}%",
        f"{row['comments_percent_of_code']:6.1f}%",
        f" {function_lines:3} {function:<34}",
        f"{file_lines:3} {file}",
    )
    return " ".join(cells)


def parse(arguments=None):
    parser = make_parser(__doc__, "code_metrics.py")
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, help="a checkout of this repo")
    add_flag(parser, "json", metavar="FILE", help="also write the table to this file")
    return parser.parse_args(arguments)


def main(args):
    package = args.path / "ddp"
    files = sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)
    if not files:
        raise ValueError(f"path={args.path}: expected a checkout, with Python files in ddp/")
    groups = {}  # "ddp" or "ddp/io" -> paths
    for path in files:
        groups.setdefault(path.parent.relative_to(args.path).as_posix(), []).append(path)
    rows = [measure(name, paths) for name, paths in groups.items()]
    rows.append(measure("total", files))
    print(f"{'':<12} {TITLES} {'longest function':<38} longest file")
    for row in rows:
        print(line_of(row))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(command(main, parse))
