"""docs/own.md: every block of Python runs, and so does every command, with small settings.

Each section runs in processes and a folder of its own: what it registers must not stay here."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import DIGITS

PAGE = (ROOT / "docs" / "own.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
SMALL = {  # what makes a command short; a flag that is given last counts
    "train.py": "--max_steps 2 --batch_size 16 --channels_base 8 --blocks_per_level 1",
    "generate.py": "--num_samples 4",
    "evaluate.py": "--num_samples 40 --vlb_items 20 --vlb_samples 2 --steps 3",
}
RUN_ALL = """
from helpers import run
for line in open("commands.txt"):
    script, *flags = line.rstrip("\\n").split("\\t")
    print(f"[{script} {flags}]", run(script, *flags, cwd="."))
"""


def blocks(text, language):
    """Return the blocks of a language, a list of texts."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def execute(*command, cwd):
    """Run Python in a process of its own; return what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "scripts"), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def commands(section):
    """Return the commands of a section, less their minutes, as words: a script, and its flags."""
    lines = "".join(blocks(section, "bash")).replace("\\\n", "").splitlines()
    words = [shlex.split(re.sub(r" --max_minutes \d+", "", line)) for line in lines]
    assert all(python == "python" for python, *_ in words), lines
    return [rest for _, *rest in words]


def write_files(section, folder):
    """Write each block of Python under the name in its first line; return the paths."""
    paths = []
    for code in blocks(section, "python"):
        path = folder / re.match(r"# (\w+\.py)\n", code)[1]
        path.write_text(code)
        paths.append(path)
    return paths


def test_every_block_belongs_to_a_section_and_is_short():
    own = [block for section in SECTIONS.values() for block in blocks(section, "python")]
    assert own == blocks(PAGE, "python")
    assert len(own) >= 8
    for code in own:
        assert len(code.splitlines()) <= 30
        assert max(map(len, code.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SECTIONS if blocks(SECTIONS[name], "python")])
def test_section_runs(name, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(DIGITS, tmp_path / "checkpoints")
    for path in write_files(SECTIONS[name], tmp_path):
        execute(path, cwd=tmp_path)
    lines = []
    for script, *flags in commands(SECTIONS[name]):
        if script in SMALL:  # else it is a file of the section, which ran above
            small = SMALL[script].split()
            if script == "evaluate.py" and "--metrics" not in flags:
                small += ["--metrics", "vlb"]  # all that apply would take a minute
            lines.append("\t".join([script, *flags, *small]))
    (tmp_path / "commands.txt").write_text("".join(f"{line}\n" for line in lines))
    out = execute("-c", RUN_ALL, cwd=tmp_path)
    assert out.count("[") >= len(lines)


def test_model_of_ones_own_samples_what_its_data_are(tmp_path):
    section = SECTIONS["Your network"]
    path = next(path for path in write_files(section, tmp_path) if path.name == "my_model.py")
    numbers = re.findall(r"-?\d+\.\d+", execute(path, cwd=tmp_path))
    *mean, std_x, std_y = map(float, numbers)
    assert max(map(abs, mean)) < 0.1  # 2000 samples: standard error 0.02
    assert abs(std_x - 1) < 0.1
    assert abs(std_y - 1) < 0.1


def test_citation_is_that_of_the_file():
    (entry,) = blocks(PAGE, "bibtex")
    fields = dict(re.findall(r"(\w+) += (.*?),?\n", entry))
    fields = {name: re.sub(r"[{}]", "", value) for name, value in fields.items()}
    known = dict(re.findall(r"^([\w-]+): \"?(.*?)\"?$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert fields["title"] == known["title"]
    assert fields["version"] == known["version"]
    assert known["date-released"].startswith(fields["year"])
    assert f"name: {fields['author']}" in (ROOT / "CITATION.cff").read_text()
