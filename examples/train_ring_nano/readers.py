"""Readers: each turns the bytes of one file into clean documents of plain text."""

from __future__ import annotations

import gzip
import html
import re
import zlib
from collections.abc import Callable, Iterator

Reader = Callable[[bytes], Iterator[str]]

_DROP = re.compile(r"(?is)<(script|style|head|nav|svg)\b.*?</\1\s*>|<!--.*?-->")
_BREAK = re.compile(
    r"(?i)</?(p|div|h[1-6]|li|tr|ul|ol|dl|dt|dd|table|pre|br|title|section)\b[^>]*>"
)
_TAG = re.compile(r"<[^>]*>")
_WEBSTER_MARK = re.compile(r"\s*\[(1913 Webster|PJC|WordNet 1\.5|Webster 1913 Suppl\.)[^\]]*\]")
_NO_DIGITS = str.maketrans("", "", "0123456789")
_ROFF_FONT = re.compile(r"\\f(\(..|\[[^\]]*\]|.)|\\s[-+]?\d")
_ROFF_CHAR = {
    r"\-": "-",
    r"\(aq": "'",
    r"\(dq": '"',
    r"\(bu": "*",
    r"\e": "\\",
    r"\&": "",
    r"\ ": " ",
}


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    """Uniform line ends, no trailing blanks, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def read_plain(data: bytes) -> Iterator[str]:
    yield tidy(_decode(data))


def read_html(data: bytes) -> Iterator[str]:
    """Text of a page: markup dropped, block elements become line breaks."""
    text = _BREAK.sub("\n", _DROP.sub(" ", _decode(data)))
    text = html.unescape(_TAG.sub("", text))
    lines = [line.rstrip() for line in text.split("\n")]
    kept = [line for line in lines if line.strip() not in {"¶", "Prev", "Next", "Home", "Up"}]
    yield tidy(re.sub(r"\n\s*\n\s*\n+", "\n\n", "\n".join(kept)))


def read_man(data: bytes) -> Iterator[str]:
    """A manual page from its roff source; good enough for the man macros."""
    out: list[str] = []
    for line in _decode(data).split("\n"):
        if line.startswith(('.\\"', "'\\\"", ".so ")):
            continue
        request, _, rest = line.partition(" ")
        if request in {".SH", ".SS", ".TH"}:
            out.append("\n" + rest.strip('"').replace('"', "") + "\n")
        elif request in {".PP", ".P", ".LP", ".TP", ".IP", ".HP"}:
            out.append("\n" + (rest.split('"')[1] if rest.count('"') > 1 else "") + "\n")
        elif request in {".B", ".I", ".BR", ".IR", ".BI", ".IB", ".RB", ".RI", ".SM"}:
            words = re.findall(r'"([^"]*)"|(\S+)', rest)
            out.append(("" if len(request) == 3 else " ").join(a or b for a, b in words) + "\n")
        elif not line.startswith("."):
            out.append(line + "\n")
    text = _ROFF_FONT.sub("", "".join(out))
    for code, char in _ROFF_CHAR.items():
        text = text.replace(code, char)
    yield tidy(text)


def read_dictionary(data: bytes) -> Iterator[str]:
    """A dictd dictionary, in documents of about 8,000 characters of whole entries."""
    text = _WEBSTER_MARK.sub("", _decode(data))
    text = tidy(re.sub(r"[{}]", "", text))
    entries = re.split(r"\n\n(?=\S)", text)
    batch: list[str] = []
    for entry in entries[4:]:
        batch.append(entry)
        if sum(map(len, batch)) > 8000:
            yield "\n\n".join(batch) + "\n"
            batch = []
    if batch:
        yield "\n\n".join(batch) + "\n"


def wordnet_entries(data: bytes) -> Iterator[tuple[list[str], str, str]]:
    """(words, part of speech, gloss with examples) of each synset."""
    kinds = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    for line in _decode(data).split("\n"):
        head, bar, gloss = line.partition(" | ")
        fields = head.split(" ")
        if not bar or len(fields) < 6 or fields[2] not in kinds:
            continue
        count = int(fields[3], 16)
        words = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
        yield words, kinds[fields[2]], gloss.strip()


def read_wordnet(data: bytes) -> Iterator[str]:
    batch: list[str] = []
    for words, kind, gloss in wordnet_entries(data):
        batch.append(f"{', '.join(words)} ({kind}): {gloss}\n")
        if len(batch) == 60:
            yield "".join(batch)
            batch = []
    if batch:
        yield "".join(batch)


def read_fortune(data: bytes) -> Iterator[str]:
    entries = [e.strip("\n") for e in re.split(r"(?m)^%$", _decode(data))]
    for start in range(0, len(entries), 20):
        yield tidy("\n\n".join(entries[start : start + 20]))


def read_ztext(data: bytes) -> Iterator[str]:
    """A SWORD module: zlib streams, one per book, of OSIS markup."""
    while (start := data.find(b"\x78")) >= 0:
        stream = zlib.decompressobj()
        try:
            markup = _decode(stream.decompress(data[start:]))
            data = stream.unused_data
        except zlib.error:
            data = data[start + 1 :]
            continue
        markup = re.sub(r"(?s)<note\b.*?</note>", "", markup)
        markup = re.sub(r"<(verse|/p|chapter|title|/title|lb)[^>]*>", "\n", markup)
        yield tidy(re.sub(r"\n\s*\n+", "\n", html.unescape(_TAG.sub("", markup))))


def read_rdata(data: bytes) -> Iterator[str]:
    """Character vectors of an R lazy-load database: one document per object."""
    position = 0
    while position < len(data):
        try:
            stream = zlib.decompressobj()
            raw = stream.decompress(data[position + 4 :])
        except zlib.error:
            return
        position = len(data) - len(stream.unused_data)
        lines: list[str] = []
        for match in re.finditer(rb"\x00\x04[\x00-\x80]\x09(.{4})", raw, re.S):
            size = int.from_bytes(match.group(1), "big")
            if size < 4096:
                lines.append(_decode(raw[match.end() : match.end() + size]))
        if len(lines) > 100:
            yield tidy("\n".join(lines))


def read_code(data: bytes) -> Iterator[str]:
    text = tidy(_decode(data))
    longest = max((len(line) for line in text.split("\n")), default=0)
    digits = len(text) - len(text.translate(_NO_DIGITS))
    if longest < 400 and digits < 0.15 * len(text):
        yield text


READERS: dict[str, Reader] = {
    "plain": read_plain,
    "html": read_html,
    "man": read_man,
    "dictionary": read_dictionary,
    "wordnet": read_wordnet,
    "fortune": read_fortune,
    "ztext": read_ztext,
    "rdata": read_rdata,
    "code": read_code,
}


def unpack(name: str, data: bytes) -> bytes:
    """The content of a file that may be gzip-compressed (also .dict.dz)."""
    return gzip.decompress(data) if name.endswith((".gz", ".dz")) else data
