import itertools
import math

import numpy as np
import pytest

from ringexport.compare.perplexity import Score, Text, perplexity, perplexity_pair
from ringexport.compare.report import Comparison, Row
from ringexport.compare.speed import BenchConfig, check_agreement, measure
from ringexport.compare.teacher import compare_runners, require_probe
from ringexport.compare.tolerances import TOLERANCES
from ringexport.compare.windows import predict
from ringexport.errors import BackendUnavailableError, ConfigError, ToleranceExceededError
from tests.compare.fake import FakeRunner

VOCAB = 8


@pytest.fixture
def table(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((VOCAB, VOCAB))


@pytest.fixture
def tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, VOCAB, 40)


def text(tokens: np.ndarray, name: str = "text") -> Text:
    return Text(name=name, tokens=np.asarray(tokens), num_bytes=2 * max(0, len(tokens) - 1))


def expected_nats(table: np.ndarray, tokens: np.ndarray) -> float:
    table = table.astype(np.float32).astype(np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
    return -sum(log_p[a, b] for a, b in itertools.pairwise(tokens))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("window", [2, 9, 40, 64, None])
def test_every_token_but_the_first_is_predicted_once(
    table: np.ndarray, tokens: np.ndarray, window: int | None, chunk: int
) -> None:
    runner = FakeRunner(table)
    parts = list(predict(runner, tokens, window=window, chunk=chunk))
    targets = np.concatenate([part.targets for part in parts])
    logits = np.concatenate([part.logits for part in parts])
    assert targets.tolist() == tokens[1:].tolist()
    assert np.array_equal(logits, runner.table[tokens[:-1]])
    size = window or runner.spec.context_length
    assert all(len(fed) <= size - 1 for fed in runner.fed)


def test_perplexity_by_hand(table: np.ndarray, tokens: np.ndarray) -> None:
    scores = perplexity(FakeRunner(table), [text(tokens)])
    nats = expected_nats(table, tokens)
    assert scores["text"].nats == pytest.approx(nats)
    assert scores["text"].perplexity == pytest.approx(math.exp(nats / 39))
    assert scores["text"].bits_per_byte == pytest.approx(nats / math.log(2) / 78)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tokens: np.ndarray) -> None:
    score = perplexity(FakeRunner(np.zeros((VOCAB, VOCAB))), [text(tokens)])["text"]
    assert score.perplexity == pytest.approx(VOCAB)


def test_scores_add_up(table: np.ndarray, tokens: np.ndarray) -> None:
    texts = [text(tokens[:10], "a"), text(tokens[10:], "b"), text(tokens[:1], "c")]
    scores = perplexity(FakeRunner(table), texts)
    total = scores["a"] + scores["b"] + scores["c"]
    assert total.tokens == 9 + 29
    assert scores["c"] == Score()
    assert math.isnan(Score().perplexity)


def test_pair_of_equal_runners(table: np.ndarray, tokens: np.ndarray) -> None:
    pair = perplexity_pair(FakeRunner(table), FakeRunner(table, context_length=11), [text(tokens)])
    assert pair.perplexity_change == 0
    assert pair.kl_mean == pytest.approx(0, abs=1e-12)
    assert pair.top1_agreement == 1


def test_pair_of_different_runners(table: np.ndarray, tokens: np.ndarray) -> None:
    pair = perplexity_pair(FakeRunner(table), FakeRunner(-table), [text(tokens)])
    assert pair.score.nats == pytest.approx(expected_nats(table, tokens))
    assert pair.against.nats == pytest.approx(expected_nats(-table, tokens))
    assert 0 < pair.kl_mean <= pair.kl_p99
    assert pair.top1_agreement == 0


def test_logits_that_are_not_finite(table: np.ndarray, tokens: np.ndarray) -> None:
    table[3, 2] = np.nan
    with pytest.raises(ToleranceExceededError, match="computes NaN or infinity"):
        perplexity(FakeRunner(table), [text(tokens)])


def test_nothing_to_score(table: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="nothing to score"):
        perplexity(FakeRunner(table), [text(np.array([1]))])


@pytest.mark.parametrize("window", [1, 65])
def test_windows_that_do_not_fit(table: np.ndarray, tokens: np.ndarray, window: int) -> None:
    with pytest.raises(ConfigError, match="expected 2 to 64"):
        perplexity(FakeRunner(table), [text(tokens)], window=window)


def test_vocabularies_must_be_equal(table: np.ndarray, tokens: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="vocabularies of 8 and 4"):
        perplexity_pair(FakeRunner(table), FakeRunner(table[:4, :4]), [text(tokens)])


def test_comparison_of_equal_runners(table: np.ndarray, tokens: np.ndarray) -> None:
    left, right = FakeRunner(table), FakeRunner(table)
    result = compare_runners(require_probe(left), require_probe(right), tokens)
    assert result.passed
    assert left.fed == right.fed == [tokens.tolist()]
    found = {(row.kind, row.name) for row in result.rows}
    assert ("hidden", "final") in found
    assert ("state", "recurrent_state.0") in found
    assert ("logits", "decode KL p99") in found
    result.check()


@pytest.mark.parametrize(
    ("shift", "kind"),
    [
        ({"hidden.0": 1e-2}, "hidden"),
        ({"hidden.final": np.nan}, "hidden"),
        ({"expert_ids.0": 1}, "experts"),
        ({"logits": np.inf}, "logits"),
    ],
)
def test_comparison_finds_differences(
    table: np.ndarray, tokens: np.ndarray, shift: dict[str, float], kind: str
) -> None:
    result = compare_runners(FakeRunner(table, shift=shift), FakeRunner(table), tokens)
    assert {row.kind for row in result.failures} == {kind}
    assert result.to_dict()["passed"] is False
    with pytest.raises(ToleranceExceededError, match=f"first {kind}"):
        result.check()


def test_comparison_refuses(table: np.ndarray, tokens: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="expected 2 to 64"):
        compare_runners(FakeRunner(table), FakeRunner(table), tokens[:1])
    with pytest.raises(ConfigError, match="vocabularies"):
        compare_runners(FakeRunner(table), FakeRunner(table[:4, :4]), tokens)

    class Blind(FakeRunner):
        probe = None  # type: ignore[assignment]

    with pytest.raises(BackendUnavailableError, match="cannot show"):
        require_probe(Blind(table))


def test_rows_as_json() -> None:
    row = Row.judge("hidden", "0", math.nan, TOLERANCES["hidden_fp32"], "why")
    assert row.to_dict()["value"] is None
    assert row.passed is False
    shown = Row.show("logits", "x", 1.0, "y")
    assert shown.passed is None
    assert Comparison(found="a", expected="b", tokens=2, rows=(shown,)).passed


def test_speed(table: np.ndarray) -> None:
    config = BenchConfig(batch=(1, 2), prefill=(4, 8), context=(5, 6), decode=3, repeat=2)
    runner = FakeRunner(table)
    speed = measure(runner, config)
    assert set(speed.first_token_ms) == {4, 8}
    assert {context: set(found) for context, found in speed.decode_tokens_per_s.items()} == {
        5: {1, 2},
        6: {1, 2},
    }
    assert len(runner.fed) == 3 * (2 + 2 * 2)
    with pytest.raises(ConfigError, match="the context holds 64"):
        measure(runner, BenchConfig(prefill=(65,)))
    with pytest.raises(ConfigError, match="positive"):
        measure(runner, BenchConfig(decode=0))


def test_no_speed_for_wrong_results(table: np.ndarray) -> None:
    assert check_agreement([FakeRunner(table, context_length=200)] * 2) == 32
    runners = [FakeRunner(table, context_length=200), FakeRunner(-table, context_length=200)]
    with pytest.raises(ToleranceExceededError, match="disagree at greedy token 0"):
        check_agreement(runners)
