"""What is chosen for the data where nothing else is said, and the names of before version 0.2."""

# What is chosen for the data where nothing else is said: by the dataset's name, else "images",
# "sequences" or "points". Measured: docs/training.md. Deep and narrow won over wide at equal cost;
# channels are multiples of 16, to which kernels pad.
PRESETS = {
    "digits": {
        "channels_base": 16,
        "blocks_per_level": 4,
        "channel_mult": [2, 2],
        "patch_size": 1,
        "noise_copies": 2,  # few items gain from several noisy copies of each in a batch
        "noise_dist": "stratified",
    },
    "images": {
        "channels_base": 32,
        "blocks_per_level": 3,
        "channel_mult": [1, 2, 2],
        "patch_size": 2,
        "noise_copies": 1,
        "noise_dist": "lognormal",
    },
    "points": {
        "channels_base": 128,
        "blocks_per_level": 4,
        "channel_mult": [1],
        "patch_size": 1,
        "noise_copies": 8,
        "noise_dist": "stratified",
    },
}
PRESETS["sequences"] = PRESETS["images"]  # not measured on sequences
PRESETS["mnist"] = PRESETS["images"] | {"blocks_per_level": 4, "channel_mult": [1, 2]}
PRESETS["fashion_mnist"] = PRESETS["mnist"]

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
