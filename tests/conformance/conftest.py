"""One runner per backend, opened once, over a tiny model that it can run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

from ringexport.compare.tolerances import TOLERANCES
from ringexport.runtime.runner import Runner
from tests.checkpoints import make_checkpoint
from tests.runners import (
    BACKENDS,
    CUDA_SHAPE,
    export_tiny_graph,
    open_test_runner,
    skip_if_missing,
)

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
NARROW = {
    "cuda": "bfloat16",
    "onnxruntime:cuda:bf16": "bfloat16",
    "onnxruntime:cuda:fp16": "float16",
}
"""Backends in 16 bits, and what torch calls their dtype; their model chooses all experts."""
ORT_CUDA_NARROW = [
    pytest.param(name, marks=pytest.mark.gpu) for name in NARROW if name.startswith("onnxruntime")
]
NOT_REPEATABLE = frozenset({"onnxruntime:cuda:bf16", "onnxruntime:cuda:fp16"})
"""On Hopper, MoE in 16 bits adds the experts of a token up in the order in which they are done."""
ROUNDING = {"bfloat16": 2**-9, "float16": 2**-12}
"""The largest relative error of one rounding."""


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint and what the backends make of it."""

    checkpoint: Path
    directory: Path

    @cached_property
    def graph(self) -> Path:
        return export_tiny_graph(self.checkpoint, self.directory / "target")

    def open(self, backend: str, *, prefill_chunk: int = 4096) -> Runner:
        needs_graph = backend not in {"torch", "cuda"}
        graph = self.graph if needs_graph else self.directory
        return open_test_runner(backend, self.checkpoint, graph, prefill_chunk=prefill_chunk)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest difference over largest value, between two ways of one backend to compute the same.

    Attributes:
        logits: of logits.
        state: of recurrent states and KV caches.
        backends: of logits, between this backend and an fp32 one.
        error: about one rounding: a backend whose steps equal its prefill so far has error 0,
            from which no growth can be foretold.
        repeatable: the same call on the same state gives the same bits.
    """

    logits: float
    state: float
    backends: float
    error: float
    repeatable: bool = True

    @classmethod
    def fp32(cls) -> "Bounds":
        """Only the order of sums differs, as at level L1; between backends as at level L4."""
        same = TOLERANCES["reference_values"].bound
        backends = TOLERANCES["hidden_fp32"].bound
        return cls(logits=same, state=same, backends=backends, error=1e-7)

    @classmethod
    def narrow(cls, model: TinyModel, dtype: str) -> "Bounds":
        """Level L2: an engine in 16 bits may be off by twice what torch is in them on this model.

        Two ways to compute the same may each be off by that, in opposite directions. What torch is
        off by is measured here, with the weights and the length of text of these tests.
        """
        from ringexport.runtime.backends.torch_ref import TorchRunner

        tokens = np.random.default_rng(5).integers(0, 384, (2, 200))
        logits, states = [], []
        for name in ("float32", dtype):
            with TorchRunner(model.checkpoint, model_digest=str, dtype=name, threads=1) as runner:
                state = runner.new_state(2)
                logits.append(runner.prefill(tokens, None, state, every_position=True))
                states.append(state.snapshot().tensors)
        pairs = [(states[1][name], expected) for name, expected in states[0].items()]
        ways = 2 * TOLERANCES["kernel_factor"].bound
        off = float(np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max())
        state_off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        bound, state_bound = ways * off, ways * state_off
        return cls(logits=bound, state=state_bound, backends=bound, error=ROUNDING[dtype])


@pytest.fixture(scope="session", params=[*BACKENDS, CUDA, *ORT_CUDA_NARROW])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_if_missing(name)
    return name


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tiny_checkpoint, tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="session")
def cuda_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("cuda") / "checkpoint", **CUDA_SHAPE)
    return TinyModel(checkpoint, tmp_path_factory.mktemp("cuda-graph"))


@pytest.fixture(scope="session")
def model(backend: str, request: pytest.FixtureRequest) -> TinyModel:
    name = "cuda_model" if backend in NARROW else "tiny_model"
    found: TinyModel = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def bounds(backend: str, model: TinyModel) -> Bounds:
    found = Bounds.narrow(model, NARROW[backend]) if backend in NARROW else Bounds.fp32()
    return replace(found, repeatable=backend not in NOT_REPEATABLE)


@pytest.fixture(scope="session")
def runner(backend: str, model: TinyModel) -> Iterator[Runner]:
    with model.open(backend) as opened:
        yield opened
