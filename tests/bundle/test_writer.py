import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest

import ringexport.bundle.files as files_module
import ringexport.bundle.writer as writer_module
from ringexport.bundle import BundleWriter, EngineBundle, clean_stale_builds, find_stale_builds
from ringexport.errors import OutputError
from tests.bundle.conftest import MakeBundle
from tests.bundle.samples import sample_files, sample_manifest

ROOT = Path(__file__).parents[2]


def write(path: Path, extra: bytes = b"") -> None:
    with BundleWriter(path) as writer:
        for file, content in sample_files(extra).items():
            writer.path(file).write_bytes(content)
        writer.commit(sample_manifest())


def fail_inside(path: Path, error: BaseException, expected_bytes: int | None = None) -> None:
    """Start a bundle, write half of it, then raise."""
    with BundleWriter(path, expected_bytes=expected_bytes) as writer:
        writer.path("model/config.json").write_text("new")
        raise error


def write_checked(path: Path, check: Callable[[EngineBundle], None]) -> None:
    with BundleWriter(path) as writer:
        for file, content in sample_files(b"new").items():
            writer.path(file).write_bytes(content)
        writer.commit(sample_manifest(), check=check)


def test_nothing_appears_before_commit(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with BundleWriter(target) as writer:
        writer.path("a/b").write_text("x")
        assert not target.exists()
        assert [path.name[:8] for path in tmp_path.iterdir()] == ["out.tmp-"]
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_and_removed_again(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with pytest.raises(KeyError), BundleWriter(target):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    write(target)
    EngineBundle.open(target)


@pytest.mark.parametrize("atomic", [True, False])
def test_a_bundle_is_replaced(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    old = make_bundle()
    if not atomic:
        monkeypatch.setattr(files_module, "_exchange_atomically", lambda *_: False)
    write(old.directory, b"new")
    new = EngineBundle.open(old.directory)
    assert new.digest != old.digest
    assert [path.name for path in old.directory.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_old_bundle_survives_errors(
    make_bundle: MakeBundle, error: type[BaseException]
) -> None:
    old = make_bundle()
    with pytest.raises(error):
        fail_inside(old.directory, error())
    assert EngineBundle.open(old.directory).digest == old.digest
    assert len(list(old.directory.parent.iterdir())) == 1


def test_the_old_bundle_survives_a_failed_check(make_bundle: MakeBundle) -> None:
    old = make_bundle()

    def refuse(bundle: EngineBundle) -> None:
        assert bundle.directory != old.directory
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_checked(old.directory, refuse)
    assert EngineBundle.open(old.directory).digest == old.digest


def test_the_old_bundle_survives_a_failed_exchange(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an atomic exchange, the second rename fails: the first is undone."""
    old = make_bundle()
    rename = Path.rename
    monkeypatch.setattr(files_module, "_exchange_atomically", lambda *_: False)

    def fail(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="cannot replace"):
        write(old.directory, b"new")
    assert EngineBundle.open(old.directory).digest == old.digest
    assert len(list(old.directory.parent.iterdir())) == 1


def test_a_bundle_moved_aside_by_a_dead_build_comes_back(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_bundle()
    old.directory.rename(old.directory.with_name("bundle.old-0123"))
    monkeypatch.setattr(files_module, "_GRACE_SECONDS", -1.0)
    assert clean_stale_builds(old.directory) == []
    assert EngineBundle.open(old.directory).digest == old.digest


def test_overwrite_can_be_refused(make_bundle: MakeBundle) -> None:
    old = make_bundle()
    with pytest.raises(OutputError, match="exists"), BundleWriter(old.directory, overwrite=False):
        pass


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a ringexport bundle; it is left alone"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    EngineBundle.open(tmp_path / "out")


def test_a_bundle_with_foreign_files_is_left_alone(make_bundle: MakeBundle) -> None:
    old = make_bundle()
    (old.directory / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"not part of it, such as thesis\.txt"):
        write(old.directory)
    assert (old.directory / "thesis.txt").exists()


@pytest.mark.parametrize("name", [".env", ".git/HEAD", "model/.notes"])
def test_hidden_files_are_not_lost(make_bundle: MakeBundle, name: str) -> None:
    old = make_bundle()
    path = old.directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    EngineBundle.open(old.directory)
    with pytest.raises(OutputError, match="not part of it, such as"):
        write(old.directory)
    assert path.read_text() == "mine"


def test_a_linked_directory_is_not_lost(make_bundle: MakeBundle, tmp_path: Path) -> None:
    old = make_bundle()
    (old.directory / "work").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(OutputError, match="such as work"):
        write(old.directory)


def test_the_lock_of_a_build_is_no_stranger(make_bundle: MakeBundle) -> None:
    old = make_bundle()
    (old.directory / files_module.LOCK_NAME).touch()
    write(old.directory)


def test_a_file_size_limit_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="file size limit"):
        fail_inside(tmp_path / "out", OSError(errno.EFBIG, "File too large"))


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    for name in ("n" * 300, "n" * 250):
        with pytest.raises(OutputError, match="File name too long"), BundleWriter(tmp_path / name):
            pytest.fail("the block must not run")


def test_a_file_or_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file")
    with pytest.raises(OutputError, match="is a symbolic link"):
        write(tmp_path / "link")


def test_unwritable_output_is_refused_on_entering(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OutputError, match="cannot write") as caught, BundleWriter(path):
            pytest.fail("the block must not run")
        assert caught.value.hint
        assert caught.value.exit_code == 6


def test_too_little_space_is_refused_on_entering(tmp_path: Path) -> None:
    with (
        pytest.raises(
            OutputError, match=r"may need up to 1,000,000,000,000,000,000 bytes, [\d,]+ bytes"
        ),
        BundleWriter(tmp_path / "out", expected_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_bytes(make_bundle: MakeBundle) -> None:
    old = make_bundle()
    message = r"disk is full .* may need up to 500 bytes, [\d,]+ bytes"
    with pytest.raises(OutputError, match=message) as caught:
        fail_inside(old.directory, OSError(errno.ENOSPC, "No space left"), expected_bytes=500)
    assert caught.value.exit_code == 6
    assert EngineBundle.open(old.directory).digest == old.digest
    assert len(list(old.directory.parent.iterdir())) == 1


def test_a_full_disk_while_committing(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_bundle()

    def full(path: Path) -> Never:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer_module, "sync_path", full)
    with pytest.raises(OutputError, match="disk is full"):
        write(old.directory, b"new")
    assert EngineBundle.open(old.directory).digest == old.digest


def test_paths_outside_the_bundle_are_refused(tmp_path: Path) -> None:
    from ringexport.errors import BundleError

    with BundleWriter(tmp_path / "out") as writer, pytest.raises(BundleError):
        writer.path("../evil")


SCRIPT = """
import sys, time
from pathlib import Path
from ringexport.bundle import BundleWriter
from tests.bundle.samples import sample_files, sample_manifest
for round in range(10_000):
    with BundleWriter(Path(sys.argv[1])) as writer:
        for file, content in sample_files(str(round).encode()).items():
            writer.path(file).write_bytes(content)
        writer.commit(sample_manifest())
    if round == 0:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("delay_ms", [1, 4, 7, 13])
def test_kill_at_any_moment_leaves_a_whole_bundle(
    tmp_path: Path, kind: signal.Signals, delay_ms: int
) -> None:
    """A process that replaces the bundle all the time is killed: what is there always opens."""
    target = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(target)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(delay_ms / 1000)
    os.kill(process.pid, kind)
    try:
        process.wait(timeout=20)
    finally:
        process.kill()
        process.stdout.close()
    EngineBundle.open(target)
    write(target, b"next")
    left = [path.name for path in tmp_path.iterdir() if path != target]
    # A directory killed between lock and rename is too young to be told from a living one.
    assert all(not (tmp_path / name / ".building").exists() for name in left), left
    EngineBundle.open(target)


def test_a_living_build_is_not_cleaned_away(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as first:
        first.path("a").write_text("first")
        assert find_stale_builds(tmp_path) == []
        write(tmp_path / "out")
        assert (first.directory / "a").read_text() == "first"


def test_a_dead_build_is_found_and_cleaned(tmp_path: Path) -> None:
    dead = tmp_path / "out.tmp-0123"
    (dead / "model").mkdir(parents=True)
    (dead / ".building").touch()
    (tmp_path / "other.tmp-4567").mkdir()
    assert find_stale_builds(tmp_path) == [dead]
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.tmp-4567", "out"]
