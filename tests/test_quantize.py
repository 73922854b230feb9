"""Products in 8 bits: which, how exactly, and that no row changes another."""

from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
from export_cases import exact_products
from onnx_graphs import kinds, write

from secateur.exporting._fuse import fuse
from secateur.exporting._quantize import quantize, quantized

pytest.importorskip("onnxruntime")

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((32, 24)).astype(np.float32)
BIAS = RANDOM.standard_normal(24).astype(np.float32)
X = RANDOM.standard_normal((2, 5, 32)).astype(np.float32)

PRODUCTS: dict[str, list[tuple[Any, ...]]] = {
    "a product": [("MatMul", ["x", "w"], ["output"])],
    "a product and a bias": [("MatMul", ["x", "w"], ["y"]), ("Add", ["b", "y"], ["output"])],
    "behind Gelu": [("Gelu", ["x"], ["g"]), ("MatMul", ["g", "w"], ["output"])],
    "behind Relu": [("Relu", ["x"], ["g"]), ("MatMul", ["g", "w"], ["output"])],
    "behind SiLU": [("Sigmoid", ["x"], ["s"]), ("Mul", ["x", "s"], ["g"]), ("MatMul", ["g", "w"], ["output"])],
}


def relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@exact_products
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_computed_in_8_bits(name: str, tmp_path: Path) -> None:
    constants = {"w": WEIGHT, "b": BIAS} if name == "a product and a bias" else {"w": WEIGHT}
    source = write(tmp_path / "source.onnx", PRODUCTS[name], {"x": ("batch", "positions", 32)}, constants)
    found = quantize(source, tmp_path / "int8.onnx")
    assert found.products == 1
    assert not found.left
    assert kinds(tmp_path / "int8.onnx")["MatMul"] == 0
    expected = exported.run(source, {"x": X})
    assert relative_error(exported.run(tmp_path / "int8.onnx", {"x": X}), expected) < 0.02


@exact_products
@pytest.mark.parametrize("turned", [False, True])
def test_gemm_is_a_product(turned: bool, tmp_path: Path) -> None:
    weight = WEIGHT.T.copy() if turned else WEIGHT
    nodes = [("Gemm", ["x", "w", "b"], ["output"], {"transB": int(turned)})]
    source = write(tmp_path / "source.onnx", nodes, {"x": ("rows", 32)}, {"w": weight, "b": BIAS})
    assert quantize(source, tmp_path / "int8.onnx").products == 1
    expected = exported.run(source, {"x": X[0]})
    assert relative_error(exported.run(tmp_path / "int8.onnx", {"x": X[0]}), expected) < 0.02


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_is_the_same_whatever_else_is_in_its_batch(name: str, tmp_path: Path) -> None:
    """The scale of ONNX Runtime's own tool is that of the largest number of the whole batch."""
    constants = {"w": WEIGHT, "b": BIAS} if name == "a product and a bias" else {"w": WEIGHT}
    source = write(tmp_path / "source.onnx", PRODUCTS[name], {"x": ("batch", "positions", 32)}, constants)
    quantize(source, tmp_path / "int8.onnx")
    alone = exported.run(tmp_path / "int8.onnx", {"x": X[:1]})
    beside = exported.run(tmp_path / "int8.onnx", {"x": np.concatenate([X[:1], 1000 * X[1:]])})
    np.testing.assert_allclose(beside[:1], alone, rtol=1e-6)


def test_rows_of_zeros_stay_zero_and_only_the_bias_is_left(tmp_path: Path) -> None:
    nodes = PRODUCTS["a product and a bias"]
    source = write(tmp_path / "source.onnx", nodes, {"x": ("batch", "positions", 32)}, {"w": WEIGHT, "b": BIAS})
    quantize(source, tmp_path / "int8.onnx")
    x = X.copy()
    x[1, 2] = 0
    np.testing.assert_array_equal(exported.run(tmp_path / "int8.onnx", {"x": x})[1, 2], BIAS)


def test_products_of_one_input_share_its_conversion(tmp_path: Path) -> None:
    nodes = [("MatMul", ["x", "w"], ["y"]), ("MatMul", ["x", "v"], ["z"]), ("Mul", ["y", "z"], ["output"])]
    source = write(tmp_path / "source.onnx", nodes, {"x": ("batch", "positions", 32)}, {"w": WEIGHT, "v": 2 * WEIGHT})
    assert quantize(source, tmp_path / "int8.onnx").products == 2
    found = kinds(tmp_path / "int8.onnx")
    assert found["QuantizeLinear"] == 1
    assert found["MatMulIntegerToFloat"] == 2


LEFT = {
    "two inputs": ([("MatMul", ["x", "x"], ["output"])], {}, "not a product of inputs and a weight"),
    "a weight of three axes": ([("MatMul", ["x", "w"], ["output"])], {"w": np.ones((1, 8, 8), np.float32)}, "3 axes"),
    "not finite": ([("MatMul", ["x", "w"], ["output"])], {"w": np.full((8, 8), np.inf, np.float32)}, "not finite"),
    "a scaled Gemm": (
        [("Gemm", ["x", "w"], ["output"], {"alpha": 2.0})],
        {"w": np.ones((8, 8), np.float32)},
        "its result scaled",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_in_float32_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    nodes, constants, reason = LEFT[name]
    source = write(tmp_path / "source.onnx", nodes, {"x": (8, 8)}, constants)
    found = quantize(source, tmp_path / "int8.onnx")
    assert found.products == 0
    assert [reason in entry for entry in found.left.values()] == [True]
    assert kinds(tmp_path / "int8.onnx") == kinds(source)


def test_a_convolution_stays_in_float32(tmp_path: Path) -> None:
    nodes = [("Conv", ["x", "w"], ["output"])]
    constants = {"w": np.ones((4, 3, 3, 3), np.float32)}
    source = write(tmp_path / "source.onnx", nodes, {"x": ("batch", 3, 8, 8)}, constants)
    found = quantize(source, tmp_path / "int8.onnx")
    assert "a convolution" in next(iter(found.left.values()))


@pytest.mark.parametrize("embeddings", [True, False])
def test_tables_have_a_scale_for_each_row(embeddings: bool, tmp_path: Path) -> None:
    table = (
        RANDOM.standard_normal((600, 32)).astype(np.float32) * np.geomspace(0.01, 10, 600, dtype=np.float32)[:, None]
    )
    nodes = [("Cast", ["x"], ["ids"], {"to": 7}), ("Gather", ["table", "ids"], ["output"])]
    source = write(tmp_path / "source.onnx", nodes, {"x": ("rows",)}, {"table": table})
    found = quantize(source, tmp_path / "int8.onnx", embeddings=embeddings)
    assert found.embeddings == int(embeddings)
    sizes = [(tmp_path / name).stat().st_size for name in ("source.onnx", "int8.onnx")]
    assert (sizes[1] < 0.35 * sizes[0]) == embeddings
    rows = exported.run(tmp_path / "int8.onnx", {"x": np.arange(600, dtype=np.float32)})
    errors = np.linalg.norm(rows - table, axis=1) / np.linalg.norm(table, axis=1)
    assert errors.max() < 0.02


def test_weights_are_rounded_to_the_nearest_with_a_scale_for_each_output() -> None:
    weight = RANDOM.standard_t(2, (64, 10)).astype(np.float32)
    weight[:, 3] = 0
    numbers, scales = quantized(weight)
    assert numbers.dtype == np.int8
    assert (np.abs(numbers).max(axis=0) == np.where(np.arange(10) == 3, 0, 127)).all()
    assert (np.abs(numbers * scales - weight) <= 0.501 * scales).all()


@exact_products
@pytest.mark.slow
@pytest.mark.parametrize("name", exported.FAMILIES)
def test_a_whole_model_in_8_bits_stays_close(name: str, tmp_path: Path) -> None:
    source = exported.exported(name, tmp_path / "source.onnx")
    fuse(source, tmp_path / "fused.onnx")
    found = quantize(tmp_path / "fused.onnx", tmp_path / "int8.onnx")
    assert found.products >= 9
    assert kinds(tmp_path / "int8.onnx")["MatMul"] == 0
    inputs = exported.inputs_of(name, 3, 17)
    assert relative_error(exported.run(tmp_path / "int8.onnx", inputs), exported.run(source, inputs)) < 0.03
