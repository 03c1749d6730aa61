"""Train the tokenizer and turn text into token files (uint16).

`tokenizer` trains the byte-level BPE on a sample of the training text and writes tokenizer.json;
`encode` writes one token file, documents separated by <|endoftext|>.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "\x1e"
VOCAB = 3072
# The last ids of the vocabulary: special tokens, then padding rows that no token uses.
SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|role_end|>",
    "<role>",
    "</role>",
)
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PADDING = 5
WORDS = (
    r"'(?i:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(path: Path) -> list[str]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as handle:
        return handle.read().split(SEPARATOR)


def train_tokenizer(files: list[Path], out: Path, sample_mb: float) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts: list[str] = []
    for path in files:
        budget = sample_mb * 1e6 / len(files)
        for text in read(path):
            budget -= len(text)
            if budget < 0:
                break
            texts.append(text)
    size = VOCAB - len(SPECIAL) - len(MARKUP) - PADDING
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKUP])
    assert tokenizer.token_to_id(SPECIAL[0]) == size
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))


def encode(tokenizer: Tokenizer, path: Path, out: Path) -> tuple[int, int]:
    """(bytes of text, tokens) of one file."""
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = read(path)
    size = tokens = 0
    with out.open("wb") as handle:
        for start in range(0, len(documents), 1024):
            batch = documents[start : start + 1024]
            size += sum(len(text.encode()) for text in batch)
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype=np.uint16)
                tokens += len(ids)
                handle.write(ids.tobytes())
    return size, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("tokenizer", "encode"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/ring-nano/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("build/tokens"))
    parser.add_argument("--sample-mb", type=float, default=12.0)
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.files, args.tokenizer, args.sample_mb)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    for path in args.files:
        target = args.out / (path.name.split(".")[0] + ".bin")
        size, tokens = encode(tokenizer, path, target)
        print(f"{target.name}: {size} bytes, {tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
