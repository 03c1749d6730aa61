"""Small bundles with made-up content: what is in the files does not matter here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ringexport.bundle import BundleWriter, EngineBundle, Manifest
from tests.bundle.samples import sample_files, sample_manifest

MakeBundle = Callable[..., EngineBundle]


@pytest.fixture
def manifest() -> Manifest:
    return sample_manifest()


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Write a bundle at a path below tmp_path and open it."""

    def make(name: str = "bundle", *, extra: bytes = b"") -> EngineBundle:
        path = tmp_path / name
        with BundleWriter(path) as writer:
            for file, content in sample_files(extra).items():
                writer.path(file).write_bytes(content)
            writer.commit(sample_manifest())
        return EngineBundle.open(path)

    return make
