"""``ringexport eval``: perplexity, and what quantization costs, on text files."""

from contextlib import ExitStack
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import (
    App,
    backend_option,
    bad_value,
    command_options,
    json_option,
    pass_app,
    verify_option,
)
from ringexport.errors import ConfigError
from ringexport.pipeline.request import DECAY_INDICES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringexport.cli.console import Terminal
    from ringexport.compare.perplexity import Score
    from ringexport.pipeline.quality import Quality

__all__ = ["command"]


@click.command("eval")
@click.argument("model", type=click.Path(path_type=Path), metavar="BUNDLE|CHECKPOINT")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text to score; may be given several times.",
)
@click.option(
    "--against",
    metavar="BUNDLE|CHECKPOINT",
    type=click.Path(path_type=Path),
    help="Score a second model on the same tokens and compare.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Cut longer texts into windows of so many tokens; default: the context length.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    metavar="TOKENS",
    help="Score only so many tokens of each text.",
)
@click.option(
    "--decay-index",
    type=click.Choice(DECAY_INDICES),
    help="Form of the decay of a CHECKPOINT; default: serving. A bundle has its own.",
)
@click.option(
    "--report",
    metavar="OUT.html",
    type=click.Path(path_type=Path),
    help="With --against: also measure how states drift over 4,096 decode steps and at the longest "
    "context, and write a page with plots.",
)
@click.option(
    "--stats",
    "stats_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Calibration stats, for expert coverage and ranges of inputs in the report.",
)
@backend_option
@verify_option
@json_option
@command_options
@pass_app
def command(
    app: App,
    /,
    *,
    model: Path,
    texts: tuple[Path, ...],
    against: Path | None,
    window: int | None,
    max_tokens: int | None,
    decay_index: str | None,
    report: Path | None,
    stats_path: Path | None,
    backend: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Measure how well a BUNDLE or CHECKPOINT predicts text files, teacher-forced.

    The state is carried through each file. Perplexity is per token; bits per byte can be compared
    across tokenizers. With --against, both models see the same tokens. A quantized CHECKPOINT runs
    with inputs, caches and states rounded as its config says.
    """
    from ringexport.cli.opening import open_engine, texts_from_files
    from ringexport.compare.perplexity import perplexity

    if against is None and report is not None:
        raise ConfigError("--report needs --against", hint="name the unquantized model with it")
    if stats_path is not None and report is None:
        raise ConfigError("--stats needs --report", hint="name the page that shows them with it")
    if report is not None:
        from ringexport.pipeline.quality import check_report

        stats = check_report(report, stats_path)
    terminal = app.terminal
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        opened = stack.enter_context(
            open_engine(
                app,
                model,
                progress,
                backend=app.backend(backend),
                decay_index=decay_index,
                verify=verify,
            )
        )
        limit = opened.runner.spec.context_length
        if window is not None and window > limit:
            raise bad_value("--window", f"{window} is more than the context, expected 2 to {limit}")
        files = texts_from_files(opened.tokenizer, texts, max_tokens)
        if against is None:
            scores = perplexity(opened.runner, files, window=window, progress=progress)
        else:
            from ringexport.pipeline.quality import measure_quality, write_report

            other = stack.enter_context(open_engine(app, against, progress, verify=verify))
            pair = opened.runner, other.runner
            quality = measure_quality(
                *pair, files, window=window, deep=report is not None, progress=progress
            )
            if report is not None:
                write_report(
                    report, quality, (model, against), texts, stats=stats, progress=progress
                )
    if against is not None:
        _show_quality(app, terminal, (str(model), str(against)), quality, as_json)
        if report is not None:
            terminal.say(f"wrote {report}")
    else:
        _show_scores(app, terminal, str(model), scores, as_json)


def _show_scores(
    app: App, terminal: "Terminal", name: str, scores: "Mapping[str, Score]", as_json: bool
) -> None:
    total = reduce(add, scores.values())
    if as_json:
        files = {file: score.to_dict() for file, score in scores.items()}
        app.write_json({"model": name, "total": total.to_dict(), "files": files})
        return
    rows = [_score_row(file, score) for file, score in scores.items()]
    if len(rows) > 1:
        rows.append(_score_row("all", total))
    terminal.table(
        ("text", "tokens", "bytes", "perplexity", "bits per byte"), rows, right=(1, 2, 3, 4)
    )


def _show_quality(
    app: App, terminal: "Terminal", names: tuple[str, str], quality: "Quality", as_json: bool
) -> None:
    if as_json:
        app.write_json({"model": names[0], "reference": names[1], **quality.to_dict()})
        return
    pair = quality.pair
    rows = [_score_row(names[0], pair.score), _score_row(names[1], pair.against)]
    terminal.table(
        ("model", "tokens", "bytes", "perplexity", "bits per byte"), rows, right=(1, 2, 3, 4)
    )
    terminal.result("")
    facts = {
        "perplexity change": f"{100 * pair.perplexity_change:+.3f}%",
        "KL mean": f"{pair.kl_mean:.3g} nats per token",
        "KL p99": f"{pair.kl_p99:.3g} nats per token",
        "top-1 agreement": f"{100 * pair.top1_agreement:.2f}%",
    }
    if quality.drift:
        last = quality.drift[-1]
        facts["state error"] = f"{last.state_error:.3g} after {last.steps:,} decode steps"
    if quality.longest is not None:
        longest = quality.longest
        facts["longest context"] = (
            f"{longest.tokens:,} tokens: state error {longest.state_error:.3g},"
            f" KL mean {longest.kl_mean:.3g}"
        )
    terminal.facts(facts)
    if quality.layers:
        terminal.result("")
        terminal.table(
            ("layer", "attention", "residual error", "same experts"),
            [
                (
                    str(row.layer),
                    row.kind,
                    f"{row.hidden_error:.3g}",
                    "" if row.expert_agreement is None else f"{100 * row.expert_agreement:.2f}%",
                )
                for row in quality.layers
            ],
            right=(0, 2, 3),
        )


def _score_row(name: str, score: "Score") -> list[str]:
    return [
        name,
        f"{score.tokens:,}",
        f"{score.num_bytes:,}",
        f"{score.perplexity:.4f}",
        f"{score.bits_per_byte:.4f}",
    ]
