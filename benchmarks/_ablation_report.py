"""The tables, the figure and the JSON of benchmarks/ablation.py."""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from ddp.metrics.uncertainty import difference_of_trainings

COLUMNS = {  # figure -> its title; those that the runs of a dataset have are shown
    "v_loss": "test loss",
    "fd": "FD",
    "precision": "precision",
    "recall": "recall",
    "confident": "confident",
    "label_accuracy": "label accuracy",
    "nn_distance_ratio": "distance to training items",
    "sliced_wasserstein": "sliced W",
    "wasserstein2": "W2",
    "histogram_kl": "histogram KL",
    "gap": "nats above the entropy",
}
# figures whose difference to the default is shown, too
DIFFERENCES = ("v_loss", "fd", "sliced_wasserstein", "gap")
ENDS_WELL = 1.1  # a run does whose test loss is below so many times the default's


def read_groups(out):
    """Return dataset -> variant -> training seed -> figures, {} where the run diverged."""
    groups = {}
    for path in sorted(Path(out).glob("*/*.json")):
        result = json.loads(path.read_text())
        variants = groups.setdefault(result["dataset"], {})
        for name, figures in (result["rows"] or {"": {}}).items():
            title = result["variant"] + (f", {name}" if name else "")
            seeds = variants.setdefault(title, {})
            seeds[result["seed"]] = figures
        variants["real items"] = {0: result["floor"]}
    return groups


def default_of(name, variants):
    """Return the figures of the default that a variant is compared with, by training seed.

    Of few samples in so many steps, those of as many: a distance falls with the number."""
    if name == "real items":
        return {}
    _, few, steps = name.rpartition("nfe=")
    return variants.get(f"default, {few}{steps}" if few else "default", {})


def summary_of(seeds, default):
    """Return the summary of a variant: of each figure its mean, sd and difference to the default.

    seeds, default: training seed -> figures. The difference is paired where seeds match; its
    interval is Student's, of trainings. None with fewer than two."""
    summary = {"seeds": sorted(seeds), "diverged": sum(not figures for figures in seeds.values())}
    for name in COLUMNS:
        values = {seed: figures[name] for seed, figures in seeds.items() if name in figures}
        if not values:
            continue
        row = {"mean": statistics.fmean(values.values()), "sd": None, "less_default": None}
        if len(values) > 1:
            row["sd"] = statistics.stdev(values.values())
        both = [seed for seed in values if name in default.get(seed, {})]
        if len(both) > 1:
            pairs = [(values[seed], default[seed][name]) for seed in both]
            ours, theirs = zip(*pairs, strict=True)
            row["less_default"] = difference_of_trainings(theirs, ours, paired=True)
        summary[name] = row
    losses = [figures.get("v_loss") for figures in default.values() if "v_loss" in figures]
    if losses and any("v_loss" in figures for figures in seeds.values()):
        limit = ENDS_WELL * statistics.fmean(losses)
        summary["ended_well"] = sum(f.get("v_loss", limit) < limit for f in seeds.values())
    elif summary["diverged"]:
        summary["ended_well"] = 0
    return summary


def markdown_table(variants):
    """Return the table of a dataset as lines of Markdown; variants: name -> summary."""
    shown = [name for name in COLUMNS if any(name in row for row in variants.values())]
    titles = ["variant", "seeds", "ended well"]
    for name in shown:
        titles.append(COLUMNS[name])
        if name in DIFFERENCES:
            titles.append("less the default")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for variant, row in variants.items():
        cells = [variant, str(len(row["seeds"])), str(row.get("ended_well", ""))]
        for name in shown:
            figure = row.get(name)
            cells.append(figure_text(figure))
            if name in DIFFERENCES:
                cells.append(difference_text(figure))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def figure_text(figure):
    """Return a mean with its standard deviation between trainings as text."""
    if figure is None:
        return ""
    sd = "" if not figure["sd"] else f" ± {figure['sd']:.1g}"
    return f"{figure['mean']:.4g}{sd}"


def difference_text(figure):
    """Return a difference with its interval as text, in bold where the interval leaves out 0."""
    if (
        figure is None
        or figure["less_default"] is None
        or not any(figure["less_default"]["interval"])
    ):
        return ""
    difference = figure["less_default"]
    low, high = difference["interval"]
    text = f"{difference['value']:+.2g} [{low:+.2g}, {high:+.2g}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def draw(report, path):
    """Draw the difference of each variant to the default, with its interval: a row a dataset."""
    rows = []
    for dataset, variants in report.items():
        name = "fd" if "fd" in variants.get("default", {}) else "sliced_wasserstein"
        if name in variants.get("default", {}):
            rows.append((dataset, ("v_loss", name)))
    if not rows:
        return
    heights = [2 + sum("nfe=" not in name for name in report[dataset]) for dataset, _ in rows]
    figure, axes = plt.subplots(
        len(rows),
        2,
        figsize=(10, 0.2 * sum(heights) + 0.5 * len(rows)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, (dataset, names) in zip(axes, rows, strict=True):
        for axis, name in zip(row, names, strict=True):
            draw_differences(axis, report[dataset], name)
            axis.set_title(dataset)
        row[1].tick_params(labelleft=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_differences(axis, variants, name):
    """Draw how far a figure of each variant is from the default's, in percent of it."""
    scale = variants["default"][name]["mean"]
    shown = []
    for variant, row in variants.items():
        difference = row.get(name, {}).get("less_default")
        if difference is None or variant in ("default", "real items") or "nfe=" in variant:
            continue
        low, high = [100 * bound / scale for bound in difference["interval"]]
        value = 100 * difference["value"] / scale
        color = "tab:gray" if low <= 0 <= high else "tab:red" if low > 0 else "tab:blue"
        axis.plot([low, high], [len(shown)] * 2, color=color)
        axis.plot([value], [len(shown)], "o", color=color, markersize=4)
        shown.append(variant)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), shown, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=10)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(f"{COLUMNS[name]} less the default's, % of it")


def draw_levels(levels, path):
    """Draw how far BatchNorm's statistics of a level are from the mixture's, by layer: a PNG."""
    height = max(4, 0.17 * len(levels["layers"]))  # of the legend
    figure, axes = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    titles = {
        "mean": "difference of means, in standard deviations of the mixture",
        "std": "standard deviation over that of the mixture",
    }
    colors = plt.get_cmap("viridis").resampled(len(levels["layers"]))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for i, layer in enumerate(levels["layers"]):
            values = [row[i] for row in levels[name]]
            style = "--" if layer.endswith("norm1") else "-"
            label = layer.removeprefix("network.") if name == "mean" else None
            axis.plot(levels["log_snr"], values, style, color=colors(i), label=label)
        axis.set_title(title)
        axis.set_xlabel("log-SNR (left: noise, right: data)")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_report(out):
    """Write the report into the folder of results: tables, JSON, figures; return the tables."""
    out = Path(out)
    report = {}
    lines = []
    for dataset, variants in read_groups(out).items():
        rows = {}
        for name, seeds in variants.items():
            rows[name] = summary_of(seeds, default_of(name, variants))
        order = sorted(rows, key=lambda name: ("nfe=" in name, name != "default", name))
        report[dataset] = {name: rows[name] for name in order}
        lines += [f"### {dataset}", "", *markdown_table(report[dataset]), ""]
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "report.md").write_text("\n".join(lines))
    draw(report, out / "report.png")
    for path in sorted(out.glob("*/default-0.json")):
        levels = json.loads(path.read_text()).get("levels")
        if levels:
            draw_levels(levels, out / f"levels-{path.parent.name}.png")
    return "\n".join(lines)
