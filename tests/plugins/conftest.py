from pathlib import Path

import pytest

from tests.plugins.native import compile_driver


@pytest.fixture(scope="session")
def plugin_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("plugin-driver"))
