"""The house: reading order, what the package keeps out, how long its parts may be."""

import ast
import re

import pytest
from conftest import ROOT

import ddp

# In the order in which a newcomer reads them; a module imports only modules above it.
CORE = [
    *("schedule", "rng", "augment", "noise_dist", "forward", "blocks", "reverse", "units", "model"),
    *("loss", "sampling", "optim", "rendezvous", "distributed", "shards", "learned_schedule"),
    "validation",
    *("planning", "threads", "training", "options", "presets", "config", "editing"),
]
DRAWERS = [
    *("io.files", "io.spelling"),
    *(
        "data.mapped",
        "data.dataset",
        "data.files",
        "data.zip_files",
        "data.listing",
        "data.toy",
        "data.vision",
        "data.pixels",
        "data.layout",
        "data.splits",
        "data.npy",
        "data.array_sources",
        "data.array_dataset",
    ),
    *("data.decode", "data.cache", "data.folder", "data", "data.arrays"),
    *("io.edit_inputs", "io.device", "io.figures", "io.item_figures"),
    *("io.page", "io.tables", "io.run_log"),
    *("io.archive", "io.schema", "io.safetensors_file", "io.checkpoint"),
    *("io.describe", "io.download", "io.memory"),
    *("metrics.ode", "metrics.likelihood", "metrics.distances", "metrics.uncertainty"),
    *("metrics.fixed_features", "metrics.features", "metrics.candidate"),
    "metrics.likelihood_metrics",
    *("metrics.sample_metrics", "metrics.comparison", "metrics.evaluate", "metrics.subjects"),
    *("metrics.verdict", "metrics.report"),
    *("io.run_lock", "io.run_dir", "io.sample_batches", "io.run_page", "io.board"),
    "io.run_writer",
    *("io.progress", "io.setup"),
    *("io.config_file", "io.runs", "io.compare_page", "io.card", "io.export"),
    *("io.writer", "io.diagnostics", "io.terminal"),
    "io.cli",
]
COMMANDS = ["inspect", "export", "compare"]  # python -m ddp.inspect: thin, as SCRIPTS are
ORDER = CORE + DRAWERS + COMMANDS
DOCSTRING_ONLY = ["metrics", "io"]  # __init__.py of a drawer that offers no names
SCRIPTS = ["train.py", "evaluate.py", "generate.py"]
KNOWS_THE_COMMAND_LINE = "io.cli"  # the only module that does, but for COMMANDS
GIT_FLAGS = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]  # another program's

MAX_FUNCTION_LINES = 45
MAX_FILE_LINES = 340
MAX_SCRIPT_LINES = 120


def path_of(module):
    """Return the file of a module such as "data.toy"."""
    path = ROOT / "ddp" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(path):
    """Return the name of a file in ddp/, such as "data.toy" or "data"."""
    parts = path.relative_to(ROOT / "ddp").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tree_of(path):
    return ast.parse(path.read_text())


def all_files():
    return sorted((ROOT / "ddp").rglob("*.py"))


def imported_modules(path):
    """Return the modules of ddp that a file imports, such as "data.toy"; "" is ddp itself."""
    modules = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "ddp":
                modules.add("")
            elif name.startswith("ddp.") and path_of(name[4:]).is_file():
                modules.add(name[4:])
    # `from ddp.io.files import x` is no import of all that ddp/__init__.py offers
    if modules - {""}:
        modules.discard("")
    return modules


def test_every_module_has_its_place():
    assert {module_of(path) for path in all_files()} == {"", *ORDER, *DOCSTRING_ONLY}


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_modules_above_it(module):
    for name in imported_modules(path_of(module)) - {""} - set(DOCSTRING_ONLY):
        assert ORDER.index(name) < ORDER.index(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", CORE)
def test_core_imports_no_drawer(module):
    drawers = imported_modules(path_of(module)) - set(CORE)
    assert not drawers, f"{module} imports {drawers}"


def test_public_names_stand_in_reading_order():
    nodes = tree_of(ROOT / "ddp" / "__init__.py").body
    modules = [node.module[4:] for node in nodes if isinstance(node, ast.ImportFrom)]
    assert modules == sorted(modules, key=ORDER.index)


@pytest.mark.parametrize("module", DOCSTRING_ONLY)
def test_drawer_without_names_is_one_docstring(module):
    (docstring,) = tree_of(path_of(module)).body
    assert isinstance(docstring.value, ast.Constant)


# ---- what the package keeps out ----


def strings_in(tree):
    """Yield (line, text) of every string literal, parts of f-strings and docstrings among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("module", [m for m in CORE + DRAWERS if m != KNOWS_THE_COMMAND_LINE])
def test_module_knows_no_command_line(module):
    tree = tree_of(path_of(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "args", f"{module}:{node.lineno} reads args.{node.attr}"
        if isinstance(node, ast.Name):
            assert node.id != "print", f"{module}:{node.lineno} prints"
    for line, text in strings_in(tree):
        if text in GIT_FLAGS:
            continue
        assert not re.search(r"--[a-zA-Z]", text), f"{module}:{line} names a flag: {text!r}"


@pytest.mark.parametrize("path", all_files(), ids=module_of)
def test_argparse_is_only_in_cli_and_torchvision_nowhere(path):
    modules = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert "torchvision" not in modules
    if module_of(path) != KNOWS_THE_COMMAND_LINE:
        assert "argparse" not in modules


# ---- how long its parts may be ----


@pytest.mark.parametrize("path", all_files(), ids=module_of)
def test_file_and_functions_are_short(path):
    count = len(path.read_text().splitlines())
    assert count <= MAX_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short(script):
    count = len((ROOT / script).read_text().splitlines())
    assert count <= MAX_SCRIPT_LINES


# ---- what README and docs/reading.md say of it ----


def modules_in_table():
    """Return the files of ddp/ that the table of modules names, in its order.

    Its lines begin like "| `data/toy.py`, `data/vision.py` | "."""
    files = []
    for line in (ROOT / "docs" / "reading.md").read_text().splitlines():
        first_cell = re.match(r"\|([^|]*)\|", line)
        if first_cell:
            files += re.findall(r"`([a-z_]+(?:/[a-z_]+)?\.py)`", first_cell[1])
    return files


def test_table_of_modules_is_true():
    files = modules_in_table()
    assert len(files) == len(set(files))
    ours = {str(path_of(module).relative_to(ROOT / "ddp")) for module in ORDER}
    assert set(files) - {"data/__init__.py"} == ours - {"data/__init__.py"}


def test_table_lists_the_core_in_reading_order():
    core = [name.removesuffix(".py") for name in modules_in_table() if "/" not in name]
    assert core == CORE + COMMANDS


def test_readme_has_two_set_up_commands_that_name_the_requirements():
    lines = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert "-r requirements.txt" in lines[0]
    assert "python train.py" in lines[0]
    assert "-r requirements-dev.txt" in lines[1]
    assert "python -m pytest" in lines[1]
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    (pin,) = [line for line in requirements if line.startswith("torch")]
    assert pin.startswith("torch==2.13.0")


def test_citation_is_of_this_version():
    assert f"version: {ddp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} leads to {target}"
