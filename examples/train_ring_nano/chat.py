"""Chat-formatted training text made from real text: docstrings, functions, dictionary entries.

Questions are fixed phrasings around a name; answers (and the reasoning, where there is one) are
the words of the source. Rendered with the shipped chat template.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from random import Random

from collect import Source, members
from jinja2.sandbox import ImmutableSandboxedEnvironment
from readers import unpack, wordnet_entries

Message = dict[str, str]
HERE = Path(__file__).parent
ASK_CODE = (
    "Write a Python function named {name}. {doc}",
    "Please implement `{name}` in Python: {doc}",
    "I need a Python function `{name}` with this purpose: {doc}",
)
ASK_DOC = ("What does this function do?\n\n{code}", "Write a one-line docstring for:\n\n{code}")
ASK_WORD = (
    'What does the {kind} "{word}" mean?',
    "Define {word} ({kind}).",
    "What is the meaning of {word}?",
    "Explain the word {word}.",
)
ASK_TERM = ("What is {term}?", "Explain the term {term}.", "Tell me about {term}.")


def renderer() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


def render(messages: list[Message], thinking: bool) -> str:
    template = renderer().from_string((HERE / "chat_template.jinja").read_text())
    return template.render(
        messages=messages, enable_thinking=thinking, tools=None, add_generation_prompt=False
    )


def from_code(text: str, rng: Random) -> Iterator[tuple[list[Message], bool]]:
    """One conversation for each short, documented function of a Python file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith(("test", "__")):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(node.body) < 2 or (node.end_lineno or 0) - node.lineno > 45:
            continue
        summary, _, details = doc.partition("\n\n")
        summary = " ".join(summary.split())
        if not 20 < len(summary) < 200:
            continue
        lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
        first = node.body[0]
        bare = (
            lines[: first.lineno - node.lineno] + lines[(first.end_lineno or 0) - node.lineno + 1 :]
        )
        code = "```python\n" + textwrap.dedent("\n".join(bare)) + "\n```"
        if rng.random() < 0.35:
            yield [_user(rng.choice(ASK_DOC).format(code=code)), _answer(summary)], False
        else:
            ask = rng.choice(ASK_CODE).format(name=node.name, doc=summary)
            think = bool(details.strip()) and len(details) < 600 and rng.random() < 0.5
            yield [_user(ask), _answer(code, details.strip() if think else "")], think


def from_wordnet(data: bytes, rng: Random) -> Iterator[tuple[list[Message], bool]]:
    for words, kind, gloss in wordnet_entries(data):
        word = rng.choice(words)
        parts = [p.strip() for p in gloss.split("; ")]
        answer = parts[0][:1].upper() + parts[0][1:] + "."
        examples = [p for p in parts[1:] if p.startswith('"')]
        others = [w for w in words if w != word]
        think = f"{word} is a {kind}." + (f" Synonyms: {', '.join(others)}." if others else "")
        if examples:
            answer += f" For example: {examples[0]}"
        thinking = rng.random() < 0.4
        ask = rng.choice(ASK_WORD).format(word=word, kind=kind)
        yield [_user(ask), _answer(answer, think if thinking else "")], thinking


def from_dictionary(text: str, rng: Random) -> Iterator[tuple[list[Message], bool]]:
    for entry in re.split(r"\n\n(?=\S)", text):
        term, _, body = entry.partition("\n")
        body = re.sub(r"^<[^>]*>\s*", "", textwrap.dedent(body).strip())
        body = " ".join(re.sub(r"\(\d{4}-\d\d-\d\d\)", "", body.split("\n\n")[0]).split())
        if 60 < len(body) < 900 and len(term) < 40:
            yield [_user(rng.choice(ASK_TERM).format(term=term.strip())), _answer(body)], False


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answer(text: str, reasoning: str = "") -> Message:
    message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def conversations(text_folder: Path, cache: Path, limit: int) -> list[str]:
    """All conversations, some of two or three turns, rendered and shuffled."""
    rng = Random(11)
    code: list[tuple[list[Message], bool]] = []
    words: list[tuple[list[Message], bool]] = []
    terms: list[tuple[list[Message], bool]] = []
    for source in (text_folder / "train-code.txt").read_text().split("\x1e"):
        code.extend(from_code(source, rng))
    rng.shuffle(code)
    labels = json.loads((text_folder / "train-english.labels.json").read_text())
    english = (text_folder / "train-english.txt").read_text().split("\x1e")
    for label, source in zip(labels, english, strict=True):
        if label.startswith("dict-foldoc"):
            terms.extend(from_dictionary(source, rng))
    words.extend(from_wordnet(_wordnet(cache, "data.noun"), rng))
    words.extend(from_wordnet(_wordnet(cache, "data.verb"), rng))
    rng.shuffle(words)
    pool = [*code[: limit // 2], *words[: limit // 3], *terms[: limit // 6]]
    rng.shuffle(pool)
    template = renderer().from_string((HERE / "chat_template.jinja").read_text())
    texts: list[str] = []
    while pool:
        turns = 1 if rng.random() < 0.7 else rng.randint(2, 3)
        picked = [pool.pop() for _ in range(min(turns, len(pool)))]
        thinking = picked[-1][1]
        messages = [message for part, _ in picked for message in part]
        texts.append(
            template.render(
                messages=messages, enable_thinking=thinking, tools=None, add_generation_prompt=False
            )
        )
    return texts


def _wordnet(cache: Path, name: str) -> bytes:
    """One data file of the wordnet-base package."""
    source = Source("deb", "wordnet-base", "", "", "wordnet", [f"*/{name}"])
    archive = next((cache / "deb").glob("wordnet-base_*"))
    return b"".join(unpack(name, data) for _, data in members(source, archive))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("build/text"))
    parser.add_argument("--cache", type=Path, default=Path("build/cache"))
    parser.add_argument("--out", type=Path, default=Path("build/text/train-chat.txt"))
    parser.add_argument("--limit", type=int, default=60_000)
    args = parser.parse_args()
    texts = conversations(args.text, args.cache, args.limit)
    args.out.write_text("\x1e".join(texts))
    print(f"{len(texts)} conversations, {sum(map(len, texts)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
