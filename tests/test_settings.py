import os
from pathlib import Path

import pytest

from ringexport.errors import ConfigError
from ringexport.settings import VARIABLES, Settings, load_settings, rest_torch_threads


def test_nothing_is_required() -> None:
    assert load_settings({}) == Settings()


def test_every_variable_is_read() -> None:
    values = {
        "RINGEXPORT_THREADS": "3",
        "RINGEXPORT_BACKEND": "torch",
        "RINGEXPORT_KERNEL_LIBRARY": "kernels.so",
        "RINGEXPORT_PLUGIN_LIBRARY": "plugins.so",
        "RINGEXPORT_API_KEY": "secret",
        "NO_COLOR": "1",
    }
    assert values.keys() == VARIABLES.keys()
    assert load_settings(values) == Settings(
        threads=3,
        backend="torch",
        kernel_library=Path("kernels.so"),
        plugin_library=Path("plugins.so"),
        api_key="secret",
        color=False,
    )


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "99999", "٣"])
def test_bad_thread_counts_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="RINGEXPORT_THREADS"):
        load_settings({"RINGEXPORT_THREADS": value})


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_of_torch_rest_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    rest_torch_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
