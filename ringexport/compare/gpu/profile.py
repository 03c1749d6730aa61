"""Where the time of a decode step goes: by kind of layer, and kernel by kernel.

A step is captured with a marker, a tiny kernel of torch's, wherever another kind of layer begins,
which the norm that a kernel reads tells. Kernels run one after the other here, so that times add
up; in a normal step they overlap, so that it takes less than their sum.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringexport.compare.gpu.decode import warm_step
from ringexport.kernels.library import KernelLibrary
from ringexport.runtime.backends.cuda.kernels import Kernels
from ringexport.runtime.backends.cuda.runner import CudaOptions, CudaRunner
from ringexport.runtime.backends.cuda.weights import DeviceWeights

__all__ = ["KernelTime", "StepProfile", "profile_decode"]

_MARKER = "bitwise_not"
"""Part of the name of the marker's kernel; nothing else inverts bits."""
_PERSISTENT = "decode_step"
"""The op that runs linear layers, dense and MoE, in one kernel."""
_NOT_KERNELS = re.compile(r"^(Mem|cuda|Activity)")
_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel in a step: how often it runs, and microseconds of all its runs together."""

    name: str
    launches: int
    us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One decode step.

    Attributes:
        kernels: the slowest first.
        kinds: "linear", "softmax", "dense", "experts", "head" and "embedding" to microseconds.
    """

    kernels: tuple[KernelTime, ...]
    kinds: dict[str, float]

    @property
    def launches(self) -> int:
        """Kernels a step."""
        return sum(kernel.launches for kernel in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"launches": self.launches}


class _Sections:
    """Tells kinds of layers apart as kernels are launched, and marks where another begins."""

    def __init__(self, weights: DeviceWeights, kernels: Kernels) -> None:
        config = weights.config
        self._begins = {weights["final_norm"].data_ptr(): "head"}
        for layer in range(config.num_hidden_layers):
            attention = "linear" if config.is_linear_layer(layer) else "softmax"
            mlp = "experts" if config.is_moe_layer(layer) else "dense"
            self._begins[weights[f"layers.{layer}.input_norm"].data_ptr()] = attention
            self._begins[weights[f"layers.{layer}.mlp_norm"].data_ptr()] = mlp
        self._marked = torch.zeros(1, dtype=torch.int16, device=weights["embedding"].device)
        self._current: int | None = None
        self.kinds: list[str] = []
        kernels.before_launch = self._see

    def _see(self, op: str, fields: dict[str, Any]) -> None:
        if op == _PERSISTENT:
            self._begin(0, "several layers")
        for name in ("norm_weight", "weight"):
            tensor = fields.get(name)
            address = tensor.data_ptr() if isinstance(tensor, torch.Tensor) else None
            if address in self._begins:
                self._begin(address, self._begins[address])

    def _begin(self, place: int, kind: str) -> None:
        if place != self._current:
            self._current = place
            self.kinds.append(kind)
            self._marked.bitwise_not_()


def profile_decode(
    weights: DeviceWeights,
    library: KernelLibrary,
    *,
    batch: int,
    context: int,
) -> StepProfile:
    """Profile decode steps of `batch` rows at `context` tokens with random states.

    Args:
        weights: of the engine.
        library: the kernel library.
        batch: rows.
        context: tokens of each.

    Raises:
        RingExportError: the memory of the GPU does not suffice.
    """
    options = CudaOptions(max_batch=batch, max_context=context + _STEPS, chained=False)
    with CudaRunner(weights, library, model_digest=str, options=options) as runner:
        sections = _Sections(weights, runner.kernels)
        step = warm_step(runner, batch, context, _STEPS)
        kinds = sections.kinds[len(sections.kinds) // 2 :]  # after the run before the capture
        step.position.fill_(context)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(_STEPS):
                step.graph.replay()
            torch.cuda.synchronize()
        events = [
            (event.time_range.start, event.name, event.device_time)
            for event in found.events() or ()
            if event.device_time and not _NOT_KERNELS.match(event.name)
        ]
    return _summary([(name, time) for _, name, time in sorted(events)], kinds)


def _summary(kernels: Sequence[tuple[str, float]], kinds: Sequence[str]) -> StepProfile:
    """Sum (name, microseconds) of kernels in their order; the i-th marker begins kinds[i].

    What is launched before the first marker of a step is the embedding, or follows the head of
    the step before; it is told by the number of kernels a step.
    """
    per_step = len(kernels) // _STEPS
    times: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    for start in range(0, per_step * _STEPS, per_step):
        kind, following = "embedding", iter(kinds)
        for name, us in kernels[start : start + per_step]:
            if _MARKER in name:
                kind = next(following, "unknown")
                continue
            sums[kind] = sums.get(kind, 0.0) + us / _STEPS
            times.setdefault(_short(name), []).append(us / _STEPS)
    found = [
        KernelTime(name=name, launches=len(us) // _STEPS, us=sum(us)) for name, us in times.items()
    ]
    return StepProfile(kernels=tuple(sorted(found, key=lambda one: -one.us)), kinds=sums)


def _short(name: str) -> str:
    """Return the name of a kernel without namespaces of ours and without its arguments."""
    bare = re.sub(r"void |ringkernels::|\(anonymous namespace\)::", "", name)
    depth = 0
    for place, char in enumerate(bare):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return bare[:place]
    return bare
