"""Everything that evaluate.py measures, each number an Estimate with its error.

A Subject, a model or somebody else's samples, is judged in a Setting: a real set to compare with
and, for the floor, as many other real items in the place of samples. Every subject meets the same
items and noise, so that what is measured of two has a paired error.
"""

import dataclasses
import math

import torch

from ddp import features, figures, likelihood, quality
from ddp.checkpoint import provenance
from ddp.data import order, to_float, to_pixels
from ddp.quality import Estimate, estimate
from ddp.reverse import final, generate

SCHEMA = 2
FEWEST = 20  # items, below which there is nothing to compare
LARGEST_ASSIGNMENT = 2000  # points: an assignment takes time as their cube
LARGEST_NEIGHBOURHOOD = 10_000  # items: nearest neighbours take memory as their square
LARGEST_DIMENSION = 512  # with more features a distance takes seconds: FEW half-samples
FEW = 10
NAMED = 0.9  # probability from which a judge is sure
CLOSE = 0.05  # the quantile of held-out items' distances to training items that is called close
CLOSEST = 16  # pairs to show

OF_MODELS = ("loss", "bound", "exact")
OF_PICTURES = ("judge", "pixels", "inception")
OF_POINTS = ("plane",)
METRICS = (*OF_MODELS, *OF_PICTURES, *OF_POINTS, "memorisation", "calibration")
SPACES = {  # what is measured in each
    **dict.fromkeys(OF_PICTURES, ("frechet", "kernel", "coverage_measures", "sliced_wasserstein")),
    "plane": ("wasserstein2", "mmd", "histogram_kl", "coverage_measures", "sliced_wasserstein"),
}
LIMITS = {"wasserstein2": LARGEST_ASSIGNMENT, "coverage_measures": LARGEST_NEIGHBOURHOOD}


@dataclasses.dataclass
class Subject:
    """What is judged: a model, with the `options` by which generate draws from it, or from the same
    made `fast`; or samples, `drawn`, uint8 pixels or points. `about`: what is told of it, plain
    types. `found`: what was measured, a nested dict of Estimates."""

    name: str
    about: dict
    model: object = None
    fast: object = None
    options: dict = None
    drawn: object = None
    found: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Setting:
    """What subjects are judged with: the real items `reference`, with their labels, and `floor`,
    as many of the other split. size: items at a time. progress: name -> a wrapper of iterables."""

    dataset: object
    count: int
    seed: int = 0
    size: int = 250
    against: str = "test"
    progress: object = lambda name: iter

    def __post_init__(self):
        data = self.dataset
        sets = [(data.test, data.test_labels), (data.train, data.train_labels)]
        real, other = sets if self.against == "test" else reversed(sets)
        self.reference, self.labels = picked(*real, self.count)
        self.count = len(self.reference)
        self.floor, _ = picked(*other, self.count)
        self.matched = len(self.floor) == self.count  # or a ratio to it would be of two numbers

    def batches(self, name, count, copies=1):
        """Indices of `count` items, batch after batch, of which each is used in `copies`."""
        return self.progress(name)(torch.arange(count).split(max(1, self.size // copies)))


def picked(items, labels, count):
    """`count` of the items, and their labels, in a random order that is always the same: a folder
    is sorted by class."""
    which = order(0, 0, len(items))[:count]
    return items[which], None if labels is None else labels[which]


def check_fit(name, model, state, dataset):
    """Raise ValueError when a checkpoint was not trained on such data."""
    same_labels = not model.classes or dataset.classes == state["classes"]
    if dataset.event != model.event or not same_labels or len(dataset.test) < 2:
        raise ValueError(
            f"the data, {dataset.event} of classes {dataset.classes}, is not what {name} was "
            f"trained on, {model.event} of classes {state['classes']}, or has too few test items"
        )


def chosen(text, is_image, models):
    """The METRICS named in `text`, or all that apply and need no download. models: those of the
    subjects, None for samples.

    Raises ValueError for one that there is not, or that does not apply."""
    unfit, has_model = OF_POINTS if is_image else OF_PICTURES, any(models)
    if text is None:
        left_out = {*unfit, "inception", *(() if has_model else OF_MODELS)}
        return [name for name in METRICS if name not in left_out]
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metrics {name}: expected some of {','.join(METRICS)}")
        if name in unfit:
            raise ValueError(f"--metrics {name} is for {'points' if is_image else 'pictures'}")
        if name in OF_MODELS and not has_model:
            raise ValueError(f"--metrics {name} needs a model, not samples alone")
    return names


def draw(model, setting, options):
    """As many samples as there are real items to compare with, of the labels that these have."""
    device, parts = next(model.parameters()).device, []
    for indices in setting.batches("samples", setting.count):
        label = setting.labels[indices].to(device) if model.classes else None
        x0 = final(generate(model, indices, setting.seed, label, **options))
        if not x0.isfinite().all():
            raise FloatingPointError("samples are not finite; use an earlier checkpoint")
        parts.append(to_pixels(x0))
    return torch.cat(parts).cpu()


def of_test(model, setting, name, count, measure, copies=1):
    """`measure`(x0, indices, label) of `count` test items in batches: a list of what it gives."""
    device, dataset = next(model.parameters()).device, setting.dataset
    items, labels = picked(dataset.test, dataset.test_labels, count)
    found = []
    for indices in setting.batches(name, len(items), copies):
        label = labels[indices].to(device) if model.classes else None
        found.append(measure(to_float(items[indices]).to(device), indices, label))
    return found


def loss(model, setting, count):
    """The test loss at ten levels, a dict of dicts: log_snr, t, and Estimates x0, eps and v. They
    go by log-SNR: two schedules have other levels at one t."""

    def measure(x0, indices, label):
        return likelihood.losses(model, x0, indices, setting.seed, label=label)

    joined = {}
    for rows in zip(*of_test(model, setting, "loss", count, measure), strict=True):
        units = {u: Estimate.mean(torch.cat([r[u] for r in rows])) for u in ("x0", "eps", "v")}
        place = {name: rows[0][name] for name in ("log_snr", "t")}
        joined[f"log-SNR {place['log_snr']:.2f}"] = place | units
    return joined


def unit(dataset):
    """Nats in the unit of likelihoods: bits/dim for images (of uint8 data), nats for points."""
    return math.log(2) * math.prod(dataset.event) if dataset.is_image else 1.0


def bound(model, setting, count, draws):
    """The variational bound in both views, a dict of dicts of Estimates: its terms, their `total`,
    its `gap` to the entropy of the data where that is known, and `monte_carlo`, the part of the
    total's error that more draws would lower."""
    found, dataset = {}, setting.dataset
    each, gap = draws // 2, log_density(dataset, count)
    for view in ("discrete", "continuous"):

        def measure(x0, indices, label, view=view):
            return [
                likelihood.bound(
                    model, x0, indices, setting.seed, each, label, dataset.is_image, view, first
                )
                for first in (0, each)
            ]

        parts = of_test(model, setting, f"bound, {view}", count, measure)
        halves = [
            {k: torch.cat([p[h][k] for p in parts]) / unit(dataset) for k in parts[0][0]}
            for h in (0, 1)
        ]
        terms = {k: (halves[0][k] + halves[1][k]) / 2 for k in halves[0]}
        found[view] = {k: Estimate.mean(v) for k, v in terms.items()}
        noise = (halves[0]["total"] - halves[1]["total"]) / 2
        found[view]["monte_carlo"] = (noise.square().sum().sqrt() / len(noise)).item()
        if gap is not None:
            found[view]["gap"] = Estimate.mean(terms["total"] + gap)
    return found


def log_density(dataset, count):
    """The log-density of the test items that are measured, (N,); None where it is not known."""
    return dataset.log_density and dataset.log_density(picked(dataset.test, None, count)[0])


def exact(model, setting, count, draws, bounds=None):
    """The exact negative log-likelihood by way of dequantisation, `uniform` and `noise`, or of
    points, `density`: dicts of Estimates, `total`; of pictures `importance_weighted`, from the same
    draws; `gap` to the entropy, where it is known; and how far `below` the continuous bound of the
    same items it is, given `bounds`, of one item each."""
    dataset, found = setting.dataset, {}
    ways = {"uniform": draws, "noise": draws} if dataset.is_image else {"density": 1}
    for way, copies in ways.items():

        def measure(x0, indices, label, way=way, copies=copies):
            dequantise = way if dataset.is_image else None
            return likelihood.exact(model, x0, indices, setting.seed, copies, label, dequantise)

        parts = of_test(model, setting, f"exact, {way}", count, measure, copies)
        nats = torch.cat(parts, dim=1)
        values = {"total": nats.mean(dim=0) / unit(dataset)}
        if dataset.is_image:
            weighted = math.log(copies) - torch.logsumexp(-nats, dim=0)
            values["importance_weighted"] = weighted / unit(dataset)
        elif (known := log_density(dataset, count)) is not None:
            values["gap"] = values["total"] + known
        if bounds is not None and way != "uniform":  # whose ends are other than the bound's
            both = min(len(bounds), nats.shape[1])
            values["below"] = bounds[:both] - values["total"][:both]
        found[way] = {name: Estimate.mean(v) for name, v in values.items()}
    return found


def in_space(name, setting, extract):
    """(measure, D): a function of samples that gives, for each measure of the space `name`, the
    Estimates `samples`, `floor` (the setting's other real items in their place) and their `ratio`;
    and the number of features. extract: items -> features (N, D)."""
    reference, other = extract(setting.reference), extract(setting.floor)
    few = {"resamples": FEW} if reference.shape[1] > LARGEST_DIMENSION else {}

    def measured(items):
        found, real = {}, reference[: len(items)]
        for measure in SPACES[name]:
            function, limit = quality.measures_of(measure), LIMITS.get(measure)
            found |= estimate(function, items, real, limit=limit, **few)
        return found

    floor = measured(other)
    return (
        lambda drawn: beside(measured(extract(drawn)), floor, setting.matched),
        reference.shape[1],
    )


def distance_ratio(drawn, setting):
    """One number for benchmarks: the Frechet distance of pixels, or the 2-Wasserstein distance of
    points, to the setting's real items, over that of its other real items."""
    measure = quality.frechet_distance if drawn.ndim == 4 else quality.wasserstein2
    sets = drawn, setting.floor, setting.reference
    ours, floor, real = (features.pixel_features(items) for items in sets)
    return measure(ours, real) / measure(floor, real[: len(floor)])


def beside(found, floor, matched):
    """Estimates, each with its floor and its ratio to it; this is None where the floor is 0, or
    unless it is `matched`, of the same number of items."""
    return {
        name: {
            "samples": e,
            "floor": floor.get(name),
            "ratio": e.over(floor[name]) if matched and name in floor else None,
        }
        for name, e in found.items()
    }


def in_classes(judge, setting):
    """A function of samples, and whether they have the setting's labels, that gives how the judge
    sorts them: `histogram`, the total variation to the real items' classes, `named`, the share of
    which it is sure, `agreement` with those labels; and the `counts` of each class."""

    def sorted_into(items):
        return judge.of(items)[1]

    real, other = sorted_into(setting.reference), sorted_into(setting.floor)

    def measured(probabilities):
        return estimate(
            lambda a, b: {
                "histogram": quality.total_variation(*map(quality.one_hot, (a, b))),
                "named": (a.amax(dim=1) > NAMED).double().mean().item(),
            },
            probabilities,
            real[: len(probabilities)],
        )

    floor = measured(other)

    def classed(drawn, labelled):
        probabilities = sorted_into(drawn)
        found = beside(measured(probabilities), floor, setting.matched)
        if labelled:
            right = probabilities.argmax(dim=1) == setting.labels
            found["agreement"] = {"samples": Estimate.share(right)}
        counts = [
            torch.bincount(p.argmax(dim=1), minlength=p.shape[1]).tolist()
            for p in (probabilities, real)
        ]
        return found | {"counts": dict(zip(("samples", "real"), counts, strict=True))}

    return classed


def notes(name, setting, dimension):
    """What to know before comparing figures of the space `name`, lines."""
    count, found = setting.count, []
    if count < 2 * dimension and name in OF_PICTURES:
        found.append(
            f"too few samples: {count:,} for {dimension:,} features, so frechet is mostly its "
            "bias; compare it at this number only"
        )
    elif count < 1000:
        found.append(f"too few samples, {count:,}, to compare with figures of another number")
    if not setting.matched:
        found.append(
            f"the floor is of {len(setting.floor):,} items only, all of the other split, so there "
            "are no ratios to it"
        )
    trained = len(setting.dataset.train)
    if name == "judge" and setting.against == "train" and count > trained // 2:
        found.append("among the real items are some on which the judge was trained")
    found += [
        f"{measure} is of {limit:,} items only"
        for measure, limit in LIMITS.items()
        if measure in SPACES[name] and count > limit
    ]
    if name == "inception" and not (count >= 50_000 and setting.against == "train"):
        found.append(
            "published distances take 50,000 samples against the training split: "
            "--num_samples 50000 --reference train"
        )
    return found


def memorisation(drawn, setting):
    """How near samples are to training items, in the root mean square over pixels or coordinates:
    the median distance to the nearest as a `ratio` to that of held-out items; the share `close`,
    nearer than all but 5% of these; the number of `copies`; and the `closest` pairs."""
    dataset = setting.dataset
    size = math.sqrt(math.prod(dataset.event))
    sets = drawn, picked(dataset.test, None, setting.count)[0], dataset.train
    ours, held_out, train = (x.flatten(1).float() / size for x in sets)
    distances, which = quality.nearest(ours, train)
    usual, _ = quality.nearest(held_out, train)

    def ratio(a, b):
        return {"ratio": (a.median() / b.median()).item()}

    first = distances.argsort()[:CLOSEST].tolist()
    middle = usual.median().item()
    return {
        **(estimate(ratio, distances, usual) if middle else {}),  # 0 where most have copies
        "close": Estimate.share(distances < usual.quantile(CLOSE)),
        "copies": int((distances == 0).sum()),
        "median": {"samples": distances.median().item(), "held_out": middle},
        "closest": [
            {"sample": i, "train": which[i].item(), "distance": distances[i].item()} for i in first
        ],
    }


def calibration(drawn, setting):
    """Whether samples have the colours of the data: Estimates of each channel's `mean` and `sd`, in
    grey values or the units of points, of samples, of real items, and their difference; and of
    pictures the share of `saturated` values, 0 or 255."""

    def moments(items):
        channels = items.double().reshape(*items.shape[:2], -1).unbind(dim=1)
        for c, x in enumerate(channels):
            first, second = x.mean(dim=1), x.square().mean(dim=1)
            sd = math.sqrt(max(0.0, second.mean().item() - first.mean().item() ** 2))
            # what an item adds to the variance, by the delta method
            share = (second - 2 * first.mean() * first) / (2 * sd or 1) / math.sqrt(len(first))
            yield f"channel {c}", "mean", Estimate.mean(first)
            yield f"channel {c}", "sd", Estimate(sd, share)
        if items.ndim == 4:
            ends = ((items == 0) | (items == 255)).flatten(1).double().mean(dim=1)
            yield "saturated", "share", Estimate.mean(ends, range=(0, 1))

    found = {}
    for (name, figure, ours), (_, _, real) in zip(
        moments(drawn), moments(setting.reference), strict=True
    ):
        row = {"samples": ours, "real": real, "difference": ours - real}
        found.setdefault(name, {})[figure] = row
    return found


def evaluate(subjects, dataset, metrics, args, device, progress):
    """(results, pictures): all that is chosen of all subjects, as a dict for JSON, and for each
    subject a dict of PIL images. args: the flags of evaluate.py."""
    extract = dict.fromkeys(("pixels", "plane"), features.pixel_features)
    if "inception" in metrics:  # first, since it may be missing
        extract["inception"] = features.inception(args.inception_weights, device)
    count = min([args.num_samples, *(len(s.drawn) for s in subjects if s.drawn is not None)])
    setting = Setting(dataset, count, args.seed, args.batch_size, args.reference, progress)
    exact_items = args.exact_items or (128 if dataset.is_image else 2000)
    draws = args.draws or (16 if dataset.is_image else 64)
    draws += draws % 2  # two halves, of which the Monte Carlo error is made
    told, spaces = [], [name for name in SPACES if name in metrics]
    for subject in subjects:
        told += subject.about.get("found", [])
        trained_on = subject.about.get("provenance", {})
        # points of another --seed have the same test items
        kin = not dataset.is_image and trained_on.get("dataset") == dataset.name
        if trained_on.get("fingerprint", dataset.fingerprint) != dataset.fingerprint and not kin:
            told.append(f"{subject.name}: this is not the data that the model was trained on; its "
                        "test items may have been among the training items")  # fmt: skip
        model, found = subject.model, subject.found
        if model is None:  # some of all, which may be sorted
            which = order(0, 0, len(subject.drawn))[: setting.count].sort().values
            subject.drawn = subject.drawn[which]
            continue
        if "loss" in metrics:
            found["loss"] = loss(model, setting, args.test_items)
        if "bound" in metrics:
            found["bound"] = bound(model, setting, args.test_items, draws)
        if "exact" in metrics:
            total = found["bound"]["continuous"]["total"] if "bound" in metrics else None
            found["exact"] = exact(
                model, setting, exact_items, args.exact_draws, total and total.items
            )
        if set(metrics) - set(OF_MODELS):
            subject.drawn = draw(subject.fast, setting, subject.options)
    if spaces and setting.count < FEWEST:
        told.append(f"too few samples or real items, {setting.count}, for {', '.join(spaces)}")
        spaces = []
    judge = None
    if "judge" in spaces:
        judge, path = features.judge_of(dataset, progress("judge"), device)
        extract["judge"] = lambda items: judge.of(items)[0]
    for name in spaces:
        measure, dimension = in_space(name, setting, extract[name])
        sort = in_classes(judge, setting) if name == "judge" and dataset.classes else None
        told += [f"{name}: {note}" for note in notes(name, setting, dimension)]
        for subject in progress(name)(subjects):
            found = measure(subject.drawn)
            if sort:
                found |= sort(subject.drawn, subject.model and subject.model.classes)
            subject.found.setdefault("quality", {})[name] = found
    for name, measure in (("memorisation", memorisation), ("calibration", calibration)):
        for subject in subjects if name in metrics else ():
            subject.found[name] = measure(subject.drawn, setting)
    known, test = log_density(dataset, args.test_items), len(dataset.test)
    recipe = {name: getattr(args, name) for name in ("seed", "reference", "exact_draws")}
    recipe |= {"test_items": min(args.test_items, test), "exact_items": min(exact_items, test)}
    recipe |= {
        "draws": draws,
        "num_samples": setting.count,
        "floor_items": len(setting.floor),
        "metrics": metrics,
    }
    recipe |= {"unit": "bits/dim" if dataset.is_image else "nats", "device": str(device)}
    recipe |= {"tolerances": likelihood.TOLERANCES, "neighbours": quality.NEIGHBOURS}
    recipe |= {"resamples": quality.RESAMPLES, "limits": LIMITS, "by": provenance(dataset)}
    recipe |= {f"resamples_above_{LARGEST_DIMENSION}_features": FEW, "judge": None}
    if judge:
        recipe["judge"] = {"accuracy": judge.accuracy.item(), "fingerprint": judge.fingerprint}
        recipe["judge"] |= {
            "learned": "labels" if dataset.classes else "turns",
            "file": path and str(path),
        }
    about = {name: getattr(dataset, name) for name in ("name", "fingerprint", "event", "classes")}
    results = {
        "schema": SCHEMA,
        "dataset": about | {"train": len(dataset.train), "test": test},
        "recipe": recipe,
        "notes": told,
        "entropy": None if known is None else Estimate.mean(-known),
        "subjects": [{"name": s.name, "about": s.about, **s.found} for s in subjects],
        "comparison": comparison(subjects),
    }
    return plain(results), {s.name: pictures(s, setting) for s in subjects}


def pictures(subject, setting):
    """What is looked at of a subject: a dict, caption -> PIL image."""
    shown, found, dataset = {}, subject.found, setting.dataset
    if subject.drawn is not None:
        count = 64 if dataset.is_image else 5000
        sets = subject.drawn[:count], setting.reference[:count]
        shown["samples and real items"] = figures.overview(*sets, ("samples", "real items"))
    if "memorisation" in found:
        pairs = found["memorisation"]["closest"]
        items = (
            subject.drawn[[p["sample"] for p in pairs]],
            dataset.train[[p["train"] for p in pairs]],
        )
        shown["closest samples, each with its nearest training item"] = figures.neighbours(*items)
    if "quality" in found:
        ratios = {
            space: {name: e["ratio"] for name, e in f.items() if "ratio" in e}
            for space, f in found["quality"].items()
        }
        shown["measures over their floor"] = figures.image_of(figures.ratios(ratios))
        for f in found["quality"].values():
            if "counts" in f:
                chart = figures.histogram(f["counts"], dataset.classes)
                shown["classes"] = figures.image_of(chart)
    if "loss" in found:
        shown["test loss by noise level"] = figures.image_of(figures.loss_by_level(found["loss"]))
    return shown


def estimates_in(tree, path=()):
    """Every (path, Estimate) of a nested dict."""
    if isinstance(tree, Estimate):
        yield "/".join(path), tree
    elif isinstance(tree, dict):
        for name, part in tree.items():
            yield from estimates_in(part, (*path, str(name)))


def comparison(subjects):
    """What is measured of each further subject less that of the first, with paired errors: a list
    of dicts. The difference is None of what was not measured of the first."""
    first, rows = dict(estimates_in(subjects[0].found)), []
    for subject in subjects[1:]:
        for path, e in estimates_in(subject.found):
            # ratios to one floor say no more than the figures do
            if path.endswith(("/floor", "/real")) or ("quality/" in path and "/ratio" in path):
                continue
            difference = e - first[path] if path in first else None
            rows.append({"subject": subject.name, "figure": path, "difference": difference})
    return rows


def plain(tree):
    """Nested dicts and lists with each Estimate as a dict, for JSON; None for what is no number."""
    if isinstance(tree, Estimate):
        tree = {"value": tree.value, "error": tree.error, "interval": tree.interval}
    if isinstance(tree, dict):
        return {name: plain(part) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(part) for part in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
