"""How each baseline is trained and sampled: benchmarks/baselines.py runs this in its environment.

Nothing is imported here but the baseline, torch and numpy. A recipe is the baseline's own for
images of this size, from its `source`; `text` says it, and what the dataset or the clock made
differ.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

CHUNK = 100  # images sampled at a time
TRIAL = 16  # images on which the default sampler is timed
STEPS = {"cpu": 1, "cuda": 20}  # between two looks at the clock, which on a GPU waits for it


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
    fast = ("SDE-DPM-Solver++", 50)  # name and steps of its fast sampler
    default = ("DDPM", 1000)  # and of its default one
    source = (
        "huggingface/diffusion-models-class: network of unit1/02, training of unit2/02; "
        "huggingface/diffusers: EMA of examples/unconditional_image_generation, sampler of "
        "docs api/schedulers/multistep_dpm_solver"
    )
    text = (
        "UNet2DModel 32-64-64, 2 layers a block, attention at 14 and 7 pixels; DDPMScheduler of "
        "1000 steps, squaredcos_cap_v2, predicts the noise; Adam at 1e-3, batch 128. Labels are "
        "left out, and EMAModel with its warm-up is added (--use_ema of the training example). "
        "Fast sampler: DPMSolverMultistepScheduler, sde-dpmsolver++ of order 2, with thresholding, "
        "for pixels, and lambda_min_clipped, for this schedule."
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

    def step(self):
        """Take one training step."""
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
        "sde-dpmsolver++ of order 2, with thresholding, for pixels."
    )
    shape = COLOR
    schedule = "linear"
    lr = 1e-4


class Lucidrains:
    """lucidrains/denoising-diffusion-pytorch; see Diffusers for what the parts are."""

    package = "denoising-diffusion-pytorch"
    install = ("denoising_diffusion_pytorch",)
    batch = 32
    fast = ("DDIM", 50)
    default = ("DDIM", 250)
    source = "lucidrains/denoising-diffusion-pytorch: README and the defaults of Trainer"
    text = (
        "Unet of dim 32, dim_mults 1-2-4, for 28 pixels instead of dim 64, 1-2-4-8 for 128; "
        "GaussianDiffusion of 1000 steps, sigmoid schedule, predicts v; Adam at 8e-5, betas 0.9 "
        "and 0.99, batch 32, gradients of 2 batches accumulated and clipped to norm 1; EMA of "
        "0.995 every 10 steps. The loop is that of Trainer.train, written out so that the clock "
        "can stop; no mirrored images, which digits are not; fp32, its amp is of fp16 on a GPU."
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

    def step(self):
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
    fast = ("its own, gam 1.6", 20)
    default = ("its own, gam 1.6", 20)
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

    def step(self):
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

    def __init__(self, recipe, device, bf16):
        self.recipe = recipe
        self.device = device
        self.bf16 = bf16
        self.steps = 0
        self.seconds = 0.0

    def autocast(self):
        # a cache would keep the weights of the first step
        dtype = torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.bf16, cache_enabled=False)

    def train(self, seconds):
        """Train until so many seconds have been spent on steps, all of them together."""
        while self.seconds < seconds:
            started = time.perf_counter()
            for _ in range(STEPS[self.device.type]):
                self.recipe.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            self.steps += STEPS[self.device.type]

    def sample(self, count, sampler, steps):
        """Return pixels, uint8 (count, H, W, C), and the seconds they took, from seed 0.

        Training goes on as if nothing had been sampled."""
        started = time.perf_counter()
        parts = []
        with torch.random.fork_rng(), torch.no_grad():
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
        "precision": "bf16" if run.bf16 else "fp32",
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


def measure(args):
    """Yield the rows of a baseline, one for each of the minutes in `at`."""
    torch.manual_seed(0)
    kind = BASELINES[args.dataset][args.baseline]
    device = torch.device(args.device)
    images = torch.from_numpy(np.load(args.images)).to(device)
    feed = Feed(images, args.batch_size or kind.batch)
    run = Run(kind(feed), device, args.bf16)
    sampler = getattr(kind, args.sampler)  # (name, steps)
    default_seconds = None  # of a sample by the default sampler
    for minutes in args.at:
        with run.autocast():
            run.train(60 * minutes)
            pixels, seconds = run.sample(args.samples, *sampler)
            if default_seconds is None:
                few = min(TRIAL, args.samples)
                default_seconds = run.sample(few, *kind.default)[1] / few
        file = args.out / f"{minutes:g}.npz"
        np.savez_compressed(file, samples=pixels)
        yield {
            "baseline": args.baseline,
            "minutes": minutes,
            **describe(run, feed),
            "file": str(file),
            "samples": args.samples,
            "sampler": dict(zip(("name", "steps"), sampler, strict=True)),
            "seconds_per_sample": seconds / args.samples,
            "default_sampler": dict(zip(("name", "steps"), kind.default, strict=True)),
            "default_seconds_per_sample": default_seconds,
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
    sampler = "which sampler of the baseline draws them"
    parser.add_argument("--sampler", choices=("fast", "default"), default="fast", help=sampler)
    parser.add_argument("--batch_size", type=int, help="batch size (default: the baseline's own)")
    parser.add_argument("--bf16", action="store_true", help="train and sample under bf16 autocast")
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
