import math
import warnings

import numpy as np
import pytest

from ringexport.errors import ConfigError, RingExportError
from ringexport.runtime.sampling import Sampler, SamplingParams, token_logprobs

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04])).astype(np.float32)


def drawn(count: int = 400, logits: np.ndarray = LOGITS, **params: float) -> set[int]:
    sampler = Sampler(SamplingParams(**({"temperature": 1.0, "seed": 0} | params)), len(logits))  # type: ignore[arg-type]
    return {sampler.sample(logits) for _ in range(count)}


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 101.0},
        {"repetition_penalty": True},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"max_new_tokens": None},
        {"top_k": "3"},
        {"temperature": "1"},
        {"temperature": None},
        {"temperature": 10**400},
        {"seed": 1.0},
        {"logprobs": True},
        {"ignore_eos": 1},
        {"stop": 3},
        {"stop": None},
        {"stop": {"a": 1}},
        {"seed": -1},
        {"stop": "text"},
        {"stop": ("a", "")},
        {"logprobs": -1},
        {"logprobs": 101},
    ],
    ids=str,
)
def test_params_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    assert Sampler(SamplingParams(), 4).sample(np.array([0, 2, 2, 1], np.float32)) == 1


def test_filters_keep_what_they_say() -> None:
    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.39) == {0}
    assert drawn(top_p=0.41) == {0, 1}
    assert drawn(min_p=0.49) == {0, 1, 2}
    assert drawn(temperature=1e-9) == {0}
    assert drawn(temperature=1e-320) == {0}


def test_filters_work_on_what_the_one_before_left() -> None:
    # Among the two of top-k, token 0 has 4/7 = 0.571; of all it would have 0.4.
    assert drawn(top_k=2, top_p=0.57) == {0}
    assert drawn(top_k=2, top_p=0.58) == {0, 1}
    # Temperature comes before top-p: at 0.5, token 0 has 0.16 / 0.2952 = 0.542.
    assert drawn(temperature=0.5, top_p=0.54) == {0}


def test_top_k_keeps_the_lower_ids_of_a_tie() -> None:
    assert drawn(logits=np.zeros(6, np.float32), top_k=3) == {0, 1, 2}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    assert drawn(logits=logits) == {1, 3}


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7), 5)
    counts = np.bincount([sampler.sample(LOGITS) for _ in range(10_000)], minlength=5)
    # 10,000 draws: the largest standard deviation is 0.0049; 5 of them.
    np.testing.assert_allclose(counts / 10_000, np.exp(LOGITS), atol=0.025)


def test_penalty_counts_prompt_and_text() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = np.array([3.0, 2.0, 1.6, -1.0], np.float32)
    sampler = Sampler(params, 4, prompt=[0])
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    negative = np.array([-1.0, -1.5, -9.0], np.float32)
    assert Sampler(params, 3, prompt=[0]).sample(negative) == 1
    np.testing.assert_array_equal(logits, np.array([3.0, 2.0, 1.6, -1.0], np.float32))


def test_same_seed_same_tokens() -> None:
    def text(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 5)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert text(None) != text(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(bad: float) -> None:
    with pytest.raises(RingExportError, match="largest logit"):
        Sampler(SamplingParams(), 3).sample(np.array([0, bad, 1], np.float32))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    found = token_logprobs(LOGITS + 3, 2, 2)
    assert found.token_id == 2
    assert math.isclose(found.logprob, math.log(0.2), rel_tol=1e-6)
    assert [token for token, _ in found.top] == [0, 1]
    assert token_logprobs(LOGITS, 0, 0).top == ()


@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [1e-320, 1.0, 1e300])
def test_extreme_parameters_and_logits_warn_of_nothing(penalty: float, temperature: float) -> None:
    big = np.finfo(np.float32).max
    logits = np.array([big, -big, 0, -np.inf, 1], np.float32)
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, top_p=0.9, min_p=0.1, seed=0
    )
    sampler = Sampler(params, 5, prompt=[0, 1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= sampler.sample(logits) < 5
        token_logprobs(logits, 1, 5)
