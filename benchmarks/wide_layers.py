"""Decode on the CPU at Ring-mini's layer sizes, fp32 beside quantized, and what the bundles take.

    python benchmarks/wide_layers.py WORK_DIRECTORY [--docs]

Two layers of the real width with random weights (one linear and dense, one softmax with 256
experts) and ring-nano's vocabulary: 0.87 billion weights, 6 GB on the disk while it runs. Random
weights decode at the speed of trained ones: which experts a token takes is as diverse.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from full_size import MINI, ROOT, write_checkpoint
from tables import markdown, replace

from ringexport.bundle import EngineBundle
from ringexport.runtime.registry import open_bundle_runner

NANO = ROOT / "models" / "ring-nano"
RECIPES = ("fp32", "int8-weight-only")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
STEPS, REPEATS, PROMPT = 32, 5, 128
SPEED_BAR, SIZE_BAR = 1.3, 0.30


def checkpoint(directory: Path) -> Path:
    """Write the checkpoint with ring-nano's tokenizer and return its folder."""
    config = json.loads(MINI.read_text())
    nano = json.loads((NANO / "config.json").read_text())
    config |= {name: nano[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    config |= {"num_hidden_layers": 2, "layer_group_size": 2}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    folder = directory / "checkpoint"
    write_checkpoint(folder, path, 4 << 30)
    for name in TOKENIZER:
        shutil.copyfile(NANO / name, folder / name)
    return folder


def build(source: Path, output: Path, recipe: str) -> Path:
    """Build a bundle in a process of its own, as users do."""
    command = [sys.executable, "-m", "ringexport", "build", source, "-o", output, "-q"]
    subprocess.run([*map(str, command), "--recipe", recipe], check=True)
    return output


def decode_rate(bundle: Path) -> float:
    """Return tokens a second after a short prompt, the median of some runs, batch 1."""
    rng = np.random.default_rng(0)
    with open_bundle_runner(EngineBundle.open(bundle, verify=False)) as runner:
        vocab = runner.spec.vocab_size
        state = runner.new_state(1)
        runner.prefill(rng.integers(0, vocab, (1, PROMPT)), None, state)
        rates = []
        for _ in range(REPEATS):
            tokens = rng.integers(0, vocab, (STEPS, 1))
            start = time.perf_counter()
            for token in tokens:
                runner.decode(token, state)
            rates.append(STEPS / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> int:
    """Measure, print, and write the table if asked to; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a new folder, removed at the end")
    parser.add_argument("--docs", action="store_true", help="write the table to docs/")
    options = parser.parse_args()
    try:
        source = checkpoint(options.directory)
        rows, first = [], (0.0, 0)
        for recipe in RECIPES:
            bundle = build(source, options.directory / recipe, recipe)
            size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
            rate = decode_rate(bundle)
            shutil.rmtree(bundle)
            first = first if rows else (rate, size)
            ratio, share = rate / first[0], size / first[1]
            rows.append(
                [recipe, f"{rate:.1f}", f"{ratio:.2f}x", f"{size / 1e9:.2f}", f"{share:.1%}"]
            )
            print(*rows[-1], sep="  ", flush=True)
    finally:
        shutil.rmtree(options.directory, ignore_errors=True)
    header = ("recipe", "decode, tokens/s", "of fp32", "bundle, GB", "of fp32")
    if options.docs:
        replace("performance.md", "wide-layers", markdown(header, rows))
    return int(ratio < SPEED_BAR or share > SIZE_BAR)


if __name__ == "__main__":
    sys.exit(main())
