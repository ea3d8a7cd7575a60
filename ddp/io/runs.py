"""Runs read back from their folders: settings, log, seconds, and what evaluate.py measured of them.

Runs that differ in their seed alone are trainings of one Group.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ddp.io.checkpoint import parse_config, read_checkpoint
from ddp.io.describe import network_text
from ddp.io.files import RUN_MODELS, file_digest, find_checkpoint
from ddp.io.run_log import read_log
from ddp.metrics.comparison import NOT_COMPARED, flatten
from ddp.metrics.subjects import NAMELESS, distinct_paths, matches, parse_subject

PLACES = {"dataset", "data_dir", "out_dir", "labels", "cache"}  # of this machine
# in which trainings of a group may differ: what changes no result but by chance
OF_ONE_RUN = {"seed", "name", "device", "threads", "planned_steps"}
OF_ONE_RUN |= {"tensorboard", "keep_checkpoints", "sample_every"}
RECIPE = ("num_samples", "reference", "baseline_items", "vlb_items", "nll_items", "unit", "seed")
OF_THE_LOSS = {"dataset", "schedule", "shift", "timesteps", "noise_dist", "weighting", "loss"}
HOW_SAMPLED = ("sampler", "steps", "weights")


@dataclass
class Run:
    """A training, as its folder tells it."""

    name: str | None  # that the user gave it
    path: Path  # of its checkpoint
    settings: dict  # field of Config -> value
    network: str  # its name and size
    step: int
    seconds: float | None  # of training; a finished model alone does not know them
    log: list  # rows of log.csv, see run_log.read_log
    figures: dict  # path such as "pixels/fd/samples" -> estimate, {value, error, interval}
    real: dict  # the same path -> estimate of real items in the place of samples
    recipe: dict  # how the figures were measured; {}: they were not

    @property
    def val_losses(self):
        """(step, loss of held-out items) at each save."""
        return [(int(row["step"]), float(row["val_loss"])) for row in self.log if row["val_loss"]]


@dataclass
class Group:
    """Runs with the same settings but for the seed: one or more trainings."""

    name: str
    runs: list

    def figure(self, path):
        """The estimates of a figure, one of each run; None where a run lacks it."""
        estimates = [run.figures.get(path) for run in self.runs]
        return None if None in estimates else estimates


def read_runs(texts):
    """The Runs that texts name: "PATH", "NAME=PATH", with * for all that match.

    Raises ValueError for one that is there twice, OSError where nothing is."""
    subjects = [found for text in texts for found in matches(parse_subject(text))]
    runs = []
    for subject in subjects:
        if subject.options:
            raise ValueError(f"{subject.path}: options of a sampler are for evaluate.py")
        run = read_run(subject.path, subject.name)
        if any(run.path.samefile(other.path) for other in runs):
            raise ValueError(f"{subject.path} is given twice")
        runs.append(run)
    return runs


def read_run(path, name=None):
    """Return the Run of a folder, or of one of its checkpoints. Raises OSError when it is none.

    name: what to call it; None: as its path."""
    checkpoint = find_checkpoint(path)
    state = read_checkpoint(checkpoint)
    config = parse_config(state, checkpoint)
    settings = {key: value for key, value in asdict(config).items() if key not in PLACES}
    settings["dataset"] = state["provenance"].get("dataset") or Path(config.dataset).name
    evaluation, subject = find_evaluation(checkpoint)
    figures, real = compared_figures(subject)
    recipe = {}
    if figures:
        recipe = {key: evaluation["recipe"].get(key) for key in RECIPE}
        recipe |= {key: subject["about"].get(key) for key in HOW_SAMPLED}
        recipe["data"] = evaluation.get("dataset", {}).get("fingerprint")
    return Run(
        name,
        checkpoint,
        settings,
        network_text(state, config),
        state["step"],
        training_seconds(state, checkpoint),
        read_log(checkpoint.parent) if checkpoint.name in RUN_MODELS else [],
        figures,
        real,
        recipe,
    )


def training_seconds(state, checkpoint):
    """The seconds of a training; of a finished model those of last.pth beside it; else None."""
    newest = checkpoint.with_name("last.pth")
    if "seconds" not in state and checkpoint.name in RUN_MODELS and newest.is_file():
        last = read_checkpoint(newest)
        state = last if last["step"] == state["step"] else state
    return state.get("seconds")


def find_evaluation(checkpoint):
    """(evaluation, the subject of it) that evaluate.py wrote of this very file; ({}, {}) if none.

    It is looked for beside the checkpoint and its folder: the newest of the same digest."""
    folder = checkpoint.absolute().parent
    found = [*folder.glob(f"{checkpoint.stem}-evaluation*"), *folder.glob("comparison*")]
    found += [*folder.parent.glob(f"{folder.name}-evaluation*"), *folder.parent.glob("comparison*")]
    paths = [path / "evaluation.json" for path in found if (path / "evaluation.json").is_file()]
    digest = file_digest(checkpoint) if paths else None
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            for subject in evaluation["subjects"]:
                if subject["about"].get("sha256") == digest and "unit" in evaluation["recipe"]:
                    return evaluation, subject
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # anybody's file
            continue
    return {}, {}


def compared_figures(subject):
    """The figures of a subject that can be compared, and those of real items in their place."""
    flat = flatten({key: subject[key] for key in subject if key not in ("name", "about")})
    figures, real = {}, {}
    for keys, cell in flat.items():
        if isinstance(cell, dict) and keys[-1] not in NOT_COMPARED:
            path = "/".join(keys)
            figures[path] = cell
            real[path] = flat.get((*keys[:-1], "real_vs_real"))
    return figures, real


def group_runs(runs):
    """The Groups of Runs, in the order in which they are given.

    A group is called as its runs are, or by what their paths begin with."""
    groups = {}  # what all runs of a group share -> the runs
    for run in runs:
        shared = {key: value for key, value in run.settings.items() if key not in OF_ONE_RUN}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    names = distinct_paths([[str(run.path) for run in members] for members in groups.values()])
    named = []
    for name, members in zip(names, groups.values(), strict=True):
        given = sorted({run.name for run in members} - {None})
        if name == NAMELESS:  # what they share of their paths is nothing
            name = f"{members[0].path.parent.name} and {len(members) - 1} more"
        named.append(Group(" and ".join(given) or name, members))
    return named


def differing_settings(groups):
    """The settings in which groups differ: field -> its value in each group."""
    parts = [group.runs[0].settings for group in groups]
    names = [name for name in parts[0] if name not in OF_ONE_RUN]
    rows = {name: [part.get(name) for part in parts] for name in names}
    return {name: values for name, values in rows.items() if any(v != values[0] for v in values)}


def loss_differences(groups):
    """Lines that say in what the losses of groups differ, so that their curves do not compare."""
    names = [name for name in differing_settings(groups) if name in OF_THE_LOSS]
    return [f"the losses do not compare: other {', '.join(names)}"] if names else []


def recipe_differences(runs):
    """Lines that say in what the measurements of runs differ, so that figures do not compare."""
    measured = [run for run in runs if run.recipe]
    lines = []
    for key in measured[0].recipe if measured else ():
        values = [run.recipe[key] for run in measured]
        if any(value != values[0] for value in values):
            shown = ", ".join(map(str, dict.fromkeys(values)))
            lines.append(f"the figures do not compare: {key} differs ({shown})")
    return lines
