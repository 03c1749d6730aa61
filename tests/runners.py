"""Runners over the tiny checkpoint, by backend name; shared by conformance and runtime tests."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.runtime.registry import available_backends
from ringexport.runtime.runner import BaseRunner, Runner, RunnerSpec
from ringexport.runtime.state import BaseState, StateLayout, StateSnapshot

__all__ = [
    "BACKENDS",
    "CUDA_SHAPE",
    "FakeRunner",
    "FakeState",
    "export_tiny_graph",
    "no_fault",
    "open_test_runner",
    "skip_if_missing",
]

BACKENDS = (
    "torch",
    "onnxruntime:cpu",
    "onnxruntime:cuda",
    "onnxruntime:cuda:fake",
    "tensorrt-rtx:fake",
)
"""The fakes are the runners of GPU targets over memory of the host (tests/fake_trt.py)."""
CUDA_SHAPE = {
    "hidden_size": 128,
    "head_dim": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 8,
    "n_group": 2,
    "topk_group": 2,
}
"""Sizes that the kernels serve. All experts are chosen: a choice that hangs on the last bits, as
it does for random weights in bf16, would make logits of one token differ at random."""
CUDA_ROWS = 320
DIGEST = "d" * 64
MAX_CHECKED = 5000
"""Tokens of a row that a `FakeRunner` computes its hash of anew in every call."""


def skip_if_missing(backend: str) -> None:
    """Skip the test with the reason if `backend` cannot run here; "cuda" has the marker gpu."""
    if backend == "cuda":
        return
    known = {info.name: info.missing for info in available_backends()}
    backend = "onnxruntime:cpu" if backend.endswith(":fake") else backend
    backend = backend.removesuffix(":bf16").removesuffix(":fp16")
    if known[backend] is not None:
        pytest.skip(f"{backend} cannot run here: {known[backend]}")


def export_tiny_graph(
    checkpoint: Path, directory: Path, provider: str = "cpu", dtype: str = "fp32"
) -> Path:
    """Write the checkpoint's graph into a new directory."""
    from ringexport.graph.export import export_graph

    directory.mkdir(parents=True)
    with CheckpointWeights.open(checkpoint) as weights:
        export_graph(weights, directory, provider=provider, dtype=dtype)
    return directory


def open_test_runner(
    backend: str, checkpoint: Path, graph: Path, *, prefill_chunk: int = 4096
) -> Runner:
    """Open a runner of `backend` over the tiny model, on one thread where it can be told."""
    if backend == "torch":
        from ringexport.runtime.backends.torch_ref import TorchRunner

        return TorchRunner(
            checkpoint, model_digest=lambda: DIGEST, threads=1, prefill_chunk=prefill_chunk
        )
    if backend == "tensorrt-rtx:fake":
        return _open_fake_engine(graph, prefill_chunk)
    if backend == "cuda":
        return _open_cuda(checkpoint, prefill_chunk)
    from ringexport.runtime.backends.ort import OrtOptions, OrtRunner

    if backend.startswith("onnxruntime:cuda"):
        return _open_ort_cuda(backend, checkpoint, graph, prefill_chunk)
    return OrtRunner(
        graph,
        context_length=4096,
        model_digest=lambda: DIGEST,
        options=OrtOptions(threads=1, spin=False, prefill_chunk=prefill_chunk),
    )


def _open_cuda(checkpoint: Path, prefill_chunk: int) -> Runner:
    """Pack the checkpoint beside it, once, and open the fast engine over it."""
    from ringexport.packing.writer import write_packed
    from ringexport.runtime.backends.cuda.open import CudaOptions, open_packed
    from ringexport.settings import load_settings

    directory = checkpoint.with_name(checkpoint.name + "-packed")
    if not directory.exists():
        directory.mkdir()
        with CheckpointWeights.open(checkpoint) as weights:
            write_packed(weights, directory)
    return open_packed(
        directory,
        checkpoint / "config.json",
        library=load_settings().kernel_library,
        model_digest=lambda: DIGEST,
        options=CudaOptions(max_batch=CUDA_ROWS, prefill_chunk=prefill_chunk),
    )


def _open_ort_cuda(backend: str, checkpoint: Path, graph: Path, prefill_chunk: int) -> Runner:
    """Open the runner of onnxruntime:cuda on a GPU, or its fake: on the CPU's provider."""
    from ringexport.runtime.backends.ort_cuda import OrtCudaRunner
    from ringexport.runtime.backends.ort_session import OrtOptions
    from tests.fake_trt import FakeCuda

    fake, dtype = backend.endswith(":fake"), backend.split(":")[2:]
    name = "fp32" if fake or not dtype else dtype[0]
    directory = graph.parent / f"ort-cuda-{name}"
    if not directory.is_dir():
        export_tiny_graph(checkpoint, directory, "cuda", name)
    return OrtCudaRunner(
        directory,
        context_length=4096,
        model_digest=lambda: DIGEST,
        options=OrtOptions(
            provider="cpu" if fake else "cuda",
            threads=1,
            spin=False,
            prefill_chunk=prefill_chunk,
            cuda_graph=not fake,
        ),
        cuda=FakeCuda() if fake else None,
    )


def _open_fake_engine(graph: Path, prefill_chunk: int) -> Runner:
    from ringexport.engine.table import EngineTable
    from ringexport.runtime.backends.trt import TrtLimits, TrtRunner
    from tests.fake_trt import FakeCuda, fake_tensorrt

    (graph / "engine.plan").write_bytes(b"engine")
    table = EngineTable(target="fake", versions={}, profile="", engine_bytes=6, counts={})
    table.write(graph / "layers.json", ())
    limits = TrtLimits(
        context_length=8192,
        decode_rows=64,
        decode_cache_tokens=4096,
        prefill_rows=2,
        prefill_new_tokens=max(prefill_chunk, 2),
        prefill_logits=64,
        prefill_cache_tokens=5000,
    )
    cuda = FakeCuda()
    return TrtRunner(
        graph,
        tensorrt=fake_tensorrt(graph / "model.onnx", cuda, limits),
        cuda=cuda,
        name="tensorrt-rtx:fake",
        limits=limits,
        model_digest=lambda: DIGEST,
    )


def no_fault(_kind: str, _tokens: list[int]) -> None:
    """Let a `FakeRunner` go on."""


class FakeState(BaseState):
    """Remembers a hash of the tokens of each row, and the tokens themselves as its cache."""

    def __init__(self, owner: "FakeRunner", batch: int) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, batch, context_length=spec.context_length)
        self._owner = owner
        self.hashes = np.zeros(batch, dtype=np.float32)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]

    @property
    def nbytes(self) -> int:
        return self.hashes.nbytes + sum(map(len, self.tokens))

    @property
    def model_digest(self) -> str:
        return self._owner.model_digest

    def feed(self, row: int, token: int) -> None:
        self.hashes[row] = (self.hashes[row] * 31 + token + 1) % 9973
        self.tokens[row].append(int(token))
        self.position[row] += 1

    def check(self, row: int) -> int:
        """Return the hash of a row, after comparing it with its tokens if they are not too many."""
        if self.position[row] > MAX_CHECKED:
            return int(self.hashes[row])
        expected = 0
        for token in self.tokens[row]:
            expected = (expected * 31 + token + 1) % 9973
        assert (len(self.tokens[row]), expected) == (self.position[row], self.hashes[row])
        return expected

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Any]:
        cache = np.zeros((len(rows), 1, tokens.stop - tokens.start, 1), dtype=np.float32)
        for index, row in enumerate(rows):
            part = self.tokens[row][tokens]
            cache[index, 0, : len(part), 0] = part
        return {
            "recurrent_state.0": self.hashes[rows].reshape(-1, 1, 1, 1),
            "kv_cache.1.key": cache,
            "kv_cache.1.value": cache.copy(),
        }

    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        self.hashes[rows] = snapshot.tensors["recurrent_state.0"].ravel()
        for index, row in enumerate(rows):
            used = int(snapshot.position[index])
            cached = snapshot.tensors["kv_cache.1.key"][index, 0, :used, 0]
            self.tokens[row] = [int(token) for token in cached]

    def _fork(self, rows: list[int]) -> "FakeState":
        other = FakeState(self._owner, len(rows))
        other.restore_rows(range(len(rows)), self.snapshot_rows(rows))
        return other


class FakeRunner(BaseRunner[FakeState]):
    """A model whose next token is a hash of all tokens before: a mixed-up state shows at once.

    Attributes:
        calls: "prefill" or "decode", and how many tokens or rows it had.
        fault: called with the kind and the tokens of each row before it advances; it may raise.
    """

    def __init__(self, *, context_length: int = 4096, max_batch: int | None = None) -> None:
        spec = RunnerSpec(
            name="fake",
            vocab_size=384,
            context_length=context_length,
            layout=StateLayout(recurrent={0: (1, 1, 1)}, kv_cache={1: (1, 1)}),
            max_batch=max_batch,
        )
        super().__init__(spec, lambda: DIGEST)
        self.calls: list[tuple[str, int]] = []
        self.fault: Callable[[str, list[int]], None] = no_fault

    def _new_state(self, batch: int) -> FakeState:
        self.fault("new_state", [batch])
        return FakeState(self, batch)

    def _prefill_chunk(
        self, tokens: Any, lengths: Any, state: FakeState, every_position: bool
    ) -> Any:
        assert not every_position
        self.calls.append(("prefill", int(lengths.sum())))
        for row, size in enumerate(lengths):
            self._feed(state, row, tokens[row, :size], "prefill")
        return self._logits(state, range(state.batch))

    def _decode(self, tokens: Any, state: FakeState) -> Any:
        return self._decode_rows(tokens, state, list(range(state.batch)))

    def _decode_rows(self, tokens: Any, state: FakeState, rows: list[int]) -> Any:
        self.calls.append(("decode", len(rows)))
        for row, token in zip(rows, tokens, strict=True):
            self._feed(state, row, [token], "decode")
        return self._logits(state, rows)

    def _feed(self, state: FakeState, row: int, tokens: Any, kind: str) -> None:
        for index, token in enumerate(tokens):
            if index == len(tokens) // 2:
                self.fault(kind, [*state.tokens[row], *map(int, tokens)])
            state.feed(row, token)

    def _logits(self, state: FakeState, rows: Iterable[int]) -> Any:
        hashes = [state.check(row) for row in rows]
        generator = [np.random.default_rng(value) for value in hashes]
        return np.array([one.random(self.spec.vocab_size, np.float32) for one in generator])

    def _close(self) -> None:
        pass
