"""Train ring-nano from token files; writes a bf16 checkpoint and a log.

The schedule (warm-up, constant, linear decay; a last phase of long sequences) follows the share
of the work that is done: of --seconds of wall time, or of --steps for a repeatable run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.config as dynamo
from export import save
from model import Config, MoE, RingNano, head_loss
from muon import Muon
from torch import Tensor, nn


@dataclass
class Settings:
    tokens_per_step: int
    short: int
    long: int
    long_share: float
    lr: float
    muon_lr: float
    decay: float
    bias_rate: float
    seconds: float
    steps: int
    compile: bool
    device: str

    def progress(self, step: int, start: float) -> float:
        if self.steps:
            return step / self.steps
        return (time.time() - start) / self.seconds


class Windows:
    """Random non-overlapping windows of one long token stream, epoch after epoch."""

    def __init__(self, tokens: Tensor, seed: int) -> None:
        self.tokens, self.generator = tokens, torch.Generator().manual_seed(seed)
        self.length, self.starts, self.epochs = 0, torch.zeros(0, dtype=torch.long), 0.0

    def batch(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        if length != self.length:
            self.length, self.starts = length, self.starts[:0]
        if len(self.starts) < count:
            offset = int(torch.randint(length, (1,), generator=self.generator))
            number = (len(self.tokens) - offset - 1) // length
            order = torch.randperm(number, generator=self.generator)
            self.starts = (offset + order * length).to(self.tokens.device)
        starts, self.starts = self.starts[:count], self.starts[count:]
        self.epochs += count * length / len(self.tokens)
        span = torch.arange(length + 1, device=self.tokens.device)
        window = self.tokens[starts[:, None] + span].long()
        return window[:, :-1], window[:, 1:]


def learning_rate(progress: float) -> float:
    """Factor of the peak: 1 % warm-up, constant to 50 %, then linear to almost zero."""
    return min(1.0, progress / 0.01 + 0.01, max(0.01, (1 - progress) / 0.5))


def optimisers(model: RingNano, settings: Settings) -> tuple[Muon, torch.optim.AdamW]:
    matrices: dict[str, nn.Parameter] = {}
    others: list[dict[str, object]] = []
    for name, parameter in model.named_parameters():
        inner = name.startswith("layers") and parameter.dim() >= 2
        if inner and not name.endswith("mlp.gate"):
            matrices[name] = parameter
        else:
            scale = 0.5 if name.endswith(("mlp.gate", "lm_head")) else 1.0
            others.append({"params": [parameter], "scale": scale})
    adam = torch.optim.AdamW(
        others,
        lr=settings.lr,
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=settings.device == "cuda",
    )
    return Muon(matrices, model.config.head_dim, settings.compile), adam


def balance(model: RingNano, loads: list[Tensor], rate: float) -> None:
    """Auxiliary-loss-free balancing: raise the bias of experts that got too little."""
    routers = [block.mlp for block in model.layers if isinstance(block.mlp, MoE)]
    for router, load in zip(routers, loads, strict=True):
        router.expert_bias.add_(rate * torch.sign(load.mean() - load))
        router.expert_bias.sub_(router.expert_bias.mean())


class Trainer:
    def __init__(self, model: RingNano, settings: Settings, tokens: Tensor) -> None:
        self.model, self.settings = model, settings
        self.muon, self.adam = optimisers(model, settings)
        self.windows = Windows(tokens, seed=7)
        self.head = torch.compile(head_loss, dynamic=False) if settings.compile else head_loss
        if settings.compile:
            for block in model.layers:
                block.compile(dynamic=False)

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        bf16 = self.settings.device == "cuda"
        with torch.autocast(self.settings.device, dtype=torch.bfloat16, enabled=bf16):
            h, loads = self.model.features(inputs)
            return self.head(h, self.model.lm_head, targets), loads

    def step(self, length: int, factor: float) -> tuple[Tensor, list[Tensor]]:
        settings = self.settings
        count = settings.tokens_per_step // length
        inputs, targets = self.windows.batch(count, length)
        loss, loads = self.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = settings.lr * factor * group["scale"]
        self.adam.step()
        self.muon.step(settings.muon_lr * factor, settings.decay)
        balance(self.model, loads, settings.bias_rate * max(factor, 0.05))
        self.model.zero_grad(set_to_none=True)
        return loss.detach(), loads

    def warm(self) -> None:
        """Compile for both lengths before the clock starts."""
        for length in (self.settings.short, self.settings.long):
            inputs, targets = self.windows.batch(self.settings.tokens_per_step // length, length)
            self.loss(inputs, targets)[0].backward()
            self.model.zero_grad(set_to_none=True)
        self.windows = Windows(self.windows.tokens, seed=7)


def train(trainer: Trainer, out: Path, log: Path) -> Iterator[dict[str, float]]:
    settings = trainer.settings
    start, step, saved, progress = time.time(), 0, 0.0, 0.0
    recent: list[Tensor] = []
    with log.open("w") as handle:
        while progress < 1.0:
            length = settings.long if progress > 1 - settings.long_share else settings.short
            loss, loads = trainer.step(length, learning_rate(progress))
            recent.append(loss)
            step += 1
            if step % 50 == 0 or settings.steps == step:
                mean = torch.stack(recent).mean().item()
                worst = max((load.max() / load.mean()).item() for load in loads)
                least = min((load.min() / load.mean()).item() for load in loads)
                row = {
                    "step": step,
                    "seconds": time.time() - start,
                    "length": length,
                    "loss": mean,
                    "load_max": worst,
                    "load_min": least,
                    "epochs": trainer.windows.epochs,
                }
                handle.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
                handle.flush()
                recent.clear()
                yield row
            progress = settings.progress(step, start)
            if progress - saved > 0.33:
                save(trainer.model, out)
                saved = progress
    save(trainer.model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, default=Path("models/ring-nano/config.json"))
    parser.add_argument("--out", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--short", type=int, default=1024)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--long-share", type=float, default=0.15)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--bias-rate", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = vars(parser.parse_args())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files, config, out = args.pop("tokens"), args.pop("config"), args.pop("out")
    settings = Settings(device=device, **args)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    dynamo.recompile_limit = 64
    stream = np.concatenate([np.fromfile(path, dtype=np.uint16) for path in files])
    tokens = torch.from_numpy(stream.astype(np.int32)).to(device)
    model = RingNano(Config.load(config)).to(device)
    print(f"{len(stream)} tokens, {sum(p.numel() for p in model.parameters())} weights", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    trainer = Trainer(model, settings, tokens)
    trainer.warm()
    print(f"ready after {time.time() - began:.1f} s", flush=True)
    for row in train(trainer, out, out / "train-log.jsonl"):
        if row["step"] % 250 == 0 or row["step"] <= 100:
            print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
