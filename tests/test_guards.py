"""The structure of the package: public names, imports between rooms, knowledge in one place, examples that run."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import secateur

PACKAGE = Path(secateur.__file__).parent

# A room imports only rooms above it.
ROOMS = [
    "_errors",
    "_types",
    "_checks",
    "_sharding",
    "patterns",
    "reports",
    "files",
    "layers",
    "calibration",
    "folding",
    "formats",
    "solvers",
    "schedules",
    "timing",
    "evaluation",
    "huggingface",
    "kernels",
    "nn",
    "zeros",
    "pruning",
    "training",
    "shapes",
    "graph",
    "surgery",
    "shrinking",
    "permuting",
    "recovery",
    "packing",
    "engines",
    "exporting",
    "pipeline",
    "comparison",
    "planning",
    "integrations",
    "demo",
    "cli",
]

PUBLIC = [
    "ADMM",
    "ALPS",
    "AllocatedLayer",
    "AllocationReport",
    "Block",
    "Choice",
    "Column",
    "ComparisonReport",
    "Evaluation",
    "EvaluationReport",
    "ExportReport",
    "Figure",
    "Fisher",
    "FoldReport",
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
    "ModelTime",
    "ModelWeights",
    "Movement",
    "NM",
    "PackReport",
    "PackSettings",
    "PackedLayer",
    "PackedLinear",
    "PatternError",
    "PermutationReport",
    "Pipeline",
    "PipelineReport",
    "Plan",
    "PlanReport",
    "Pooling",
    "RIA",
    "Random",
    "Recipe",
    "RecipeError",
    "RecoveryReport",
    "Refit",
    "Report",
    "Row",
    "Select",
    "ShrinkReport",
    "SkippedLayer",
    "Solution",
    "Solver",
    "SolverError",
    "SparseConv2d",
    "SparseGPT",
    "Swaps",
    "SparseLinear",
    "SparseTraining",
    "SparsityError",
    "SparsityPattern",
    "StatisticsError",
    "Taylor",
    "TransposableNM",
    "Unstructured",
    "Verification",
    "Wanda",
    "allocate",
    "apply_masks_",
    "bucket",
    "compare",
    "densify_",
    "evaluate",
    "export",
    "fold_",
    "load",
    "masks",
    "optimize_",
    "pack_",
    "permute_",
    "plan",
    "prune_",
    "recover_",
    "register_layer",
    "save",
    "shrink_",
    "sparsify_",
    "unpack_",
    "verify",
]


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """Every module of the package that a file imports, also inside of functions, with the imported names."""
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
    """The imports of a module that the rules forbid."""
    wrong = []
    for target, names in imports:
        if target == "secateur" and room_of(module) in ("cli", "demo", "integrations"):
            continue  # they use the public names, as users do
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
                wrong.append(f"{module} imports {room}, which is below it")
            if target.count(".") > 1 or any(name.startswith("_") for name in names):
                wrong.append(f"{module} reaches into {target} for {names}")
    return wrong


def test_public_names_are_the_declared_ones():
    public = {name for name in vars(secateur) if not name.startswith("_")} - set(ROOMS)
    assert public == set(PUBLIC)


def test_public_names_are_documented():
    for name in PUBLIC:
        assert getattr(secateur, name).__doc__, name


def test_a_room_imports_only_public_names_of_rooms_above_it():
    modules = {module: path for module, path in modules_by_name().items() if module != "secateur"}
    assert not [wrong for module, path in modules.items() for wrong in wrong_imports(module, imports_of(path))]


def test_the_guard_of_imports_can_fail():
    assert wrong_imports("secateur.patterns._pattern", [("secateur.layers", ["Layer"])])
    assert wrong_imports("secateur.layers._layers", [("secateur.patterns._pattern", ["NM"])])
    assert wrong_imports("secateur.layers._layers", [("secateur.patterns", ["_first"])])
    assert wrong_imports("secateur.layers._layers", [("secateur", ["prune_"])])
    assert not wrong_imports("secateur.layers._layers", [("secateur.patterns", ["NM"]), ("secateur._errors", [])])


def test_rooms_import_one_another_without_a_circle():
    """Nor do the modules of one room: they can be put in an order in which each imports only earlier ones."""
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


def test_every_room_is_listed_and_has_a_docstring():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} == set(ROOMS)
    for room in ROOMS:
        assert importlib.import_module(f"secateur.{room}").__doc__


def too_long(path: Path, most: int) -> bool:
    return len(path.read_text(encoding="utf-8").splitlines()) > most


def test_no_file_has_more_than_one_job():
    assert not [module for module, path in modules_by_name().items() if too_long(path, 500)]
    assert too_long(PACKAGE / "__init__.py", 10)  # the guard can fail


# Knowledge that only one file, or a few, may have


def calls(tree: ast.AST, *functions: str) -> Iterator[tuple[str, list[object]]]:
    """The calls of functions or methods of these names, each with the constants among its arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in functions:
                yield name, [argument.value for argument in node.args if isinstance(argument, ast.Constant)]


def constants(tree: ast.AST) -> Iterator[object]:
    """Constants in the code, parts of f-strings among them, but no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Attributes, with the name that they are taken from where it is a single one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else f".{node.attr}"


def knows_dtensor(tree: ast.AST) -> list[str]:
    words = {"full_tensor", "device_mesh", "placements", "to_local"}
    asked = [str(c) for _, found in calls(tree, "hasattr", "getattr") for c in found if c in words]
    return asked + [name for name in attributes(tree) if name.rpartition(".")[2] in words]


def imports_transformers(tree: ast.AST) -> list[str]:
    found = [str(c) for _, found in calls(tree, "import_module", "__import__", "find_spec", "get") for c in found[:1]]
    for node in ast.walk(tree):
        found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
    return [name for name in found if name.split(".")[0] == "transformers"]


def knows_texts_of_routes(tree: ast.AST) -> list[str]:
    text = re.compile(r"(bitmask|panels|groups|tiles|rows|columns|lanes|strips|dense|prepacked)[:@]")
    cut = [str(c) for _, found in calls(tree, "partition", "rpartition", "split", "rsplit") for c in found[:1]]
    return [c for c in constants(tree) if isinstance(c, str) and text.match(c)] + [c for c in cut if c in (":", "@")]


def knows_the_range_of_int8(tree: ast.AST) -> list[str]:
    return [str(c) for c in constants(tree) if type(c) in (int, float) and c == 127]


def makes_files_appear(tree: ast.AST) -> list[str]:
    temporary = {"mkdtemp", "mkstemp", "NamedTemporaryFile"}
    return [name for name in attributes(tree) if name == "os.replace" or name.rpartition(".")[2] in temporary]


@dataclass(frozen=True)
class Knowledge:
    """What few files may know.

    Args:
        find: returns the places in the code of a file that know it.
        allowed: the modules or rooms that may.
        example: code that knows it.
    """

    find: Callable[[ast.AST], list[str]]
    allowed: tuple[str, ...]
    example: str


KNOWLEDGE = {
    "sharded tensors": Knowledge(knows_dtensor, ("_sharding",), 'hasattr(weight, "full_tensor")'),
    "the transformers library": Knowledge(
        imports_transformers,
        # The last two have transformers' Conv1D. They look it up only where a model may have such a layer.
        ("huggingface", "integrations", "layers._kinds", "nn._packed"),
        "def f():\n    from transformers.pytorch_utils import Conv1D",
    ),
    "texts of routes": Knowledge(
        knows_texts_of_routes,
        ("kernels", "timing._machine"),  # the latter reads "key: value" from the system
        'name, _, size = text.partition(":")',
    ),
    # Other engines have 8 bits of their own.
    "scales of int8": Knowledge(
        knows_the_range_of_int8,
        ("formats._grid", "exporting._quantize"),
        "scale = largest / 127",
    ),
    "replacing files": Knowledge(makes_files_appear, ("files._whole",), "os.replace(partial, path)"),
}


def is_allowed(module: str, allowed: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"secateur.{place}.") for place in allowed)


@pytest.mark.parametrize("what", KNOWLEDGE)
def test_only_a_few_files_know(what):
    guard = KNOWLEDGE[what]
    for module, path in modules_by_name().items():
        if not is_allowed(module, guard.allowed):
            found = guard.find(ast.parse(path.read_text(encoding="utf-8")))
            assert not found, f"{module} knows {what}: {found}"


@pytest.mark.parametrize("what", KNOWLEDGE)
def test_each_guard_of_knowledge_can_fail(what):
    guard = KNOWLEDGE[what]
    assert guard.find(ast.parse(guard.example))
    assert not guard.find(ast.parse(f'"""Says {guard.example!r}."""'))
    for place in guard.allowed:  # each is needed
        found = [path for module, path in modules_by_name().items() if is_allowed(module, (place,))]
        assert any(guard.find(ast.parse(path.read_text(encoding="utf-8"))) for path in found), place


def test_only_conv1d_of_transformers_is_known_outside_of_its_rooms():
    for module in ("secateur.layers._kinds", "secateur.nn._packed"):
        found = imports_transformers(ast.parse(modules_by_name()[module].read_text(encoding="utf-8")))
        assert set(found) == {"transformers.pytorch_utils"}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"transformers", "accelerate", "lightning", "matplotlib", "typer", "rich", "tokenizers", "scipy"}


def test_import_is_light():
    assert not HEAVY & loaded_after("import secateur")


def test_the_light_import_guard_can_fail():
    assert HEAVY & loaded_after("import secateur, rich")


# Lightning 2.6 uses a deprecated name of PyTorch 2.13, and warns of few workers even for 64 numbers.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(
    "name", [name for name, path in sorted(modules_by_name().items()) if ">>> " in path.read_text(encoding="utf-8")]
)
def test_examples_in_docstrings_run(name, monkeypatch):
    from secateur.layers import _kinds

    monkeypatch.setattr(_kinds, "_KINDS", dict(_kinds._KINDS))  # the example of register_layer adds one
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert results.attempted
    assert results.failed == 0


def test_public_callables_have_examples():
    without = {"Importance", "Solver", "LayerKind", "LayerProblem", "LayerStatistics", "Solution", "verify"}
    reports = {
        "AllocatedLayer",
        "AllocationReport",
        "Choice",
        "Evaluation",
        "EvaluationReport",
        "ExportReport",
        "Figure",
        "FoldReport",
        "Histogram",
        "LayerReport",
        "ModelTime",
        "ModelWeights",
        "PackReport",
        "PackSettings",
        "PackedLayer",
        "Report",
        "SkippedLayer",
        "Verification",
    }
    errors = {name for name in PUBLIC if name.endswith("Error")}
    for name in set(PUBLIC) - without - reports - errors:
        assert ">>>" in getattr(secateur, name).__doc__, name
