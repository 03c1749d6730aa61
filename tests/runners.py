"""Runners over the tiny checkpoint, by backend name; shared by conformance and runtime tests."""

from pathlib import Path

import pytest

from ringexport.checkpoint import CheckpointWeights
from ringexport.runtime.registry import available_backends
from ringexport.runtime.runner import Runner

__all__ = ["BACKENDS", "export_tiny_graph", "open_test_runner", "skip_if_missing"]

BACKENDS = ("torch", "onnxruntime:cpu")
DIGEST = "d" * 64


def skip_if_missing(backend: str) -> None:
    """Skip the test with the reason if `backend` cannot run here."""
    known = {info.name: info.missing for info in available_backends()}
    if known[backend] is not None:
        pytest.skip(f"{backend} cannot run here: {known[backend]}")


def export_tiny_graph(checkpoint: Path, directory: Path) -> Path:
    """Write the checkpoint's graph into a new directory."""
    from ringexport.graph.export import export_graph

    directory.mkdir(parents=True)
    with CheckpointWeights.open(checkpoint) as weights:
        export_graph(weights, directory)
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
    from ringexport.runtime.backends.ort import OrtOptions, OrtRunner

    return OrtRunner(
        graph,
        context_length=4096,
        model_digest=lambda: DIGEST,
        options=OrtOptions(threads=1, spin=False, prefill_chunk=prefill_chunk),
    )
