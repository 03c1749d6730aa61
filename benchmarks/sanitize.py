"""Run the kernel tests under NVIDIA's compute-sanitizer and print a table of what it found.

`make sanitize` on a machine with an NVIDIA GPU and the CUDA toolkit, after `make plugins`. Each
family of kernels is a process of its own, several at once; kernels of torch are not looked at. Ends
with 1 if anything was found.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "kernels"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Family to the choice of its tests (pytest -k): every kernel and number format in few sizes for
# memcheck, and fewer tests of the same kernels for the other tools, which are ten times slower.
FAMILIES = {
    "attention": (
        "not 131072 and not 524288 and not many_rows",
        "slots or full_rotary or (every_group and float8 and 12)",
    ),
    "attention_prefill": ("not many_tokens and not 4097", "every_group or ragged or slots"),
    "grouped_experts": ("not many_experts", "fp16 or input_quantized or (odd_widths and bfloat16)"),
    "large_projection": ("not 4097", "193 and (208 or codes)"),
    "linear_attention": (
        "not drift and not 4097 and not 5000 and not no_bias and not float32",
        "ragged or reset or padding or slots or small or (decode_fused and not dtype2)",
    ),
    "moe": (
        (
            "fields or routing or given_codes or output or (router and not 4097 and not 500)"
            " or ((shapes or test_experts) and (nano or ragged))"
        ),
        (
            "fields or (routing and 8) or (shapes and 7 and nano) or (shapes and 40 and ragged)"
            " or (ties and (3 or 63) and mini)"
        ),
    ),
    "norm": (
        (
            "(quantize and 33 and (256 or 1000)) or (rms_norm and (33 or 3)) or (gate and 3-)"
            " or (rotary and 7])"
        ),
        (
            "(quantize and 33 and 1000 and bf16) or (rms_norm and 33 and 2040)"
            " or (gate and 3- and 256) or (rotary and 7] and fp8)"
        ),
    ),
    "projection": (
        (
            "(codes and (1040 or 48)) or (half and 208) or (prologue and 256) or zeros or residual"
            " or graph"
        ),
        (
            "(codes and 208 and (-1] or -64])) or (half and 208 and -50])"
            " or (prologue and 256 and (-7] or -3]) and block and not int8)"
        ),
    ),
    "sample": ("not distribution", "shape1 or shape3 or zero"),
}
SUMMARY = re.compile(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*)")
CLEAN = re.compile(r"SUMMARY: 0 (errors|hazards)")
PASSED = re.compile(r"\d+ passed.*")
LATE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one tool said of one family.

    Attributes:
        tool, family: which run.
        tests: pytest's last line.
        summary: the tool's last line.
        seconds: wall time.
        output: everything that was printed.
        clean: the tests passed and the tool found nothing.
    """

    tool: str
    family: str
    tests: str
    summary: str
    seconds: float
    output: str
    clean: bool


def sanitizer() -> str:
    """Return the tool's path, from PATH or from the toolkit's folder."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        root = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        found = shutil.which(
            "compute-sanitizer", path=f"{root / 'bin'}:{root / 'compute-sanitizer'}"
        )
    if found is None:
        sys.exit("compute-sanitizer is missing: install the CUDA toolkit, or put it into PATH")
    return found


def _choice(tool: str, family: str) -> str:
    return FAMILIES[family][tool != TOOLS[0]]


def check(tool: str, family: str, choice: str, limit: float) -> Finding:
    """Run one family under one tool."""
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "0"]
    command += ["--kernel-name", "kns=ringkernels", "--print-limit", "20"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu"]
    # Tools slow a test down a lot: none of pytest's limits.
    command += ["-o", "addopts=", str(TESTS / f"test_{family}.py"), "-k", choice]
    # Without torch's cache every tensor is an allocation of its own, so that overruns are seen.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RINGEXPORT_REQUIRE": "gpu"}
    environment = os.environ | more
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, code = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and the tests, its child
            output, code = process.communicate()[0], LATE
    summaries, tests = SUMMARY.findall(output), PASSED.search(output)
    ended = f"not ended within {limit:.0f} s" if code == LATE else "failed"
    return Finding(
        tool=tool,
        family=family,
        tests=tests.group(0) if tests else ended,
        summary=summaries[-1] if summaries else "no summary",
        seconds=time.monotonic() - start,
        output=output,
        clean=code == 0
        and tests is not None
        and bool(summaries)
        and bool(CLEAN.search(summaries[-1])),
    )


def main() -> int:
    """Print a table, then the output of what was not clean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="default: memcheck, racecheck"
    )
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--choice", help="pytest -k expression instead of the family's own")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each run")
    parser.add_argument("--lines", type=int, default=60, help="lines shown of a run with findings")
    options = parser.parse_args()
    runs = [
        (tool, family)
        for tool in options.tool or TOOLS[:2]
        for family in options.family or FAMILIES
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        findings = list(
            pool.map(lambda run: check(*run, options.choice or _choice(*run), options.limit), runs)
        )
    for found in findings:
        row = f"{found.tool:10} {found.family:17} {found.seconds:5.0f} s  "
        print(f"{row}{found.tests:45} {found.summary}")
    for found in findings:
        if not found.clean:
            lines = found.output.splitlines()
            print(f"\n--- {found.tool} {found.family}", *lines[-options.lines :], sep="\n")
    return int(not all(found.clean for found in findings))


if __name__ == "__main__":
    sys.exit(main())
