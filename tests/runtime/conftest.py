"""A bundle of the tiny checkpoint, and an engine on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ringexport.pipeline.build import build
from ringexport.pipeline.request import BuildRequest
from ringexport.runtime.registry import RunnerOptions
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer

OPTIONS = RunnerOptions(threads=1, spin=False)


@pytest.fixture(scope="session")
def bundle_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "bundle"
    build(BuildRequest(checkpoint=tiny_checkpoint, output=path))
    return path


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Iterator[Engine]:
    with Engine.open(bundle_path, options=OPTIONS) as opened:
        yield opened


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint: Path) -> ModelTokenizer:
    return ModelTokenizer.open(tiny_checkpoint, vocab_size=384)
