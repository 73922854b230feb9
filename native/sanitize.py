"""Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests: `make asan`.

After that, `python native/sanitize.py run SCRIPT ARGUMENTS` runs a script with the kernels that were built.

Every tensor then has poisoned bytes around it, torch's included, so that a kernel that reads or writes one byte outside
of what it was given ends the run.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
NAME = "secateur.kernels._native"


def build() -> None:
    """Compile into a folder of its own."""
    cmake = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-DSECATEUR_SANITIZE=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(cmake, check=True)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True)


def library(name: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def restart(*arguments: str) -> int:
    """Run this file again with the sanitizers loaded before all else."""
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        # No leaks: the interpreter and torch keep what they have until the end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def put_in_place() -> None:
    """Put the sanitized module in the place of the installed one."""
    import torch  # noqa: F401  its OpenMP first

    (path,) = BUILD.glob("_native*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


def test() -> int:
    """Run the tests of native code."""
    import pytest

    tests = ["tests/test_kernels.py", "tests/test_packed_conv.py", "tests/test_gate.py", "tests/test_native_source.py"]
    return pytest.main(["-q", "-s", "-p", "no:cacheprovider", *tests, *sys.argv[2:]])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["test", *_]:
            put_in_place()
            sys.exit(test())
        case ["script", script, *arguments]:
            put_in_place()
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
        case ["run", script, *arguments]:
            sys.exit(restart("script", script, *arguments))
        case _:
            build()
            sys.exit(restart("test"))
