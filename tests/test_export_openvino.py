"""From an ONNX file to OpenVINO's files: what is rounded, by how much, and what is said of the rest."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from export_cases import exact_products, needs_engine

from secateur._errors import FormatError, RecipeError, StatisticsError
from secateur.engines import ENGINES, import_openvino
from secateur.exporting._openvino import convert

needs_engine("openvino")
onnx = pytest.importorskip("onnx")

VOCABULARY, WIDTH = 300, 32
Arrays = Mapping[str, np.ndarray]


def save(path: Path, nodes, inputs, outputs, constants: Arrays) -> Path:
    def described(table):
        return [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in table.items()]

    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    nodes = [onnx.helper.make_node(kind, list(i), [o], name=f"node_{o}", **rest) for kind, i, o, rest in nodes]
    graph = onnx.helper.make_graph(nodes, "graph", described(inputs), described(outputs), tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def text_model(path: Path, *, inner: int = 64, loud: float = 1.0) -> Path:
    """Embeddings, two products with an activation, and a head on the first token; some channels can be loud."""
    table = numbers(VOCABULARY, WIDTH, seed=1)
    table[:, 3] *= loud
    constants = {
        "table": table,
        "up": numbers(WIDTH, inner, seed=2) / WIDTH**0.5,
        "down": numbers(inner, WIDTH, seed=3) / inner**0.5,
        "head": numbers(12, WIDTH, seed=4) / WIDTH**0.5,
        "bias": numbers(12, seed=5),
        "first": np.array(0),
    }
    nodes = [
        ("Gather", ["table", "input_ids"], "h", {}),
        ("MatMul", ["h", "up"], "u", {}),
        ("Relu", ["u"], "a", {}),
        ("MatMul", ["a", "down"], "hidden", {}),
        ("Gather", ["hidden", "first"], "token", {"axis": 1}),
        ("Gemm", ["token", "head", "bias"], "logits", {"transB": 1}),
    ]
    ids = (onnx.TensorProto.INT64, ["batch", "length"])
    outputs = {"hidden": (onnx.TensorProto.FLOAT, ["batch", "length", WIDTH]), "logits": (1, ["batch", 12])}
    return save(path, nodes, {"input_ids": ids}, outputs, constants)


def image_model(path: Path) -> Path:
    constants = {"w1": numbers(16, 3, 3, 3) / 5, "w2": numbers(16, 1, 5, 5) / 5, "w3": numbers(24, 16, 1, 1) / 4}
    nodes = [
        ("Conv", ["pixels", "w1"], "a", {"pads": [1, 1, 1, 1]}),
        ("Relu", ["a"], "b", {}),
        ("Conv", ["b", "w2"], "c", {"group": 16, "pads": [2, 2, 2, 2]}),
        ("Conv", ["c", "w3"], "out", {}),
    ]
    return save(
        path,
        nodes,
        {"pixels": (1, ["batch", 3, "height", "width"])},
        {"out": (1, ["batch", 24, "height", "width"])},
        constants,
    )


def texts(seed: int = 7, shape: tuple[int, int] = (4, 9)) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(seed).integers(0, VOCABULARY, shape)}


def images(seed: int = 7) -> dict[str, np.ndarray]:
    return {"pixels": numbers(2, 3, 12, 10, seed=seed)}


EVERY_WORD = {"input_ids": np.arange(VOCABULARY).reshape(-1, 1)}
MODELS = {"texts": (text_model, texts, 4), "images": (image_model, images, 3)}


def run(path: Path, feeds: Arrays) -> dict[str, np.ndarray]:
    return ENGINES["openvino"].load(path, "float32", 1)(feeds)


def error(found: Arrays, right: Arrays) -> float:
    """The largest relative error, in the Frobenius norm, of all outputs."""
    assert set(found) == set(right)
    assert all(found[name].shape == right[name].shape for name in right)
    return max(float(np.linalg.norm(found[n] - right[n]) / np.linalg.norm(right[n])) for n in right)


def kinds_of_constants(path: Path) -> dict[str, int]:
    """Bytes of the constants in a file, by type."""
    found: dict[str, int] = {}
    for node in import_openvino().Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type().get_type_name()
            found[kind] = found.get(kind, 0) + node.get_byte_size()
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_float32_is_exact_and_any_shape_goes(tmp_path, kind):
    make, inputs, _ = MODELS[kind]
    source = make(tmp_path / "model.onnx")
    done = convert(source, tmp_path / "out" / "openvino", int8=False)
    assert [file.name for file in done.files] == ["openvino_model.xml", "openvino_model.bin"]
    assert done.nbytes == sum(file.stat().st_size for file in done.files)
    assert not done.in_8_bits
    for feeds in (inputs(), {name: value[:1] for name, value in inputs(9).items()}):
        assert error(run(done.files[0], feeds), run(source, feeds)) < 1e-6


def test_half_is_half_as_large_and_nearly_exact(tmp_path):
    source = text_model(tmp_path / "model.onnx")
    full, half = (convert(source, tmp_path / str(flag), int8=False, half=flag) for flag in (False, True))
    sizes = [done.files[1].stat().st_size for done in (full, half)]
    assert sizes[1] < 0.55 * sizes[0]
    assert 0 < error(run(half.files[0], texts()), run(source, texts())) < 1e-3


@exact_products
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_8_bits_are_a_quarter_and_close(tmp_path, kind, calibrated):
    make, inputs, weights = MODELS[kind]
    source = make(tmp_path / "model.onnx")
    given = [EVERY_WORD if kind == "texts" else images(seed) for seed in range(4)] if calibrated else None
    done = convert(source, tmp_path / "8", int8=True, calibration=given)
    assert len(done.in_8_bits) == weights
    assert done.ranges == (3 if calibrated else 0)
    found, before = kinds_of_constants(done.files[0]), kinds_of_constants(source)
    assert 4 * found["i8"] == before["f32"] - small_floats(source)
    assert error(run(done.files[0], inputs()), run(source, inputs())) < 0.03


def small_floats(source: Path) -> int:
    """Bytes of the float constants that are too small for 8 bits."""
    nodes = import_openvino().Core().read_model(source).get_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    return sum(c.get_byte_size() for c in constants if c.get_element_type().is_real() and c.data.size < 256)


@pytest.mark.parametrize("inner", [16, 20, 33, 64, 100, 200])
def test_inputs_that_do_not_fill_groups_are_right(tmp_path, inner):
    """A shrunk layer has any number of neurons, and OpenVINO rounds inputs in groups of 64."""
    source = text_model(tmp_path / "model.onnx", inner=inner)
    done = convert(source, tmp_path / "8", int8=True)
    assert "down" in done.in_8_bits
    assert error(run(done.files[0], texts()), run(source, texts())) < 0.03


def test_the_file_says_how_inputs_are_rounded(tmp_path):
    source = text_model(tmp_path / "model.onnx")
    done = convert(source, tmp_path / "8", int8=True)
    compiled = import_openvino().Core().compile_model(done.files[0], "CPU")
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 64


def test_loud_channels_do_not_drown_the_others(tmp_path):
    """One range for all channels of a layer would leave the quiet ones a few steps."""
    source = text_model(tmp_path / "model.onnx", loud=300.0)
    done = convert(source, tmp_path / "8", int8=True, calibration=[EVERY_WORD])
    assert error(run(done.files[0], texts()), run(source, texts())) < 0.03


@exact_products
def test_channels_that_are_always_zero_stay_finite(tmp_path):
    source = text_model(tmp_path / "model.onnx", loud=0.0)
    done = convert(source, tmp_path / "8", int8=True, calibration=[EVERY_WORD])
    assert error(run(done.files[0], texts()), run(source, texts())) < 0.03


def test_a_table_that_is_also_a_head_is_stored_once(tmp_path):
    constants = {"table": numbers(VOCABULARY, WIDTH)}
    nodes = [
        ("Gather", ["table", "input_ids"], "h", {}),
        ("Transpose", ["table"], "turned", {"perm": [1, 0]}),
        ("MatMul", ["h", "turned"], "logits", {}),
    ]
    ids = {"input_ids": (onnx.TensorProto.INT64, ["batch", "length"])}
    source = save(tmp_path / "m.onnx", nodes, ids, {"logits": (1, ["batch", "length", VOCABULARY])}, constants)
    done = convert(source, tmp_path / "8", int8=True)
    assert done.in_8_bits == ("table",)
    assert done.files[1].stat().st_size < 1.3 * VOCABULARY * WIDTH
    assert error(run(done.files[0], texts()), run(source, texts())) < 0.03


@exact_products
def test_masked_rows_do_not_count(tmp_path):
    """Where the mask is 0 the ids are those of one very loud token."""
    source = masked_model(tmp_path / "model.onnx")
    mask = np.ones((4, 9), dtype=np.int64)
    mask[:, 5:] = 0
    given = [{"input_ids": np.where(mask, 1 + texts(s)["input_ids"] % 99, 0), "attention_mask": mask} for s in range(4)]
    whole = [{**feeds, "attention_mask": np.ones_like(mask)} for feeds in given]
    feeds = {"input_ids": given[0]["input_ids"][:, :5], "attention_mask": mask[:, :5]}
    errors = []
    for number, calibration in enumerate((given, whole)):
        done = convert(source, tmp_path / str(number), int8=True, calibration=calibration)
        errors.append(error(run(done.files[0], feeds), run(source, feeds)))
    assert errors[0] < 0.03 < errors[1]


def masked_model(path: Path) -> Path:
    table = numbers(VOCABULARY, WIDTH)
    table[0] *= 100
    nodes = [
        ("Gather", ["table", "input_ids"], "h", {}),
        ("MatMul", ["h", "up"], "u", {}),
        ("Cast", ["attention_mask"], "m", {"to": 1}),
        ("Unsqueeze", ["m", "last"], "w", {}),
        ("Mul", ["u", "w"], "out", {}),
    ]
    constants = {"table": table, "up": numbers(WIDTH, 16), "last": np.array([-1])}
    kind = (onnx.TensorProto.INT64, ["batch", "length"])
    return save(
        path, nodes, {"input_ids": kind, "attention_mask": kind}, {"out": (1, ["batch", "length", 16])}, constants
    )


def test_what_stays_in_floating_point_is_said(tmp_path):
    constants = {"w": numbers(WIDTH, WIDTH), "big": numbers(160, 128)}
    nodes = [("MatMul", ["x", "w"], "a", {}), ("Mul", ["y", "big"], "b", {})]
    inputs = {"x": (1, ["batch", WIDTH]), "y": (1, ["n", 128])}
    source = save(tmp_path / "m.onnx", nodes, inputs, {"a": (1, ["batch", WIDTH]), "b": (1, [160, 128])}, constants)
    done = convert(source, tmp_path / "8", int8=True)
    assert done.in_8_bits == ("w",)
    assert done.notes == ("big (81,920 bytes) stays in floating point: Multiply has no 8 bits here.",)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    path = text_model(tmp_path / "model.onnx")
    model = onnx.load(path)
    weight = next(entry for entry in model.graph.initializer if entry.name == "up")
    broken = onnx.numpy_helper.to_array(weight).copy()
    broken[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(broken, "up"))
    onnx.save(model, path)
    with pytest.raises(FormatError, match="up has values that are not finite"):
        convert(path, tmp_path / "8", int8=True)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "there are no calibration inputs"),
        ([{"ids": np.zeros((1, 2), dtype=np.int64)}], "calibration input 0 lacks input_ids"),
        ([texts(), {"input_ids": np.full((1, 2), VOCABULARY + 5)}, {"input_ids": np.zeros(3, dtype=np.int64)}], "2"),
    ],
)
def test_calibration_inputs_that_do_not_fit(tmp_path, calibration, message):
    source = text_model(tmp_path / "model.onnx")
    with pytest.raises(StatisticsError, match=message):
        convert(source, tmp_path / "8", int8=True, calibration=calibration)
    assert not (tmp_path / "8").exists()


def test_ranges_without_8_bits_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="int8 is off"):
        convert(text_model(tmp_path / "model.onnx"), tmp_path / "out", int8=False, calibration=[texts()])


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(FormatError, match="is not a model that OpenVINO takes"):
        convert(tmp_path / "model.onnx", tmp_path / "out", int8=True)


def test_files_say_nothing_of_where_they_were_made(tmp_path):
    done = convert(text_model(tmp_path / "model.onnx"), tmp_path / "8", int8=True)
    assert str(tmp_path) not in done.files[0].read_text()
