"""What the three scripts share: help, spellings, names of before 0.2, errors and exit codes."""

import argparse
import errno
import importlib
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import DIGITS, SHORT, execute, read_arrays, refused, run

from ddp.config import Config
from ddp.io import cli
from ddp.io.checkpoint import read_checkpoint
from ddp.io.edit_inputs import parse_labels
from ddp.io.terminal import Stopped
from ddp.options import SamplerOptions, count_or_auto
from ddp.presets import OLD_NAMES, OLD_VALUES
from ddp.sampling import SAMPLERS

SCRIPTS = ("train", "generate", "evaluate")


def parsed(script, line):
    """Return what a script makes of the flags in a line: name -> value, of those that it has."""
    return vars(importlib.import_module(script).parse(line.split()))


# ---- help ----


def help_sections(script, monkeypatch):
    """Return the help of a script: title of a group -> names of its flags, in order."""
    monkeypatch.setenv("COLUMNS", "200")
    result = execute(f"{script}.py", "--help", cwd=ROOT)
    assert result.code == 0
    sections = {}
    for line in result.out.splitlines():
        if re.match(r"\w.*:$", line):
            title = line.removesuffix(":")
            sections[title] = []
        flag = re.match(r"  (?:-\w, )?--(\w+)", line)
        if flag:
            sections[title].append(flag[1])
    return sections


@pytest.mark.parametrize(
    ("script", "together"),
    [
        ("train", ["dataset data_dir image_size", "epochs max_steps max_minutes"]),
        ("train", ["lr batch_size optimizer warmup", "schedule timesteps shift"]),
        ("train", ["network channels_base norm dropout", "prediction weighting loss"]),
        ("train", ["name out_dir save_every"]),
        ("generate", ["sampler steps eta cfg_scale threshold", "image inpaint reconstruct"]),
        ("evaluate", ["checkpoint samples compare metrics", "num_samples vlb_items seed"]),
        ("evaluate", ["sampler steps eta cfg_scale threshold"]),
    ],
)
def test_help_groups_flags_by_topic(script, together, monkeypatch):
    sections = help_sections(script, monkeypatch)
    groups = []
    for names in together:
        (group,) = [title for title, flags in sections.items() if set(names.split()) <= set(flags)]
        groups.append(group)
    assert len(set(groups)) == len(groups)
    assert max(len(flags) for flags in sections.values()) < 20


@pytest.mark.parametrize(
    ("script", "common", "rare"),
    [
        ("train", "dataset epochs lr batch_size", "optimizer ema_decay shift init loss plugin"),
        ("generate", "checkpoint num_samples out", "weights eta guidance_rescale jump_length"),
        ("evaluate", "checkpoint metrics num_samples", "dequant_samples eta inception_weights"),
    ],
)
def test_help_lists_common_flags_before_rare_ones(script, common, rare, monkeypatch):
    order = []
    for flags in help_sections(script, monkeypatch).values():
        order += flags
    places = [order.index(name) for name in common.split()]
    assert places == sorted(places)
    assert places[-1] < min(order.index(name) for name in rare.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_once_and_by_its_name(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = execute(f"{script}.py", "--help", cwd=ROOT).out
    flags = re.findall(r"^  (?:-\w, )?--([\w-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 20
    assert not [name for name in flags if "-" in name]
    assert not set(flags) & set(OLD_NAMES)  # names of before 0.2
    for name in (*OLD_VALUES["noise_dist"], *OLD_VALUES["sampler"]):
        assert not re.search(rf"[{{,]{re.escape(name)}[,}}]", text)


def test_help_shows_choices_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(execute("train.py", "--help", cwd=ROOT).out.split())
    assert "{linear,scaled_linear,cosine,sigmoid,karras,flow,learned}" in text
    assert re.search(r"--lr \w+ [\w ]+\(default: 0\.001\)", text)
    assert re.search(r"--batch_size \w+ [\w ]+\(default: 128\)", text)


# ---- spellings and old names ----


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("train", "--max_steps 12 --batch_size 16 --class_cond --noise_dist edm --dry_run"),
        ("generate", "--checkpoint a.pth --num_samples 3 --cfg_scale 2 --guidance_interval -1 1"),
        ("evaluate", "--checkpoint a.pth --vlb_items 30 --cfg_scale 2 --data_dir d"),
    ],
)
def test_flags_may_be_written_with_hyphens(script, line):
    with_hyphens = re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), line)
    assert with_hyphens != line
    assert parsed(script, with_hyphens) == parsed(script, line)


@pytest.mark.parametrize("name", ["normal", "log_normal"])
def test_old_noise_dist_goes_with_its_old_flag_only(name, tmp_path):
    """Today's `lognormal` is the `normal` of old: one underscore must not change the meaning."""
    assert "noise_dist" in refused("train.py", "--noise_dist", name, cwd=tmp_path)


def test_unknown_metric_is_refused_before_anything_is_loaded(tmp_path):
    line = refused("evaluate.py", "--checkpoint", "none.pth", "--metrics", "foo", cwd=tmp_path)
    assert "metrics=foo" in line


def test_nothing_to_resume_is_said(tmp_path):
    out = run("train.py", *SHORT, "--resume", "auto", cwd=tmp_path)
    assert "nothing to resume" in out


OLD_TRAIN_FLAGS = {
    "--levels normal": "--noise_dist lognormal",
    "--levels log_normal": "--noise_dist edm",
    "--levels uniform": "--noise_dist uniform",
    "--weighting bound": "--weighting vlb",
    "--width 8": "--channels_base 8",
    "--depth 2": "--blocks_per_level 2",
    "--multipliers 1,2": "--channel_mult 1,2",
    "--patch 2": "--patch_size 2",
    "--attention 4": "--attention_resolutions 4",
    "--conditional": "--class_cond",
    "--predict eps": "--prediction eps",
    "--noise_draws 2": "--noise_copies 2",
    "--noise-draws 2": "--noise_copies 2",
    "--keep 0": "--keep_checkpoints 0",
}
OLD_SAMPLING_FLAGS = {
    "--sampler dpm++": "--sampler dpmpp_2m",
    "--sampler dpm++sde": "--sampler dpmpp_2m_sde",
    "--churn 3": "--s_churn 3",
    "--clip none": "--threshold none",
    "--guidance 2": "--cfg_scale 2",
    "--guide x.pth": "--guide_checkpoint x.pth",
}
OLD_EDIT_FLAGS = {
    "--noise n.npz": "--latents n.npz",
    "--jump 3": "--jump_length 3",
    "--resample 2": "--jump_n_sample 2",
}
OLD_FLAGS = [("train", "", *pair) for pair in OLD_TRAIN_FLAGS.items()]
OLD_FLAGS += [
    ("generate", "--checkpoint a.pth ", *pair)
    for pair in (OLD_SAMPLING_FLAGS | OLD_EDIT_FLAGS).items()
]
OLD_FLAGS += [("evaluate", "--checkpoint a.pth ", *pair) for pair in OLD_SAMPLING_FLAGS.items()]


@pytest.mark.parametrize(("script", "required", "old", "new"), OLD_FLAGS)
def test_flags_of_before_version_0_2_are_read(script, required, old, new):
    values = parsed(script, required + new)
    assert parsed(script, required + old) == values
    assert values != parsed(script, required)


def test_every_old_name_and_value_is_tested():
    text = " ".join([*OLD_TRAIN_FLAGS, *OLD_SAMPLING_FLAGS])
    for name in OLD_NAMES:
        assert f"--{name}" in text.split()
    for values in OLD_VALUES.values():
        for value in values:
            assert value in text.split()


def test_old_flags_make_the_same_run_and_samples(tmp_path):
    lines = {
        "old": "--width 8 --depth 1 --multipliers 1,2 --patch 2 --attention 2 --conditional "
        "--predict eps --noise_draws 2 --levels normal --keep 0",
        "new": "--channels_base 8 --blocks_per_level 1 --channel_mult 1,2 --patch_size 2 "
        "--attention_resolutions 2 --class_cond --prediction eps --noise_copies 2 "
        "--noise_dist lognormal --keep_checkpoints 0",
    }
    sampling = {
        "old": "--sampler euler --churn 2 --clip none --guidance 2",
        "new": "--sampler euler --s_churn 2 --threshold none --cfg_scale 2",
    }
    images = {}
    weights = {}
    for name, line in lines.items():
        run("train.py", *SHORT, *line.split(), "--name", name, cwd=tmp_path)
        path = tmp_path / "checkpoints" / name / "model.pth"
        weights[name] = read_checkpoint(path)["ema"]
        flags = ["--checkpoint", path, "--num_samples", 3, "--steps", 2, "--out", f"{name}.npz"]
        run("generate.py", *flags, *sampling[name].split(), cwd=tmp_path)
        images[name] = read_arrays(tmp_path / f"{name}.npz")["images"]
    assert weights["old"].keys() == weights["new"].keys()
    for key, weight in weights["old"].items():
        assert torch.equal(weight, weights["new"][key])
    assert (images["old"] == images["new"]).all()


@pytest.mark.parametrize("options_class", [Config, SamplerOptions])
def test_every_field_is_a_flag_that_knows_its_type(options_class):
    parser = cli.make_parser("", argument_default=argparse.SUPPRESS)
    cli.add_config_flags(parser, options_class)
    assert not vars(parser.parse_args([]))  # what is not given is not there
    for field in options_class.__dataclass_fields__.values():
        kind = field.metadata["kind"]
        choices = field.metadata["choices"]
        values = {bool: [], int: ["3"], float: ["0.5"], str: ["x"], count_or_auto: ["3"]}
        values = values.get(kind, ["8,4"])
        if choices:
            values = [str(next(iter(choices)))]
        if field.metadata["bounds"].get("count") == 2:
            values = ["-1", "2.5"]
        if kind.__name__ == "image_size":
            values = ["8x4"]
        parsed_values = vars(parser.parse_args([f"--{field.name}", *values]))
        expected = {int: 3, float: 0.5, str: "x", bool: True, count_or_auto: 3}
        expected = expected.get(kind, [8, 4])
        if choices:
            expected = next(iter(choices))
        if field.metadata["bounds"].get("count") == 2:
            expected = [-1, 2.5]
        assert parsed_values == {field.name: expected}


def test_sampler_options_tell_zero_from_not_given():
    for script in ("generate", "evaluate"):
        line = "--checkpoint a.pth --eta 0 --cfg_scale 0"
        args = importlib.import_module(script).parse(line.split())
        options = cli.sampler_options(args)
        assert (options.eta, options.cfg_scale, options.steps) == (0, 0, None)


def test_a_switch_is_turned_off_again():
    parse = importlib.import_module("train").parse
    assert not hasattr(parse([]), "class_cond")
    assert parse(["--class_cond"]).class_cond
    for spelling in ("--no_class_cond", "--no-class-cond"):
        assert parse([spelling]).class_cond is False


# ---- errors and exit codes ----


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        ("train.py", "--epochs 0", "epochs"),
        ("train.py", "--lr fast", "lr"),
        ("train.py", "--no_such_flag", "no_such_flag"),
        ("train.py", "--ephocs 3", "did you mean --epochs"),
        ("generate.py", "--checkpoint a.pth --samlper ddim", "did you mean --sampler"),
        ("generate.py", "--checkpoint a.pth --sampler dimm", "did you mean ddim"),
        ("train.py", "--norm bach", "did you mean batch"),
        ("train.py", "--dataset mnsit", "did you mean mnist"),
        ("generate.py", "--checkpoint a.pth --format stirp", "did you mean strip"),
        ("evaluate.py", "--checkpoint a.pth --metrics filter", "did you mean filters"),
        ("train.py", "--class_cond false", "no_class_cond turns it off"),
        ("train.py", "--config config.json --resume auto", "config"),
        ("train.py", f"--max_steps {'9' * 400}", "max_steps"),
        ("train.py", f"--channel_mult 1,{'9' * 5000}", "channel_mult"),
        ("train.py", "--lr 1e38", "lr"),
        ("train.py", "--epochs 1e308", "epochs"),
        ("train.py", "--lr nan", "lr"),
        ("generate.py", f"--checkpoint a.pth --num_samples -{'9' * 400}", "num_samples"),
        ("generate.py", "--checkpoint a.pth --s_churn inf", "s_churn"),
        ("generate.py", "--checkpoint =", "checkpoint"),
        ("generate.py", f"--checkpoint a.pth --steps {'many' * 1000}", "steps"),
        ("train.py", "--schedule cubic", "schedule"),
        ("generate.py", "", "checkpoint"),
        ("generate.py", "--checkpoint a.pth --steps many", "steps"),
        ("generate.py", "--checkpoint a.pth --strength 0.5", "strength"),
        ("evaluate.py", "", "checkpoint"),
        ("evaluate.py", "--checkpoint a.pth --num_samples 1", "num_samples"),
    ],
)
def test_wrong_flag_is_one_short_line_and_code_2(script, flags, name, tmp_path):
    arguments = [word.replace("=", "") for word in flags.split()]  # = is empty text
    result = execute(script, *arguments, cwd=tmp_path)
    assert result.code == 2
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert re.search(rf"\b{name}\b", lines[-1])
    assert "error: " in lines[-1]
    assert len(lines) <= 2  # one of them may be the usage
    assert all(len(line) < 250 for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py"])
def test_missing_or_damaged_checkpoint_is_one_line_and_code_1(script, tmp_path):
    assert "none.pth" in refused(script, "--checkpoint", "none.pth", cwd=tmp_path, code=1)
    (tmp_path / "bad.pth").write_bytes(b"PK nonsense")
    result = execute(script, "--checkpoint", "bad.pth", cwd=tmp_path)
    assert result.code == 1
    assert "bad.pth" in result.error_line
    assert len(result.err.splitlines()) == 1


def test_missing_or_damaged_run_is_one_line_and_code_1(tmp_path):
    assert "none.pth" in refused("train.py", "--resume", "none.pth", cwd=tmp_path, code=1)
    (tmp_path / "bad.pth").write_bytes(b"PK nonsense")
    assert "bad.pth" in refused("train.py", "--resume", "bad.pth", cwd=tmp_path, code=1)


def test_exit_codes_reach_the_shell(tmp_path):
    """As programs: 2 for a wrong flag, 1 for a failure, each with its one line on stderr.

    Other tests of generate.py and train.py as programs see 130, of Ctrl-C and SIGTERM."""
    programs = []
    for script, flags, code in (
        ("train.py", ["--epochs", "0"], 2),
        ("evaluate.py", ["--checkpoint", "none.pth"], 1),
    ):
        command = [sys.executable, ROOT / script, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        programs.append((script, code, subprocess.Popen(command, cwd=tmp_path, **pipes)))
    for script, code, program in programs:
        _, err = program.communicate(timeout=120)
        assert program.returncode == code, err
        assert re.fullmatch(rf"{script}: error: .*\n", err)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("steps=0 is too few"), 2, "error: steps=0 is too few"),
        (OSError("there is no a.pth"), 1, "error: there is no a.pth"),
        (FloatingPointError("infinite"), 1, "error: infinite"),
        (KeyboardInterrupt(), 130, "stopped at once"),
        (Stopped(signal.SIGTERM), 143, "stopped at once"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), 1, "batch_size"),
        (MemoryError(), 1, "memory"),
        (MemoryError("Unable to allocate 3 TiB"), 1, "3 TiB"),
        (OSError("two\nlines"), 1, "two lines"),
        (torch._dynamo.exc.InternalTorchDynamoError("no\ncompiler"), 1, "compile"),
    ],
)
def test_exit_status_of_what_ends_a_script(error, code, line):
    status, text = cli.exit_status(error)
    assert status == code
    assert line in text
    assert "\n" not in text


def test_exit_status_of_a_full_disk_names_the_reason():
    status, text = cli.exit_status(OSError(errno.ENOSPC, "No space left on device", "a.pth"))
    assert status == 1
    assert "No space left" in text


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug"), TypeError("a bug")])
def test_exit_status_lets_a_bug_show_its_traceback(error):
    with pytest.raises(type(error)):
        cli.exit_status(error)


def test_an_error_with_what_a_terminal_obeys_is_one_plain_short_line(capsys):
    def main(args):
        raise OSError("\x1b[2J\r\n" + "x" * 10**6)

    assert cli.command(main, lambda arguments: None, []) == 1
    err = capsys.readouterr().err
    assert r": error: \x1b[2J x" in err
    assert err.count("\n") == 1
    assert len(err) < 5000


def test_require_at_least_names_the_flag():
    args = argparse.Namespace(num_samples=0, seed=2**32, steps=None)
    cli.require_at_least(args, steps=1)
    for name in ("num_samples", "seed"):
        with pytest.raises(ValueError, match=f"{name}="):
            cli.require_at_least(args, **{name: 1})


def test_reject_if_raises_the_first_reason_that_holds():
    cli.reject_if((False, "a"), (None, "b"))
    with pytest.raises(ValueError, match=r"^b$"):
        cli.reject_if((False, "a"), (True, "b"), (True, "c"))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1", [1]),
        ("cat", [0]),
        ("dog, cat", [1, 0]),
        ("big, brown", [2]),
        ("2,0", [2, 0]),
        (None, None),
    ],
)
def test_parse_labels_reads_names_and_numbers(text, labels):
    model = argparse.Namespace(num_classes=3)
    assert parse_labels(text, model, ["cat", "dog", "big, brown"]) == labels


def test_parse_labels_refuses_what_is_not_a_class():
    for num_classes, text in ((3, "bird"), (3, "3"), (0, "cat")):
        model = argparse.Namespace(num_classes=num_classes)
        with pytest.raises(ValueError, match="label="):
            parse_labels(text, model, ["cat", "dog", "big, brown"])


# ---- plugins ----


def test_a_break_between_groups_is_no_end_of_all_flags(tmp_path):
    (tmp_path / "own.py").write_text("raise OSError('it ran')")
    line = ["--seed", "3", "--compare", "a", "b", "--", "c", "--plugin", str(tmp_path / "own.py")]
    args = importlib.import_module("evaluate").parse(line)
    assert args.compare == ["a", "b", "--", "c"]
    assert (args.seed, len(args.plugin)) == (3, 1)
    with pytest.raises(OSError, match="it ran"):
        cli.load_plugins(line)
    assert cli.with_breaks(["x", "--", "y"]) == ["x", "--", "y"]  # of another script


def test_plugins_run_in_order_before_anything_else(tmp_path):
    for name in ("first", "second"):
        text = f"with open('order.txt', 'a') as f:\n    f.write('{name} ')\n"
        (tmp_path / f"{name}.py").write_text(text)
    flags = ["--plugin", "first.py", "--plugin", "second.py", "--epochs", 0]
    assert "epochs" in refused("train.py", *flags, cwd=tmp_path)
    assert (tmp_path / "order.txt").read_text() == "first second "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('it needs scipy')\n", "it needs scipy (line 1)"),
        ("x = 1\nimport no_such_module\n", "no_such_module"),
        ("import statistics\n\nstatistics.mean([])\n", "(line 3)"),  # raised in another file
        ("this is no Python\n", "line 1"),
    ],
)
def test_plugin_that_fails_is_one_line_that_names_its_line(tmp_path, text, reason):
    (tmp_path / "own.py").write_text(text)
    for script in SCRIPTS:
        result = execute(f"{script}.py", "--plugin", "own.py", "--no_such_flag", cwd=tmp_path)
        assert result.code == 1
        assert "plugin=own.py: " in result.error_line
        assert reason in result.error_line
        assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["none.py", ".", "="])
def test_plugin_that_is_not_there_is_refused(tmp_path, name):
    name = name.strip("=")
    line = refused("train.py", *SHORT, "--plugin", name, cwd=tmp_path, code=1)
    assert f"plugin={name}: " in line
    assert not list(tmp_path.iterdir())


FAULTY = """
import math

from ddp.sampling import SAMPLERS, Sampler


def step(x0_hat, x_t, log_snr_t, log_snr_s, **_):
    return x0_hat * math.sqrt(-1)


SAMPLERS["faulty"] = Sampler(step)
"""


def test_plugin_that_fails_at_work_is_no_wrong_flag(tmp_path):
    """A ValueError in it is not what the user asked for; the line says where it arose."""
    (tmp_path / "own.py").write_text(FAULTY)
    flags = ["--checkpoint", DIGITS, "--plugin", "own.py", "--sampler", "faulty", "--steps", 1]
    try:
        line = refused("generate.py", *flags, "--out", "a.png", cwd=tmp_path, code=1)
    finally:
        SAMPLERS.pop("faulty", None)
    assert "plugin=own.py: ValueError: math domain error (line 8)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]
