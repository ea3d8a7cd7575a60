"""Every row of docs/equations.md leads to a function, class or registry entry that exists."""

import ast
import re

import pytest
from conftest import ROOT

REFERENCE = re.compile(r"`(ddp/[\w/]+\.py):(\w+)(?:\.(\w+)|\[(\w+)\])?`")


def table_rows():
    """Return the rows of all tables of docs/equations.md, lists of cells, without the headers."""
    rows = []
    for line in (ROOT / "docs" / "equations.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "paper" and not set(line) <= set("|-"):
            rows.append(cells)
    return rows


def is_defined(path, name, method=None, key=None):
    """Return whether a module defines a function, a class and its method, or a registry's key."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if key is not None and isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in names and isinstance(node.value, ast.Dict):
                return key in [ast.literal_eval(k) for k in node.value.keys]
        if key is None and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            inner = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            return method is None or method in inner
    return False


@pytest.mark.parametrize("cells", table_rows(), ids=lambda cells: cells[-1].strip("`"))
def test_equation_leads_to_code(cells):
    assert len(cells) == 4
    assert all(cells)  # paper, number, formula, where
    reference = REFERENCE.fullmatch(cells[-1])
    assert reference, cells[-1]
    path, name, method, key = reference.groups()
    assert (ROOT / path).is_file()
    assert is_defined(path, name, method, key)


def test_equations_are_not_lost():
    assert len(table_rows()) >= 40


@pytest.mark.parametrize(
    "reference",
    [
        ("ddp/forward.py", "q_sampel"),
        ("ddp/schedule.py", "Schedule", "grid"),
        ("ddp/model.py", "PREDICTIONS", None, "velocity"),
        ("ddp/model.py", "PREDICTIONS"),  # a registry needs a key
    ],
)
def test_equation_that_leads_nowhere_is_seen(reference):
    assert not is_defined(*reference)
