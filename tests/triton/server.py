"""A real tritonserver, from the wheel of PyTriton, in an environment of its own.

That wheel's Python backend was built for numpy 1 and its metadata forbids numpy 2, so it is not
installed beside ringexport. The environment holds numpy 1.26 and the wheel, and sees the packages
of this Python behind them.
"""

import contextlib
import fcntl
import os
import platform
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Server", "UnavailableError", "run_server", "server_environment"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 90.0


class UnavailableError(Exception):
    """No tritonserver can run here."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    grpc: str
    http: str
    log: Path


def server_environment() -> Path:
    """Return the folder of the environment; it is made once and kept below build/."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError("the wheel nvidia-pytriton is for Linux on x86-64")
    library = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("LDLIBRARY")
    if library.suffix != ".so" or not library.exists():
        raise UnavailableError(f"this Python has no shared library: {library}")
    folder = ROOT / "build" / f"tritonserver-{VERSION}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        venv.create(partial, with_pip=False, symlinks=True)
        packages = partial / "lib" / f"python{VERSION}" / "site-packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--disable-pip-version-check", "--target", str(packages), *PACKAGES]
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=240)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UnavailableError(f"cannot install {' and '.join(PACKAGES)}: {last}")
        backend = packages / "pytriton" / "tritonserver"
        stub = "triton_python_backend_stub"
        if not (backend / "python_backend_stubs" / VERSION / stub).exists():
            raise UnavailableError(f"the wheel has no Python backend for Python {VERSION}")
        shutil.copy(
            backend / "python_backend_stubs" / VERSION / stub, backend / "backends" / "python"
        )
        for program in (backend / "bin" / "tritonserver", backend / "backends" / "python" / stub):
            program.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def run_server(repositories: Sequence[Path], folder: Path) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        repositories: what it serves.
        folder: for its log and the list of packages.
    """
    environment = server_environment()
    packages = environment / "lib" / f"python{VERSION}" / "site-packages"
    # Written anew: the environment is kept, and whoever runs the tests next may be another Python.
    behind = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (packages / "zz-behind.pth").write_text(behind)
    tritonserver = packages / "pytriton" / "tritonserver"
    http, grpc = _free_port(), _free_port()
    command = [
        str(tritonserver / "bin" / "tritonserver"),
        *(f"--model-repository={path}" for path in repositories),
        f"--backend-directory={tritonserver / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name=ringexport-{uuid.uuid4().hex[:8]}",
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1"),
        *(f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false"),
        "--exit-timeout-secs=20",
    ]
    libraries = [str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    env = os.environ | {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
    }
    log = folder / "tritonserver.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        try:
            _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
            yield Server(f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}", log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"tritonserver did not start:\n{log.read_text()[-6000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
