"""One bundle of ring-nano, one engine that says what is right, one server for the module."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport import Engine
from ringexport.bundle import EngineBundle
from ringexport.cli.main import run_cli
from ringexport.triton import TritonOptions, write_repository
from tests.triton.engines import bundle_with
from tests.triton.server import ROOT, Server, UnavailableError, run_server, server_environment

NAMES = ("nano", "brief", "pair")


STEP_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        names = ("tokens", "lengths", "position", "logits_index")
        tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in names]
        ranks = [tensor.as_numpy().ndim for tensor in tensors]
        logits = np.array([[[*ranks, tensors[0].as_numpy().shape[1]]]], dtype=np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)])
"""
"""Stands in for a TensorRT engine; its logits are the ranks of its inputs and the length."""


def write_step_model(folder: Path) -> None:
    """Write the repository of made-up engines, and let the Python backend load its step model."""
    bundle = bundle_with(folder / "bundle", "tensorrt:sm_90")
    write_repository(bundle, folder / "step", TritonOptions(name="step"))
    shutil.rmtree(folder / "step" / "step")
    model = folder / "step" / "step_step"
    config = (model / "config.pbtxt").read_text().replace("KIND_GPU", "KIND_CPU")
    config = config.replace('platform: "tensorrt_plan"', 'backend: "python"')
    config = re.sub(
        r"default_model_filename.*|cc_model_filenames \{[^}]*\}| *profile:.*", "", config
    )
    (model / "config.pbtxt").write_text(config)
    (model / "1" / "model.py").write_text(STEP_MODEL)


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> EngineBundle:
    path = tmp_path_factory.mktemp("triton") / "ring-nano"
    assert run_cli(["build", str(ROOT / "models/ring-nano"), "-o", str(path), "-q"]) == 0
    return EngineBundle.open(path)


@pytest.fixture(scope="module")
def engine(nano: EngineBundle) -> Iterator[Engine]:
    with Engine.open(nano.directory) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(nano: EngineBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of `nano`, `brief` (one session of 2 seconds), `pair` (2 instances), `step_step`."""
    try:
        server_environment()
    except UnavailableError as error:
        pytest.skip(f"needs tritonserver: {error}")
    folder = tmp_path_factory.mktemp("repositories")
    for options in (
        TritonOptions(name="nano", threads=1),
        TritonOptions(
            name="brief",
            threads=1,
            reference=True,
            max_batch=1,
            max_sessions=1,
            session_idle_seconds=2,
        ),
        TritonOptions(name="pair", threads=1, reference=True, instances=2, max_sessions=8),
    ):
        write_repository(nano, folder / str(options.name), options)
    write_step_model(folder)
    with run_server([folder / name for name in (*NAMES, "step")], folder) as server:
        yield server
    log = server.log.read_text()
    # Triton 2.51 never unloads a model if it answers a request itself, as it does with one that is
    # cancelled before the model has it: that happens to `nano` now and then.
    unloaded = [name for name in NAMES if f"successfully unloaded '{name}'" in log]
    assert {"brief", "pair"} <= set(unloaded)
