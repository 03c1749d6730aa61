"""What the documentation tells people to type and to follow: it parses, it resolves, it runs."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ringexport.cli.main import cli, run_cli

ROOT = Path(__file__).parents[2]
SYNOPSIS = r" \| |\.\.|…|COMMAND"
SKIPPED = {"bundles", "build", "node_modules", "__pycache__"}


def markdown_files() -> list[Path]:
    """Every page of the repository, without hidden and built directories."""
    found = []
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in SKIPPED]
        found += [Path(directory) / name for name in files if name.endswith(".md")]
    return sorted(found)


PAGES = markdown_files()
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    if "://" not in link and not link.startswith("mailto:")
]


def commands(page: Path) -> list[str]:
    """Complete command lines: lines of their own."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?(ringexport [^`\n]*)$", text, re.MULTILINE)
    return [line for line in lines if not re.search(SYNOPSIS, line)]


def mentions(page: Path) -> list[str]:
    """Commands in code spans, which may leave out what every command needs."""
    found = re.findall(r"`(ringexport [^`\n]+)`", page.read_text(encoding="utf-8"))
    return [line for line in found if not re.search(SYNOPSIS, line)]


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]
MENTIONS = [(page, line) for page in PAGES for line in mentions(page)]


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def parse(line: str) -> click.Context:
    """Parse a command line with the real parser, without running it."""
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    if words[0].startswith("-"):
        return click.Context(cli)
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    help_names = ["-h", "--help"]
    with_help = any(name in words for name in help_names)
    settings = {"help_option_names": help_names, "resilient_parsing": with_help}
    return command.make_context(words[0], words[1:], **settings)


def test_the_readme_has_commands_and_links() -> None:
    assert [line for page, line in COMMANDS if page.name == "README.md"]
    assert len(LINKS) > 10


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=name_of)
def test_command_lines_parse(page: Path, line: str) -> None:
    del page
    parse(line)


@pytest.mark.parametrize(("page", "line"), MENTIONS, ids=name_of)
def test_mentioned_commands_parse(page: Path, line: str) -> None:
    del page
    with contextlib.suppress(click.MissingParameter):
        parse(line)


def test_a_wrong_command_line_does_not_parse() -> None:
    for line in ("ringexport run", "ringexport run a b --nucleus 1", "ringexport buld x -o y"):
        with pytest.raises(click.UsageError):
            parse(line)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=name_of)
def test_links_resolve(page: Path, link: str) -> None:
    assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the first commands of the README have been run."""
    path = tmp_path_factory.mktemp("readme")
    output = path / "bundles" / "ring-nano"
    assert run_cli(["build", str(ROOT / "models/ring-nano"), "-o", str(output), "-q"]) == 0
    return path


def run_snippet(snippet: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python code of the README as its readers do."""
    return subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def snippets() -> list[str]:
    """Python code of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_snippets_of_the_readme_run(workplace: Path) -> None:
    assert snippets()
    for snippet in snippets():
        done = run_snippet(snippet, workplace)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_sessions_that_share_a_past_say_the_same(workplace: Path) -> None:
    (snippet,) = [one for one in snippets() if "fork" in one]
    said = run_snippet(snippet, workplace).stdout
    assert len(said) > 3
    assert said == 3 * said[: len(said) // 3]
