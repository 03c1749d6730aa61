"""The page of `ringexport eval --report`: one HTML file that needs nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ringexport.compare.perplexity import PairScore
from ringexport.compare.quality import DriftPoint, LayerQuality, LongContext
from ringexport.compare.svg import (
    Bar,
    Line,
    RangeRow,
    bar_chart,
    heat_map,
    line_chart,
    range_chart,
)

__all__ = ["ModuleRange", "ReportPage", "render"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6676; --line: #dfe4ea; --paper: #fff;
  --card: #f7f9fb; --a: #2f6fde; --b: #d9822b; --bad: #d33f49; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #333c48;
  --paper: #14181d; --card: #1b2027; --a: #6ea1ff; --b: #f0a050; --bad: #ff6b74; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 860px; padding: 32px 24px 64px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0 10px; color: var(--soft); } code { font-size: 13px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
svg { width: 100%; height: auto; display: block; margin: 8px 0; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.tick { fill: var(--soft); font-size: 11px; } .title { fill: var(--soft); font-size: 12px; }
.a, .cell { fill: var(--a); } .b { fill: var(--b); } .blind { fill: var(--bad); }
.line { fill: none; stroke-width: 2; } .line.a { stroke: var(--a); fill: none; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 6px 0 14px;
  vertical-align: -1px; } .key:first-child { margin-left: 0; }
.key.a { background: var(--a); } .key.b { background: var(--b); }
.key.blind { background: var(--bad); }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRange:
    """Largest magnitudes of one module in all layers.

    Attributes:
        name: without layer and expert.
        weights: one per layer and expert.
        inputs: likewise, as calibration saw them; empty without stats.
    """

    name: str
    weights: Sequence[float]
    inputs: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """What the page shows; empty parts are left out.

    Attributes:
        model, reference: what was compared.
        texts: names of the texts.
        pair: scores.
        layers: per layer.
        drift: over decode steps.
        longest: at the end of the context, None if it was not measured.
        coverage: layer -> tokens that each expert saw in calibration.
        ranges: of weights and inputs.
        conditions: of the measurement, by name.
    """

    model: str
    reference: str
    texts: Sequence[str]
    pair: PairScore
    layers: Sequence[LayerQuality] = ()
    drift: Sequence[DriftPoint] = ()
    longest: LongContext | None = None
    coverage: Mapping[int, Sequence[float]]
    ranges: Sequence[ModuleRange] = ()
    conditions: Mapping[str, str]


def render(page: ReportPage) -> str:
    """Return the page as HTML; it loads nothing and runs no script."""
    sections = [
        _summary(page),
        _layers(page.layers),
        _experts(page.layers),
        _drift(page.drift, page.longest),
        _coverage(page.coverage),
        _ranges(page.ranges),
    ]
    conditions = " · ".join(f"{escape(k)} {escape(v)}" for k, v in page.conditions.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quality of {escape(page.model)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}<footer>{conditions}</footer></body></html>\n"
    )


def _summary(page: ReportPage) -> str:
    pair = page.pair
    tiles = [
        (f"{100 * pair.perplexity_change:+.2f} %", "perplexity"),
        (f"{pair.kl_mean:.4f}", "mean KL, nats per token"),
        (f"{pair.kl_p99:.4f}", "99th percentile of KL"),
        (f"{100 * pair.top1_agreement:.2f} %", "same best token"),
    ]
    rows = []
    for name, score in ((page.model, pair.score), (page.reference, pair.against)):
        cells = (
            f"{score.tokens:,}",
            f"{score.perplexity:.4f}",
            f"{score.bits_per_byte:.4f}",
        )
        rows.append(f"<tr><td><code>{escape(name)}</code></td>{_cells(cells)}</tr>")
    texts = ", ".join(f"<code>{escape(text)}</code>" for text in page.texts)
    shown = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    return (
        f"<h1>Quality of <code>{escape(page.model)}</code></h1>"
        f"<p>against <code>{escape(page.reference)}</code>, teacher-forced on {texts}</p>"
        f'<div class="tiles">{shown}</div>'
        "<table><tr><th>model</th><th>tokens</th><th>perplexity</th><th>bits per byte</th></tr>"
        f"{''.join(rows)}</table>"
    )


def _layers(layers: Sequence[LayerQuality]) -> str:
    if not layers:
        return ""
    bars = [
        Bar(
            label=str(row.layer),
            value=row.hidden_error if math.isfinite(row.hidden_error) else 0.0,
            style="a" if row.kind == "linear" else "b",
            title=f"layer {row.layer}, {row.kind}: {row.hidden_error:.4g}",
        )
        for row in layers
    ]
    keys = _keys((("a", "linear attention"), ("b", "softmax attention")))
    chart = bar_chart(bars, y_title="relative error", x_title="layer")
    return _section("Error of the residual stream after each layer", keys, chart)


def _experts(layers: Sequence[LayerQuality]) -> str:
    bars = [
        Bar(
            label=str(row.layer),
            value=100 * (1 - row.expert_agreement),
            style="a" if row.kind == "linear" else "b",
            title=f"layer {row.layer}: {100 * row.expert_agreement:.2f} % the same",
        )
        for row in layers
        if row.expert_agreement is not None
    ]
    if not bars:
        return ""
    chart = bar_chart(bars, y_title="% chosen differently", x_title="layer")
    return _section("Experts that the reference would not have chosen", "", chart)


def _drift(points: Sequence[DriftPoint], longest: LongContext | None) -> str:
    if not points:
        return ""
    measured = Line(points=[(p.steps, p.state_error) for p in points], style="a")
    text = "<p>Both models decode the same tokens; compared every 64 steps.</p>"
    if longest is not None:
        text += (
            f"<p>At the end of the longest context, {longest.tokens:,} tokens: state error "
            f"{longest.state_error:.4g}, mean KL {longest.kl_mean:.4g}, same best token "
            f"{100 * longest.top1_agreement:.2f} % (last {longest.scored} tokens).</p>"
        )
    chart = line_chart([measured], y_title="relative error", x_title="decode steps")
    loss = Line(points=[(p.steps, p.kl_mean) for p in points], style="a")
    second = line_chart([loss], y_title="mean KL per 64 steps", x_title="decode steps")
    return _section("Drift of the recurrent states", text, chart + second)


def _coverage(coverage: Mapping[int, Sequence[float]]) -> str:
    if not coverage:
        return ""
    rows = [(f"layer {layer}", values) for layer, values in sorted(coverage.items())]
    blind = sum(value == 0 for _, values in rows for value in values)
    least = min(value for _, values in rows for value in values)
    keys = _keys((("a", "tokens, stronger is more (log scale)"), ("blind", "none")))
    chart = heat_map(rows, x_title="expert", describe=lambda value: f"{value:,.0f} tokens")
    text = f"<p>Experts without a token: {blind}. Tokens of the least used one: {least:,.0f}.</p>"
    return _section("Experts that calibration covered", keys + text, chart)


def _ranges(ranges: Sequence[ModuleRange]) -> str:
    if not ranges:
        return ""
    rows = [RangeRow(label=one.name, ranges={"a": one.weights, "b": one.inputs}) for one in ranges]
    named = (("a", "weights"), ("b", "inputs in calibration"))
    keys = _keys(named if any(one.inputs for one in ranges) else named[:1])
    chart = range_chart(rows, x_title="largest magnitude, one dot per layer and expert")
    return _section("Ranges of weights and inputs", keys, chart)


def _section(title: str, text: str, chart: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{text}{chart}</section>"


def _keys(entries: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<i class="key {style}"></i>{escape(text)}' for style, text in entries)
    return f"<p>{keys}</p>"


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)
