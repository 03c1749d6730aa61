"""Whether thousands of decode steps stay right, and equally fast: states against the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringexport.compare.gpu.agreement import Choices
from ringexport.compare.gpu.reference import PackedReference
from ringexport.compare.gpu.timing import GpuTimer
from ringexport.compare.tolerances import TOLERANCES
from ringexport.errors import ToleranceExceededError
from ringexport.model.state import ReferenceState
from ringexport.runtime.backends.cuda.runner import CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights
from ringexport.runtime.runner import Tokens

__all__ = ["DRIFT_STEPS", "Drift", "measure_drift", "time_steps"]

DRIFT_STEPS = (64, 256, 1024, 4096)
States = dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Relative errors of the recurrent states after some decode steps, against fp32.

    Attributes:
        steps: decoded so far.
        engine: error of the engine, the worst layer.
        rounding: error of the reference in bf16, the worst layer.
        engine_median: error of the engine, the median layer.
        rounding_median: error of the reference in bf16, the median layer.
    """

    steps: int
    engine: float
    rounding: float
    engine_median: float
    rounding_median: float

    def check(self) -> None:
        """Raise ToleranceExceededError if the engine errs more than bf16 explains."""
        bound = TOLERANCES["kernel_factor"].bound
        if not self.engine <= bound * self.rounding:
            raise ToleranceExceededError(
                f"after {self.steps:,} steps a recurrent state is off by {self.engine:.2e}, "
                f"in bf16 alone by {self.rounding:.2e}",
                hint=f"at most {bound:g} times is allowed: look for a bias, a wrong decay or a "
                "state that is rounded",
            )


def measure_drift(
    runner: CudaRunner, weights: DeviceWeights, places: Sequence[int] = DRIFT_STEPS
) -> list[Drift]:
    """Decode random tokens one by one and compare the states at `places` with the reference's.

    The reference reads the same tokens in chunks and uses the experts that the engine chose.

    Args:
        runner: with room for a row of as many tokens.
        weights: of the runner.
        places: numbers of steps, ascending.
    """
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, runner.spec.vocab_size, (1, places[-1]), dtype=np.int64)
    states, experts = _decode(runner, tokens, places)
    exact = PackedReference(weights)
    models = (exact, exact.in_dtype(torch.bfloat16))
    found, held = [], [model.new_state(1) for model in models]
    for start, stop in zip((0, *places), places, strict=False):
        part = {layer: ids[0, start:stop] for layer, ids in experts.items()}
        for model, state in zip(models, held, strict=True):
            model.forward(torch.from_numpy(tokens[:, start:stop]), None, state, experts=part)
        found.append(_drift(stop, states[stop], held))
    return found


def _decode(
    runner: CudaRunner, tokens: Tokens, places: Sequence[int]
) -> tuple[dict[int, States], Choices]:
    """Return the recurrent states at `places` and the experts of all steps."""
    state = runner.new_state(1)
    states: dict[int, States] = {}
    chosen: list[Tensor] = []
    layers: list[int] = []
    for place in range(tokens.shape[1]):
        runner.replay(tokens[:, place], state, range(1), steps=1)
        found = runner.graphs.step(1).expert_ids
        layers = list(found)
        chosen.append(torch.stack([ids[0] for ids in found.values()]))
        if place + 1 in places:
            slot = state.slots[0]
            pool = runner.pool.recurrent_state
            states[place + 1] = {layer: one[slot].clone() for layer, one in pool.items()}
    experts = torch.stack(chosen, dim=1)[:, None]  # [layers, 1, T, top_k]
    return states, dict(zip(layers, experts, strict=True))


def _drift(steps: int, engine: States, held: Sequence[ReferenceState]) -> Drift:
    exact, rounded = (state.recurrent_state for state in held)
    errors, noise = [], []
    for layer, expected in exact.items():
        size = float(expected.norm())
        errors.append(float((engine[layer] - expected[0]).norm()) / size)
        noise.append(float((rounded[layer] - expected).norm()) / size)
    return Drift(
        steps=steps,
        engine=max(errors),
        rounding=max(noise),
        engine_median=float(np.median(errors)),
        rounding_median=float(np.median(noise)),
    )


def time_steps(runner: CudaRunner, steps: int, window: int = 128) -> list[float]:
    """Generate `steps` tokens from an empty context and return seconds a token of each window.

    Args:
        runner: with room for a row of `steps` tokens.
        steps: a multiple of `window`.
        window: tokens that are timed together.
    """
    state = runner.new_state(1)
    runner.replay(np.zeros(1, dtype=np.int64), state, range(1), steps=steps)
    step = runner.graphs.step(1)
    runner.pool.reset(state.slots)
    step.position.zero_()
    found = []
    for _ in range(0, steps, window):
        with GpuTimer() as timer:
            for _ in range(window):
                step.graph.replay()
        found.append(timer.seconds / window)
    return found
