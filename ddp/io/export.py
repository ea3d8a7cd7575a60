"""A model as files for others: safetensors, ONNX, torch.export, each checked, and a model card."""

import contextlib
import importlib.util
import logging
import math
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

from ddp.io.card import model_card
from ddp.io.checkpoint import load_model, read_checkpoint, strip_training_state
from ddp.io.figures import save_png
from ddp.io.files import atomic_dir, require_absent
from ddp.io.safetensors_file import write_safetensors
from ddp.io.sample_batches import picture
from ddp.io.spelling import none_of

EXAMPLE_BATCH = 2  # of which a graph is made
PARITY_BATCHES = (1, 3, 5)  # with which it is checked: the batch is to be free
PARITY_LOG_SNR = 6.0  # levels from -6 to 6; an eps-model divides by alpha, 0.05 at -6
MAX_DIFFERENCE = 1e-4  # of x0_hat, where data have a standard deviation of about 1
Export = namedtuple("Export", "file write packages")  # write: (model, state, path) -> a line


class Denoiser(nn.Module):
    """x_t (B, *event), log_snr (B,), label (B,) of a class-conditional model -> x0_hat.

    The model in float32, with every BatchNorm folded."""

    def __init__(self, model):
        super().__init__()
        self.model = model.for_inference()

    def forward(self, x_t, log_snr, label=None):
        return self.model.denoise(x_t, log_snr, label)


def random_inputs(model, batch, seed=0):
    """Return x_t, log_snr and, of a class-conditional model, label: inputs of a Denoiser."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, *model.event, generator=generator)
    log_snr = PARITY_LOG_SNR * (2 * torch.rand(batch, generator=generator) - 1)
    if not model.num_classes:
        return x_t, log_snr
    return x_t, log_snr, torch.randint(model.num_classes, (batch,), generator=generator)


def exported(model):
    """Return (a Denoiser of the model, its graph as a torch.export program of any batch)."""
    denoiser = Denoiser(model)
    inputs = random_inputs(model, EXAMPLE_BATCH)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    shapes = tuple({0: batch} for _ in inputs)
    with quiet(), torch.no_grad():
        program = torch.export.export(denoiser, inputs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return denoiser, program


@contextlib.contextmanager
def quiet():
    """Keep back what PyTorch's exporters say of themselves, and give them the flags they can read.

    They ask cuDNN's old TF32 flag, which raises where io.device.set_tf32 has set the new ones."""
    kinds = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [kind.fp32_precision for kind in kinds]
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32"  # as PyTorch begins; nothing is computed on a GPU here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
        logging.disable(disabled)


def parity(name, model, denoiser, other):
    """Return a line that says how far x0_hat of `other`, a function like a Denoiser, is off.

    Raises FloatingPointError when that is more than MAX_DIFFERENCE."""
    worst = 0.0
    with torch.no_grad():
        for batch in PARITY_BATCHES:
            inputs = random_inputs(model, batch, seed=batch)
            difference = (denoiser(*inputs) - other(*inputs)).abs().max().item()
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    if worst > MAX_DIFFERENCE:
        much = f"{worst:.2g}, more than {MAX_DIFFERENCE:g}"
        raise FloatingPointError(f"{name} differs from PyTorch by {much}; nothing is written")
    batches = ", ".join(map(str, PARITY_BATCHES))
    return f"{name}: differs from PyTorch by at most {worst:.2g}, in batches of {batches}"


def export_safetensors(model, state, path):
    write_safetensors(path, state)
    read_checkpoint(path)  # this verifies its digest
    return f"{path.name}: holds the same numbers, by their digest"


def export_torch(model, state, path):
    denoiser, program = exported(model)
    with quiet():
        torch.export.save(program, path)
    return parity(path.name, model, denoiser, torch.export.load(path).module())


def export_onnx(model, state, path):
    import onnxruntime

    denoiser, program = exported(model)
    names = ["x_t", "log_snr", "label"][: 2 + (model.num_classes > 0)]
    options = {"input_names": names, "output_names": ["x0_hat"], "external_data": False}
    with quiet():
        torch.onnx.export(program, (), path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        arrays = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return parity(path.name, model, denoiser, run)


EXPORTS = {
    "safetensors": Export("model.safetensors", export_safetensors, ("safetensors",)),
    "onnx": Export("model.onnx", export_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch_export": Export("model.pt2", export_torch, ()),
}


def parse_formats(text):
    """Return the names in "safetensors,onnx". Raises ValueError for one that is unknown, OSError
    where a library that it needs is not installed."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in EXPORTS:
            raise ValueError(none_of("format", name, EXPORTS))
        lacking = [each for each in EXPORTS[name].packages if not importlib.util.find_spec(each)]
        if lacking:
            raise OSError(f"format={name} needs what is absent: pip install {' '.join(lacking)}")
    return list(dict.fromkeys(names))


def default_folder(checkpoint):
    """Return where the files of a checkpoint go: a folder beside it."""
    path = Path(checkpoint).absolute()
    return path.with_name(f"{path.stem}-export")


def export(
    checkpoint,  # path
    formats,  # names in EXPORTS
    out=None,  # a new folder; default: beside the checkpoint
    tell=lambda line: None,  # called with a line for each file
):
    """Write a model's files, its card and samples into a new folder, whole or not at all -> path.

    Raises ValueError when the folder is there, OSError when the checkpoint cannot be used,
    FloatingPointError when a file would compute something else than the model."""
    checkpoint = Path(checkpoint)
    out = Path(out) if out else default_folder(checkpoint)
    require_absent(out)
    model, config, state = load_model(checkpoint)
    shared = strip_training_state(state)  # without paths of this machine
    with atomic_dir(out) as written:
        checks = []
        for name in formats:
            file, write, _ = EXPORTS[name]
            checks.append(write(model, shared, written.folder / file))
            tell(checks[-1])
        image = picture(model.for_inference(), 0, state["classes"])
        save_png(image, written.folder / "samples.png")
        card = model_card(checkpoint, model, config, state, checks)
        (written.folder / "README.md").write_text(card, encoding="utf-8")
    return written.path
