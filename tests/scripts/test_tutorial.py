"""examples/tutorial.ipynb: its code runs, and what is kept in the file is small and whole."""

import ast
import base64
import io
import json
import re

import pytest
from conftest import ROOT
from PIL import Image

PATH = ROOT / "examples" / "tutorial.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
MAX_BYTES = 300_000


def source(cell):
    return "".join(cell["source"])


def kept_images(cell):
    """Return the pictures that a cell keeps, as PIL images."""
    bundles = [output["data"] for output in cell["outputs"] if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in bundles]


def kept_text(cell):
    """Return what a cell printed, as it is kept."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def run_cell(cell, number, names):
    """Run a cell as a notebook does; return the value of its last line, an expression, or None."""
    tree = ast.parse(source(cell))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        return eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Run all cells with three steps of training; return their values and all names."""
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDP_TUTORIAL_STEPS", "3")
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        values = [run_cell(cell, i, names) for i, cell in enumerate(CODE, 1)]
    return values, names


@pytest.mark.slow
def test_every_cell_shows_what_it_keeps(executed):
    values, _ = executed
    for cell, value in zip(CODE, values, strict=True):
        kept = kept_images(cell)
        assert len(kept) == isinstance(value, Image.Image)
        if kept:
            assert kept[0].size == value.size


@pytest.mark.slow
def test_three_steps_are_taken(executed):
    _, names = executed
    assert len(names["losses"]) == names["STEPS"] == 3


@pytest.mark.slow
def test_the_readers_ddim_is_the_librarys(executed):
    _, names = executed
    noise, trained = names["noise"], names["trained"]  # three steps of training would show little
    digits = names["ddim"](trained, noise, names["log_snrs"], None)
    again = names["sample"](trained, names["indices"], **names["options"])
    assert digits.std() > 0.5  # strokes on black
    assert (again - digits).abs().max() < 1e-3


@pytest.mark.slow
def test_statistics_differ_and_weights_do_not(executed):
    _, names = executed
    ema = dict(names["ema"].named_parameters())
    for kind in ("raw", "fresh", "batch"):
        model = names[f"{kind}_statistics"]
        assert all(weight.equal(ema[name]) for name, weight in model.named_parameters())
    raw = dict(names["raw_statistics"].named_buffers())
    fresh = dict(names["fresh_statistics"].named_buffers())
    means = [name for name in raw if name.endswith("running_mean")]
    assert means
    assert not any(raw[name].equal(fresh[name]) for name in means)


def test_outputs_are_of_one_whole_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            assert output.get("name", "stdout") == "stdout"
    default = re.search(r'"DDP_TUTORIAL_STEPS", (\d+)', source(CODE[0]))[1]
    assert f"{default} steps" in kept_text(CODE[0])
    kept = "".join(map(kept_text, CODE))
    assert f"step {int(default) - 100}, loss 0." in kept
    assert float(re.search(r"largest difference (\S+)", kept)[1]) < 1e-4


def test_file_is_small_and_plain():
    assert PATH.stat().st_size < MAX_BYTES
    assert NOTEBOOK["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in NOTEBOOK["cells"])
    assert all(max(map(len, source(cell).splitlines())) <= 100 for cell in CODE)


def test_links_lead_somewhere():
    text = "".join(source(cell) for cell in NOTEBOOK["cells"])
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) >= 5
    for link in links:
        assert (PATH.parent / link).is_file(), link
