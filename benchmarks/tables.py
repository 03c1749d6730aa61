"""Tables in docs/ that a benchmark writes: everything between two markers is replaced."""

import fcntl
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def merged(
    old: str, lead: str, header: Sequence[str], rows: Iterable[Sequence[object]], *, key: int
) -> str:
    """Return a text and a table below it, with those rows of an older one that have no successor.

    Where rows of both are there, the texts say by the rows' first cells which ones they are about.

    Args:
        old: text and table that are to be replaced; rows of a table with another header are lost.
        lead: the text.
        header: of the table.
        rows: its new rows.
        key: an older row with the same first `key` cells as a new one is replaced by it; 0 for a
            table that is always measured as a whole.
    """
    new = [[str(cell) for cell in row] for row in rows]
    text, _, table = old.partition(markdown(header, ()))
    lines = [line for line in table.splitlines() if key and line.startswith("|")]
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    measured = {tuple(row[:key]) for row in new}
    kept = [row for row in found if tuple(row[:key]) not in measured]
    order = list(dict.fromkeys(row[0] for row in (*found, *new)))
    sheet = markdown(header, sorted((*kept, *new), key=lambda row: order.index(row[0])))
    leads = _older_leads(text, dict.fromkeys(row[0] for row in kept)) if kept else []
    if kept and lead:
        leads.insert(0, _labelled(dict.fromkeys(row[0] for row in new), lead))
    elif lead:
        leads = [lead]
    return "\n\n".join((*leads, sheet))


def _older_leads(text: str, kept: Iterable[str]) -> list[str]:
    """Return the paragraphs of a text that are about rows which are kept, and say so."""
    leads = []
    for paragraph in filter(None, text.strip().split("\n\n")):
        label = re.fullmatch(r"Rows of ((?:`[^`]*`(?:, )?)+): (.*)", paragraph, re.DOTALL)
        about = re.findall("`([^`]*)`", label[1]) if label else kept
        names = [name for name in kept if name in about]
        if names:
            leads.append(_labelled(names, label[2] if label else paragraph))
    return leads


def _labelled(names: Iterable[str], lead: str) -> str:
    return f"Rows of {', '.join(f'`{name}`' for name in names)}: {lead}"


def read(page: str, name: str) -> str:
    """Return what is between the markers of `name` in docs/`page`, "" without markers."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, _, rest = text.partition(f"<!-- begin {name} -->\n")
    return rest.partition(f"\n<!-- end {name} -->")[0]


def replace(page: str, name: str, content: str) -> None:
    """Put `content` between the markers of `name` in docs/`page`; several processes may do so."""
    path = DOCS / page
    begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        head, _, rest = file.read().partition(begin)
        _, _, tail = rest.partition(end)
        if not rest or not tail:
            raise SystemExit(f"{path} has no markers of {name}")
        file.seek(0)
        file.write(head + begin + content + end + tail)
        file.truncate()
