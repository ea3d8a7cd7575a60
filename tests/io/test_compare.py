"""Runs read back from their folders, pooled over seeds, and put side by side."""

import json
import math
import os
import re
import shutil
from statistics import mean, stdev

import pytest
from PIL import Image

from ddp.config import Config
from ddp.data import load_dataset
from ddp.io.checkpoint import checkpoint_state, write_checkpoint
from ddp.io.compare_page import (
    ONE_TRAINING,
    best_of,
    comparison_tables,
    error_of,
    figure_text,
    told_apart,
    write_comparison,
)
from ddp.io.files import file_digest
from ddp.io.runs import (
    find_evaluations,
    group_runs,
    left_out,
    loss_differences,
    read_run,
    read_runs,
    recipe_differences,
    unmeasured,
)
from ddp.io.tables import Best
from ddp.training import Trainer

SMALL = {"channels_base": 8, "blocks_per_level": 1, "batch_size": 8, "max_steps": 2}


def estimate(value, error=0.01):
    return {"value": value, "error": error, "interval": [value - 2 * error, value + 2 * error]}


def make_run(folder, seed=0, fd=None, recall=0.5, seconds=60.0, recipe=None, **fields):
    """Write a run of two steps that was never trained, and an evaluation if it has an fd."""
    config = Config(dataset="moons", seed=seed, **{**SMALL, **fields})
    trainer = Trainer(config, load_dataset("moons"))
    state = checkpoint_state(trainer) | {"seconds": seconds, "step": 2}
    path = write_checkpoint(folder / "last.pth", state)
    header = "step,epoch,loss,grad_norm,lr,val_loss"
    (folder / "log.csv").write_text(
        f"{header}\n1,0,1.0,1.0,0.1,0.9\n2,0,0.9,1.0,0.1,{0.5 + seed}\n"
    )
    if fd is not None:
        (folder / "last-evaluation").mkdir()
        about = {"sha256": file_digest(path), "sampler": "ddim", "steps": 20, "weights": "ema"}
        results = {
            "points": {"fd": row(fd), "recall": row(recall)},
            "loss": {"1": {"x0": estimate(2)}},
        }
        evaluation = {
            "schema": 6,
            "dataset": {"name": "moons", "fingerprint": "5", "event": [2], "standardized": False},
            "recipe": {
                "unit": "nats",
                "num_samples": 100,
                "seed": 0,
                "feature_spaces": {"points": {}},
                **(recipe or {}),
            },
            "subjects": [{"name": "x", "about": about, **results}],
        }
        (folder / "last-evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def row(value):
    return {"samples": estimate(value), "real_vs_real": estimate(0.25), "relative_to_real": None}


def four_runs(tmp_path):
    """Two ways of training, two seeds each."""
    values = {"a": (1.0, 1.2), "b": (2.0, 2.1)}
    for name, lr in (("a", 0.001), ("b", 0.002)):
        for seed, fd in enumerate(values[name]):
            make_run(tmp_path / f"{name}-{seed}", seed, fd, lr=lr)
    return [str(tmp_path / "a-*"), str(tmp_path / "b-*")]


def test_runs_that_differ_in_their_seed_are_pooled(tmp_path):
    groups = group_runs(read_runs(four_runs(tmp_path)))
    assert [(group.name, len(group.runs)) for group in groups] == [("a", 2), ("b", 2)]
    run = groups[0].runs[0]
    assert (run.step, run.seconds, run.val_losses) == (2, 60.0, [(1, 0.9), (2, 0.5)])
    assert run.settings["dataset"] == "moons"
    assert "out_dir" not in run.settings
    runs, settings, figures, levels = comparison_tables(groups, comparable=True)
    assert [line[0] for line in settings.rows] == ["lr"]
    assert settings.rows[0][1:] == ["0.001", "0.002"]
    rows = {line[0]: line[1:] for line in figures.rows}
    expected = f"{mean([1.0, 1.2]):.2f} ± {stdev([1.0, 1.2]):.2f}"
    assert rows["points/fd ↓"] == [expected, "2.050 ± 0.071", "0.250 ± 0.010"]
    assert [line[0] for line in levels.rows] == ["loss/1/x0 ↓"]
    assert ["trainings", "2", "2"] in runs.rows
    assert ["minutes of training", "1.0", "1.0"] in runs.rows


def test_of_one_training_the_error_is_that_of_its_samples(tmp_path):
    make_run(tmp_path / "one", 0, 1.0)
    make_run(tmp_path / "two", 0, 1.5, lr=0.1)
    groups = group_runs(read_runs([str(tmp_path / "one"), str(tmp_path / "two")]))
    *_, figures, _ = comparison_tables(groups, comparable=True)
    assert figures.rows[0] == ["points/fd ↓", "1.000 ± 0.010", "1.500 ± 0.010", "0.250 ± 0.010"]
    assert [isinstance(cell, Best) for cell in figures.rows[0]] == [False, True, False, False]
    assert [isinstance(cell, Best) for cell in figures.rows[1][1:3]] == [False, False]  # a tie
    assert "other seeds were not trained" in figures.note
    assert figures.note.startswith("100 samples by ddim in 20 steps; ")


def test_runs_of_so_many_minutes_are_pooled_though_their_steps_differ(tmp_path):
    length = {"max_steps": None, "max_minutes": 10.0}
    make_run(tmp_path / "a", 0, planned_steps=100, **length)
    make_run(tmp_path / "b", 1, planned_steps=101, **length)
    (group,) = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert len(group.runs) == 2


def test_the_same_seed_is_no_other_training(tmp_path):
    for name in ("digits", "digits-2"):
        make_run(tmp_path / name, 0)
    make_run(tmp_path / "digits-3", 1)
    runs = [str(tmp_path / name) for name in ("digits", "digits-2", "digits-3")]
    groups = group_runs(read_runs(runs))
    assert [len(group.runs) for group in groups] == [2, 1]
    assert len({group.name for group in groups}) == 2


def test_names_that_the_user_gives_keep_runs_apart(tmp_path):
    make_run(tmp_path / "a", 0)
    make_run(tmp_path / "b", 1)
    groups = group_runs(read_runs([f"early={tmp_path / 'a'}", f"late={tmp_path / 'b'}"]))
    assert [group.name for group in groups] == ["early", "late"]


def test_a_pattern_leaves_out_what_is_no_run(tmp_path):
    make_run(tmp_path / "a-0.001", 0)
    (tmp_path / "a-0.001-evaluation").mkdir()
    (tmp_path / "a-0-items.png").write_bytes(b"")
    (run,) = read_runs([str(tmp_path / "a-*")])
    assert run.path == tmp_path / "a-0.001" / "last.pth"


def test_a_run_without_an_evaluation_is_named(tmp_path):
    make_run(tmp_path / "a", 0, 1.0)
    make_run(tmp_path / "b", 1)
    (group,) = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    (line,) = unmeasured([group])
    path = tmp_path / "b" / "last.pth"
    assert line.endswith(f"no figures, 1 of 2 runs have none, such as {path}")


def test_a_comparison_of_groups_counts_for_all_of_their_runs(tmp_path):
    """evaluate.py --compare writes it into the folder of the first."""
    evaluations = []
    for seed in (0, 1):
        folder = make_run(tmp_path / f"a-{seed}", seed, 1.0 + seed)
        path = folder / "last-evaluation" / "evaluation.json"
        evaluations.append(json.loads(path.read_text()))
        shutil.rmtree(path.parent)
    evaluations[0]["subjects"] += evaluations[1]["subjects"]
    (tmp_path / "a-0" / "comparison").mkdir()
    path = tmp_path / "a-0" / "comparison" / "evaluation.json"
    path.write_text(json.dumps(evaluations[0]))
    (group,) = group_runs(read_runs([str(tmp_path / "a-*")]))
    assert [each["value"] for each in group.figure("points/fd/samples")] == [1.0, 2.0]


def test_a_share_of_none_is_as_uncertain_as_its_interval():
    none = {"value": 0.0, "error": 0.0, "interval": [0.0, 0.392]}
    some = {"value": 0.15, "error": 0.04, "interval": [0.07, 0.23]}
    assert error_of(none) == pytest.approx(0.1)
    assert error_of(some) == 0.04
    assert figure_text([none]) == "0.00 ± 0.10"
    assert not told_apart([none], [some], None)


def test_real_items_have_no_column_where_recipes_differ(tmp_path):
    make_run(tmp_path / "a", 0, 1.0)
    make_run(tmp_path / "b", 0, 1.0, lr=0.1, recipe={"num_samples": 50})
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    _, tables, _, warnings = write_comparison(groups, tmp_path / "out", "python x")
    assert any("num_samples differs (100, 50)" in line for line in warnings)
    (figures,) = [table for table in tables if table.title == "figures"]
    assert figures.head == ["", "a", "b"]
    assert {len(row) for row in figures.rows} == {3}
    assert "samples by" not in figures.note


def test_losses_of_another_weighting_do_not_compare(tmp_path):
    make_run(tmp_path / "a", 0, weighting="snr", prediction="v")
    make_run(tmp_path / "b", 0, weighting="min_snr", prediction="v")
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert loss_differences(groups) == ["the losses do not compare: other weighting"]
    assert loss_differences(groups[:1]) == []


def test_figures_of_other_data_do_not_compare(tmp_path):
    for name, data in (("a", "digits"), ("b", "moons")):
        folder = make_run(tmp_path / name, 0, 1.0, lr=len(data) / 100)
        path = folder / "last-evaluation" / "evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["dataset"] |= {"name": data}
        path.write_text(json.dumps(evaluation))
    runs = read_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert recipe_differences(runs) == ["the figures do not compare: data differs (digits, moons)"]


@pytest.mark.parametrize(
    ("values", "direction", "best"),
    [
        ([[1.0, 1.1], [2.0, 2.1]], "lower", [0]),
        ([[1.0, 1.1], [2.0, 2.1]], "higher", [1]),
        ([[1.0, 2.0], [1.2, 2.1]], "lower", []),  # they overlap
        ([[1.0, 1.1], None, [2.0, 2.1]], "higher", [2]),
        ([[1.0], [1.01], [1.2]], "lower", [0, 1]),  # by the errors of samples, 0.01
        ([[1.0], [1.1, 1.2, 1.3]], "lower", []),  # one more of that spread may lie there
        ([[0.0], [1.1, 1.2, 1.3]], "lower", [0]),
        ([[1.0, 1.1], None], "lower", []),  # nothing to be better than
        ([[1.0, 1.1], [2.0, 2.1]], None, []),
        ([None], "lower", []),
    ],
)
def test_best_is_what_cannot_be_told_from_the_best(values, direction, best):
    estimates = [each and [estimate(value) for value in each] for each in values]
    assert best_of(estimates, direction, [[0, 1]] * len(values)) == best


def test_the_same_three_seeds_are_paired():
    """The seeds differ by far more than the groups do."""
    estimates = [[estimate(value) for value in values] for values in ([1, 5, 9], [2, 6.1, 10])]
    assert best_of(estimates, "lower", [[0, 1, 2]] * 2) == [0]
    assert best_of(estimates, "lower", [[0, 1, 2], [0, 1, 3]]) == []


def test_figures_of_another_recipe_are_told_and_nothing_is_bold(tmp_path):
    make_run(tmp_path / "a", 0, 1.0)
    make_run(tmp_path / "b", 0, 2.0, lr=0.1, recipe={"num_samples": 50})
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    lines = recipe_differences([run for group in groups for run in group.runs])
    assert lines == ["the figures do not compare: num_samples differs (100, 50)"]
    out, tables, sentences, warnings = write_comparison(groups, tmp_path / "out", "python x")
    assert sentences == []
    assert warnings == lines
    assert not any(isinstance(cell, Best) for table in tables for row in table.rows for cell in row)
    assert lines[0] in (out / "comparison.html").read_text(encoding="utf-8")


def test_page_and_tables(tmp_path):
    groups = group_runs(read_runs(four_runs(tmp_path)))
    (tmp_path / "a-0" / "samples").mkdir()
    Image.new("L", (30, 30)).save(tmp_path / "a-0" / "samples" / "step_00000002.png")
    out, _, sentences, warnings = write_comparison(groups, tmp_path / "out", "python <x>")
    names = sorted(path.name for path in out.iterdir())
    charts = ["loss_over_minutes.png", "loss_over_steps.png"]
    assert names == ["comparison.html", *charts, "tables.csv", "tables.md", "tables.tex"]
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert warnings == []
    assert sentences == ["a is better in points/fd."]
    assert page.index(sentences[0]) < page.index("a: samples at step 2") < page.index("<table>")
    assert "python &lt;x&gt;" in page
    assert page.count("<figure>") == 3
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert re.search(r"<b>1.10 ± 0.14</b>", page)
    assert str(tmp_path) not in page.replace("python", "")


def test_evaluation_is_of_this_very_file(tmp_path):
    folder = make_run(tmp_path / "a", 0, 1.0)
    ((_, subject),) = find_evaluations(folder / "last.pth")
    assert subject["points"]["fd"]["samples"]["value"] == 1.0
    (folder / "last-evaluation").rename(tmp_path / "a-evaluation-2")  # of the run's folder
    assert next(find_evaluations(folder / "last.pth"))[1] == subject
    path = tmp_path / "a-evaluation-2" / "evaluation.json"
    for text in (
        "",
        "[]",
        '{"subjects": 3}',
        path.read_text().replace(subject["about"]["sha256"], "0"),
    ):
        path.write_text(text)
        assert [*find_evaluations(folder / "last.pth")] == []
    assert read_run(folder).evaluation.figures == {}
    assert math.isclose(read_run(folder).seconds, 60)


def test_evaluations_of_one_recipe_are_read_together(tmp_path):
    folder = make_run(tmp_path / "a", 0, 1.0)
    path = folder / "last-evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for number, (fd, count) in enumerate(((3.0, 100), (4.0, 50)), 2):
        (subject,) = evaluation["subjects"]
        del subject["points"], subject["loss"]
        subject["values"] = {"fd": row(fd)}
        evaluation["recipe"] |= {
            "num_samples": count,
            "feature_spaces": {"values": {}, "points": {}},
        }
        subject |= {"points": {"fd": row(fd)}}
        other = folder / f"last-evaluation-{number}"
        other.mkdir()
        (other / "evaluation.json").write_text(json.dumps(evaluation))
        os.utime(other / "evaluation.json", (number, number))  # older than the first
        subject["loss"] = {}
    figures = read_run(folder).evaluation.figures
    values = {path: each["value"] for path, each in figures.items()}
    assert values["points/fd/samples"] == 1.0  # of the newest
    assert values["values/fd/samples"] == 3.0  # of an older one with as many samples
    run = read_run(folder)
    assert len(run.evaluations) == 2  # that of 50 is another
    (line,) = left_out(group_runs([run]))
    assert "are left out" in line


def test_what_was_measured_beside_runs_is_no_run(tmp_path):
    folder = make_run(tmp_path / "a", 0, 1.0)
    (folder / "last-evaluation").rename(tmp_path / "a-evaluation")
    paths = sorted(map(str, tmp_path.iterdir()))
    assert len(paths) == 2
    assert [run.path.parent for run in read_runs(paths)] == [folder]
    with pytest.raises(OSError, match="a-evaluation"):
        read_runs(paths[1:])


def test_runs_are_compared_by_a_recipe_that_all_have(tmp_path):
    for name, fd in (("a", 1.0), ("b", 2.0)):
        make_run(tmp_path / name, 0, fd, lr=fd)
    path = tmp_path / "a" / "last-evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["recipe"]["num_samples"] = 50
    evaluation["subjects"][0]["points"]["fd"] = row(3.0)
    newer = tmp_path / "a-evaluation"
    newer.mkdir()
    (newer / "evaluation.json").write_text(json.dumps(evaluation))
    os.utime(path, (1, 1))
    assert read_run(tmp_path / "a").evaluation.figures["points/fd/samples"]["value"] == 3.0
    runs = read_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [run.evaluation.figures["points/fd/samples"]["value"] for run in runs] == [1.0, 2.0]
    assert recipe_differences(runs) == []
    assert left_out(group_runs(runs))[0].startswith("a: evaluations of another recipe")


def test_another_feature_space_is_no_other_recipe_but_another_classifier_is(tmp_path):
    spaces = ({"pixels": {}}, {"filters": {}}, {"classifier": {"id": 1}}, {"classifier": {"id": 2}})
    for i, space in enumerate(spaces):
        make_run(tmp_path / f"{i}", 0, 1.0, lr=0.1 + i, recipe={"feature_spaces": space})
    runs = [read_run(tmp_path / f"{i}") for i in range(4)]
    assert recipe_differences(runs[:3]) == []
    (line,) = recipe_differences(runs[2:])
    assert "features of classifier differs" in line


def test_nothing_is_said_where_nothing_was_compared(tmp_path):
    make_run(tmp_path / "a", 0, 1.0)
    make_run(tmp_path / "b", 0, lr=0.1)
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    _, _, sentences, warnings = write_comparison(groups, tmp_path / "out", "python x")
    assert sentences == []
    (line,) = warnings
    assert line.startswith("b: no figures")


def test_the_losses_by_noise_level_are_told_of_too(tmp_path):
    for name, lr, loss in (("a", 0.1, 2), ("b", 0.2, 3)):
        folder = make_run(tmp_path / name, 0, 1.0, lr=lr)
        path = folder / "last-evaluation" / "evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["subjects"][0]["loss"]["1"]["x0"] = estimate(loss)
        path.write_text(json.dumps(evaluation))
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    _, _, sentences, _ = write_comparison(groups, tmp_path / "out", "python x")
    assert sentences[0] == "a is better in 1 row of the test loss by noise level."


def test_one_training_each_shows_the_networks_alone(tmp_path):
    make_run(tmp_path / "a", 0, 1.0)
    make_run(tmp_path / "b", 0, 1.01, recall=0.501, lr=0.1)
    groups = group_runs(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    _, _, sentences, _ = write_comparison(groups, tmp_path / "out", "python x")
    assert sentences == ["No figure tells them apart at 95%.", ONE_TRAINING]


def test_what_is_no_run_is_refused(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([str(folder), str(folder / "last.pth")])
    with pytest.raises(ValueError, match="options of a sampler"):
        read_runs([f"{folder},steps=3"])
    with pytest.raises(OSError, match="nothing matches"):
        read_runs([str(tmp_path / "x*")])
    with pytest.raises(OSError, match=r"nothing\.pth"):
        read_runs([str(tmp_path / "nothing.pth")])


def test_names(tmp_path):
    make_run(tmp_path / "x" / "0")
    make_run(tmp_path / "y" / "0", lr=0.1)
    make_run(tmp_path / "z", lr=0.2)
    runs = [str(tmp_path / "x" / "0"), str(tmp_path / "y" / "0"), f"mine={tmp_path / 'z'}"]
    assert [group.name for group in group_runs(read_runs(runs))][:2] == ["x/0", "y/0"]
    assert group_runs(read_runs(runs))[2].name == "mine"
