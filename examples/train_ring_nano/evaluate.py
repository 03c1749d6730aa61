"""Bits per byte, expert load and sample texts of a checkpoint, computed in fp32."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from export import load
from model import CHUNK, RingNano
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def bits_per_byte(
    model: RingNano, tokenizer: Tokenizer, text: str, length: int, device: str
) -> tuple[float, Tensor]:
    """Bits per byte over windows of `length` tokens, and tokens per MoE layer and expert.

    Each window starts after <|endoftext|>, so every token of the text is predicted once.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    end = tokenizer.token_to_id("<|endoftext|>")
    nats, loads = 0.0, []
    for start in range(0, len(ids), length):
        targets = ids[start : start + length]
        inputs = [end, *targets[:-1]]
        padded = inputs + [end] * (-len(inputs) % CHUNK)
        h, load_now = model.features(torch.tensor([padded], device=device))
        logits = F.linear(h[0, : len(targets)], model.lm_head)
        goal = torch.tensor(targets, device=device)
        nats += F.cross_entropy(logits.float(), goal, reduction="sum").item()
        loads.append(torch.stack(load_now) * len(targets))
    return nats / math.log(2) / len(text.encode()), torch.stack(loads).sum(0)


@torch.no_grad()
def sample(
    model: RingNano, tokenizer: Tokenizer, prompt: str, count: int, temperature: float, device: str
) -> str:
    """Continue a prompt; slow (the whole text is computed anew for each token)."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    stops = {tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|role_end|>")}
    generator = torch.Generator().manual_seed(5)
    begin = len(ids)
    for _ in range(count):
        padded = ids + [0] * (-len(ids) % CHUNK)
        logits = model.logits(torch.tensor([padded], device=device))[0, len(ids) - 1].cpu()
        if temperature:
            choice = torch.multinomial(
                torch.softmax(logits / temperature, -1), 1, generator=generator
            )
        else:
            choice = logits.argmax(-1, keepdim=True)
        ids.append(int(choice))
        if ids[-1] in stops:
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/ring-nano"),
        help="folder with config.json and tokenizer.json",
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--prompts", type=Path, help="JSON list of prompts to continue")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    model = load(args.checkpoint, args.model / "config.json").to(device)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    report: dict[str, object] = {}
    totals = []
    for path in args.text:
        text = path.read_text()
        for length in args.lengths:
            value, loads = bits_per_byte(model, tokenizer, text, length, device)
            report[f"{path.name}@{length}"] = round(value, 4)
            print(path.name, length, round(value, 4), flush=True)
        totals.append(loads)
    load_all = torch.stack(totals).sum(0)
    load_all /= load_all.mean(-1, keepdim=True)
    report["expert load over all texts, relative to the mean"] = [
        {"max": round(x.max().item(), 3), "min": round(x.min().item(), 3)} for x in load_all
    ]
    samples = []
    for prompt in json.loads(args.prompts.read_text()) if args.prompts else []:
        for temperature in (0.0, 0.7):
            text = sample(model, tokenizer, prompt, args.tokens, temperature, device)
            samples.append({"prompt": prompt, "temperature": temperature, "text": text})
            print(f"--- t={temperature} {prompt!r}\n{text}", flush=True)
    report["samples"] = samples
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
