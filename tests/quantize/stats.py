"""Made-up calibration stats for a config: positive, different for every module, from a seed."""

import numpy as np

from ringexport.checkpoint import RingConfig
from ringexport.quantize.modules import quantizable_modules
from ringexport.stats import CalibrationStats, Quantity


def make_stats(config: RingConfig, seed: int = 0) -> CalibrationStats:
    rng = np.random.default_rng(seed)
    entries: dict[tuple[str, Quantity], np.ndarray] = {}
    for module in quantizable_modules(config):
        channels = np.exp(rng.standard_normal(module.shape[1])).astype(np.float32)
        entries[module.name, Quantity.INPUT_CHANNEL_ABSMAX] = channels
        entries[module.name, Quantity.INPUT_ABSMAX] = channels.max(keepdims=True)
    for layer in config.softmax_layers:
        for quantity in (Quantity.KEY_ABSMAX, Quantity.VALUE_ABSMAX):
            value = rng.uniform(1, 9, 1).astype(np.float32)
            entries[f"model.layers.{layer}.attention", quantity] = value
    return CalibrationStats(
        model_digest="0" * 64,
        calibration_set="made-up",
        num_samples=1,
        num_tokens=1,
        entries=entries,
    )
