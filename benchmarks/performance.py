"""Measure the numbers of docs/performance.md on this machine and write them there.

    python benchmarks/performance.py

Run it on a machine that does nothing else.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import markdown, replace

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "ring-nano"
REPEATS = 7


def seconds(*command: object) -> float:
    """Return the median wall time of a process, after one run that warms the file cache."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def startup(bundle: Path) -> str:
    """Wall times of whole processes."""
    python = sys.executable
    cli = (python, "-m", "ringexport")
    rows = [
        ("`python -c pass`, for scale", seconds(python, "-c", "pass")),
        ("`import ringexport`", seconds(python, "-c", "import ringexport")),
        ("`ringexport --help`", seconds(*cli, "--help")),
        ("`ringexport build` of ring-nano", seconds(*cli, "build", MODEL, "-o", bundle)),
    ]
    return markdown(("process", "median"), [(name, f"{value:.2f} s") for name, value in rows])


def speed(bundle: Path) -> tuple[str, str]:
    """The table of `ringexport bench`, and its conditions."""
    command = [sys.executable, "-m", "ringexport", "bench", bundle, "--json", "--quiet"]
    result = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout)
    by_name = {entry["backend"]: entry for entry in found["results"]}
    mine, reference = by_name["onnxruntime:cpu"], by_name["torch"]
    rows = []
    for length, value in mine["first_token_ms"].items():
        other = reference["first_token_ms"][length]
        what = f"first token of {length} tokens, ms"
        rows.append((what, f"{value:.1f}", f"{other:.1f}", f"{other / value:.2f}x"))
    for context, speeds in mine["decode_tokens_per_s"].items():
        for batch, value in speeds.items():
            other = reference["decode_tokens_per_s"][context][batch]
            what = f"decode after {context} tokens, batch {batch}, tokens/s"
            rows.append((what, f"{value:.1f}", f"{other:.1f}", f"{value / other:.2f}x"))
    table = markdown(("ring-nano, fp32", "`onnxruntime:cpu`", "torch reference", "ratio"), rows)
    hidden = {"bundle"}
    conditions = ", ".join(f"{k} {v}" for k, v in found["conditions"].items() if k not in hidden)
    return table, f"Conditions: {conditions}; medians."


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        replace("performance.md", "startup", startup(bundle))
        table, conditions = speed(bundle)
        replace("performance.md", "speed", f"{conditions}\n\n{table}")


if __name__ == "__main__":
    main()
