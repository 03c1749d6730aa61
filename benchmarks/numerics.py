"""Measure the numbers of docs/numerics.md on ring-nano and write them there.

    python benchmarks/numerics.py

takes some minutes on two cores and needs torch and onnxruntime.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import markdown, replace

from ringexport import Engine, SamplingParams
from ringexport.compare.tolerances import TOLERANCES
from ringexport.ops.decay import DecayIndex

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "ring-nano"
TEXTS = sorted((ROOT / "calibration" / "text").glob("heldout-*.txt"))
GREEDY_TOKENS = 256
WINDOW = 2048
PROMPTS = (
    "The history of", "def main(", "In the beginning", "class Node:", "import numpy as np\n",
    "The purpose of this function is", "Once upon a time", "for i in range(", "To install the",
    "#include <stdio.h>\n", "It is a truth", "return self.", "The following options", "try:\n",
    "A word used to", "SELECT", "if __name__ ==", "The President", "struct ", "Note that",
)  # fmt: skip


def ringexport(*arguments: object) -> Any:
    """Run a command with --json and return what it prints; exit code 1 is a result too."""
    command = [sys.executable, "-m", "ringexport", *map(str, arguments), "--json", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)


def tolerances() -> str:
    rows = [
        (row.level, row.what, row.metric, f"{row.sense.value} {row.bound:g}", row.reason)
        for row in TOLERANCES.values()
    ]
    return markdown(("level", "what", "metric", "bound", "reason"), rows)


def build(scratch: Path) -> dict[DecayIndex, Path]:
    """Build a bundle per form of the decay."""
    bundles = {form: scratch / form for form in DecayIndex}
    for form, bundle in bundles.items():
        ringexport("build", MODEL, "-o", bundle, "--decay-index", form)
    return bundles


def agreement(bundle: Path) -> str:
    """Worst number of each kind of the teacher-forced comparison with the reference."""
    found = ringexport("compare", bundle, "--against", "torch")
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found["rows"]:
        key = (row["kind"], row["name"] if row["kind"] == "logits" else row["metric"])
        smaller_is_worse = (row["bound"] or "").startswith(">=")
        old = worst.setdefault(key, row)
        if (row["value"] < old["value"]) == smaller_is_worse:
            worst[key] = row
    rows = [
        (kind, what, f"{row['value']:.3g}", row["bound"] or "", "yes" if row["passed"] else "NO")
        for (kind, what), row in worst.items()
        if row["bound"]
    ]
    table = markdown(("what", "number", "worst", "bound", "within"), rows)
    return f"{found['tokens']} tokens, teacher-forced:\n\n{table}"


def greedy(bundle: Path) -> str:
    """Count the tokens of greedy continuations that both backends agree on."""
    params = SamplingParams(max_new_tokens=GREEDY_TOKENS, temperature=0.0, ignore_eos=True)
    texts = {}
    for backend in ("onnxruntime:cpu", "torch"):
        with Engine.open(bundle, backend=backend) as engine:
            results = engine.generate_batch(list(PROMPTS), params)
        texts[backend] = [result.token_ids for result in results]
    equal = sum(left == right for left, right in zip(*texts.values(), strict=True))
    return (
        f"Greedy continuations of {GREEDY_TOKENS} tokens that are equal token for token between "
        f"`onnxruntime:cpu` and the torch reference, fp32: **{equal} of {len(PROMPTS)}** prompts."
    )


def quality(bundles: dict[DecayIndex, Path]) -> str:
    """Bits per byte of held-out text, per form of the decay."""
    arguments = [part for text in TEXTS for part in ("--text", text)]
    found = {
        form: ringexport("eval", bundle, *arguments, "--window", WINDOW)["files"]
        for form, bundle in bundles.items()
    }
    rows = [
        (f"`{text.name}`", *(f"{found[form][str(text)]['bits_per_byte']:.4f}" for form in found))
        for text in TEXTS
    ]
    return markdown(("text", *(f"`{form}`" for form in found)), rows)


def main() -> None:
    replace("numerics.md", "tolerances", tolerances())
    with tempfile.TemporaryDirectory() as scratch:
        bundles = build(Path(scratch))
        replace("numerics.md", "agreement", agreement(bundles[DecayIndex.SERVING]))
        replace("numerics.md", "greedy", greedy(bundles[DecayIndex.SERVING]))
        replace("numerics.md", "quality", quality(bundles))


if __name__ == "__main__":
    main()
