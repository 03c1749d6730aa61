"""Complete the checkpoint folder: weights, tokenizer and generation configs, chat template."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

HERE = Path(__file__).parent
LIMIT = 16_000_000


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/ring-nano"))
    args = parser.parse_args()
    for path in sorted(args.checkpoint.glob("model*")):
        shutil.copyfile(path, args.model / path.name)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    ids = {token.content: number for number, token in added.items()}
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "gmask_token": "[gMASK]",
    }
    write_json(args.model / "special_tokens_map.json", names)
    decoder = {
        str(number): {
            "content": t.content,
            "lstrip": t.lstrip,
            "normalized": t.normalized,
            "rstrip": t.rstrip,
            "single_word": t.single_word,
            "special": t.special,
        }
        for number, t in sorted(added.items())
    }
    write_json(
        args.model / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": ["<role>", "</role>"],
            "chat_template": (HERE / "chat_template.jinja").read_text(),
            "clean_up_tokenization_spaces": False,
            **names,
            "fast_tokenizer": True,
            "model_max_length": 8192,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        args.model / "generation_config.json",
        {
            "_from_model_config": True,
            "eos_token_id": [ids["<|endoftext|>"], ids["<|role_end|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "transformers_version": "4.56.1",
        },
    )
    total = sum(path.stat().st_size for path in args.model.iterdir())
    print(f"{total} bytes")
    if total > LIMIT:
        raise SystemExit(f"the folder is larger than {LIMIT} bytes")


if __name__ == "__main__":
    main()
