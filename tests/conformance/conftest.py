"""One runner per backend, opened once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport.runtime.runner import Runner
from tests.runners import BACKENDS, export_tiny_graph, open_test_runner, skip_if_missing


@pytest.fixture(scope="session")
def tiny_graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_graph(tiny_checkpoint, tmp_path_factory.mktemp("graph") / "target")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_if_missing(name)
    return name


@pytest.fixture(scope="session")
def runner(backend: str, tiny_checkpoint: Path, tiny_graph: Path) -> Iterator[Runner]:
    with open_test_runner(backend, tiny_checkpoint, tiny_graph) as opened:
        yield opened
