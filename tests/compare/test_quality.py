import math
from html.parser import HTMLParser

import numpy as np
import pytest

from ringexport.compare.html import ModuleRange, ReportPage, render
from ringexport.compare.perplexity import PairScore, Score, Text
from ringexport.compare.quality import (
    DriftPoint,
    LayerQuality,
    LongContext,
    layer_quality,
    long_context,
    state_drift,
)
from ringexport.compare.svg import Bar, Line, RangeRow, bar_chart, heat_map, line_chart, range_chart
from ringexport.errors import ConfigError
from tests.compare.fake import FakeRunner

VOCAB = 8


@pytest.fixture
def table(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((VOCAB, VOCAB))


def test_layers_are_compared_over_all_texts(table: np.ndarray) -> None:
    texts = [Text(name=str(n), tokens=np.arange(n) % VOCAB, num_bytes=9) for n in (12, 30)]
    same = layer_quality(FakeRunner(table), FakeRunner(table), texts)
    assert [(row.layer, row.hidden_error, row.expert_agreement) for row in same] == [(0, 0.0, 1.0)]
    shifted = FakeRunner(table, shift={"hidden.0": 0.5, "expert_ids.0": 4})
    row = layer_quality(shifted, FakeRunner(table), texts, max_tokens=8)[0]
    ids = np.concatenate([np.arange(8), np.arange(8)])
    hidden = np.stack([ids + 1.0, ids * 0.5], axis=-1)
    assert row.hidden_error == pytest.approx(0.5 * math.sqrt(hidden.size) / np.linalg.norm(hidden))
    mine, theirs = ({(i % 4) + s, i % 3 + 4 + s} for i in [5] for s in (4, 0))
    by_hand = np.mean([len({i % 4 + 4, i % 3 + 8} & {i % 4, i % 3 + 4}) / 2 for i in ids.tolist()])
    assert mine != theirs
    assert row.expert_agreement == pytest.approx(by_hand)


def test_experts_in_another_order_agree(table: np.ndarray) -> None:
    class Swapped(FakeRunner):
        def probe(self, *arguments: object) -> dict[str, np.ndarray]:
            probes = super().probe(*arguments)  # type: ignore[arg-type]
            return probes | {"expert_ids.0": probes["expert_ids.0"][..., ::-1]}

    texts = [Text(name="a", tokens=np.arange(6), num_bytes=9)]
    assert layer_quality(Swapped(table), FakeRunner(table), texts)[0].expert_agreement == 1.0


def test_drift_is_taken_every_64_steps(table: np.ndarray) -> None:
    class Drifting(FakeRunner):
        def decode(self, tokens: object, state: object) -> np.ndarray:
            state.total += 1  # type: ignore[attr-defined]
            return super().decode(tokens, state)  # type: ignore[arg-type]

    tokens = np.full(10, 3)
    runner = Drifting(table, context_length=200)
    points = state_drift(runner, FakeRunner(table, context_length=150), tokens)
    assert [point.steps for point in points] == [64, 128]
    assert [point.state_error for point in points] == pytest.approx([1 / 3, 1 / 3])
    assert [point.kl_mean for point in points] == [0.0, 0.0]
    assert len(runner.fed[0]) == 150
    with pytest.raises(ConfigError, match="no tokens"):
        state_drift(runner, runner, np.zeros(0, np.int64))


def test_the_longest_context_is_filled(table: np.ndarray) -> None:
    runner, other = FakeRunner(table, context_length=5000), FakeRunner(table, context_length=4500)
    found = long_context(runner, other, np.arange(7))
    assert found.tokens == 4500
    assert found.scored == 256
    assert (found.kl_mean, found.top1_agreement, found.state_error) == (0.0, 1.0, 0.0)
    assert runner.fed[0] == [i % 7 for i in range(4500)]
    worse = long_context(FakeRunner(-table, context_length=64), other, np.arange(7), scored=999)
    assert worse.scored == 64
    assert worse.kl_mean > 0.1


class Checker(HTMLParser):
    """Collects tags, and refuses what is not closed."""

    EMPTY = frozenset({"meta", "rect", "path", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.EMPTY or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(**changes: object) -> ReportPage:
    score = Score(nats=200.0, tokens=100, num_bytes=300)
    pair = PairScore(score=score, against=score, kl_mean=0.25, kl_p99=0.5, top1_agreement=0.875)
    values: dict[str, object] = {
        "model": "<q>",
        "reference": "plain",
        "texts": ["a&b.txt"],
        "pair": pair,
        "coverage": {1: [0.0, 5.0, 900.0], 2: [7.0, 8.0, 9.0]},
        "conditions": {"cpu": "x"},
        "layers": [
            LayerQuality(layer=0, kind="linear", hidden_error=0.01, expert_agreement=None),
            LayerQuality(layer=1, kind="softmax", hidden_error=0.02, expert_agreement=0.9),
        ],
        "drift": [DriftPoint(steps=s, state_error=0.01, kl_mean=0.1) for s in (64, 128)],
        "longest": LongContext(
            tokens=8192, state_error=0.125, kl_mean=0.1, top1_agreement=0.9, scored=256
        ),
        "ranges": [ModuleRange(name="mlp.down_proj", weights=[0.1, 0.2], inputs=[3.0])],
    }
    return ReportPage(**(values | changes))  # type: ignore[arg-type]


def test_the_report_is_one_page_that_loads_nothing() -> None:
    text = render(page())
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.tags["svg"] == 6
    assert not checker.tags.keys() & {"script", "link", "img", "iframe"}
    assert "http" not in text
    assert "url(" not in text
    assert not [name for name, _ in checker.attributes if name in {"src", "href"}]
    assert "nan" not in text.lower()
    blind = "Experts without a token: 1."
    for shown in ("<q>", "a&b.txt", "0.2500", "87.50 %", "8,192 tokens", blind):
        assert shown in checker.text
    assert "<q>" not in text


def test_parts_without_data_are_left_out() -> None:
    text = render(page(layers=(), drift=(), longest=None, coverage={}, ranges=()))
    assert "<svg" not in text
    assert "0.2500" in text


def test_charts_survive_odd_data() -> None:
    charts = [
        bar_chart([], y_title="y", x_title="x"),
        bar_chart([Bar(label="0", value=0.0, style="a", title="t")], y_title="y", x_title="x"),
        line_chart([], y_title="y", x_title="x"),
        line_chart([Line(points=[(0, 0.0)], style="a")], y_title="y", x_title="x"),
        heat_map([], x_title="x", describe=str),
        heat_map([("row", [0.0])], x_title="x", describe=str),
        range_chart([RangeRow(label="r", ranges={"a": [0.0], "b": []})], x_title="x"),
    ]
    for chart in charts:
        assert chart.startswith("<svg")
        assert chart.endswith("</svg>")
        assert "nan" not in chart
        assert "inf" not in chart
    assert 'class="blind"' in charts[5]
