"""Run the kernel tests under NVIDIA's compute-sanitizer and print a table of what it found.

`make sanitize` on a machine with an NVIDIA GPU and the CUDA toolkit, after `make plugins`. Each
family of kernels is a process of its own, several at once; kernels of torch are not looked at. The
table of each tool ends with the sum of its families: on a machine with 16 cores and one H200 both
are there after 100 s. Ends with 1 if anything was found.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "kernels"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Kernels that are looked at by one process.

    Attributes:
        kernels: folder of plugins/kernels; "common": several.
        tests: `tests/kernels/test_<tests>.py`.
        many: pytest -k for memcheck: every kernel and number format in few sizes.
        few: pytest -k for the other tools, which are ten times slower: every kernel once or twice,
            as small as it goes, so that each process ends within 40 s on an H200.
    """

    kernels: str
    tests: str
    many: str
    few: str


_EXPERTS = (
    "fields or routing or given_codes or output or ((shapes or test_experts) and (nano or ragged))"
)
_PREFILL = "test_prefill and not 4097 and not 5000 and not 1029 and not 1001 and not no_bias"

# Those that take longest first: the last ones to start are done soon.
FAMILIES = {
    "experts_sorted": Family(
        kernels="moe",
        tests="moe",
        many=f"({_EXPERTS} or (test_experts[ and -130])) and not -3] and not -1- and not -4]",
        few=(
            "(routing and -8]) or (shapes and (-7-nano or -40-ragged))"
            " or (test_experts[ and -130] and (channel or none))"
        ),
    ),
    "experts_direct": Family(
        kernels="moe",
        tests="moe",
        many=f"({_EXPERTS} or (test_experts[ and -2])) and not 40 and not 50 and not -8]",
        few="routing and -3] or (shapes and (-1-nano or -1-ragged)) or (test_experts[ and -2])",
    ),
    "grouped_experts": Family(
        kernels="moe", tests="grouped_experts", many="not many_experts", few="test_a_tile_of_each"
    ),
    "linear_prefill": Family(
        kernels="linear_attention",
        tests="linear_attention",
        many=_PREFILL,
        few="small_model or padding or (test_prefill[ and 65- and dtype0) or (reset and 70)",
    ),
    "projection": Family(
        kernels="projection",
        tests="projection",
        many=(
            "(codes and (1040 or 48)) or (half and 208) or (prologue and 256) or zeros or residual"
            " or graph"
        ),
        few=(
            "(codes and 208 and (-1] or -64])) or (half and 208 and (-50] or -1]))"
            " or (prologue and 256 and (-7] or -3]) and block and not int8)"
            " or (prologue and 256 and -1] and (channel or gate) and not int8)"
        ),
    ),
    "attention": Family(
        kernels="attention",
        tests="attention",
        many="not 131072 and not 524288 and not many_rows",
        few="slots or full_rotary or (every_group and float8 and 12)",
    ),
    "attention_prefill": Family(
        kernels="attention",
        tests="attention_prefill",
        many="not many_tokens and not 4097",
        few="every_group or ragged or slots",
    ),
    "nan_rows": Family(
        kernels="common",
        tests="nan_rows",
        # Not the test that asks for too much memory: the tool counts CUDA's refusal as an error.
        many=(
            "attention or nobody or (nan] and (many_tokens or quantized or plain-fp8-block-2-"
            " or (plain and -40-) or (test_projection[ and 256 and -3-)))"
        ),
        few="max_length",
    ),
    "norm": Family(
        kernels="norm",
        tests="norm",
        many=(
            "(quantize and 33 and (256 or 1000)) or (rms_norm and (33 or 3)) or (gate and 3-)"
            " or (rotary and -7])"
        ),
        few=(
            "(quantize and 33 and 1000 and bf16) or (rms_norm and 33 and 2040)"
            " or (gate and 3- and 256) or (rotary and -7] and fp8)"
        ),
    ),
    "sample": Family(
        kernels="sample",
        tests="sample",
        many="not distribution",
        few="shape1 or shape3 or zero_is or counts or 1000-peaked or 5003-equal",
    ),
    "large_projection": Family(
        kernels="projection",
        tests="large_projection",
        many="not 4097",
        few="193 and (-48- or (208 and fp8) or codes)",
    ),
    "linear_decode": Family(
        kernels="linear_attention",
        tests="linear_attention",
        many="decode and not float32",
        few="decode_slots or (decode_fused and dtype0 and 64)",
    ),
    "router": Family(
        kernels="moe",
        tests="router",
        many="not 4097 and not 500 and (not strange or (41 and (mini or large)) or (7- and nan))",
        few=(
            "(ties and (3-mini or 63-mini or 3-wide or 63-wide))"
            " or (strange_weights and bias and (8-mini or 8-large))"
        ),
    ),
    "embed": Family(kernels="embed", tests="embed", many="embed", few="not 500"),
}

ELSEWHERE = {
    "built_library": "launches nothing",
    "library": "launches nothing",
    "one_workspace": "repeats launches of attention and grouped_experts",
}
"""Files of tests/kernels that belong to no family, with the reason."""

SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?!.* not printed).*")
OURS = re.compile(r"Uninitialized .*\n={9} +at .*ringkernels::.*")
SAID = re.compile(r"(?<!=)={9} (?!=).*")  # anywhere: pytest's own line may not have ended yet
PASSED = re.compile(r"(\d+) passed.*? in [\d.]+s")
LATE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one tool said of one family.

    Attributes:
        tool, family: which run.
        tests: pytest's last line.
        passed: tests that passed.
        summary: the tool's last line.
        errors: what the tool found in kernels of this library.
        seconds: wall time.
        output: everything that was printed.
        clean: the tests passed and the tool found nothing.
    """

    tool: str
    family: str
    tests: str
    passed: int
    summary: str
    errors: int
    seconds: float
    output: str
    clean: bool

    def row(self) -> str:
        """Return the line of the table."""
        seconds = f"{self.seconds:4.0f} s"
        return f"{self.tool:10} {self.family:17} {seconds}  {self.tests:45} {self.summary}"


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


def _environment(tool: str) -> dict[str, str]:
    more = {"RINGEXPORT_REQUIRE": "gpu", "OMP_NUM_THREADS": "1"}
    if tool != "racecheck":  # looks at shared memory only
        # Without torch's cache every tensor is an allocation of its own: overruns are seen.
        more["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return os.environ | more


def _command(tool: str, family: str, choice: str | None) -> list[str]:
    tests = FAMILIES[family]
    command = [sanitizer(), "--tool", tool, "--launch-timeout", "0"]
    if tool == "initcheck":  # has to see what kernels of torch write, and reports those too
        command += ["--print-limit", "10000"]
    else:
        command += ["--error-exitcode", "9", "--kernel-name", "kns=ringkernels"]
        command += ["--print-limit", "100"]
    if tool == "racecheck":
        command += ["--racecheck-report", "all"]  # addresses and threads, and the analysis
    command += [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-m", "gpu"]
    # Tools slow a test down a lot: none of pytest's limits.
    command += ["-o", "addopts=", str(TESTS / f"test_{tests.tests}.py")]
    return [*command, "-k", choice or (tests.many if tool == "memcheck" else tests.few)]


def check(tool: str, family: str, choice: str | None, limit: float) -> Finding:
    """Run one family under one tool."""
    command, environment = _command(tool, family, choice), _environment(tool)
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
    ended = f"not ended within {limit:.0f} s" if code == LATE else f"ended with code {code}"
    finding = read(tool, family, output, ended=ended, code=code)
    return replace(finding, seconds=time.monotonic() - start)


def read(tool: str, family: str, output: str, *, ended: str, code: int) -> Finding:
    """Return what the output of a run says; its time is not in it.

    Args:
        tool: its name.
        family: its name.
        output: of the tool and of pytest.
        ended: said instead of pytest's last line where there is none.
        code: exit status of the run.
    """
    summaries, tests = list(SUMMARY.finditer(output)), PASSED.search(output)
    summary = summaries[-1].group(0) if summaries else "no summary"
    errors = int(summaries[-1].group(1)) if summaries else 0
    if tool == "initcheck" and summaries:
        errors = len(OURS.findall(output))
        summary += f", {errors} in this library"
    return Finding(
        tool=tool,
        family=family,
        tests=tests.group(0) if tests else ended,
        passed=int(tests.group(1)) if tests else 0,
        summary=summary,
        errors=errors,
        seconds=0,
        output=output,
        clean=code == 0 and tests is not None and bool(summaries) and errors == 0,
    )


def table(tool: str, findings: Sequence[Finding]) -> list[str]:
    """Return the lines of one tool: a family each, then their sum."""
    runs = [found for found in findings if found.tool == tool]
    passed, errors = sum(found.passed for found in runs), sum(found.errors for found in runs)
    clean = sum(found.clean for found in runs)
    total = f"{tool}: {passed} tests passed, {errors} errors, {clean} of {len(runs)} families clean"
    return ["", *(found.row() for found in runs), total]


def _report(found: Finding, most: int) -> list[str]:
    """Return every line of the tool, so that no access is cut off, and the end of pytest's."""
    said = SAID.findall(found.output)
    return [*said[:most], "...", *found.output.splitlines()[-12:]]


def main() -> int:
    """Print a line for each run that ends, a table for each tool, then what was not clean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="default: memcheck, racecheck"
    )
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--choice", help="pytest -k expression instead of the family's own")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each run")
    parser.add_argument("--lines", type=int, default=400, help="lines shown of a run with findings")
    options = parser.parse_args()
    tools = options.tool or TOOLS[:2]

    def run(job: tuple[str, str]) -> Finding:
        found = check(*job, options.choice, options.limit)
        print(found.row(), file=sys.stderr, flush=True)
        return found

    jobs = [(tool, family) for tool in tools for family in options.family or FAMILIES]
    with ThreadPoolExecutor(options.jobs) as pool:
        findings = list(pool.map(run, jobs))
    for tool in tools:
        print(*table(tool, findings), sep="\n")
    for found in findings:
        if not found.clean:
            print(f"\n--- {found.tool} {found.family}", *_report(found, options.lines), sep="\n")
    return int(not all(found.clean for found in findings))


if __name__ == "__main__":
    sys.exit(main())
