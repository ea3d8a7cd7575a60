"""The house: reading order, and what the package keeps out."""

import ast
import re

import pytest
from conftest import ROOT

# in the order in which a newcomer reads it; a module imports only modules above it
ORDER = [
    *("schedule", "forward", "network", "model", "loss", "guidance", "reverse", "likelihood"),
    *("quality", "pictures", "data", "editing", "config", "device", "checkpoint"),
    *("profiling", "muon", "training"),
    *("features", "figures", "evaluation", "report", "output", "run"),
]


def imports(path):
    """Names of the ddp modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ddp":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddp."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ddp."))


def test_every_module_has_its_place():
    assert {p.stem for p in (ROOT / "ddp").glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_above_it(module):
    for name in imports(ROOT / "ddp" / f"{module}.py"):
        assert ORDER.index(name) < ORDER.index(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", ORDER)
def test_the_package_neither_prints_nor_parses_flags(module):
    tree = ast.parse((ROOT / "ddp" / f"{module}.py").read_text())
    names = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert "print" not in names
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not modules & {"argparse", "torchvision"}


def test_the_readme_has_two_set_up_commands_that_name_the_requirements():
    lines = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert "-r requirements.txt" in lines[0]
    assert "python train.py" in lines[0]
    assert "-r requirements-dev.txt" in lines[1]
    assert "python -m pytest" in lines[1]
    (pin,) = (
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if "torch" in line
    )
    assert pin.startswith("torch==2.13.0")
