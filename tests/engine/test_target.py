import pytest

from ringexport.engine.target import EngineTarget
from ringexport.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "flavor", "architectures"),
    [
        ("tensorrt-rtx:sm_89", "tensorrt-rtx", (89,)),
        ("tensorrt-rtx:sm_120+sm_80+sm_89", "tensorrt-rtx", (80, 89, 120)),
        ("tensorrt:sm_90", "tensorrt", (90,)),
    ],
)
def test_names(name: str, flavor: str, architectures: tuple[int, ...]) -> None:
    target = EngineTarget.parse(name)
    assert target == EngineTarget(flavor, architectures)
    assert EngineTarget.parse(target.name) == target


def test_the_name_is_canonical() -> None:
    target = EngineTarget.parse("tensorrt-rtx:sm_120+sm_80")
    assert target is not None
    assert target.name == "tensorrt-rtx:sm_80+sm_120"


@pytest.mark.parametrize(
    ("name", "has_fp8"),
    [
        ("tensorrt-rtx:sm_89", True),
        ("tensorrt-rtx:sm_89+sm_120", True),
        ("tensorrt-rtx:sm_80+sm_89", False),
        ("tensorrt:sm_86", False),
    ],
)
def test_fp8_is_what_all_gpus_have(name: str, has_fp8: bool) -> None:
    target = EngineTarget.parse(name)
    assert target is not None
    assert target.has_fp8 is has_fp8


@pytest.mark.parametrize("name", ["onnxruntime:cpu", "cuda:sm_90", "torch"])
def test_other_families(name: str) -> None:
    assert EngineTarget.parse(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorrt", "names no architectures"),
        ("tensorrt-rtx:89", "names no architectures that can be read: '89'"),
        ("tensorrt-rtx:sm_80,sm_89", "names no architectures that can be read"),
        ("tensorrt-rtx:sm_\u0668\u0669", "names no architectures that can be read"),
        ("tensorrt-rtx:sm_089", "names no architectures that can be read"),
        ("tensorrt:sm_" + "9" * 5000, "names no architectures that can be read"),
        ("tensorrt-rtx:sm_90", "do not run on sm_90"),
        ("tensorrt-rtx:sm_89+sm_89", "names an architecture twice"),
        ("tensorrt:sm_80+sm_89", "is for one architecture"),
        ("tensorrt:sm_75", "do not run on sm_75"),
    ],
)
def test_targets_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EngineTarget.parse(name)
    assert caught.value.hint is not None


def test_the_hint_is_a_target_that_can_be() -> None:
    for flavor, several in (("tensorrt", False), ("tensorrt-rtx", True)):
        with pytest.raises(ConfigError) as caught:
            EngineTarget.parse(flavor)
        assert ("+" in str(caught.value.hint)) is several
