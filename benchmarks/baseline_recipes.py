"""How each baseline is trained and sampled: benchmarks/baselines.py runs this in its environment.

Nothing is imported here but the baseline, torch and numpy. A recipe is the baseline's own for
images of this size, from its `source`; `text` says it, and what the dataset or the clock made
differ.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

WARMUP = 0.1  # share of the run in which a learning rate that is annealed rises
CHUNK = 100  # images sampled at a time
TRIAL_STEPS = 3  # by which the faster precision is found
STEPS = {"cpu": 1, "cuda": 20}  # between two looks at the clock, which on a GPU waits for it
PRECISIONS = ("fp32", "bf16")


class Feed:
    """Endless shuffled batches of floats in [0, 1], (B, C, H, W), and how many images went by."""

    def __init__(
        self,
        images,  # uint8 (N, C, H, W), on the device where the batches are wanted
        size,  # B
    ):
        self.images = images
        self.size = size
        self.count = 0
        self.device = images.device
        self.channels = images.shape[1]
        self.side = images.shape[2]

    def __iter__(self):
        while True:
            for indices in torch.randperm(len(self.images)).split(self.size):
                self.count += len(indices)
                yield self.images[indices].float() / 255


GRAY = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
COLOR = {
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def output_to_float(network, inputs, output):
    """A forward hook: in bfloat16 the schedulers would keep the images themselves in it."""
    return output.float()


class Diffusers:
    """What a recipe has: how to install it, its batch, its samplers, a training step, samples."""

    package = "diffusers"
    install = ("diffusers[torch]",)  # what pip is asked for
    batch = 128
    samplers = (("DDPM", 1000), ("SDE-DPM-Solver++", 50))  # name and steps; its own comes first
    anneals = True  # its learning rate falls to the end of the run: each budget is a run
    source = (
        "huggingface/diffusion-models-class: network of unit1/02, training of unit2/02; "
        "huggingface/diffusers: EMA of examples/unconditional_image_generation, sampler of "
        "docs api/schedulers/multistep_dpm_solver; learning rate of the training example"
    )
    text = (
        "UNet2DModel 32-64-64, 2 layers a block, attention at 14 and 7 pixels; DDPMScheduler of "
        "1000 steps, squaredcos_cap_v2, predicts the noise; Adam at 1e-3, batch 128. Labels are "
        "left out, and of the training example are EMAModel with its warm-up (--use_ema) and the "
        "cosine learning rate with warm-up, here a tenth of the run, annealed to each budget. "
        "Samplers: DDPMScheduler, its own; DPMSolverMultistepScheduler, sde-dpmsolver++ of order "
        "2, with thresholding, for pixels, and lambda_min_clipped, for this schedule."
    )
    shape = GRAY
    schedule = "squaredcos_cap_v2"
    lr = 1e-3

    def __init__(self, feed):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        ends = {
            "sample_size": feed.side,
            "in_channels": feed.channels,
            "out_channels": feed.channels,
        }
        self.network = UNet2DModel(layers_per_block=2, **ends, **self.shape).to(feed.device)
        self.network.conv_out.register_forward_hook(output_to_float)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=self.schedule)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr)
        self.ema = EMAModel(
            self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        self.batches = iter(feed)

    def step(self, progress):
        """Take one training step, at progress in [0, 1] of the run."""
        warmup = min(1.0, (progress + 1e-3) / WARMUP)
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - WARMUP) / (1 - WARMUP)))
        self.optimizer.param_groups[0]["lr"] = self.lr * warmup * falling
        x = next(self.batches) * 2 - 1
        noise = torch.randn_like(x)
        t = torch.randint(0, 999, (len(x),), device=x.device)
        noisy = self.scheduler.add_noise(x, noise, t)
        output = self.network(noisy, t, return_dict=False)[0]
        torch.nn.functional.mse_loss(output, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())

    def sample(self, count, sampler, steps):
        """Return images in [0, 1], (count, C, H, W)."""
        from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

        scheduler = self.scheduler
        if sampler != "DDPM":
            options = {
                "algorithm_type": "sde-dpmsolver++",
                "solver_order": 2,
                "thresholding": True,
            }
            if self.schedule == "squaredcos_cap_v2":
                options["lambda_min_clipped"] = -5.1
            scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, **options)
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        pipeline = DDPMPipeline(self.network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=count, num_inference_steps=steps, output_type="np").images
        self.ema.restore(self.network.parameters())
        return torch.from_numpy(images).movedim(-1, 1)


class DiffusersColor(Diffusers):
    """The same package on color images, by the recipe of its CIFAR-10 model."""

    source = (
        "google/ddpm-cifar10-32: network and schedule; huggingface/diffusers: learning rate and "
        "EMA of examples/unconditional_image_generation"
    )
    text = (
        "UNet2DModel 128-256-256-256, 2 layers a block, attention at 16 pixels; DDPMScheduler of "
        "1000 steps, linear, predicts the noise; Adam at 1e-4, batch 128 instead of 16; EMAModel "
        "with its warm-up; no mirrored images. Fast sampler: DPMSolverMultistepScheduler, "
        "sde-dpmsolver++ of order 2, with thresholding, for pixels; cosine learning rate."
    )
    shape = COLOR
    schedule = "linear"
    lr = 1e-4


class Lucidrains:
    """lucidrains/denoising-diffusion-pytorch; see Diffusers for what the parts are."""

    package = "denoising-diffusion-pytorch"
    install = ("denoising_diffusion_pytorch",)
    batch = 32
    samplers = (("DDIM", 250), ("DDIM", 50))
    anneals = False
    source = "lucidrains/denoising-diffusion-pytorch: README and the defaults of Trainer"
    text = (
        "Unet of dim 32, dim_mults 1-2-4, for 28 pixels instead of dim 64, 1-2-4-8 for 128; "
        "GaussianDiffusion of 1000 steps, sigmoid schedule, predicts v; Adam at 8e-5, betas 0.9 "
        "and 0.99, batch 32, gradients of 2 batches accumulated and clipped to norm 1; EMA of "
        "0.995 every 10 steps. The loop is that of Trainer.train, written out so that the clock "
        "can stop; no mirrored images, which digits are not. Samplers: DDIM of 250 steps, that of "
        "its README, and of 50."
    )

    def __init__(self, feed):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, flash_attn=True)
        self.diffusion = GaussianDiffusion(
            self.network, image_size=feed.side, timesteps=1000, sampling_timesteps=250
        ).to(feed.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        self.batches = iter(feed)

    def step(self, progress):
        self.diffusion.train()
        for _ in range(2):
            (self.diffusion(next(self.batches)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def sample(self, count, sampler, steps):
        model = self.ema.ema_model.eval()
        model.sampling_timesteps = steps
        return model.sample(batch_size=count)


class Smalldiffusion:
    """yuanchenyang/smalldiffusion; see Diffusers for what the parts are."""

    package = "smalldiffusion"
    install = ("smalldiffusion", "torch_ema")
    batch = 128
    samplers = (("its own, gam 1.6", 20),)
    anneals = False
    source = "yuanchenyang/smalldiffusion: examples/fashion_mnist_unet.py"
    text = (
        "Scaled(Unet) of 64 channels, ch_mult 1-1-2, attention at 14 pixels, dropout 0.1; "
        "ScheduleLogLinear from 0.01 to 20, predicts the noise; its training_loop: AdamW at 7e-4, "
        "EMA of 0.999 with its warm-up. Batch 128 instead of 1024, of which a CPU does few in the "
        "time; no mirrored images, which digits are not."
    )

    def __init__(self, feed):
        from smalldiffusion import Scaled, ScheduleLogLinear, Unet, training_loop
        from torch_ema import ExponentialMovingAverage

        network = Scaled(Unet)(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
        self.network = network.to(feed.device)
        self.schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
        self.ema = ExponentialMovingAverage(self.network.parameters(), decay=0.999)
        batches = (2 * x - 1 for x in feed)
        self.loop = training_loop(batches, self.network, self.schedule, epochs=1, lr=7e-4)

    def step(self, progress):
        next(self.loop)
        self.ema.update()

    def sample(self, count, sampler, steps):
        from smalldiffusion import img_normalize, samples

        with self.ema.average_parameters():
            sigmas = self.schedule.sample_sigmas(steps)
            *_, x0 = samples(self.network, sigmas, gam=1.6, batchsize=count)
        return img_normalize(x0)


BASELINES = {  # dataset -> name -> recipe
    "mnist": {
        "diffusers": Diffusers,
        "lucidrains": Lucidrains,
        "smalldiffusion": Smalldiffusion,
    },
    "cifar10": {"diffusers": DiffusersColor},
}


class Run:
    """A recipe in training: how many steps and seconds it has taken."""

    def __init__(self, recipe, device, precision, seconds_per_step=None):
        self.recipe = recipe
        self.device = device
        self.precision = precision  # of PRECISIONS
        self.seconds_per_step = seconds_per_step  # None: by the clock
        self.steps = 0
        self.seconds = 0.0

    def autocast(self):
        # a cache would keep the weights of the first step
        options = {"enabled": self.precision != "fp32", "cache_enabled": False}
        return torch.autocast(self.device.type, torch.bfloat16, **options)

    def train(self, seconds):
        """Train until so many seconds have been spent on steps, all of them together."""
        with self.autocast():
            while self.seconds < seconds:
                started = time.perf_counter()
                for _ in range(STEPS[self.device.type]):
                    self.recipe.step(self.seconds / seconds)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = time.perf_counter() - started
                if self.seconds_per_step:
                    spent = self.seconds_per_step * STEPS[self.device.type]
                self.seconds += spent
                self.steps += STEPS[self.device.type]

    def sample(self, count, sampler, steps):
        """Return pixels, uint8 (count, H, W, C), and the seconds they took, from seed 0.

        Training goes on as if nothing had been sampled."""
        started = time.perf_counter()
        parts = []
        with torch.random.fork_rng(), torch.no_grad(), self.autocast():
            torch.manual_seed(0)
            for chunk in torch.arange(count).split(CHUNK):
                images = self.recipe.sample(len(chunk), sampler, steps)
                parts.append(images.float().cpu())
        pixels = torch.cat(parts).clamp(0, 1).mul(255).round().byte().movedim(1, -1).numpy()
        return pixels, time.perf_counter() - started


def describe(run, feed):
    """Return what is known of a run so far: a part of a row of the table."""
    on_gpu = run.device.type == "cuda"
    return {
        "version": importlib.metadata.version(run.recipe.package),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "parameters": sum(p.numel() for p in run.recipe.network.parameters()),
        "batch": feed.size,
        "seconds": run.seconds,
        "steps": run.steps,
        "images": feed.count,
        "images_per_second": feed.count / run.seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "recipe": run.recipe.text,
        "source": run.recipe.source,
    }


def start(args, images, precision):
    """Return a Run at its start, from seed 0, and its Feed."""
    torch.manual_seed(0)
    kind = BASELINES[args.dataset][args.baseline]
    feed = Feed(images, args.batch_size or kind.batch)
    return Run(kind(feed), images.device, precision, args.seconds_per_step), feed


def faster_precision(args, images):
    """Return fp32 or bf16, in which the recipe's steps take less time here."""
    seconds = {}
    for precision in PRECISIONS:
        run, _ = start(args, images, precision)
        run.seconds_per_step = None
        run.train(1e-9)  # one step, in which kernels are chosen
        before = run.seconds
        while run.steps < TRIAL_STEPS + 1:
            run.train(run.seconds + 1e-9)
        seconds[precision] = (run.seconds - before) / (run.steps - STEPS[images.device.type])
    return min(seconds, key=seconds.get)


def measure(args):
    """Yield the rows of a baseline: for each of the minutes in `at`, one for each sampler."""
    images = torch.from_numpy(np.load(args.images)).to(args.device)
    precision = args.precision
    if precision == "faster":
        precision = faster_precision(args, images)
    run = None
    for minutes in args.at:
        if run is None or run.recipe.anneals:
            run, feed = start(args, images, precision)
        run.train(60 * minutes)
        for name, steps in run.recipe.samplers:
            pixels, seconds = run.sample(args.samples, name, steps)
            file = args.out / f"{minutes:g}-{steps}.npz"
            np.savez_compressed(file, samples=pixels)
            yield {
                "baseline": args.baseline,
                "minutes": minutes,
                **describe(run, feed),
                "file": str(file),
                "samples": args.samples,
                "sampler": {"name": name, "steps": steps},
                "seconds_per_sample": seconds / args.samples,
            }


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baseline", help="one of the dataset's baselines")
    dataset = "the dataset, which chooses the recipe"
    parser.add_argument("--dataset", choices=BASELINES, default="mnist", help=dataset)
    parser.add_argument("--images", required=True, help="an .npy of uint8 (N, C, H, W)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    at = "minutes of training after which to sample, ascending"
    parser.add_argument("--at", type=float, nargs="+", required=True, help=at)
    parser.add_argument("--samples", type=int, required=True, help="samples each time")
    parser.add_argument("--batch_size", type=int, help="batch size (default: the baseline's own)")
    precision = "of training and sampling, by autocast (default: the faster one)"
    choices = ("faster", *PRECISIONS)
    parser.add_argument("--precision", choices=choices, default="faster", help=precision)
    fixed = "count a training step as so many seconds, as measured when nothing else ran"
    parser.add_argument("--seconds_per_step", type=float, help=fixed)
    parser.add_argument("--out", type=Path, required=True, help="folder for the samples")
    return parser.parse_args(arguments)


def main(args):
    for row in measure(args):
        print(json.dumps(row), file=sys.__stdout__, flush=True)
    return 0


if __name__ == "__main__":
    # what a baseline prints is no row
    with contextlib.redirect_stdout(sys.stderr):
        main(parse())
