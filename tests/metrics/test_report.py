"""Tables, text and page of an evaluation."""

import contextlib
import errno
import json
import re
from html import escape
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from ddp.data.dataset import Dataset
from ddp.io.files import atomic_write
from ddp.io.tables import error_text, interval_text, table_lines
from ddp.metrics import evaluate
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference
from ddp.metrics.evaluate import Metric, to_json
from ddp.metrics.report import (
    comparison_tables,
    evaluation_page,
    measure_and_report,
    nested_rows,
    shortened,
    side_by_side,
    subject_tables,
    told_difference,
    write_report,
)
from ddp.metrics.uncertainty import Estimate

HOSTILE = "<script>alert(1)</script>"
CELL = to_json(Estimate.mean(torch.rand(50)))


def evaluation_of(*subjects, comparison=()):
    """An evaluation as evaluate.py writes it; subjects: dicts, metric -> results."""
    named = []
    for i, results in enumerate(subjects):
        about = {"checkpoint": "/a&b.pth", "step": 3}
        named.append({"name": f"{HOSTILE}{i}", "about": about, **results})
    return {
        "dataset": {
            "name": HOSTILE,
            "event": [1, 8, 8],
            "classes": ["<0>"],
            "train": 9,
            "test": 5,
            "standardized": False,
        },
        "recipe": {
            "seed": 0,
            "command": "python evaluate.py --checkpoint '<b>'",
            "unit": "nats",
            "vlb_items": 5,
            "nll_items": 4,
            "dequant_samples": 2,
            "num_samples": 5,
            "baseline_items": 5,
            "reference": "test",
            "feature_spaces": {"classifier": {"accuracy": 0.5, "trained_on": "labels"}},
        },
        "warnings": ["too few <items>"],
        "entropy": None,
        "subjects": named,
        "comparison": list(comparison),
        "groups": [],
    }


def table_of(results):
    """The only table of such results, as a dict: name of a row -> cells."""
    (table,) = subject_tables(results, evaluation_of(results))
    return table.head, {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0456, "1.235 [1.145, 1.324]"),
        (123.456, 12.3, "123 [99, 148]"),
        (0.5, 0.0, "0.500 [0.500, 0.500]"),
        (0.12345678, 1e-7, "0.12346 [0.12346, 0.12346]"),
    ],
)
def test_an_interval_shows_the_digits_that_its_error_allows(value, error, text):
    interval = [value - 1.96 * error, value + 1.96 * error]
    assert interval_text({"value": value, "error": error, "interval": interval}) == text


def test_cells_without_an_error():
    alone = {"value": 0.5, "error": None, "interval": [None, None]}
    assert interval_text(alone) == error_text(alone) == "0.5000"
    assert error_text({"value": 0.5, "error": 0.25, "interval": [0, 1]}) == "0.5000 ± 0.2500"
    assert [error_text(cell) for cell in (None, 1234567, 0.123456)] == ["", "1,234,567", "0.1235"]


def test_nested_rows_take_any_depth():
    assert nested_rows(CELL) == {"": {"": CELL}}
    assert nested_rows({"a": CELL, "n": 3}) == {"a": {"": CELL}, "n": {"": 3}}
    tree = {"a": {"mean": CELL, "deep": {"x": 1, "y": 2}}, "names": ["left", "out"], "text": "too"}
    assert nested_rows(tree) == {"a": {"mean": CELL}, "a, deep": {"x": 1, "y": 2}}


def test_feature_tables_say_which_way_is_better():
    row = {"samples": CELL, "real_vs_real": CELL, "relative_to_real": None}
    head, rows = table_of({"pixels": {"fd": row, "recall": row}})
    assert head == ["", "samples", "real vs real", "relative to real"]
    assert set(rows) == {"fd ↓", "recall ↑"}
    none = "real vs real near 0"
    assert rows["fd ↓"] == [interval_text(CELL), interval_text(CELL), none]


def test_classifier_tables_have_the_classes():
    row = {"samples": CELL, "real_vs_real": CELL, "relative_to_real": CELL}
    results = {"classifier": {"confident": row, "counts": {"samples": [7], "real": [9]}}}
    evaluation = evaluation_of(results)
    classes, distances = subject_tables(results, evaluation)
    assert classes.rows == [["<0>", "7", "9"]]
    assert "50.0%" in distances.note
    assert len(distances.rows) == 1


def test_likelihood_tables_end_with_the_entropy():
    results = {"vlb": {"discrete": {"total": CELL, "monte_carlo": 0.5}}}
    evaluation = evaluation_of(results)
    evaluation["entropy"] = CELL
    (table,) = subject_tables(results, evaluation)
    assert table.head == ["", "total", "monte_carlo"]
    assert table.rows[0] == ["discrete", error_text(CELL), "0.5"]
    assert table.rows[1] == ["entropy of the data", error_text(CELL), ""]
    assert table.note.startswith("nats")
    results = {"ode_nll": {"uniform": {"total": CELL}}}
    (table,) = subject_tables(results, evaluation)
    assert "4 test items, 2 dequantizations each" in table.note


def test_memorization_table_does_without_a_ratio():
    median = {"samples": 1.0, "heldout": 0.0}
    results = {"near_duplicates": CELL, "copies": 3, "median_distance": median, "closest": []}
    _, rows = table_of({"memorization": results})
    assert rows["exact copies"] == ["3"]
    assert "" in [cells[0] for cells in rows.values()]


def test_comparison_has_a_column_for_each_subject_and_losses_last():
    row = {"samples": CELL, "real_vs_real": CELL, "relative_to_real": CELL}
    level = {"log-SNR 1.00": {"x0": CELL}}
    first = {"loss": level, "pixels": {"fd": row, "density": row}}
    second = {"loss": level, "pixels": {"fd": row, "density": row}, "vlb": {"d": {"total": CELL}}}
    name = f"{HOSTILE}1"
    less = to_json(Estimate.mean(torch.rand(50) - 9))
    comparison = [
        {"subject": name, "path": "loss/log-SNR 1.00/x0", "difference": less},
        {"subject": name, "path": "pixels/fd/samples", "difference": less},
        {"subject": name, "path": "pixels/density/samples", "difference": less},
        {"subject": name, "path": "vlb/d/total", "difference": None},
    ]
    table, levels = comparison_tables(evaluation_of(first, second, comparison=comparison))
    assert table.head == ["", f"{HOSTILE}0", name, f"{name} - {HOSTILE}0", "real vs real"]
    text = interval_text(CELL)
    assert table.rows[0] == ["pixels/fd ↓", text, text, f"{interval_text(less)} better", text]
    # more than real items have is no gain
    assert table.rows[1] == ["pixels/density", text, text, interval_text(less), text]
    assert table.rows[2] == ["vlb/d/total ↓", "", text, "", ""]
    assert levels.head == ["", f"{HOSTILE}0", name, f"{name} - {HOSTILE}0"]
    assert levels.rows[0][0] == "loss/log-SNR 1.00/x0 ↓"
    assert comparison_tables(evaluation_of(first)) == []


def test_a_difference_says_what_its_interval_does():
    def told(*interval, keys=("pixels", "fd", "samples")):
        return told_difference({"value": 1.0, "error": 0.5, "interval": interval}, keys)

    assert told(0.2, 1.8).endswith("] worse")
    assert told(0.2, 1.8, keys=("pixels", "recall", "samples")).endswith("] better")
    assert told(-0.2, 1.8).endswith("]")
    assert told(0.2, 1.8, keys=("value_stats", "channel 0", "mean")).endswith("]")
    assert told_difference(None, ("pixels", "fd", "samples")) == ""


def test_groups_have_a_table_each_and_one_of_their_difference():
    figures = {
        "pixels/recall/samples": {"mean": 0.5, "sd": 0.25, "sample_error": 0.125},
        "value_stats/channel 0/mean/difference": {"mean": 2.0, "sd": None, "sample_error": 1.0},
    }
    differences = {path: {"difference": CELL, "better": None} for path in figures}
    differences["pixels/recall/samples"]["better"] = "b" * 20
    less_first = {"interval_of": "trainings", "paired": True, "figures": differences}
    groups = [
        {"name": "a", "subjects": ["x", "y"], "figures": figures, "less_first": None},
        {"name": "b" * 20, "subjects": ["z", "w"], "figures": figures, "less_first": less_first},
    ]
    evaluation = evaluation_of({}) | {"groups": groups}
    first, second, difference = side_by_side(evaluation)
    assert (first.title, first.note, second.title) == ("a", "2 trainings", "b" * 20)
    assert first.head == ["", "mean", "sd of trainings", "error of samples"]
    assert first.rows[0] == ["pixels/recall ↑", "0.5", "0.25", "0.125"]
    assert first.rows[1] == ["value_stats/channel 0/mean/difference", "2", "", "1"]
    assert difference.title == f"{'b' * 20} - a"
    assert "over trainings, paired by seed" in difference.note
    assert difference.rows[0] == ["pixels/recall ↑", interval_text(CELL), "..." + "b" * 11]
    assert difference.rows[1][2] == ""  # neither direction is better
    assert max(map(len, table_lines([first, second, difference]))) <= 120  # by a long name
    less_first |= {"interval_of": "samples", "paired": False}
    differences["pixels/recall/samples"]["better"] = None
    difference = side_by_side(evaluation)[2]
    assert difference.note == "one training each: the interval holds the samples alone"
    assert difference.rows[0][2] == "cannot be told"
    page = evaluation_page(evaluation, [{}])
    assert escape(difference.note) in page
    assert "sd of trainings" in page


def test_a_ratio_that_other_numbers_forbid_is_left_empty():
    row = {"samples": CELL, "real_vs_real": CELL, "relative_to_real": None}
    evaluation = evaluation_of({"pixels": {"fd": row}})
    evaluation["recipe"]["baseline_items"] = 3
    (table,) = subject_tables(evaluation["subjects"][0], evaluation)
    assert table.rows[0][-1] == ""


def test_table_lines_have_a_row_a_line():
    evaluation = evaluation_of({"value_stats": {"channel 0": {"mean": {"samples": CELL}}}})
    lines = table_lines(subject_tables(evaluation["subjects"][0], evaluation))
    assert "   channel 0, mean  " + error_text(CELL) in lines


# ---- figures are told and written as they come ----


class Stopped(BaseException):
    """What a signal raises, such as KeyboardInterrupt."""


def dark(candidate, reference, options):
    """A metric that is always 1."""
    return {"ink": Estimate.mean(torch.ones(9))}


@pytest.mark.parametrize("error", [Stopped("SIGTERM"), KeyboardInterrupt(), OSError("disk")])
def test_what_is_finished_outlives_what_stops_the_rest(tmp_path, monkeypatch, error):
    def stop(candidate, reference, options):
        assert json.loads((tmp_path / "evaluation.json").read_text())["subjects"][0]["dark"]
        assert "ink" in "".join(told)
        raise error

    told = []
    monkeypatch.setattr(evaluate, "METRICS", {"dark": Metric(dark), "stop": Metric(stop)})
    monkeypatch.setattr(evaluate, "OLD_METRICS", {})
    items = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    options = EvaluateOptions(num_samples=20)
    reference = Reference(Dataset("x", items, items), options)
    what = ([Candidate("c", {}, samples=items)], reference)
    how = (options, tmp_path, "python x", False, told.append)
    evaluation, stopped = measure_and_report(*what, ["dark", "stop"], *how)
    assert stopped is error
    assert evaluation["subjects"][0]["dark"]["ink"]["value"] == 1
    assert "stop" not in evaluation["subjects"][0]
    assert evaluation["recipe"]["command"] == "python x"
    assert "stopped before all was measured" in told[-1]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    assert (tmp_path / "evaluation.html").exists()
    with pytest.raises(type(error)):  # nothing is finished
        measure_and_report(*what, ["stop"], *how)


def test_numbers_outlive_figures_that_fail(tmp_path, monkeypatch):
    def fail(candidate, reference):
        raise ValueError("no such font")

    monkeypatch.setattr("ddp.metrics.report.candidate_figures", fail)
    evaluation = evaluation_of({"value_stats": {"channel 0": {"mean": {"samples": CELL}}}})
    write_report(tmp_path, evaluation, [Candidate("c", {})], None)
    warnings = json.loads((tmp_path / "evaluation.json").read_text())["warnings"]
    assert warnings[-1] == "c: the figures failed: no such font"


@pytest.mark.parametrize("full", ["png", "html", "json"])
def test_numbers_outlive_a_full_disk(tmp_path, monkeypatch, full):
    def write(path, write_file):
        if path.suffix == f".{full}":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return atomic_write(path, write_file)

    told = []
    for module in ("metrics.report", "io.page"):
        monkeypatch.setattr(f"ddp.{module}.atomic_write", write)
    monkeypatch.setattr(evaluate, "METRICS", {"dark": Metric(dark), "again": Metric(dark)})
    monkeypatch.setattr(evaluate, "OLD_METRICS", {})
    items = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    options = EvaluateOptions(num_samples=20)
    candidates = [Candidate(name, {}, samples=items) for name in ("c", "d")]
    what = (candidates, Reference(Dataset("x", items, items), options), ["dark", "again"], options)
    fails = pytest.raises(OSError, match="No space") if full == "json" else contextlib.nullcontext()
    with fails:
        _, stopped = measure_and_report(*what, tmp_path, "python x", False, told.append)
        assert stopped is None
    text = "\n".join(told)
    assert all(part in text for part in ("c: dark", "d: again", "comparison"))
    assert (tmp_path / "evaluation.json").exists() == (full != "json")
    assert ("cannot be written" in text) == (full != "json")
    assert not list(tmp_path.glob(".*"))


class Tags(HTMLParser):
    """Which tags are open at the end, and whether any was closed out of order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "html", "p", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "p":
            assert self.open.pop() == tag


def test_a_page_needs_no_network_and_escapes_what_it_is_given():
    row = {"samples": CELL, "real": CELL, "difference": CELL}
    evaluation = evaluation_of({"value_stats": {HOSTILE: {"mean": row}}})
    page = evaluation_page(evaluation, [{"a <caption>": Image.new("L", (4, 4))}])
    assert HOSTILE not in page
    assert "<b>" not in page
    assert "<items>" not in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "http" not in page
    assert "data:image/png;base64," in page
    assert 'name="viewport"' in page
    assert error_text(CELL) in page
    tags = Tags()
    tags.feed(page)
    assert tags.open == []


def test_a_page_takes_names_with_a_dollar():
    evaluation = evaluation_of({"value_stats": {"$5 ${title}": {"mean": {"samples": CELL}}}})
    evaluation["dataset"]["name"] = "${body} $x"
    page = evaluation_page(evaluation, [{"$a$ caption": Image.new("L", (4, 4))}])
    for text in ("${body} $x", "$a$ caption", "$5 ${title}"):
        assert text in page


def test_write_report_names_figures_by_their_caption(tmp_path, monkeypatch):
    evaluation = evaluation_of({}, {})
    image = Image.new("L", (4, 4))
    figures = iter([{"a b, and more": image}, {"a b": image}])
    monkeypatch.setattr("ddp.metrics.report.candidate_figures", lambda *_: next(figures))
    candidates = [Candidate(f"{HOSTILE}0", {}), Candidate("ö" * 300, {})]
    write_report(tmp_path, evaluation, candidates, None)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"evaluation.json", "evaluation.html"} < names
    assert "1-_script_alert_1_script_0-a_b.png" in names
    assert len(names) == 4
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation


def test_of_a_long_name_the_end_is_shown():
    assert shortened("cannot be told") == "cannot be told"
    assert shortened("runs/a-long-one") == ".../a-long-one"
