from pathlib import Path

import pytest

from ringexport.engine.profile import DEFAULT_PROFILE, BuildOptions, Range, load_profile
from ringexport.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "engines" / "profiles" / "default.toml"


def test_the_shipped_file_is_the_default() -> None:
    assert load_profile() == DEFAULT_PROFILE
    assert load_profile(str(SHIPPED)) == DEFAULT_PROFILE


def test_shapes_of_a_tensor() -> None:
    decode, prefill = DEFAULT_PROFILE.shapes
    cache = ("B", 4, "S", 128)
    assert decode.shapes(cache, 32768) == ((1, 4, 1, 128), (1, 4, 4096, 128), (64, 4, 32768, 128))
    assert prefill.shapes(("B", "T"), 1024) == ((1, 2), (1, 512), (8, 1024))


def test_limits_for_the_manifest() -> None:
    limits = DEFAULT_PROFILE.limits(8192)
    assert limits["decode_rows"] == 64
    assert limits["prefill_new_tokens"] == 4096
    assert limits["prefill_cache_tokens"] == 8192


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(
        '[prefill]\nrows = [1, 2, 4]\ncache_tokens = [2, 16, "context"]\n'
        '[options]\nrefit = true\noptimization_level = 4\ntiming_cache = "a/b.cache"\n'
    )
    profile = load_profile(str(path))
    assert profile.name == "small"
    assert profile.decode == DEFAULT_PROFILE.decode
    assert profile.prefill.ranges["B"] == Range(1, 2, 4)
    assert profile.prefill.ranges["S"] == Range(2, 16, None)
    assert profile.options == BuildOptions(
        refit=True, optimization_level=4, timing_cache=Path("a/b.cache")
    )
    assert profile.options.to_dict() == {"refit": True, "optimization_level": 4}
    assert BuildOptions(optimization_level=0).to_dict() == {"optimization_level": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prefil]\n", "unknown key 'prefil'"),
        ("[prefill]\nrow = [1, 1, 1]\n", "did you mean rows"),
        ("[prefill]\nrows = [1, 1]\n", "three rising numbers"),
        ("[prefill]\nrows = [4, 2, 8]\n", "three rising numbers"),
        ("[prefill]\nrows = [0, 2, 8]\n", "three rising numbers"),
        ("[decode]\nnew_tokens = [1, 1, 2]\n", r"is not \[1, 1, 1\]"),
        ("[options]\nrefit = 1\n", "expected bool"),
        ("[options]\noptimization_level = 9\n", "optimization_level is 9, expected 0 to 5"),
        ("[options]\nworkspace_mib = 0\n", "workspace_mib is 0, expected 1 to 1048576"),
        ("[options]\nworkspace_mib = 99999999999999\n", "expected 1 to 1048576"),
        ('[options]\ntiming_cache = ""\n', "timing_cache is empty"),
        (
            "[decode]\nrows = [3, 4, 8]\n",
            r"decode.rows is \[3, 4, 8\], expected a range that holds 1",
        ),
        ("[prefill]\nnew_tokens = [1, 1, 1]\n", "a range that holds 2"),
        ("[prefill]\nlogits = [5, 5, 5]\n", "a range that holds 1"),
        ('[prefill]\ncache_tokens = [512, 4096, "context"]\n', "a range that holds 2"),
        ("[options]\nfast = true\n", "unknown key 'fast'"),
        ("options = 3\n", "is no table"),
        ("decode = 3\n", "decode is no table"),
        ("[prefill\n", "is no TOML"),
        ("a = " + "[" * 5000, "is no TOML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(str(path))
    assert caught.value.hint is not None


def test_names_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine profile"):
        load_profile("fast")
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory$"):
        load_profile(str(tmp_path / "missing.toml"))
