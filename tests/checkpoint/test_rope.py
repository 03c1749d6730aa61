"""Rotary frequencies and YaRN against numbers worked out by hand from the published formulas."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringexport.checkpoint import RingConfig, YarnConfig
from ringexport.errors import ConfigError
from tests.checkpoints import tiny_config

MINI = Path(__file__).parent / "data" / "ring-mini-linear-2.0.json"
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072}


def read_yarn(**overrides: Any) -> YarnConfig | None:
    return YarnConfig.from_dict(YARN | overrides, source="config.json: rope_scaling")


def test_plain_frequencies() -> None:
    inv_freq = RingConfig.from_file(MINI).inv_freq()
    assert inv_freq.dtype == np.float64
    expected = [1e6 ** (-2 * j / 64) for j in range(32)]
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-14)


def test_yarn_frequencies_and_attention_factor() -> None:
    plain = RingConfig.from_file(MINI)
    config = plain.with_yarn(4.0)
    assert config.context_length == 524288
    assert config.trained_context_length == 131072
    assert config.attention_factor == pytest.approx(1.138629, abs=1e-6)
    # 64 ln(131072 / (32 * 2 pi)) / (2 ln 1e6) = 15.01, and 23.04 for one rotation: the ramp runs
    # from dimension 15 to 24.
    ratio = config.inv_freq() / plain.inv_freq()
    expected = [1 - 0.75 * min(max((j - 15) / 9, 0), 1) for j in range(32)]
    np.testing.assert_allclose(ratio, expected, rtol=1e-14)
    assert plain.with_yarn(2.0).attention_factor == pytest.approx(1.069315, abs=1e-6)


def test_yarn_without_rounding_of_the_ramp() -> None:
    plain = RingConfig.from_file(MINI)
    config = RingConfig.from_file(MINI, rope_scaling=YARN | {"truncate": False})
    low, high = (
        64 * math.log(131072 / (turns * 2 * math.pi)) / (2 * math.log(1e6)) for turns in (32, 1)
    )
    expected = [1 - 0.75 * min(max((j - low) / (high - low), 0), 1) for j in range(32)]
    np.testing.assert_allclose(config.inv_freq() / plain.inv_freq(), expected, rtol=1e-12)


def test_yarn_on_the_tiny_model_keeps_frequencies_positive_and_falling() -> None:
    config = RingConfig.from_dict(tiny_config(), source="config.json").with_yarn(4.0)
    inv_freq = config.inv_freq()
    assert inv_freq.shape == (4,)
    assert (inv_freq > 0).all()
    assert (np.diff(inv_freq) < 0).all()


def test_yarn_whose_every_frequency_turns_often_changes_none() -> None:
    scaling = YARN | {"original_max_position_embeddings": 1 << 20}
    values = tiny_config(rope_theta=10, max_position_embeddings=1 << 20)
    plain = RingConfig.from_dict(values, source="config.json")
    config = RingConfig.from_dict(values | {"rope_scaling": scaling}, source="config.json")
    np.testing.assert_array_equal(config.inv_freq(), plain.inv_freq())


def test_with_yarn_replaces_the_factor_and_keeps_the_trained_context() -> None:
    plain = RingConfig.from_file(MINI)
    assert plain.with_yarn(4.0).with_yarn(2.0) == plain.with_yarn(2.0)
    assert plain.with_yarn(4.0) == RingConfig.from_file(MINI, rope_scaling=YARN)
    for factor in (0.5, math.nan, 1e9, True):
        with pytest.raises(ConfigError, match="factor is"):
            plain.with_yarn(factor)


def test_attention_factor_and_mscale() -> None:
    def factor(**overrides: Any) -> float:
        yarn = read_yarn(**overrides)
        assert yarn is not None
        return yarn.attention_factor

    magnitude = 0.1 * math.log(4)
    assert factor() == factor(attention_factor=None) == factor(mscale=2.0) == 1 + magnitude
    assert factor(attention_factor=1.5) == 1.5
    assert factor(mscale=2.0, mscale_all_dim=1.0) == (1 + 2 * magnitude) / (1 + magnitude)
    assert factor(factor=1.0) == 1.0


def test_default_rope_type_is_no_scaling() -> None:
    assert YarnConfig.from_dict({"rope_type": "default"}, source="rope_scaling") is None
    assert read_yarn(rope_type="yarn") == read_yarn()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"type": "linear"}, "rope type 'linear', expected 'yarn'"),
        ({"rope_type": "dynamic"}, "rope type 'dynamic' and 'yarn', expected 'yarn'"),
        ({"type": ["yarn"]}, "expected 'yarn'"),
        ({"factor": 0.5}, "factor is 0.5, expected a number from 1 to 1024"),
        ({"factor": True}, "factor is True"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"original_max_position_embeddings": 1 << 27}, "expected at most 134217728"),
        ({"beta_fast": 1}, "beta_fast is 1, expected more than beta_slow 1"),
        ({"beta_slow": -1}, "beta_slow is -1"),
        ({"attention_factor": 0}, "attention_factor is 0"),
        ({"truncate": 1}, "truncate is 1, expected true or false"),
        ({"beta_fats": 32}, "did you mean 'beta_fast'?"),
    ],
)
def test_bad_scaling_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yarn(**overrides)
    assert str(caught.value).startswith("config.json: rope_scaling")
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["type", "factor", "original_max_position_embeddings"])
def test_scaling_lacks_a_key(key: str) -> None:
    values = {name: value for name, value in YARN.items() if name != key}
    with pytest.raises(ConfigError, match=f"rope_scaling lacks .*{key}"):
        YarnConfig.from_dict(values, source="rope_scaling")


def test_context_lengths_must_agree() -> None:
    values = tiny_config(rope_scaling=YARN | {"original_max_position_embeddings": 1024})
    config = RingConfig.from_dict(values, source="config.json")  # 4 x 1024 = 4096
    assert (config.trained_context_length, config.context_length) == (1024, 4096)
    with pytest.raises(ConfigError, match="max_position_embeddings 4096 is neither the trained"):
        RingConfig.from_dict(tiny_config(rope_scaling=YARN), source="config.json")
