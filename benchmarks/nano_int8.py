"""What int8 weights give ring-nano on the CPU: decode speed beside fp32, and size of the bundle.

    python benchmarks/nano_int8.py [--pairs 5] [--repeat 9] [--docs]

Each pair is two processes of `ringexport bench`, fp32 and int8 in turn, so that the ratio holds
where the speed of a machine drifts. Exits with 1 if a bar is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import markdown, replace

MODEL = Path(__file__).parents[1] / "models" / "ring-nano"
RECIPES = ("fp32", "int8-weight-only")
CONTEXT = "128"
BENCH = ("--backend", "onnxruntime:cpu", "--context", CONTEXT, "--prefill", CONTEXT)
DECODE = "400"
SPEED_BAR, SIZE_BAR = 1.3, 0.30


def ringexport(*arguments: object) -> str:
    """Run a command of ringexport and return its output."""
    command = [sys.executable, "-m", "ringexport", *map(str, arguments), "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def decode_rate(bundle: Path, repeat: int) -> tuple[float, dict[str, str]]:
    """Return tokens a second at batch 1, and the conditions of the run."""
    length = ("--decode", DECODE, "--repeat", repeat)
    found = json.loads(ringexport("bench", bundle, *BENCH, *length, "--json"))
    return found["results"][0]["decode_tokens_per_s"][CONTEXT]["1"], found["conditions"]


def main() -> int:
    """Measure, print, and write the table if asked to; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=9, help="runs in each process")
    parser.add_argument("--docs", action="store_true", help="write the table to docs/")
    options = parser.parse_args()
    sizes, rates = [], []
    with tempfile.TemporaryDirectory() as scratch:
        bundles = [Path(scratch) / recipe for recipe in RECIPES]
        for recipe, bundle in zip(RECIPES, bundles, strict=True):
            ringexport("build", MODEL, "-o", bundle, "--recipe", recipe)
            sizes.append(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()))
        for _ in range(options.pairs):
            found = [decode_rate(bundle, options.repeat) for bundle in bundles]
            pair, conditions = zip(*found, strict=True)
            rates.append(pair)
            print(*(f"{rate:.1f}" for rate in pair), f"{pair[1] / pair[0]:.3f}x", flush=True)
    ratios = sorted(eight / full for full, eight in rates)
    ratio, share = statistics.median(ratios), sizes[1] / sizes[0]
    decode = [statistics.median(column) for column in zip(*rates, strict=True)]
    rows = [
        (RECIPES[0], f"{decode[0]:.0f}", "1.00x", f"{sizes[0] / 1e6:.2f}", "100.0%"),
        (RECIPES[1], f"{decode[1]:.0f}", f"{ratio:.2f}x", f"{sizes[1] / 1e6:.2f}", f"{share:.1%}"),
    ]
    header = ("recipe", "decode, tokens/s", "of fp32", "bundle, MB", "of fp32")
    shown = ("cpu", "cpus", "system", "python", "onnxruntime")
    about = ", ".join(f"{name} {conditions[0][name]}" for name in shown)
    loads = " to ".join(sorted(found["load"] for found in conditions))
    about += f", load {loads} at the end; {options.pairs} pairs, ratios {ratios[0]:.2f} to "
    text = f"Conditions: {about}{ratios[-1]:.2f}, medians.\n\n{markdown(header, rows)}"
    print(text)
    if options.docs:
        replace("performance.md", "nano-int8", text)
    return int(ratio < SPEED_BAR or share > SIZE_BAR)


if __name__ == "__main__":
    sys.exit(main())
