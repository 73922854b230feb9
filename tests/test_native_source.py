"""The shape of native/: where instruction sets may appear, that the lists are complete, and the format of the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur import kernels
from secateur.kernels._load import load

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "native"
SOURCES = sorted(path for path in NATIVE.rglob("*") if path.suffix in {".h", ".cpp"})
INTRINSIC = re.compile(r"__(AVX|SSE|ARM_)\w*|\b_mm\d*_\w+|\b__m(64|128|256|512)\w*|\w*intrin\.h|\barm_neon\.h")


def name_of(path: Path) -> str:
    return path.relative_to(NATIVE).as_posix()


def entries(path: str, macro: str) -> list[tuple[str, str]]:
    """The first two columns of a list of macro calls."""
    return re.findall(rf"^{macro}\((\w+), *(\w+),", (NATIVE / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_instruction_sets_stay_in_simd():
    found = [
        f"{name_of(path)}: {match.group()}"
        for path in SOURCES
        if path.parent.name != "simd"
        for match in INTRINSIC.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_guard_of_instruction_sets_can_fail():
    simd = (NATIVE / "simd" / "avx512.h").read_text(encoding="utf-8")
    tokens = {match.group() for match in INTRINSIC.finditer(simd + "#if defined(__AVX2__)\n#include <immintrin.h>")}
    assert {"__m512", "_mm512_loadu_ps", "__AVX2__", "immintrin.h"} <= tokens


def test_every_operation_is_listed():
    files = {path.stem for path in (NATIVE / "ops").iterdir()} - {"list"}
    listed = entries("ops/list.h", "(?:OP|BYTES)")
    assert files == {file for file, _ in listed}
    for file, function in listed:
        assert f"inline void {function}(const " in (NATIVE / "ops" / f"{file}.h").read_text(encoding="utf-8")


def test_every_instruction_set_is_listed():
    """One header each, whose first line has the compiler's options; the other headers there serve several."""
    headers = {
        path.stem
        for path in (NATIVE / "simd").iterdir()
        if path.read_text(encoding="utf-8").splitlines()[0].startswith("// compile:")
    }
    assert headers == {isa for isa, _ in entries("isa/list.h", "ISA")}
    shared = {path.stem for path in (NATIVE / "simd").iterdir()} - headers
    assert shared == {"types", "vector", "x86"}


@pytest.mark.skipif(not kernels.isas(), reason="no native module")
def test_the_module_has_what_the_lists_say():
    native = load()
    assert not isinstance(native, str)
    listed = [isa for isa, _ in entries("isa/list.h", "ISA")]
    assert native.isas() == [isa for isa in listed if isa in native.isas()]
    assert native.isas()[-1] == "generic"
    assert native.has("generic")
    assert not native.has("sse9")
    for _, function in entries("ops/list.h", "(?:OP|BYTES)"):
        assert hasattr(native, function) or hasattr(native, "".join(map(str.capitalize, function.split("_"))))
    with pytest.raises(ValueError, match="instruction set 'sse9'"):
        native.Bitmask("sse9", 0, 0, 0, 0, 0, 0, 0)


def test_code_is_formatted():
    expected = re.search(r"clang-format (\d+)", (ROOT / ".clang-format").read_text(encoding="utf-8"))
    assert expected
    beside = Path(sys.executable).with_name("clang-format")
    program = str(beside) if beside.exists() else shutil.which("clang-format")
    if program is None:
        pytest.skip("clang-format is not installed")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if f"version {expected[1]}." not in version:
        pytest.skip(f"the format is that of clang-format {expected[1]}, this is {version.strip()}")
    wrong = subprocess.run(
        [program, "--dry-run", "--Werror", *map(str, SOURCES)], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 0, wrong.stderr


def test_options_of_an_instruction_set_are_where_the_build_reads_them():
    """A comment that is folded anew can hide them: then kernels lack instructions, and are right but slow."""
    headers = sorted((ROOT / "native" / "simd").glob("*.h"))
    for header in headers:
        for line in header.read_text().splitlines():
            if line.startswith("//") and (" -m" in line or "refines:" in line):
                assert line.startswith(("// compile: -m", "// refines: ")), f"{header.name}: {line}"
    refining = {header.stem for header in headers if "\n// refines: " in header.read_text()}
    assert refining == {"avx2_vnni", "avx512_vnni", "avx512_vbmi2"}
