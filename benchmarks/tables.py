"""Tables in docs/ that a benchmark writes: everything between two markers is replaced."""

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def replace(page: str, name: str, content: str) -> None:
    """Put `content` between the markers of `name` in docs/`page`."""
    path = DOCS / page
    begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    if not rest or not tail:
        raise SystemExit(f"{path} has no markers of {name}")
    path.write_text(head + begin + content + end + tail, encoding="utf-8")
