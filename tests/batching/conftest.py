"""An engine on a runner that tells of mixed-up states, and one on a real one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport.pipeline.build import build
from ringexport.pipeline.request import BuildRequest
from ringexport.runtime.registry import RunnerOptions
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer
from tests.device_runner import DeviceRunner
from tests.runners import FakeRunner


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint: Path) -> ModelTokenizer:
    return ModelTokenizer.open(tiny_checkpoint, vocab_size=384)


@pytest.fixture(params=[FakeRunner, DeviceRunner], ids=["host", "device"])
def runner(request: pytest.FixtureRequest) -> FakeRunner:
    made: FakeRunner = request.param()
    return made


@pytest.fixture
def fake(runner: FakeRunner, tokenizer: ModelTokenizer) -> Engine:
    return Engine(runner, tokenizer)


@pytest.fixture(scope="session")
def bundle_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batching") / "bundle"
    build(BuildRequest(checkpoint=tiny_checkpoint, output=path))
    return path


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Iterator[Engine]:
    with Engine.open(bundle_path, options=RunnerOptions(threads=1, spin=False)) as opened:
        yield opened
