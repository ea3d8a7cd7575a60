"""What is chosen where nothing else is said: by data, size and purpose; names of before 0.2."""

# Size s: by the dataset's name, else "images", "sequences" or "points". Measured:
# docs/training.md. Deep and narrow won over wide at equal cost; channels are multiples of 16, to
# which kernels pad.
PRESETS = {
    "digits": {
        "channels_base": 32,
        "blocks_per_level": 6,
        "channel_mult": [2],
        "patch_size": 2,
        "dropout": 0.0,  # 0.1 has 1.6% less test loss, and takes 1.3 times as long
        "noise_copies": 3,  # few items gain from several noisy copies of each in a batch
        "noise_dist": "stratified",
        "prediction": "edm",
    },
    "images": {
        "channels_base": 32,
        "blocks_per_level": 3,
        "channel_mult": [1, 2, 2],
        "patch_size": 2,
        "dropout": 0.0,
        "noise_copies": 1,
        "noise_dist": "lognormal",
    },
    "points": {
        "channels_base": 128,
        "blocks_per_level": 4,
        "channel_mult": [1],
        "patch_size": 1,
        "dropout": 0.0,
        "noise_copies": 8,
        "noise_dist": "stratified",
    },
}
PRESETS["sequences"] = PRESETS["images"]  # not measured on sequences
PRESETS["mnist"] = PRESETS["images"] | {"blocks_per_level": 4, "channel_mult": [1, 2]}
PRESETS["fashion_mnist"] = PRESETS["mnist"]

# What of them another size changes: m is twice as wide, about 4 times the weights and the time.
# Attention is on the largest feature map of at most so many a side. The color network of size l is
# that of DDPM (Ho et al. 2020, appendix B: 35.7 M weights) as this U-Net has it: without a middle,
# and with 4 blocks a resolution, down and up, for their 2 and 3.
SIZES = {
    "s": {},
    "m": {
        "digits": {"channels_base": 64},
        "mnist": {"channels_base": 64},
        "images": {"channels_base": 64},
        "points": {"channels_base": 256},
    },
    "l": {
        "digits": {"channels_base": 96, "attention_resolutions": [8], "dropout": 0.1},
        "mnist": {
            "channels_base": 64,
            "channel_mult": [1, 2, 2],
            "patch_size": 1,
            "attention_resolutions": [16],
            "dropout": 0.1,
        },
        "images": {
            "channels_base": 128,
            "blocks_per_level": 4,
            "channel_mult": [1, 2, 2, 2],
            "patch_size": 1,
            "attention_resolutions": [16],
            "dropout": 0.1,
        },
        "points": {"channels_base": 512},
    },
}
for size in ("m", "l"):
    SIZES[size]["fashion_mnist"] = SIZES[size]["mnist"]
SIZES["m"]["sequences"] = SIZES["m"]["images"]
SIZES["l"]["sequences"] = SIZES["l"]["images"] | {"attention_resolutions": [256]}

# What a purpose changes, whatever the data and the size.
PURPOSES = {
    "samples": {},
    # bits/dim: the ends of the noise schedule are trained, too, and each pixel is seen to a
    # fraction of its gray value (Kingma et al. 2021); measured: docs/training.md, Likelihood. An
    # x0 that the network predicts is never as near to data as the noise that is left.
    "likelihood": {
        "schedule": "learned",
        "prediction": "v",
        "patch_size": 1,
        "fourier_features": 8,
    },
}
# What it changes of a network of size s, by kind. Without patches a block sees four times the
# pixels, so it has fewer channels. Of points, whose x0_hat must be right to a thousandth, the noise
# of a batch's statistics costs 0.004 to 0.01 nats: docs/log.md, Checkerboard.
PURPOSE_NETWORKS = {
    "likelihood": {
        "images": {"channels_base": 16, "blocks_per_level": 2, "channel_mult": [1, 2, 2]},
        "points": {"norm": "none"},
    }
}


# Of images that are so few, dropout keeps the network from learning them by heart, at 1.3 times the
# time of a step; measured of 100 and of 150 (of 500 it does little): docs/ablation.md, Few items.
FEW_ITEMS = 300
FEW_DROPOUT = 0.2


def preset_of(dataset, kind, size, purpose, items):
    """Return the fields of Config that are chosen for a dataset, its kind, a size and a purpose.

    items: how many the dataset has to train on."""
    changes = SIZES[size]
    preset = PRESETS.get(dataset, PRESETS[kind]) | changes.get(dataset, changes.get(kind, {}))
    if size == "s":
        preset |= PURPOSE_NETWORKS.get(purpose, {}).get(kind, {})
    if kind == "images" and items < FEW_ITEMS:
        preset |= {"dropout": FEW_DROPOUT}
    return preset


# Names of before version 0.2, still read in checkpoints and as flags.
OLD_NAMES = {
    "levels": "noise_dist",
    "width": "channels_base",
    "depth": "blocks_per_level",
    "multipliers": "channel_mult",
    "patch": "patch_size",
    "attention": "attention_resolutions",
    "conditional": "class_cond",
    "predict": "prediction",
    "noise_draws": "noise_copies",
    "keep": "keep_checkpoints",
    "churn": "s_churn",
    "clip": "threshold",
    "guidance": "cfg_scale",
    "guide": "guide_checkpoint",
}
OLD_VALUES = {
    "noise_dist": {"normal": "lognormal", "log_normal": "edm"},
    "weighting": {"bound": "vlb"},
    "sampler": {"dpm++": "dpmpp_2m", "dpm++sde": "dpmpp_2m_sde"},
}
