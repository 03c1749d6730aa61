"""Serve the full-size shape on this machine's GPU, and compare with its decode steps alone.

    python benchmarks/serving_gpu.py [--docs] [--seconds 10] [--quick]

Ring-mini's shape with random weights in FP8. A server in a process of its own first times decode
steps alone and the batching engine without HTTP, then answers 128 clients that stream; these are
in this process. --docs writes the tables into docs/performance.md.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from serving_clients import BATCH, LOADS, STEP_CONTEXT, Outcome, Work, drive
from serving_vocabulary import VOCAB_SIZE
from tables import markdown, replace

SERVED = tuple((*load, temperature) for load in LOADS for temperature in (0, 1))
STEP_HEADER = (
    f"{BATCH} rows at {STEP_CONTEXT} tokens",
    "ms a step",
    "tokens/s",
    "of the step alone",
)
SERVER_HEADER = (
    "prompt and new tokens",
    "chosen by",
    "server, new tokens/s",
    "of the engine without HTTP",
    "of decode steps alone",
    "first token, median",
    "p99",
    "events a token",
)


def measure(arguments: argparse.Namespace) -> str:
    """Start the server, drive it, and return the tables."""
    command = [sys.executable, str(Path(__file__).with_name("serving_gpu_server.py"))]
    command += ["--quick"] if arguments.quick else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    results: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            results.append(json.loads(line))
            print(line.strip(), flush=True)
            if results[-1]["kind"] == "url":
                break
        else:
            raise SystemExit("the server ended early")
        host, _, port = results[-1]["url"].rpartition("//")[2].partition(":")
        for prompt_tokens, new_tokens, temperature in SERVED:
            sampling = {"temperature": temperature}
            work = Work(BATCH, prompt_tokens, new_tokens, VOCAB_SIZE, sampling)
            found = asyncio.run(drive(host, int(port), work, arguments.seconds))
            outcomes.append(found)
            print(
                f"{prompt_tokens} + {new_tokens}, temperature {temperature}:"
                f" {found.rate:,.0f} tokens/s,"
                f" {found.answers} answers, first token {found.median_ms:.0f} ms",
                flush=True,
            )
    finally:
        process.terminate()
        process.wait(60)
    return tables(results, outcomes)


def tables(results: list[dict[str, Any]], outcomes: list[Outcome]) -> str:
    """Return the tables for docs/performance.md."""
    step = next(one["seconds"] for one in results if one["kind"] == "step")
    rows = [("decode steps alone", f"{1e3 * step:.2f}", f"{BATCH / step:,.0f}", "")]
    for one in results:
        if one["kind"] == "sampling":
            rate = one["steady"]
            share = f"{rate * step / BATCH:.1%}"
            rows.append(
                (f"engine, {one['name']}", f"{1e3 * BATCH / rate:.2f}", f"{rate:,.0f}", share)
            )
    served = []
    engines = {tuple(one["load"]): one["whole"] for one in results if one["kind"] == "engine"}
    for outcome, (*load, temperature) in zip(outcomes, SERVED, strict=True):
        rate = outcome.rate
        served.append(
            (
                "{} and {}".format(*load),
                "temperature 1" if temperature else "greedy",
                f"{rate:,.0f}",
                f"{rate / engines[tuple(load)]:.1%}",
                f"{rate * step / BATCH:.1%}",
                f"{outcome.median_ms:.0f} ms",
                f"{outcome.first_token_ms(0.99):.0f} ms",
                f"{outcome.events / outcome.tokens:.2f}",
            )
        )
    return markdown(STEP_HEADER, rows) + "\n\n" + markdown(SERVER_HEADER, served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="no sampling but greedy")
    arguments = parser.parse_args()
    text = measure(arguments)
    print(text)
    if arguments.docs:
        replace("performance.md", "gpu-serving", text)


if __name__ == "__main__":
    main()
