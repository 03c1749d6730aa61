import math

import pytest

from ringexport.compare.gate import Gate, check_gate
from ringexport.compare.perplexity import PairScore, Score
from ringexport.errors import ConfigError


def pair(ppl: float = 0.0, kl: float = 0.0, top1: float = 1.0) -> PairScore:
    against = Score(nats=2.0 * 100, tokens=100, num_bytes=300)
    score = Score(nats=against.nats + 100 * math.log1p(ppl), tokens=100, num_bytes=300)
    return PairScore(score=score, against=against, kl_mean=kl, kl_p99=kl, top1_agreement=top1)


def test_a_gate_is_read_and_written() -> None:
    gate = Gate.parse("ppl=0.5%,kl=0.005,top1=97%")
    assert gate == Gate(ppl=0.005, kl=0.005, top1=0.97)
    assert str(gate) == "ppl=0.5%,kl=0.005,top1=97%"
    assert Gate.parse(" top1 = 0.9 , ppl=.01") == Gate(ppl=0.01, top1=0.9)
    assert Gate.parse(str(Gate(kl=1e-5))) == Gate(kl=1e-5)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "''", "ppl=0.5%"),
        ("pp=1%", "'pp'", "'ppl'"),
        ("top-1=97%", "'top-1'", "'top1'"),
        ("kld=1", "'kld'", "'kl'"),
        ("ppl=1%,", "''", "ppl=0.5%"),
        ("ppl", "no value for ppl", "ppl=0.5%"),
        ("ppl=1%,ppl=2%", "more than once", None),
        ("ppl=-1%", "'-1%'", "ppl=0.5%"),
        ("ppl=nan", "'nan'", "ppl=0.5%"),
        ("ppl=1e3", "'1e3'", "ppl=0.5%"),
        ("kl=5%", "number of nats", "ppl=0.5%"),
        ("top1=97", "at most 1 or 100%", "top1=97%"),
        ("top1=101%", "at most 1 or 100%", "top1="),
        ("kl=" + "9" * 400, "expected a number of nats", "ppl=0.5%"),
    ],
)
def test_a_bad_gate_is_refused(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        Gate.parse(text)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_the_verdict_names_every_limit_that_is_missed() -> None:
    gate = Gate.parse("ppl=0.5%,kl=0.005,top1=97%")
    assert check_gate(gate, pair(0.004, 0.005, 0.97)).passed
    assert check_gate(gate, pair(-0.2, 0.0, 1.0)).passed
    verdict = check_gate(gate, pair(0.01, 0.02, 0.96))
    assert [failure.split(" ")[0] for failure in verdict.failures] == ["perplexity", "KL", "top-1"]
    assert verdict.excess == pytest.approx(4)
    assert "0.02 is above 0.005" in verdict.failures[1]
    assert "96% is below 97%" in verdict.failures[2]
    only = check_gate(Gate(top1=0.97), pair(0.5, 0.5, 0.94))
    assert len(only.failures) == 1
    assert only.excess == pytest.approx(2)


def test_what_is_no_number_passes_no_gate() -> None:
    verdict = check_gate(Gate(kl=0.1), pair(kl=math.nan))
    assert not verdict.passed
    assert verdict.excess == math.inf
    assert check_gate(Gate(kl=0.0), pair(kl=0.1)).excess == math.inf
    assert check_gate(Gate(), pair(kl=math.nan)).passed
