"""Time decode steps of the engine on the GPU, at a given number of rows and tokens behind them."""

import statistics
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ringexport.compare.gpu.timing import GpuTimer
from ringexport.compare.gpu.traffic import expected_experts, moved_bytes
from ringexport.errors import ToleranceExceededError
from ringexport.runtime.backends.cuda.graphs import DecodeStep
from ringexport.runtime.backends.cuda.runner import CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["DecodeSpeed", "fill_state", "measure_decode", "warm_step"]

_MIN_DIVERSITY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpeed:
    """One point of the grid.

    Attributes:
        batch: rows.
        context: tokens that each row holds at the first step.
        step_us: microseconds a step on the GPU, median of runs.
        spread: (slowest - fastest) / median of the runs.
        bytes_moved: that a step has to move.
        limit_us: microseconds that moving them takes at the read rate.
        experts_hit: distinct experts chosen in a layer, mean over layers, 0 without experts.
        experts_expected: the same if routing were uniform.
    """

    batch: int
    context: int
    step_us: float
    spread: float
    bytes_moved: float
    limit_us: float
    experts_hit: float
    experts_expected: float

    @property
    def tokens_per_s(self) -> float:
        """Of all rows."""
        return self.batch / self.step_us * 1e6

    @property
    def limit_tokens_per_s(self) -> float:
        """Of all rows, if a step took as long as its bytes."""
        return self.batch / self.limit_us * 1e6

    @property
    def fraction(self) -> float:
        """Of the limit."""
        return self.limit_us / self.step_us

    def to_dict(self) -> dict[str, float]:
        """Return JSON values."""
        return asdict(self) | {
            "tokens_per_s": self.tokens_per_s,
            "limit_tokens_per_s": self.limit_tokens_per_s,
            "fraction_of_limit": self.fraction,
        }

    def check_routing(self) -> None:
        """Raise ToleranceExceededError if the routers chose too few different experts."""
        if self.experts_hit < _MIN_DIVERSITY * self.experts_expected:
            raise ToleranceExceededError(
                f"batch {self.batch}: {self.experts_hit:.1f} experts are hit a layer and step, "
                f"uniform routing hits {self.experts_expected:.1f}: a router that chooses so few "
                "makes any engine look fast, no speed is reported",
                hint="the router's weights have collapsed; use other weights",
            )


def fill_state(runner: CudaRunner, seed: int = 0) -> None:
    """Fill all slots with random states and caches: what tokens of a text would leave there."""
    pool = runner.pool
    device = next(iter(pool.recurrent_state.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for state in pool.recurrent_state.values():
        state.normal_(generator=generator)
    for cache in (*pool.keys.values(), *pool.values.values()):
        for slot in cache:
            noise = torch.randn(slot.shape, generator=generator, device=device)
            slot.copy_(noise.to(slot.dtype))


def warm_step(runner: CudaRunner, batch: int, context: int, steps: int) -> DecodeStep:
    """Return a captured step after `steps` replays: its buffers hold `batch` rows with a state.

    Args:
        runner: with room for `batch` rows and context + steps tokens.
        batch: rows.
        context: tokens that each row seems to hold; the state is random.
        steps: replays.
    """
    state = runner.new_state(batch)
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, batch)
    for _ in range(2):  # a slot may be emptied when it is first used: filled in between
        state.position[:] = context
        runner.replay(tokens, state, range(batch), steps=steps)
        fill_state(runner)
    return runner.graphs.step(batch)


def _time(step: DecodeStep, context: int, steps: int) -> float:
    """Return seconds a step; each follows the one before on the GPU, without the host."""
    step.position.fill_(context)
    with GpuTimer() as timer:
        for _ in range(steps):
            step.graph.replay()
    return timer.seconds / steps


def measure_decode(
    runner: CudaRunner,
    weights: DeviceWeights,
    *,
    batch: int,
    context: int,
    read_rate: float,
    steps: int = 32,
    repeat: int = 5,
) -> DecodeSpeed:
    """Time `steps` steps that follow each other on the GPU, each with the token chosen before it.

    Args:
        runner: with room for `batch` rows and context + steps tokens.
        weights: of the runner.
        batch: rows.
        context: tokens that each row holds at first; the state is random.
        read_rate: bytes a second of the GPU.
        steps: a run.
        repeat: runs.

    Raises:
        ToleranceExceededError: the routers chose too few different experts.
    """
    step = warm_step(runner, batch, context, steps)
    times = [_time(step, context, steps) for _ in range(repeat)]
    middle = statistics.median(times)
    chosen = step.expert_ids.values()
    hit = statistics.mean(len(torch.unique(ids)) for ids in chosen) if chosen else 0.0
    nbytes = moved_bytes(
        weights,
        batch=batch,
        context=context,
        experts_hit=hit,
        cache_dtype=next(iter(runner.pool.keys.values())).dtype,
    )
    speed = DecodeSpeed(
        batch=batch,
        context=context,
        step_us=middle * 1e6,
        spread=(max(times) - min(times)) / middle,
        bytes_moved=nbytes,
        limit_us=nbytes / read_rate * 1e6,
        experts_hit=hit,
        experts_expected=expected_experts(weights.config, batch),
    )
    speed.check_routing()
    return speed
