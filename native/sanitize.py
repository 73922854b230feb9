"""Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests: `make asan`.

Every tensor then has poisoned bytes around it, torch's included, so that a kernel that reads or writes one byte outside
of what it was given ends the run.
"""

import importlib.util
import os
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


def restart() -> int:
    """Run this file again with the sanitizers loaded before all else."""
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # the interpreter and torch keep what they have until the end
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, __file__, "test"], env=environment, cwd=ROOT, check=False).returncode


def test() -> int:
    """Put the sanitized module in the place of the installed one, and run the tests of native code."""
    import pytest
    import torch  # noqa: F401  its OpenMP first

    (path,) = BUILD.glob("_native*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    tests = ["tests/test_kernels.py", "tests/test_gate.py", "tests/test_native_source.py"]
    return pytest.main(["-q", "-s", "-p", "no:cacheprovider", *tests, *sys.argv[2:]])


if __name__ == "__main__":
    if sys.argv[1:2] == ["test"]:
        sys.exit(test())
    build()
    sys.exit(restart())
