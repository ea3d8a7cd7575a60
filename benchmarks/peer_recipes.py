"""How each peer is trained and sampled: benchmarks/peers.py runs this in the peer's environment.

Nothing is imported here but the peer, torch and numpy. A recipe is the peer's own for pictures of
this size, from its `source`; `text` says it, and what the dataset or the clock made differ."""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

CHUNK = 100  # pictures that are drawn at once
TRIAL = 16  # pictures that the default sampler is timed on
STEPS = {"cpu": 1, "cuda": 20}  # between two looks at the clock, which on a GPU waits for it


class Feed:
    """Endless shuffled batches of floats from 0 to 1, (B, C, H, W), on the pictures' device, and
    how many went by."""

    def __init__(self, pictures, size):
        self.pictures, self.size, self.count = pictures, size, 0
        self.device, (self.channels, self.side) = pictures.device, pictures.shape[1:3]

    def __iter__(self):
        while True:
            for chosen in torch.randperm(len(self.pictures)).split(self.size):
                self.count += len(chosen)
                yield self.pictures[chosen].float() / 255


GREY = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
COLOUR = {
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


class Diffusers:
    """What a recipe has: how to install it, its batch, (sampler, steps) of its fast and its default
    sampler, a step of the optimiser, and pictures from 0 to 1."""

    package, install, batch = "diffusers", ["diffusers[torch]"], 128
    fast, default = ("SDE-DPM-Solver++", 50), ("DDPM", 1000)
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

    shape, schedule, lr = GREY, "squaredcos_cap_v2", 1e-3

    def __init__(self, feed):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        ends = {"sample_size": feed.side, "in_channels": feed.channels}
        ends |= {"out_channels": feed.channels}
        self.network = UNet2DModel(layers_per_block=2, **ends, **self.shape).to(feed.device)
        # in bfloat16 its schedulers would keep the pictures themselves in it
        self.network.conv_out.register_forward_hook(lambda network, given, found: found.float())
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=self.schedule)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr)
        self.average = EMAModel(
            self.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        self.batches = iter(feed)

    def step(self):
        x = next(self.batches) * 2 - 1
        noise, t = torch.randn_like(x), torch.randint(0, 999, (len(x),), device=x.device)
        found = self.network(self.scheduler.add_noise(x, noise, t), t, return_dict=False)[0]
        torch.nn.functional.mse_loss(found, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())

    def draw(self, count, sampler, steps):
        from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

        scheduler = self.scheduler
        if sampler != "DDPM":
            options = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
            options |= {"thresholding": True}
            if self.schedule == "squaredcos_cap_v2":
                options |= {"lambda_min_clipped": -5.1}
            scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, **options)
        self.average.store(self.network.parameters())
        self.average.copy_to(self.network.parameters())
        pipeline = DDPMPipeline(self.network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(batch_size=count, num_inference_steps=steps, output_type="np").images
        self.average.restore(self.network.parameters())
        return torch.from_numpy(drawn).movedim(-1, 1)


class DiffusersForColour(Diffusers):
    source = (
        "google/ddpm-cifar10-32: network and schedule; huggingface/diffusers: learning rate and "
        "EMA of examples/unconditional_image_generation"
    )
    text = (
        "UNet2DModel 128-256-256-256, 2 layers a block, attention at 16 pixels; DDPMScheduler of "
        "1000 steps, linear, predicts the noise; Adam at 1e-4, batch 128 instead of 16; EMAModel "
        "with its warm-up; no mirrored pictures. Fast sampler: DPMSolverMultistepScheduler, "
        "sde-dpmsolver++ of order 2, with thresholding, for pixels."
    )
    shape, schedule, lr = COLOUR, "linear", 1e-4


class Lucidrains:
    package, install = "denoising-diffusion-pytorch", ["denoising_diffusion_pytorch"]
    batch, fast, default = 32, ("DDIM", 50), ("DDIM", 250)
    source = "lucidrains/denoising-diffusion-pytorch: README and the defaults of Trainer"
    text = (
        "Unet of dim 32, dim_mults 1-2-4, for 28 pixels instead of dim 64, 1-2-4-8 for 128; "
        "GaussianDiffusion of 1000 steps, sigmoid schedule, predicts v; Adam at 8e-5, betas 0.9 "
        "and 0.99, batch 32, gradients of 2 batches accumulated and clipped to norm 1; EMA of "
        "0.995 every 10 steps. The loop is that of Trainer.train, written out so that the clock "
        "can stop; no mirrored pictures, which digits are not; fp32, its amp is of fp16 on a GPU."
    )

    def __init__(self, feed):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, flash_attn=True)
        self.diffusion = GaussianDiffusion(
            self.network, image_size=feed.side, timesteps=1000, sampling_timesteps=250
        ).to(feed.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)
        self.batches = iter(feed)

    def step(self):
        self.diffusion.train()
        for _ in range(2):
            (self.diffusion(next(self.batches)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()

    def draw(self, count, sampler, steps):
        model = self.average.ema_model.eval()
        model.sampling_timesteps = steps
        return model.sample(batch_size=count)


class Smalldiffusion:
    package, install = "smalldiffusion", ["smalldiffusion", "torch_ema"]
    batch, fast, default = 128, ("its own, gam 1.6", 20), ("its own, gam 1.6", 20)
    source = "yuanchenyang/smalldiffusion: examples/fashion_mnist_unet.py"
    text = (
        "Scaled(Unet) of 64 channels, ch_mult 1-1-2, attention at 14 pixels, dropout 0.1; "
        "ScheduleLogLinear from 0.01 to 20, predicts the noise; its training_loop: AdamW at 7e-4, "
        "EMA of 0.999 with its warm-up. Batch 128 instead of 1024, of which a CPU does few in the "
        "time; no mirrored pictures, which digits are not."
    )

    def __init__(self, feed):
        from smalldiffusion import Scaled, ScheduleLogLinear, Unet, training_loop
        from torch_ema import ExponentialMovingAverage

        network = Scaled(Unet)(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
        self.network = network.to(feed.device)
        self.schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
        self.average = ExponentialMovingAverage(self.network.parameters(), decay=0.999)
        batches = (2 * x - 1 for x in feed)
        self.loop = training_loop(batches, self.network, self.schedule, epochs=1, lr=7e-4)

    def step(self):
        next(self.loop)
        self.average.update()

    def draw(self, count, sampler, steps):
        from smalldiffusion import img_normalize, samples

        with self.average.average_parameters():
            sigmas = self.schedule.sample_sigmas(steps)
            *_, x0 = samples(self.network, sigmas, gam=1.6, batchsize=count)
        return img_normalize(x0)


PEERS = {
    "mnist": {
        "diffusers": Diffusers,
        "lucidrains": Lucidrains,
        "smalldiffusion": Smalldiffusion,
    },
    "cifar10": {"diffusers": DiffusersForColour},
}


def draw(recipe, count, sampler, steps):
    """(uint8 (N, H, W, C), seconds), from seed 0; training goes on as if nothing had been drawn."""
    started = time.perf_counter()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        sizes = [len(part) for part in torch.arange(count).split(CHUNK)]
        drawn = torch.cat([recipe.draw(size, sampler, steps).float().cpu() for size in sizes])
    pixels = drawn.clamp(0, 1).mul(255).round().byte().movedim(1, -1).numpy()
    return pixels, time.perf_counter() - started


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("--dataset", choices=PEERS, default="mnist")
    parser.add_argument("--pictures", required=True, help=".npy of uint8 (N, C, H, W)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at", type=float, nargs="+", required=True, help="minutes, ascending")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--sampler", choices=("fast", "default"), default="fast")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    kind, where = PEERS[args.dataset][args.peer], torch.device(args.device)
    pictures = torch.from_numpy(np.load(args.pictures)).to(where)
    feed = Feed(pictures, args.batch_size or kind.batch)
    wait = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    recipe, seconds, steps, trial = kind(feed), 0.0, 0, None
    for minutes in args.at:
        half = {"dtype": torch.bfloat16, "enabled": args.bf16}
        # a cache would keep the weights of the first step
        with torch.autocast(where.type, cache_enabled=False, **half):
            while seconds < 60 * minutes:
                started = time.perf_counter()
                for _ in range(STEPS[where.type]):
                    recipe.step()
                wait()
                seconds += time.perf_counter() - started
                steps += STEPS[where.type]
            pixels, took = draw(recipe, args.samples, *getattr(kind, args.sampler))
            few = min(TRIAL, args.samples)
            trial = trial or draw(recipe, few, *kind.default)[1] / few
        file = args.out / f"{minutes:g}.npz"
        np.savez_compressed(file, samples=pixels)
        row = {
            "peer": args.peer,
            "version": importlib.metadata.version(kind.package),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if args.bf16 else "fp32",
            "parameters": sum(p.numel() for p in recipe.network.parameters()),
            "batch": feed.size,
            "minutes": minutes,
            "seconds": seconds,
            "steps": steps,
            "pictures": feed.count,
            "pictures_per_second": feed.count / seconds,
            "gpu_bytes": torch.cuda.max_memory_allocated() if where.type == "cuda" else None,
            "file": str(file),
            "samples": args.samples,
            "sampler": dict(zip(("name", "steps"), getattr(kind, args.sampler), strict=True)),
            "seconds_per_sample": took / args.samples,
            "default_sampler": dict(zip(("name", "steps"), kind.default, strict=True)),
            "default_seconds_per_sample": trial,
            "recipe": kind.text,
            "source": kind.source,
        }
        print(json.dumps(row), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    # what a peer prints is no row
    with contextlib.redirect_stdout(sys.stderr):
        main()
