"""Tiny checkpoints, texts and an independent numpy model for the tests of calibration."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from ringexport.calibrate import CalibrationSettings, PromptSet
from ringexport.progress import NoProgress
from ringexport.stats import CalibrationStats, Quantity
from tests.checkpoints import make_checkpoint

Array = npt.NDArray[Any]

TEXTS = (
    "The first of the texts is the longest one here, and it is in no way interesting to read.",
    "a b c",
    "In the end there was nothing but the wind on the sea, and the sound of it.",
    "for i in range(10):\n    print(i, i * i, sum(range(i)))\n",
    "x",
    "Words and words and words, one after the other, until the line is at its end.",
)
PROMPTS = PromptSet(name="literal", texts=TEXTS, sources=("test",) * len(TEXTS))
SETTINGS = CalibrationSettings(batch_tokens=160, max_tokens=48, max_blind_share=1.0)
SMALL = {"num_hidden_layers": 4, "layer_group_size": 2, "num_experts": 8}
"""Config of a model that calibrates fast: linear, softmax and MoE layers are all there."""


def checkpoint(directory: Path, biases: Mapping[int, Mapping[int, float]], **config: Any) -> Path:
    """Write a tiny checkpoint with these router biases, by layer and expert."""
    make_checkpoint(directory, shards=1, **config)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for layer, values in biases.items():
        bias = tensors[f"model.layers.{layer}.mlp.gate.expert_bias"]
        for expert, value in values.items():
            bias[expert] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


class Recorder(NoProgress):
    """Counts, and interrupts after so many advances of the calibration."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.stages: list[tuple[str, int | None, str]] = []
        self.amounts: Counter[str] = Counter()
        self.notes: list[str] = []
        self._left = interrupt_after

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append((stage, total, unit))

    def advance(self, amount: int = 1) -> None:
        stage = self.stages[-1][0]
        self.amounts[stage] += amount
        if stage == "calibrate" and self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


def entry(stats: CalibrationStats, module: str, quantity: Quantity) -> np.ndarray:
    found = stats.find(module, quantity)
    assert found is not None, f"no {quantity} of {module}"
    return found


def experts_of(stats: CalibrationStats, layer: int, quantity: Quantity) -> npt.NDArray[np.float32]:
    """Return EXPERT_TOKENS or EXPERT_FORCED of a layer."""
    return entry(stats, f"model.layers.{layer}.mlp.gate", quantity)


def rms_norm(hidden: Array, weight: Array) -> Array:
    wide = hidden.astype(np.float64)
    return wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * weight


def silu(values: Array) -> Array:
    return values / (1.0 + np.exp(-values))
