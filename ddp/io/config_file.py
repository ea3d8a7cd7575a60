"""config.json, which a run writes and another can begin from: what was given, what was chosen."""

import contextlib
import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from ddp.config import LIMITS, RESUMABLE_FIELDS, Config
from ddp.io.files import atomic_write
from ddp.io.spelling import did_you_mean
from ddp.presets import OLD_NAMES

NAME = "config.json"
MAX_BYTES = 2**20  # of a file that is read
# fields from which no other field follows
ALONE = RESUMABLE_FIELDS | {"seed", "init_from"}


def write_config(folder, given, config, plugins=()):
    """Write config.json into a run's folder, in which a resumed run has one already.

    given: the fields of Config that the user set, a dict. config: the Config that came of them.
    plugins: the files that were run first."""
    path = Path(folder) / NAME
    if path.is_file():
        with contextlib.suppress(OSError, ValueError):  # it may be anybody's
            given = read_json(path)[0] | given
    saved = {"given": given, "chosen": asdict(config)}
    saved |= {"plugin": [str(path) for path in plugins]} if plugins else {}
    text = json.dumps(saved, indent=1)
    atomic_write(path, partial(Path.write_text, data=text, encoding="utf-8"))


def read_config(path, overrides, plugins=()):
    """Return the fields of Config that a config.json, or None, and `overrides` say together.

    overrides: a dict, which wins. Returned are the fields to begin from and, of them, those that
    were given. What the run had chosen stays, so that it is repeated; but where a field is
    overridden from which others follow, such as the size, they are chosen anew. The name is not
    taken over: the new run gets a folder of its own. The file may also hold fields alone. Raises
    OSError when there is no such file, ValueError when it is none or holds an unknown field, or
    when its run had plugins and this one has none."""
    if path is None:
        return overrides, overrides
    given, chosen, needed = read_json(path)
    if needed and not plugins:
        raise ValueError(f"config={path}: that run had plugin={needed[0]}; give it, too")
    known = [*(field.name for field in fields(Config)), "init_from"]  # see setup.starting_weights
    for name in (*given, *chosen):
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"config={path}: no run has a field {name}{hint}")
    dropped = {"name", *(LIMITS if overrides.keys() & {*LIMITS} else ())}
    given = {name: given[name] for name in given if name not in dropped} | overrides
    if overrides.keys() <= ALONE:
        chosen = {name: chosen[name] for name in chosen if name not in dropped}
        return chosen | given, given
    return given, given


def read_json(path):
    """Return what a config.json says was given and chosen, two dicts of fields, and its plugins."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path  # of a run's folder, its own
    if not path.is_file():
        raise OSError(f"config={path}: there is no such file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        saved = json.loads(path.read_text(encoding="utf-8"))
        parts = (saved, {})
        plugins = []
        if isinstance(saved, dict) and "given" in saved:
            parts = (saved["given"], saved.get("chosen", {}))
            plugins = saved.get("plugin", [])
        if not (all(isinstance(part, dict) for part in parts) and isinstance(plugins, list)):
            raise ValueError("fields by name were expected")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config={path}: this is no config.json of a run ({reason})") from None
    renamed = [{OLD_NAMES.get(name, name): part[name] for name in part} for part in parts]
    return *renamed, plugins
