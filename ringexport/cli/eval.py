"""``ringexport eval``: perplexity and bits per byte on text files."""

from contextlib import ExitStack
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App, backend_option, command_options, json_option, pass_app
from ringexport.pipeline.request import DECAY_INDICES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringexport.cli.console import Terminal
    from ringexport.compare.perplexity import PairScore, Score

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
@backend_option
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
    backend: str | None,
    as_json: bool,
) -> None:
    """Measure how well a BUNDLE or CHECKPOINT predicts text files, teacher-forced.

    The state is carried through each file. Perplexity is per token; bits per byte can be compared
    across tokenizers. With --against, both models see the same tokens.
    """
    from ringexport.cli.opening import open_engine, texts_from_files
    from ringexport.compare.perplexity import perplexity, perplexity_pair

    terminal = app.terminal
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        opened = stack.enter_context(
            open_engine(app, model, progress, backend=app.backend(backend), decay_index=decay_index)
        )
        files = texts_from_files(opened.tokenizer, texts, max_tokens)
        if against is None:
            scores = perplexity(opened.runner, files, window=window, progress=progress)
            pair = None
        else:
            other = stack.enter_context(open_engine(app, against, progress))
            scores = {}
            pair = perplexity_pair(
                opened.runner, other.runner, files, window=window, progress=progress
            )
    if pair is not None:
        _show_pair(app, terminal, (str(model), str(against)), pair, as_json)
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


def _show_pair(
    app: App, terminal: "Terminal", names: tuple[str, str], pair: "PairScore", as_json: bool
) -> None:
    if as_json:
        app.write_json({"model": names[0], "reference": names[1], **pair.to_dict()})
        return
    rows = [_score_row(names[0], pair.score), _score_row(names[1], pair.against)]
    terminal.table(
        ("model", "tokens", "bytes", "perplexity", "bits per byte"), rows, right=(1, 2, 3, 4)
    )
    terminal.result("")
    terminal.facts(
        {
            "perplexity change": f"{100 * pair.perplexity_change:+.3f}%",
            "KL mean": f"{pair.kl_mean:.3g} nats per token",
            "KL p99": f"{pair.kl_p99:.3g} nats per token",
            "top-1 agreement": f"{100 * pair.top1_agreement:.2f}%",
        }
    )


def _score_row(name: str, score: "Score") -> list[str]:
    return [
        name,
        f"{score.tokens:,}",
        f"{score.num_bytes:,}",
        f"{score.perplexity:.4f}",
        f"{score.bits_per_byte:.4f}",
    ]
