"""Graphs for ONNX Runtime: fewer operators, the same numbers."""

from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
from onnx_graphs import kinds, write

from secateur import FormatError
from secateur.exporting._fuse import fuse

pytest.importorskip("onnxruntime")

# Each is exported, which takes seconds. Opset 23 has attention as an operator already, on four axes.
EXPORTED = [pytest.param(name, 20, marks=[] if name == "bert" else pytest.mark.slow) for name in exported.FAMILIES]
EXPORTED += [pytest.param(name, 23, marks=pytest.mark.slow) for name in ("bert", "vit")]


@pytest.mark.parametrize(("name", "opset"), EXPORTED)
def test_a_fused_model_computes_the_same_with_one_operator_for_attention(name: str, opset: int, tmp_path: Path) -> None:
    source = exported.exported(name, tmp_path / "source.onnx", opset)
    found = fuse(source, tmp_path / "fused.onnx")
    assert found.counts["attention"] == 2
    assert not found.left
    assert kinds(tmp_path / "fused.onnx")["Softmax"] == 0
    for rows, positions in ((2, 6), (1, 9), (3, 17)):
        inputs = exported.inputs_of(name, rows, positions)
        expected = exported.run(source, inputs)
        error = np.abs(exported.run(tmp_path / "fused.onnx", inputs) - expected).max()
        assert error <= 1e-5 * np.abs(expected).max()


SIZES = {"batch": 2, "positions": 5, "width": 8, "heads": 2}
CONSTANTS = {
    "cut": np.array([0, 0, 2, 4]),
    "join": np.array([0, 0, 8]),
    "scale": np.array(0.5, np.float32),
    "zero": np.array(0, np.float32),
    "hidden": np.array(-np.inf, np.float32),
}


def attention(variant: str) -> list[tuple[Any, ...]]:
    """Attention as different exporters write it."""
    turn = {"perm": [0, 2, 1, 3]}
    nodes: list[tuple[Any, ...]] = []
    for name in "qkv":
        order = {"perm": [0, 2, 3, 1]} if name == "k" and variant == "keys turned at once" else turn
        nodes += [("Reshape", [name, "cut"], [f"{name}4"]), ("Transpose", [f"{name}4"], [f"{name}t"], order)]
    keys = "kt" if variant == "keys turned at once" else "kk"
    if keys == "kk":
        nodes.append(("Transpose", ["kt"], ["kk"], {"perm": [0, 1, 3, 2]}))
    query = "qt"
    if variant == "scaled before":
        nodes.append(("Mul", ["scale", "qt"], ["qs"]))
        query = "qs"
    nodes.append(("MatMul", [query, keys], ["s"]))
    scores = "s" if variant == "scaled before" else "sd"
    if scores == "sd":
        nodes.append(("Div", ["s", "scale"], ["sd"]))
    if variant != "no mask":
        mask = {"rows": "mask_rows", "two masks": "mask", "mask first": "mask"}.get(variant, "mask")
        nodes.append(("Add", [mask, scores] if variant == "mask first" else [scores, mask], ["sm"]))
        scores = "sm"
    if variant == "two masks":
        nodes.append(("Add", ["sm", "mask_rows"], ["sn"]))
        scores = "sn"
    nodes.append(("Softmax", [scores], ["p"], {"axis": -1}))
    nodes += [("IsNaN", ["p"], ["nan"]), ("Where", ["nan", "zero", "p"], ["pp"])] if variant == "rows" else []
    nodes.append(("MatMul", ["pp" if variant == "rows" else "p", "vt"], ["o"]))
    return [*nodes, ("Transpose", ["o"], ["ot"], turn), ("Reshape", ["ot", "join"], ["output"])]


VARIANTS = ("plain", "no mask", "scaled before", "mask first", "rows", "two masks", "keys turned at once")


def write_attention(path: Path, variant: str) -> tuple[Path, dict[str, Any]]:
    shape: tuple[Any, ...] = ("batch", "positions", 8)
    nodes, random = attention(variant), np.random.default_rng(0)
    inputs = {name: random.standard_normal((2, 5, 8)).astype(np.float32) for name in "qkv"}
    shapes: dict[str, tuple[Any, ...]] = dict.fromkeys("qkv", shape)
    read = {name for node in nodes for name in node[1]}
    if "mask" in read:
        inputs["mask"] = np.where(random.random((2, 1, 5, 5)) < 0.4, -1e9, 0).astype(np.float32)
        shapes["mask"] = ("batch", 1, "positions", "positions")
    if "mask_rows" in read:
        inputs["mask_rows"] = np.zeros((2, 1, 1, 5), np.float32)
        inputs["mask_rows"][0, :, :, 3:] = -np.inf
        inputs["mask_rows"][1] = -np.inf if variant == "rows" else 0  # only the exporter's own guard makes sense of it
        shapes["mask_rows"] = ("batch", 1, 1, "positions")
    return write(path, nodes, shapes, {name: value for name, value in CONSTANTS.items() if name in read}), inputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_found_however_it_is_written(variant: str, tmp_path: Path) -> None:
    source, inputs = write_attention(tmp_path / "source.onnx", variant)
    found = fuse(source, tmp_path / "fused.onnx")
    assert found.counts == {"attention": 1}
    assert not found.left
    assert kinds(tmp_path / "fused.onnx")["Transpose"] == 0
    expected = exported.run(source, inputs)
    np.testing.assert_allclose(exported.run(tmp_path / "fused.onnx", inputs), expected, rtol=1e-5, atol=1e-6)


def test_an_output_that_others_read_keeps_its_nodes(tmp_path: Path) -> None:
    nodes = [
        *attention("plain"),
        ("ReduceMean", ["p"], ["mean"], {"keepdims": 0}),
        ("Add", ["output", "mean"], ["end"]),
    ]
    constants = {name: value for name, value in CONSTANTS.items() if name in ("cut", "join", "scale")}
    shapes: dict[str, tuple[Any, ...]] = dict.fromkeys("qkv", ("batch", "positions", 8))
    shapes["mask"] = ("batch", 1, "positions", "positions")
    source = write(tmp_path / "source.onnx", nodes, shapes, constants)
    found = fuse(source, tmp_path / "fused.onnx")
    assert "attention" not in found.counts
    assert kinds(tmp_path / "fused.onnx") == kinds(source)


def test_a_sum_before_a_normalisation_is_kept_from_the_slow_operator_of_both(tmp_path: Path) -> None:
    nodes = [("Add", ["x", "y"], ["s"]), ("LayerNormalization", ["s", "weight"], ["output"])]
    shapes: dict[str, tuple[Any, ...]] = {"x": ("rows", 4), "y": ("rows", 4)}
    source = write(tmp_path / "source.onnx", nodes, shapes, {"weight": np.ones(4, np.float32)})
    assert fuse(source, tmp_path / "fused.onnx").counts == {"sums before a normalisation": 1}
    inputs = {name: np.arange(8, dtype=np.float32).reshape(2, 4) ** 2 for name in "xy"}
    np.testing.assert_array_equal(exported.run(tmp_path / "fused.onnx", inputs), exported.run(source, inputs))


def test_a_graph_that_is_not_known_stays_and_the_result_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "source.onnx", [("Relu", ["x"], ["output"])], {"x": ("rows", 4)})
    found = fuse(source, tmp_path / "fused.onnx")
    assert not found.counts
    assert "no attention" in found.left["the file"]
    assert kinds(tmp_path / "fused.onnx") == kinds(source)


def test_an_old_version_of_the_operators_is_left_with_the_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "source.onnx", [("Relu", ["x"], ["output"])], {"x": ("rows", 4)}, opset=13)
    assert "opset 13" in fuse(source, tmp_path / "fused.onnx").left["the file"]


def test_weights_in_a_second_file_stay_in_one(tmp_path: Path) -> None:
    import onnx

    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    plain = write(tmp_path / "plain.onnx", [("MatMul", ["x", "w"], ["output"])], {"x": ("rows", 32)}, {"w": weight})
    source, output = tmp_path / "source.onnx", tmp_path / "fused.onnx"
    onnx.save(onnx.load(plain), source, save_as_external_data=True, location="weights", size_threshold=0)
    for _ in range(2):  # a file that is written again does not grow
        fuse(source, output)
        assert (tmp_path / "fused.onnx.data").stat().st_size == weight.nbytes
    inputs = {"x": weight[:2]}
    np.testing.assert_array_equal(exported.run(output, inputs), exported.run(plain, inputs))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source.onnx").write_bytes(b"no model")
    with pytest.raises(FormatError, match="not an ONNX file"):
        fuse(tmp_path / "source.onnx", tmp_path / "fused.onnx")


def test_a_file_does_not_tell_where_it_was_exported(tmp_path: Path) -> None:
    import onnx

    source = write(tmp_path / "source.onnx", [("Relu", ["x"], ["output"])], {"x": ("rows", 4)})
    model = onnx.load(source)
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/someone/model.py")
    onnx.save(model, source)
    fuse(source, tmp_path / "fused.onnx")
    assert b"someone" not in (tmp_path / "fused.onnx").read_bytes()
