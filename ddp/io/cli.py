"""The command line: flags made from dataclasses, plugins, one line for every error, exit codes."""

import argparse
import contextlib
import dataclasses
import math
import os
import runpy
import signal
import sys
import textwrap
import traceback
from pathlib import Path

from ddp.distributed import is_first_failure, is_lost_process, leave, processes
from ddp.editing import EDITS, EditInputs
from ddp.io.spelling import did_you_mean
from ddp.io.terminal import safe_process
from ddp.options import SamplerOptions, count_or_auto, image_size, integers
from ddp.presets import OLD_NAMES, OLD_VALUES

NEW_NAMES = {new: old for old, new in OLD_NAMES.items()}
# the field of Config at which each topic of the help begins
TOPICS = {
    "dataset": "data",
    "epochs": "length of the run",
    "lr": "optimization",
    "schedule": "the forward network",
    "network": "the reverse network",
    "prediction": "the objective",
    "name": "output",
}


def path(text):
    """Return the path that a flag gives; one that the shell left as ~/name is below HOME."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected a path")
    return os.path.expanduser(text)


BREAK_MARK = "\0"  # which no argument holds
METAVARS = {path: "PATH", int: "N", float: "X", integers: "N,N", image_size: "N or HxW"}
METAVARS[count_or_auto] = "N"
KINDS = {
    count_or_auto: "a whole number, or auto",
    int: "a whole number",
    float: "a number",
    integers: "whole numbers, such as 4,8",
    image_size: "a size, such as 64 or 30x45",
}


class Parser(argparse.ArgumentParser):
    def _check_value(self, action, value):
        """Refuse a value that is none of the choices, and tell it from the nearest."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), [*map(str, action.choices)])
            raise

    def parse_args(self, args=None, namespace=None):
        """Parse flags; one that is unknown is an error."""
        self.words = sys.argv[1:] if args is None else [*map(str, args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            for flag, word in zip(self.words, self.words[1:], strict=False):
                action = self._option_string_actions.get(flag)
                if word in unknown and action and action.nargs == 0:
                    message += f"; {flag} takes no value, --no_{action.dest} turns it off"
            self.error(message)
        return parsed

    def error(self, message):
        """Say what is wrong, tell unknown flags from the nearest, and leave with code 2."""
        known = [name for action in self._actions for name in action.option_strings]
        given = [word.split("=")[0] for word in self.words if word.startswith("--")]
        hints = [did_you_mean(word, known) for word in given if word not in known]
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog.removeprefix('-m ')}: error: {message}{''.join(hints)}\n")


def make_parser(description, given="", **options):
    """Return a Parser for a script; given: what stands before the flags, such as "RUN "."""
    paragraphs = description.split("\n\n")  # the first has the command, and is one line
    return Parser(
        description="\n\n".join([paragraphs[0], *map(textwrap.fill, paragraphs[1:])]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"python %(prog)s {given}[flags]; --help lists them",
        allow_abbrev=False,
        **options,
    )


def add_flag(parser, name, alias=None, alias_type=None, **options):
    """Add --name_of_flag; --name-of-flag and the name of before version 0.2 do the same, hidden."""
    if "choices" not in options and "action" not in options:
        options.setdefault("metavar", METAVARS.get(options.get("type"), "TEXT"))
    if options.get("type") in KINDS:
        options["type"] = number_reader(options["type"])
    parser.add_argument(f"--{name}", **options)
    hidden = options | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    hidden.pop("required", None)
    if "_" in name:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **hidden)
    if alias_type:
        hidden["type"] = alias_type
    if options.get("action") == "store_true":  # which a config.json may have turned on
        off = hidden | {"action": "store_false"}
        parser.add_argument(f"--no_{name}", f"--no-{name.replace('_', '-')}", dest=name, **off)
    for spelling in sorted({alias, alias.replace("_", "-")}) if alias else ():
        parser.add_argument(f"--{spelling}", dest=name, **hidden)


def add_machine_flags(parser):
    """Add the flags of what computes."""
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    help = "CPU threads (default: auto, what is fastest now)"
    add_flag(parser, "threads", type=count_or_auto, default=0, help=help)


def add_plugin_flag(parser):
    group = parser.add_argument_group("your own parts")
    help = "a Python file that registers things of your own, run first; may be repeated"
    add_flag(group, "plugin", action="append", metavar="FILE", help=help)


def add_config_flags(parser, config_class, title=None):
    """Add a flag for each field of a dataclass whose fields are ddp.options.flag."""
    group = parser.add_argument_group(title) if title else parser
    for field in dataclasses.fields(config_class):
        if not title and field.name in TOPICS:
            group = parser.add_argument_group(TOPICS[field.name])
        options = argparse_options(field)
        alias = NEW_NAMES.get(field.name)
        reader = None
        if field.name in OLD_VALUES:
            reader = old_value_reader(OLD_VALUES[field.name])
            if not alias:  # a flag that kept its name; else the old values go with the old name
                options["type"] = reader
        add_flag(group, field.name, alias, reader, **options)


def argparse_options(field):
    """Return the keyword arguments of add_argument for a field."""
    metadata = field.metadata
    kind = metadata["kind"]
    choices = metadata["choices"] and list(metadata["choices"])
    options = {"help": metadata["help"].replace("%", "%%")}
    if metadata["help"] == argparse.SUPPRESS:
        options["help"] = argparse.SUPPRESS  # argparse looks for this very object
    if kind is bool:
        return options | {"action": "store_true"}
    if field.default not in (None, dataclasses.MISSING):
        default = "auto" if kind is count_or_auto and field.default == 0 else field.default
        options["help"] += f" (default: {default})"
    count = metadata["bounds"].get("count", 1)
    if count > 1:
        options["nargs"] = count
    metavar = None if choices else METAVARS.get(kind, "TEXT")
    return options | {"type": kind, "choices": choices, "metavar": metavar}


def number_reader(kind):
    """Return a function that reads the text of a flag as one of KINDS, in numbers of 64 bits."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if all(abs(number) < 2**63 for number in (value if isinstance(value, list) else [value])):
            return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {KINDS[kind]}, below 2^63")

    return read


def old_value_reader(old_values):
    """Return a function that reads a value that has another name since version 0.2."""
    return lambda text: old_values.get(text, text)


def sampler_options(args):
    """Return the SamplerOptions among parsed flags, in which None means not given."""
    given = {}
    for field in dataclasses.fields(SamplerOptions):
        value = getattr(args, field.name)
        if value is not None:
            given[field.name] = value
    return SamplerOptions(**given)


def add_edit_flags(parser):
    """Add a flag for each of EDITS, of which one may be given, and their options."""
    group = parser.add_argument_group("editing, one of")
    edits = group.add_mutually_exclusive_group()
    for name, edit in EDITS.items():
        kind = {"nargs": "?", "const": "", "metavar": "PATH"} if edit.optional else {"type": path}
        alias = "noise" if name == "latents" else None
        add_flag(edits, name, alias, help=edit.help, **kind)
    add_flag(edits, "mc_dropout", type=int, metavar="K", help="mean and std of K dropout passes")
    group = parser.add_argument_group("editing options")
    default = EditInputs.strength
    help = f"SDEdit strength in (0, 1]; 1 ignores the input (default: {default})"
    add_flag(group, "strength", type=float, help=help)
    add_flag(
        group, "mask", type=path, help="of inpaint: an image or array; what is light is filled in"
    )
    add_flag(group, "jump_length", "jump", type=int, help="RePaint: steps undone (default: 10)")
    add_flag(group, "jump_n_sample", "resample", type=int, help="RePaint: passes (default: 5)")


def edit_options(args):
    """Return the edit among parsed flags, as keyword arguments of io.edit_inputs.check_edit."""
    options = {name: getattr(args, name) for name in ("mask", "strength")}
    options |= {name: getattr(args, name) for name in ("jump_length", "jump_n_sample")}
    for name in EDITS:
        if getattr(args, name) is not None:
            return options | {"name": name, "path": getattr(args, name)}
    return options | {"name": None, "path": None}


def require_at_least(args, **bounds):
    """Raise ValueError when a flag in `args` is below its bound, or above all reason."""
    for name, bound in bounds.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < 2**32:
            raise ValueError(f"{name}={value}: expected at least {bound}, below 2^32")


def reject_if(*reasons):
    """Raise ValueError with the first message whose condition holds, of (condition, message)."""
    for condition, message in reasons:
        if condition:
            raise ValueError(message)


PLUGINS = []  # paths of those that were run


def with_breaks(arguments=None):
    """Return the arguments (default: sys.argv's) with each `--` after --compare as BREAK_MARK.

    argparse would take it for the end of all flags."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--compare" not in arguments:
        return arguments
    start = arguments.index("--compare")
    marked = [BREAK_MARK if word == "--" else word for word in arguments[start:]]
    return arguments[:start] + marked


def subject(text):
    """Return the text of something to compare, `--` for what stands between groups."""
    return "--" if text == BREAK_MARK else text


def load_plugins(arguments=None):
    """Run the files given by --plugin, so that what they register can be chosen by a flag."""
    arguments = with_breaks(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", nargs="?", default=[])
    PLUGINS[:] = parser.parse_known_args(arguments)[0].plugin
    for path in [each for each in PLUGINS if each is not None]:  # None is refused by the parser
        if not os.path.isfile(path):
            raise OSError(f"plugin={path}: there is no such file")
        try:
            runpy.run_path(path)
        except Exception as error:
            raise OSError(plugin_fault(error) or f"plugin={path}: {error}") from None


def plugin_fault(error):
    """Return a line that says where in a plugin an error arose, or None: it was in none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in PLUGINS:
            kind = type(error).__name__
            return f"plugin={frame.filename}: {kind}: {error} (line {frame.lineno})"
    return None


def exit_status(error):
    """Return (exit code, one line) of what ended a script; what nobody foresaw is raised again.

    2: a ValueError, what was asked for cannot be done. 1: it was tried and failed, an OSError, such
    as a path where nothing is, a FloatingPointError, a fault of a plugin, too little memory. 128 +
    the signal's number, if one stopped it."""
    line = f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        code = 128 + getattr(error, "number", signal.SIGINT)
        line = "stopped at once; files that were finished before stand"
    elif isinstance(error, ValueError):
        fault = plugin_fault(error)
        code, line = (1, f"error: {fault}") if fault else (2, line)
    elif isinstance(error, (OSError, FloatingPointError)):
        code = 1
    elif is_lost_process(error):
        code, line = 1, "error: another process was lost; with --max-restarts torchrun starts again"
    elif type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        reason = str(error)[:200]
        code, line = 1, f"error: compile does not work here ({reason}); leave it out"
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    ):
        reason = str(error).splitlines()[:1] or ["too little memory"]
        code, line = 1, f"error: {reason[0]}; try a smaller batch_size, or shards=auto"
    else:
        raise error
    return code, " ".join(line.split())


def command(
    main,  # (parsed flags) -> exit code
    parse,  # (arguments or None) -> parsed flags
    arguments=None,  # default: sys.argv
):
    """Run a script -> its exit code, as exit_status says; no print fails, and signals tidy up."""
    with safe_process(), contextlib.ExitStack() as launch:
        stderr = sys.stderr
        try:
            stderr = launch.enter_context(processes())
            load_plugins(arguments)
            code = main(parse(arguments))
            leave(code)
        except (Exception, KeyboardInterrupt) as error:
            code = 1
            if is_first_failure():  # whose cause is that of all
                code, line = exit_status(error)
                script = Path(sys.modules[main.__module__].__file__)
                name = f"ddp.{script.stem}" if script.parent.name == "ddp" else script.name
                print(f"{name}: {line}", file=stderr)
        return code
