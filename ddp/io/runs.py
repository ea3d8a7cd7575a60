"""Runs read back from their folders: settings, log, seconds, and what evaluate.py measured of them.

Runs that differ in their seed alone are trainings of one Group.
"""

import json
import math
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

from ddp.io.checkpoint import parse_config, read_checkpoint
from ddp.io.config_file import read_json
from ddp.io.describe import network_text
from ddp.io.files import RUN_MODELS, file_digest, find_checkpoint
from ddp.io.run_log import read_log
from ddp.metrics.comparison import NOT_COMPARED, flat_results
from ddp.metrics.subjects import distinct_paths, matches, numbered, parse_subject, shared_path

PLACES = {"dataset", "data_dir", "out_dir", "cache"}  # of this machine
# in which trainings of a group may differ: what changes no result but by chance
OF_ONE_RUN = {"seed", "name", "device", "threads", "planned_steps", "compile", "tensorboard"}
OF_ONE_RUN |= {"save_every", "sample_every", "keep_checkpoints", "checkpoint_activations", "reduce"}
OF_THE_LOSS = {"dataset", "data", "class_cond", "schedule", "shift", "timesteps", "loss"}
OF_THE_LOSS |= {"zero_terminal_snr", "noise_dist", "weighting"}
# what of an evaluation does not change its figures
NOT_OF_THE_RECIPE = {
    "metrics",
    "feature_spaces",  # of which each is compared by itself
    "device",
    "command",
    "batch_size",
    "provenance",
    "inception_weights",
}
FEATURES_OF = "features of "  # in a recipe; an evaluation without that space says nothing of it
NOT_OF_THE_SAMPLES = {"checkpoint", "sha256", "step", "provenance", "summary"}


@dataclass
class Evaluation:
    """What evaluate.py measured of a checkpoint by one recipe."""

    figures: dict  # path such as "pixels/fd/samples" -> estimate, {value, error, interval}
    real: dict  # the same path -> estimate of real items in the place of samples
    recipe: dict  # how they were measured; {}: they were not


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
    evaluations: list  # one of each recipe, the newest first; or that of which all runs have one

    @property
    def evaluation(self):
        """The Evaluation that is shown."""
        return self.evaluations[0] if self.evaluations else Evaluation({}, {}, {})

    @property
    def val_losses(self):
        """(step, loss of held-out items) at each save."""
        return [(int(row["step"]), float(row["val_loss"])) for row in self.log if row["val_loss"]]


@dataclass
class Group:
    """Runs with the same settings but for the seed: one or more trainings."""

    name: str
    runs: list  # by their seeds

    @property
    def seeds(self):
        return [run.settings["seed"] for run in self.runs]

    def figure(self, path):
        """The estimates of a figure, one of each run; None where a run lacks it."""
        estimates = [run.evaluation.figures.get(path) for run in self.runs]
        return None if None in estimates else estimates


def read_runs(texts):
    """The Runs that texts name: "PATH", "NAME=PATH", with * for all that match.

    Raises ValueError for one that is there twice, OSError where nothing is."""
    subjects = [found for text in texts for found in matches(parse_subject(text))]
    # a shell's * finds what was measured beside the runs
    subjects = [each for each in subjects if not is_result(each.path)] or subjects
    folders = {find_checkpoint(each.path).absolute().parent for each in subjects}
    runs = []
    for subject in subjects:
        if subject.options:
            raise ValueError(f"{subject.path}: options of a sampler are for evaluate.py")
        run = read_run(subject.path, subject.name, folders)
        if any(run.path.samefile(other.path) for other in runs):
            raise ValueError(f"{subject.path} is given twice")
        runs.append(run)
    share_recipe(runs)
    return runs


def is_result(path):
    """Whether a path is a folder that evaluate.py or a comparison wrote."""
    return any((Path(path) / name).is_file() for name in ("evaluation.json", "comparison.html"))


def share_recipe(runs):
    """Put first the newest recipe by which every run that was measured was measured, if any."""
    having = [run for run in runs if run.evaluations]
    for first in having[0].evaluations if having else ():
        found = [like(first, run.evaluations) for run in having]
        if None not in found:
            for run, evaluation in zip(having, found, strict=True):
                run.evaluations.remove(evaluation)
                run.evaluations.insert(0, evaluation)
            return


def like(evaluation, others):
    """The first of other Evaluations of the same recipe, or None."""
    same = (one for one in others if not different_keys([evaluation.recipe, one.recipe]))
    return next(same, None)


def read_run(path, name=None, folders=()):
    """Return the Run of a folder, or of one of its checkpoints. Raises OSError when it is none.

    name: what to call it; None: as its path. folders: where else a comparison may lie."""
    checkpoint = find_checkpoint(path)
    state = read_checkpoint(checkpoint)
    config = parse_config(state, checkpoint)
    settings = {key: value for key, value in asdict(config).items() if key not in PLACES}
    origin = state["provenance"]
    settings["dataset"] = origin.get("dataset") or Path(config.dataset).name
    is_toy = len(state["event"]) == 1 and state["units"] is None  # drawn anew for each seed
    settings["data"] = settings["dataset"] if is_toy else origin.get("fingerprint")
    settings["init_from"] = origin_of_weights(checkpoint.parent)
    return Run(
        name,
        checkpoint,
        settings,
        network_text(state, config),
        state["step"],
        training_seconds(state, checkpoint),
        read_log(checkpoint.parent) if checkpoint.name in RUN_MODELS else [],
        read_evaluations(checkpoint, folders),
    )


def training_seconds(state, checkpoint):
    """The seconds of a training; of a finished model those of last.pth beside it; else None."""
    newest = checkpoint.with_name("last.pth")
    if "seconds" not in state and checkpoint.name in RUN_MODELS and newest.is_file():
        last = read_checkpoint(newest)
        state = last if last["step"] == state["step"] else state
    return state.get("seconds")


def origin_of_weights(folder):
    """The checkpoint with whose weights a run in a folder began, by config.json; None: unknown."""
    try:
        return read_json(folder)[0].get("init_from")
    except (OSError, ValueError):
        return None


def read_evaluations(checkpoint, folders=()):
    """The Evaluations of a checkpoint, the newest first; those of one recipe are one."""
    evaluations = []
    for found, subject in find_evaluations(checkpoint, folders):
        evaluation = Evaluation(*compared_figures(subject), recipe_of(found, subject))
        newer = like(evaluation, evaluations)
        if newer is None:
            evaluations.append(evaluation)
        else:
            newer.figures = evaluation.figures | newer.figures
            newer.real = evaluation.real | newer.real
            newer.recipe = evaluation.recipe | newer.recipe
    return evaluations


def recipe_of(evaluation, subject):
    """How the figures of a subject of an evaluation were measured, a dict."""
    dataset = evaluation.get("dataset") or {}
    is_toy = len(dataset.get("event") or ()) == 1 and not dataset.get("standardized")
    recipe, about = evaluation["recipe"], subject["about"]
    spaces = recipe.get("feature_spaces") or {}
    recipe = {key: recipe[key] for key in recipe if key not in NOT_OF_THE_RECIPE}
    recipe |= {key: about[key] for key in about if key not in NOT_OF_THE_SAMPLES}
    recipe |= {FEATURES_OF + name: features for name, features in spaces.items()}
    recipe["schema"] = evaluation.get("schema")
    recipe["data"] = dataset.get("name" if is_toy else "fingerprint")
    return recipe


def find_evaluations(checkpoint, folders=()):
    """Yield (evaluation, the subject of it) that evaluate.py wrote of this very file.

    They are looked for beside the checkpoint and its folder, by its digest: those of the file
    alone, then of comparisons, also in other folders, the newest first."""
    folder = checkpoint.absolute().parent
    own = [*folder.glob(f"{escape(checkpoint.stem)}-evaluation*")]
    own += folder.parent.glob(f"{escape(folder.name)}-evaluation*")
    places = {folder, folder.parent, *folders}
    compared = [path for place in places for path in place.glob("comparison*")]
    found = []
    for group in (own, compared):
        paths = [path / "evaluation.json" for path in group]
        paths = [path for path in paths if path.is_file()]
        found += sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    digest = file_digest(checkpoint) if found else None
    for path in found:
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            for subject in evaluation["subjects"]:
                if subject["about"].get("sha256") == digest and is_whole(evaluation, subject):
                    yield evaluation, subject
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # anybody's file
            continue


def is_whole(evaluation, subject):
    """Whether somebody's evaluation has what is read of it. May raise what a wrong type raises."""
    figures, _ = compared_figures(subject)
    numbers = [number for cell in figures.values() for number in (cell["value"], cell["error"])]
    finite = all(math.isfinite(number) for number in numbers if number is not None)
    return bool(numbers) and finite and "unit" in recipe_of(evaluation, subject)


def compared_figures(subject):
    """The figures of a subject that can be compared, and those of real items in their place."""
    flat = flat_results(subject)
    figures, real = {}, {}
    for keys, cell in flat.items():
        if isinstance(cell, dict) and keys[-1] not in NOT_COMPARED:
            path = "/".join(keys)
            figures[path] = cell
            real[path] = flat.get((*keys[:-1], "real_vs_real"))
    return figures, real


def group_runs(runs):
    """The Groups of Runs, in the order in which they are given.

    A seed that a group has already begins another: it is the same training, or a later state of it.
    A group is called as its runs are, or by what their paths begin with."""
    groups = {}  # what all runs of a group share -> the runs
    for run in runs:
        shared = {key: value for key, value in run.settings.items() if key not in OF_ONE_RUN}
        steps = run.step if shared["max_minutes"] is None else None
        key = json.dumps([run.name, steps, shared], sort_keys=True)
        while run.settings["seed"] in [other.settings["seed"] for other in groups.get(key, [])]:
            key += "again"
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        members.sort(key=lambda run: run.settings["seed"])
    paths = [[str(run.path.resolve()) for run in members] for members in groups.values()]
    names = []
    for path, members in zip(distinct_paths(paths), groups.values(), strict=True):
        first = members[0].path.resolve().parent.name
        others = [run for run in runs if run not in members]
        if len(members) > 1 and holds_others(members, others):
            path = f"{first} and {len(members) - 1} more"
        names.append(members[0].name or path or first)
    return [Group(*each) for each in zip(numbered(names), groups.values(), strict=True)]


def holds_others(members, others):
    """Whether runs share no more of their paths than a folder in which others lie, too."""
    shared = shared_path([str(run.path.resolve()) for run in members])
    inside = [run.path.resolve().is_relative_to(shared) for run in others]
    return shared == Path.cwd() or any(inside)


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


def different_keys(recipes):
    """In what recipes differ: key -> its values. A feature space that one lacks is none."""
    different = {}
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        having = [recipe for recipe in recipes if key in recipe or not key.startswith(FEATURES_OF)]
        values = [recipe.get(key) for recipe in having]
        if any(value != values[0] for value in values):
            different[key] = values
    return different


def recipe_differences(runs):
    """Lines that say in what the measurements of runs differ, so that figures do not compare."""
    lines = []
    recipes = [run.evaluation.recipe for run in runs if run.evaluations]
    for key, values in different_keys(recipes).items():
        shown = ", ".join(dict.fromkeys(str(value)[:40] for value in values))
        lines.append(f"the figures do not compare: {key} differs ({shown})")
    return lines


def unmeasured(groups):
    """Lines that name groups without figures, where others have some: a run of theirs has none."""
    lines = []
    measured = any(run.evaluations for group in groups for run in group.runs)
    for group in groups:
        without = [run for run in group.runs if not run.evaluations]
        if without and measured:
            share = f"{len(without)} of {len(group.runs)} runs"
            lines.append(f"{group.name}: no figures, {share} have none, such as {without[0].path}")
    return lines


def left_out(groups):
    """Lines that name groups of which evaluations of another recipe are not shown."""
    what = "evaluations of another recipe (samples, items, sampler) are left out"
    more = [group for group in groups if any(len(run.evaluations) > 1 for run in group.runs)]
    return [f"{group.name}: {what}" for group in more]
