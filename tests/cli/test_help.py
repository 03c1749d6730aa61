import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ringexport import errors
from ringexport.batching import BatchingOptions
from ringexport.cli.main import COMMANDS, EXIT_CODES, cli
from ringexport.cli.reference import render_reference
from ringexport.cli.run import SAMPLING_DEFAULTS
from ringexport.cli.serve import SERVE_DEFAULTS
from ringexport.compare.speed import BenchConfig
from ringexport.ops.decay import DecayIndex
from ringexport.pipeline import DECAY_INDICES
from ringexport.runtime.sampling import SamplingParams
from ringexport.serve import ServeOptions
from ringexport.version import __version__
from tests.cli.conftest import Call

ROOT = Path(__file__).parents[2]
COMMON = {"quiet", "verbose"}
MAX_OPTIONS = 12
MORE_OPTIONS = {"build": 13, "run": 15}
"""`build` has its gate besides. `run` has every sampling parameter, --thinking, and the two files
of an offline batch, which share all of these; a command of their own would repeat them."""


def options(name: str) -> list[click.Option]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [
        parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in COMMON
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(call: Call, name: str) -> None:
    called = call(name, "--help")
    assert called.code == 0
    assert f"Usage: ringexport {name}" in called.out
    assert called.err == ""
    for option in options(name):
        assert option.help
        assert option.help.rstrip("] ")[-1:] != ""


def test_the_group_lists_the_commands(call: Call) -> None:
    shown = call("--help").out
    assert call().out == shown
    for name, text in COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(text)}", shown)


def test_version(call: Call) -> None:
    assert call("--version").out == f"ringexport {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_few_options(name: str) -> None:
    assert len(options(name)) <= MORE_OPTIONS.get(name, MAX_OPTIONS)


def test_help_imports_nothing_heavy() -> None:
    script = f"""
import sys
from ringexport.cli.main import run_cli
for name in {list(COMMANDS)}:
    assert run_cli([name, "--help"]) == 0
heavy = {{"torch", "onnxruntime", "onnx", "numpy", "tokenizers", "safetensors", "rich", "jinja2"}}
found = heavy & set(sys.modules)
assert not found, found
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60
    )


def test_help_is_quick() -> None:
    """CPU time, so that a busy machine does not matter; the promise is 0.3 s on an idle one."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "ringexport", "--help"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_sampling_defaults_are_those_of_the_dataclass() -> None:
    params = SamplingParams()
    assert {name: str(getattr(params, name)) for name in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS


def test_bench_defaults_are_those_of_the_dataclass() -> None:
    defaults = {option.name: option for option in options("bench")}
    config = BenchConfig()
    for name in ("batch", "prefill", "context", "decode", "repeat"):
        option = defaults[name]
        context = click.Context(click.Command("bench"))
        assert option.type_cast_value(context, option.default) == getattr(config, name)


def test_serve_defaults_are_those_of_the_dataclasses() -> None:
    batching = BatchingOptions()
    assert {
        "max_batch": batching.max_batch,
        "max_queue": batching.max_queue,
        "drain": ServeOptions().drain_seconds,
        "prefix_cache": batching.prefix_cache_bytes >> 20,
    } == SERVE_DEFAULTS


def test_decay_indices_are_those_of_the_enum() -> None:
    assert tuple(DecayIndex) == DECAY_INDICES


def test_every_error_has_a_documented_exit_code() -> None:
    classes = [getattr(errors, name) for name in errors.__all__]
    assert {cls.exit_code for cls in classes} <= set(EXIT_CODES)


def test_the_reference_is_current() -> None:
    path = ROOT / "docs" / "cli.md"
    assert path.read_text() == render_reference(), "run: make docs"


def test_unknown_command_names_the_nearest(call: Call) -> None:
    called = call("insect")
    assert called.code == 2
    assert "there is no command 'insect'; did you mean 'inspect'?" in called.err


def test_choice_errors_list_the_choices(call: Call) -> None:
    called = call("build", "x", "-o", "y", "--decay-index", "z")
    assert called.code == 2
    for choice in DECAY_INDICES:
        assert choice in called.err
    assert "hint: ringexport build --help" in called.err
