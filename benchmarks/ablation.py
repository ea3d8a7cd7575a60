"""What each part of the network and of its training is worth, over training seeds.

python benchmarks/ablation.py --out ablation [--datasets digits] [--studies parts] [--workers 2]

Each run is one dataset, one variant of the default and one training seed; its figures go to a file
of their own in the folder, so that a second call goes on where the first was stopped, and any
number of processes, on any machines that see the folder, may work on it at once. Variants come in
the order of _ablation_grid.py, all seeds of one before the next. Prints a table of what is there
and writes it, with a figure, into the folder: see _ablation_report.py.
"""

import copy
import dataclasses
import fcntl
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _ablation_grid import DATASETS, POINTS, STUDIES, batch_no_mean, config_of, set_branches, spoil
from _ablation_levels import LevelModel, mix_levels
from _ablation_report import write_report
from _common import cpu_name, make_parser
from _cuda_graph import GraphSteps, can_graph
from tqdm import tqdm

from ddp.blocks import NORMS, batch_norms
from ddp.data import load_dataset
from ddp.io.cli import add_flag, command, require_at_least
from ddp.io.device import sampling_dtype, select_device, select_precision
from ddp.io.files import atomic_write
from ddp.io.spelling import none_of
from ddp.metrics.candidate import Candidate, EvaluateOptions, Reference, generate_samples
from ddp.metrics.likelihood_metrics import evaluate_loss, evaluate_ode_nll
from ddp.metrics.sample_metrics import class_measures, real_features, rms_to_nearest
from ddp.optim import ema_decay
from ddp.schedule import Schedule
from ddp.training import Trainer

DISTANCE_NAMES = {  # in each feature space
    "classifier": ("fd", "prdc"),
    "points": ("sliced_wasserstein", "histogram_kl", "wasserstein2"),
}
NFE = (3, 5, 10, 20, 50, 100, 1000)
FEW_SAMPLES = 300  # at each of NFE
FEW_SEEDS = 3  # of which what takes long is measured
VAL_POINTS = 10  # in a run, at which its test loss is measured
PACE_ROUNDS = 12  # pairs of steps that are timed


# ---- one run ----


def train(dataset, variant, fields, seed, device):
    """Return (trainer, its BufferAverage or None, what is known of its run).

    Stops where the loss is not finite."""
    default, config = config_of(variant, dataset, **fields, seed=seed)
    items = spoil(dataset, variant, seed)
    steps = default.num_steps(len(dataset.train))  # those of all items, however few there are
    pace = 1.0
    if variant.equal_seconds:
        pace = relative_pace(dataset, default, config, device)
        steps = round(steps * pace)
    config = dataclasses.replace(config, epochs=None, max_steps=steps)
    precision = select_precision(config.precision, device)
    trainer = Trainer(config, items, device, precision)
    if variant.zero_init is not None:
        for model in (trainer.model, trainer.ema):
            torch.manual_seed(seed)
            set_branches(model.network, variant.zero_init)
    if variant.level_groups:
        mix_levels(trainer, variant.level_groups)
    averaged = BufferAverage(trainer) if "statistics" in variant.evaluate else None
    about = {"steps": steps, "pace": pace, "precision": precision, "device": str(device)}
    about |= {"curve": [], "diverged": None}  # curve: rows of (step, test loss, training loss)
    graph = None
    if can_graph(trainer) and not variant.level_groups:
        graph = GraphSteps(trainer, steps)
    started = time.monotonic()
    for step in range(steps):
        loss = graph.take() if graph else trainer.train_step(step / steps).loss
        if averaged:
            averaged.update()
        if (step + 1) % max(1, steps // VAL_POINTS) == 0:
            if not loss.isfinite():
                about["diverged"] = step + 1
                break
            started_pause = time.monotonic()
            trainer.recalibrated_ema()
            about["curve"].append([step + 1, trainer.val_loss(), loss.item()])
            started += time.monotonic() - started_pause
    about["step_ms"] = 1000 * (time.monotonic() - started) / trainer.step
    return trainer, averaged, about


def relative_pace(dataset, default, config, device):
    """Return the time of a step of the default over that of a config's, both on one thread.

    In turn, by the processor time of this process, which others on the machine hardly change."""
    trainers = []
    for one in (default, config):
        trainers.append(Trainer(one, dataset, device, select_precision(one.precision, device)))
    ratios = []
    for _ in range(PACE_ROUNDS):
        seconds = []
        for trainer in trainers:
            started = time.process_time()
            trainer.train_step(0.0)
            seconds.append(time.process_time() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


class BufferAverage:
    """The running statistics of the raw model, averaged as its weights are."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.values = [x.clone() for x in running_statistics(trainer.model)]

    def update(self):
        decay = ema_decay(self.trainer.config.ema_decay, self.trainer.step)
        torch._foreach_lerp_(self.values, running_statistics(self.trainer.model), 1 - decay)


def running_statistics(model):
    """Return the running means and variances of a model's BatchNorms, a list."""
    return [x for norm in batch_norms(model) for x in (norm.running_mean, norm.running_var)]


class RealItems:
    """The real items of a dataset and how sets are compared with them; the same for all runs."""

    def __init__(self, dataset, num_samples, device):
        options = EvaluateOptions(num_samples=num_samples, vlb_items=num_samples, batch_size=500)
        if len(dataset.test) < num_samples:
            options = dataclasses.replace(options, reference="train")
        self.options = options.resolve(dataset, [])
        self.reference = Reference(dataset, self.options, device)
        self.dataset = dataset
        name = "classifier" if dataset.is_pixels else "points"
        self.space = real_features(name, self.reference, self.options)
        self.distance_names = DISTANCE_NAMES[name]
        self.floor = self.distances(self.reference.baseline)

    def distances(self, samples):
        """Return the distances of samples (N, *event) to as many real items: name -> float."""
        features = self.space.extractor.features(samples)  # (N, D)
        real = self.space.items[: len(samples)]
        figures = {}
        for name in self.distance_names:
            distance = self.space.distances[name]
            figures |= distance(features[: distance.max_items], real[: distance.max_items])
        if self.space.class_probs is not None:
            probs = self.space.extractor.class_probs(samples)
            figures |= class_measures(probs, self.space.class_probs[: len(samples)])
        return figures

    def samples(self, model, count, seed, **sampler_options):
        """Return at most `count` samples (N, *event) of a model, as the data is."""
        options = dataclasses.replace(self.options, seed=seed)
        reference = copy.copy(self.reference)
        reference.items = reference.items[:count]
        candidate = Candidate("", {}, sampling_model=model, sampler_options=sampler_options)
        return generate_samples(candidate, reference, options)

    def figures(self, model, sampling_model, seed):
        """Return all figures of a model, its test loss and its samples' distances, and samples."""
        candidate = Candidate("", about={}, model=model)
        levels = evaluate_loss(candidate, self.reference, self.options)
        v_losses = [level["v"].value for level in levels.values()]
        figures = {"v_loss": sum(v_losses) / len(v_losses)}
        samples = self.samples(sampling_model, self.options.num_samples, seed)
        figures |= self.distances(samples)
        if self.dataset.log_density:
            nll = evaluate_ode_nll(candidate, self.reference, self.options)["density"]
            figures["gap"] = nll["gap"].value
        if model.num_classes:
            predicted = self.space.extractor.class_probs(samples).argmax(dim=1)
            correct = predicted == self.reference.sample_labels
            figures["label_accuracy"] = correct.double().mean().item()
        return figures, samples


def at_default_levels(model):
    """Let the loss of a model be measured at the levels of the default schedule."""
    model.schedule = Schedule().to(model.device)
    return model


def figures_of(model, trainer, real):
    """Return the figures of a model of a trainer, and its samples."""
    plain = at_default_levels(model.for_inference())
    return real.figures(plain, model.for_inference(fast_dtype(trainer)), trainer.config.seed)


def fast_dtype(trainer):
    """Return the dtype in which samples are drawn: points are not drawn in bfloat16."""
    if trainer.model.is_image:
        return sampling_dtype("auto", trainer.precision, trainer.device)
    return torch.float32


def by_nfe(trainer, real, _):
    """Yield (name, figures) of samples in few and in many steps of an ODE solver."""
    seed = trainer.config.seed
    model = trainer.recalibrated_ema().for_inference(fast_dtype(trainer))
    for steps in NFE if seed == 0 else NFE[:-1]:
        drawn = real.samples(model, FEW_SAMPLES, seed, sampler="dpmpp_2m", steps=steps)
        yield f"nfe={steps}", real.distances(drawn)


def by_statistics(trainer, real, averaged):
    """Yield (name, figures) of the raw weights, and of the EMA with other BatchNorm statistics."""
    yield "raw weights", figures_of(trainer.model.eval(), trainer, real)[0]
    model = trainer.recalibrated_ema()
    recomputed = [x.clone() for x in running_statistics(model)]
    others = {"copied": running_statistics(trainer.model), "averaged": averaged.values}
    for name, values in others.items():
        torch._foreach_copy_(running_statistics(model), values)
        yield f"statistics {name}", figures_of(model, trainer, real)[0]
    torch._foreach_copy_(running_statistics(model), recomputed)


def by_level(trainer, real, _):
    """Yield (name, figures) of the EMA with statistics of each noise level, whole and half."""
    for share in (1.0, 0.5):
        models = [
            LevelModel(trainer, share, dtype) for dtype in (torch.float32, fast_dtype(trainer))
        ]
        yield f"statistics by level x {share:g}", real.figures(*models, trainer.config.seed)[0]


EVALUATIONS = {"nfe": by_nfe, "statistics": by_statistics, "by_level": by_level}


def evaluate_run(trainer, variant, real, averaged):
    """Return name -> figures of a finished run: "", its own, and those of `variant.evaluate`."""
    figures, samples = figures_of(trainer.recalibrated_ema(), trainer, real)
    if variant.items:
        seen = trainer.dataset.train.cpu()
        near, _ = rms_to_nearest(samples, seen)
        unseen, _ = rms_to_nearest(real.reference.items, seen)
        figures["nn_distance_ratio"] = (near.median() / unseen.median()).item()
    rows = {"": figures}
    for name in variant.evaluate:
        if name == "statistics" or trainer.config.seed < FEW_SEEDS:
            rows |= EVALUATIONS[name](trainer, real, averaged)
    return rows


# ---- the folder of results ----


def result_path(out, dataset, variant, seed):
    name = "".join(c if c.isalnum() or c in "=.,-" else "_" for c in variant.name)
    return Path(out) / dataset / f"{name}-{seed}.json"


def claim(path):
    """Return a lock on the run of a result, or None: it is done, or another process is at it.

    The lock is the system's: it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mark.close()
        return None
    if path.exists():
        mark.close()
        return None
    return mark


def work(args, runs):
    """Do every run that nobody has done or does, in their order."""
    NORMS["batch_no_mean"] = batch_no_mean
    device = select_device(args.device)
    references = {}
    for name, variant, seed in tqdm(runs, disable=None):
        path = result_path(args.out, name, variant, seed)
        lock = claim(path) if time.monotonic() < args.deadline else None
        if lock is None:
            continue
        if name not in references:
            dataset = load_dataset(args.data.get(name, name), args.data_dir)
            references[name] = RealItems(dataset, args.samples, device)
        real = references[name]
        if args.brief:
            variant = dataclasses.replace(variant, evaluate=())
        fields = {"dataset": args.data.get(name, name), **DATASETS[name]}
        if args.max_steps:
            fields |= {"epochs": None, "max_steps": args.max_steps}
        trainer, averaged, about = train(real.dataset, variant, fields, seed, device)
        about |= {"dataset": name, "variant": variant.name, "seed": seed}
        about |= {"cpu": cpu_name(), "torch": torch.__version__}
        rows = {}
        if about["diverged"] is None:
            try:
                rows = evaluate_run(trainer, variant, real, averaged)
                if "by_level" in variant.evaluate and seed == 0:
                    about["levels"] = LevelModel(trainer).differences()
            except FloatingPointError:  # its weights or samples are not finite
                about["diverged"] = about["steps"]
        about |= {"rows": rows, "floor": real.floor}
        atomic_write(path, lambda new, about=about: Path(new).write_text(json.dumps(about)))
        lock.close()


def parse(arguments=None):
    parser = make_parser(__doc__, "ablation.py")
    names = ",".join(DATASETS)
    add_flag(parser, "datasets", default="digits", help=f"some of {names} (default: digits)")
    studies = f"some of {','.join(STUDIES)} (default: parts)"
    add_flag(parser, "studies", default="parts", help=studies)
    add_flag(parser, "only", help="names of variants as the table shows them, with ; between")
    add_flag(parser, "data_dir", default="data", help="where datasets lie (default: data)")
    help = "folder or .zip of CIFAR-10's images, for cifar10 (default: none)"
    add_flag(parser, "cifar10", help=help)
    add_flag(parser, "samples", type=int, default=2000, help="samples (default: 2000)")
    add_flag(parser, "seeds", type=int, help="training seeds (default: 5 or 3, by variant)")
    add_flag(parser, "max_steps", type=int, help="steps of a run (default: by dataset)")
    help = "measure the finished model alone: not few steps, other statistics, statistics by level"
    add_flag(parser, "brief", action="store_true", help=help)
    add_flag(parser, "minutes", type=float, help="begin no run after so many")
    add_flag(parser, "workers", type=int, default=1, help="processes (default: 1)")
    add_flag(parser, "device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add_flag(parser, "out", default="ablation", help="folder for results (default: ablation)")
    add_flag(parser, "report", action="store_true", help="train nothing, write the report")
    return parser.parse_args(arguments)


def list_runs(args):
    """Return the runs that the flags ask for, in order: (dataset, variant, seed)."""
    runs = []
    for name in args.datasets.split(","):
        if name not in DATASETS:
            raise ValueError(none_of("datasets", name, DATASETS))
    for study in args.studies.split(","):
        if study not in STUDIES:
            raise ValueError(none_of("studies", study, STUDIES))
        for name in args.datasets.split(","):
            for variant in STUDIES[study]():
                if args.only and variant.name not in args.only.split(";"):
                    continue
                if name in POINTS and not variant.is_for_points:
                    continue
                runs += [(name, variant, seed) for seed in range(args.seeds or variant.seeds)]
    if not runs:
        raise ValueError(f"only={args.only}: no variant of studies={args.studies} has such a name")
    return runs


def main(args):
    require_at_least(args, samples=4, workers=1)
    args.data = {"cifar10": args.cifar10} if args.cifar10 else {}
    args.deadline = time.monotonic() + 60 * (args.minutes or 1e9)
    runs = list_runs(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    others = []
    if not args.report:
        for _ in range(args.workers - 1):
            arguments = [*sys.argv[1:], "--workers", "1"]
            others.append(subprocess.Popen([sys.executable, __file__, *arguments]))
        work(args, runs)
    codes = [process.wait() for process in others]
    print(write_report(out))
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(command(main, parse))
