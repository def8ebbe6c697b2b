"""Find Java and run programs that use it: same result in every locale, always within a time limit."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# METEOR prints its numbers as the locale wants them, and a decimal comma cannot be parsed. The country counts too:
# English as in Germany has the comma.
_JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US")


def find_java() -> str | None:
    """Return the path of the `java` program on PATH, or None where there is none."""
    return shutil.which("java")


def java_environment() -> dict[str, str]:
    """Return this process's environment, with Java's locale fixed."""
    environment = dict(os.environ, LC_ALL="C")
    # The last value of an option wins, and _JAVA_OPTIONS wins over JAVA_TOOL_OPTIONS and the command line.
    for name in ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"):
        if name in environment or name == "JAVA_TOOL_OPTIONS":
            environment[name] = " ".join(filter(None, (environment.get(name), *_JAVA_OPTIONS)))
    return environment


def package_folder() -> Path:
    """Return the folder pycocoevalcap is installed in (a namespace package: it has no `__file__`).

    Raises:
        ModuleNotFoundError: if pycocoevalcap is not installed.
    """
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pycocoevalcap is missing: pip install pycocoevalcap", name="pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def run_java(command: Sequence[str], *, time_limit: float, stdin: bytes = b"", folder: Path | None = None) -> bytes:
    """Run a program that is, or starts, Java and return what it wrote to stdout.

    Args:
        command: The program and its arguments.
        time_limit: Seconds after which the program and every process it started are killed.
        stdin: What the program reads.
        folder: Working directory, this process's own by default.

    Raises:
        TimeoutError: if it ran longer than `time_limit`.
        RuntimeError: if it ended with another exit status than 0; the message ends with its last line of stderr.
        OSError: if it could not be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=java_environment(),
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(stdin, timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"stopped after {time_limit:g} s without a result") from None
    finally:
        # Also on Ctrl-C. The group, because a hung scorer's JVM outlives the Python process that started it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"ended with status {process.returncode}: {lines[-1] if lines else 'no error message'}")
    return output
