"""The shape of the house: public names, import levels, a light import, examples that run."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

PACKAGE = Path(secateur.__file__).parent

# A room imports only rooms above it; the ground is first, the public surface and the command are last.
ROOMS = [
    "_errors",
    "_types",
    "_checks",
    "patterns",
    "reports",
    "files",
    "layers",
    "calibration",
    "solvers",
    "schedules",
    "timing",
    "evaluation",
    "huggingface",
    "formats",
    "kernels",
    "nn",
    "pruning",
    "training",
    "packing",
    "integrations",
    "demo",
    "cli",
]

PUBLIC = [
    "Block",
    "Choice",
    "Column",
    "Evaluation",
    "FormatError",
    "GroupSparsity",
    "Histogram",
    "Importance",
    "KernelError",
    "LayerKind",
    "LayerProblem",
    "LayerReport",
    "LayerStatistics",
    "LotteryTicket",
    "Magnitude",
    "NM",
    "PackReport",
    "PackSettings",
    "PackedLayer",
    "PackedLinear",
    "PatternError",
    "RIA",
    "Random",
    "Recipe",
    "RecipeError",
    "Refit",
    "Report",
    "Row",
    "Select",
    "SkippedLayer",
    "Solution",
    "Solver",
    "SolverError",
    "SparseConv2d",
    "SparseGPT",
    "SparseLinear",
    "SparseTraining",
    "SparsityError",
    "SparsityPattern",
    "StatisticsError",
    "Unstructured",
    "Wanda",
    "densify_",
    "load",
    "pack_",
    "prune_",
    "register_layer",
    "save",
    "sparsify_",
    "unpack_",
    "verify",
]


def module_names() -> list[str]:
    return [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "secateur.")]


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """Every module of the package that a file imports, lazily or not, with the names it takes."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateur":
            found.append((node.module or "", [alias.name for alias in node.names]))
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names if alias.name.split(".")[0] == "secateur"]
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


def modules_by_name() -> dict[str, Path]:
    """Every file of the package by module name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["secateur", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def wrong_imports(module: str, imports: list[tuple[str, list[str]]]) -> list[str]:
    """What the rules of the house forbid among the imports of a module of a room."""
    wrong = []
    for target, names in imports:
        if target == "secateur" and room_of(module) in ("cli", "demo", "integrations"):
            continue  # they use secateur as anybody does
        if target == "secateur":
            rooms = [name for name in names if name in ROOMS]
            if names != rooms or not rooms:
                wrong.append(f"{module} imports {names} from the public surface")
        else:
            rooms = [room_of(target)]
        for room in rooms:
            if room == room_of(module):
                continue
            if ROOMS.index(room) > ROOMS.index(room_of(module)):
                wrong.append(f"{module} imports {room}, which lies below it")
            if target.count(".") > 1 or any(name.startswith("_") for name in names):
                wrong.append(f"{module} reaches into {target} for {names}")
    return wrong


def test_public_names_are_the_declared_ones():
    public = {name for name in vars(secateur) if not name.startswith("_")} - set(ROOMS)
    assert public == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    public = getattr(secateur, name)
    assert public.__doc__
    assert "Args:" not in public.__doc__ or len(public.__doc__.splitlines()) > 3


@pytest.mark.parametrize("module", sorted(modules_by_name()))
def test_imports_point_down_and_stop_at_the_door(module):
    if module != "secateur":
        assert not wrong_imports(module, imports_of(modules_by_name()[module]))


def test_the_guard_of_imports_can_fail():
    assert wrong_imports("secateur.patterns._pattern", [("secateur.layers", ["Layer"])])
    assert wrong_imports("secateur.layers._layers", [("secateur.patterns._pattern", ["NM"])])
    assert wrong_imports("secateur.layers._layers", [("secateur.patterns", ["_first"])])
    assert wrong_imports("secateur.layers._layers", [("secateur", ["prune_"])])
    assert not wrong_imports("secateur.layers._layers", [("secateur.patterns", ["NM"]), ("secateur._errors", [])])


def test_rooms_import_one_another_without_a_circle():
    """Modules within a room, too: each is imported on its own in a fresh interpreter's order of need."""
    modules = modules_by_name()
    needs = {
        module: {
            found
            for target, names in imports_of(path)
            for found in (target, *(f"{target}.{name}" for name in names))
            if found in modules and found != module and modules[found].name != "__init__.py"
        }
        for module, path in modules.items()
    }
    done: set[str] = set()
    while ready := {module for module, wants in needs.items() if module not in done and wants <= done}:
        done |= ready
    assert done == set(modules), f"a circle among {sorted(set(modules) - done)}"


def test_every_room_is_listed_and_says_what_it_answers():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(ROOMS)
    for room in ROOMS:
        assert importlib.import_module(f"secateur.{room}").__doc__


@pytest.mark.parametrize("module", sorted(modules_by_name()))
def test_no_file_is_too_long_for_one_job(module):
    path = modules_by_name()[module]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"transformers", "accelerate", "lightning", "matplotlib", "typer", "rich", "tokenizers"}


def test_import_is_light():
    assert not HEAVY & loaded_after("import secateur")


def test_the_light_import_guard_can_fail():
    assert HEAVY & loaded_after("import secateur, rich")


# Lightning 2.6 asks torch 2.13 about trees in a way that is going away, and wants more workers than 64 numbers need.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_run(name, monkeypatch):
    from secateur.layers import _kinds

    monkeypatch.setattr(_kinds, "_KINDS", dict(_kinds._KINDS))  # the example of register_layer registers one
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert results.failed == 0


def test_public_callables_have_examples():
    without = {"Importance", "Solver", "LayerKind", "LayerProblem", "LayerStatistics", "Solution", "verify"}
    reports = {
        "Choice",
        "Evaluation",
        "Histogram",
        "LayerReport",
        "PackReport",
        "PackSettings",
        "PackedLayer",
        "Report",
        "SkippedLayer",
    }
    errors = {name for name in PUBLIC if name.endswith("Error")}
    for name in set(PUBLIC) - without - reports - errors:
        assert ">>>" in getattr(secateur, name).__doc__, name
