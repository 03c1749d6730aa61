"""A made-up tokenizer of full size, for models with random weights: any id is some text."""

import itertools
import json
from pathlib import Path

from ringexport.runtime.tokenizer import byte_symbols

__all__ = ["VOCAB_SIZE", "write_tokenizer"]

VOCAB_SIZE = 157184


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level vocabulary: all bytes, then made-up words of 4 letters."""
    symbols = byte_symbols()
    letters = [symbols[byte] for byte in b"abcdefghijklmnopqrstuvwxyz"]
    words = ("".join(word) for word in itertools.product(letters, repeat=4))
    tokens = [*symbols, *(symbols[ord(" ")] + word for word in words)][:vocab_size]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    data = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": level,
        "pre_tokenizer": level,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
