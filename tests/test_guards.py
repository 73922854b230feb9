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

LEVEL = {
    "_errors": 0,
    "_types": 0,
    "_plain": 0,
    "_pattern": 1,
    "_optimizer": 1,
    "_statistics": 1,
    "_layers": 2,
    "_report": 1,
    "_text": 1,
    "schedules": 1,
    "_measure": 2,
    "_importance": 2,
    "_formats": 2,
    "_html": 2,
    "_packreport": 2,
    "_io": 2,
    "_group": 3,
    "_inspect": 3,
    "_packedfile": 3,
    "kernels": 2,
    "solvers": 3,
    "_ways": 3,
    "nn": 4,
    "_recipe": 4,
    "_calibrate": 4,
    "_evaluate": 5,
    "_oneshot": 5,
    "training": 5,
    "integrations": 6,
    "_autotune": 5,
    "_packing": 6,
    "_hf": 6,
    "_packedmodel": 7,
    "_bench": 7,
    "_demo": 8,
    "cli": 9,
}

PUBLIC = [
    "Block",
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


def imported_siblings(source: str) -> set[str]:
    """Modules of the package that a module imports when it is imported itself; imports inside functions are lazy."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("secateur."):
            found.add(node.module.split(".")[1])
    return found


def test_public_names_are_the_declared_ones():
    modules = {"solvers", "cli", "nn", "schedules", "training", "integrations", "kernels"}
    public = {name for name in vars(secateur) if not name.startswith("_")} - modules
    assert public == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    public = getattr(secateur, name)
    assert public.__doc__
    assert "Args:" not in public.__doc__ or len(public.__doc__.splitlines()) > 3


def test_imports_point_down():
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]
    for path in files:
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for target in imported_siblings(path.read_text(encoding="utf-8")):
            inside = target == module
            assert inside or LEVEL[target] < LEVEL[module], f"{module} (level {LEVEL[module]}) imports {target}"


def test_every_module_has_a_level():
    packages = {"kernels", "solvers", "nn", "training", "integrations"}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | packages == set(LEVEL)


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
    from secateur import _layers

    monkeypatch.setattr(_layers, "_KINDS", dict(_layers._KINDS))  # the example of register_layer registers one
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert results.failed == 0


def test_public_callables_have_examples():
    without = {"Importance", "Solver", "LayerKind", "LayerProblem", "LayerStatistics", "Solution", "verify"}
    reports = {"Evaluation", "Histogram", "LayerReport", "Report", "SkippedLayer"}
    errors = {name for name in PUBLIC if name.endswith("Error")}
    for name in set(PUBLIC) - without - reports - errors:
        assert ">>>" in getattr(secateur, name).__doc__, name
