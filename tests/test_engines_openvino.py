"""OpenVINO as an engine: what it is given, what it must not lose, and whom it tells."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import needs_engine

from secateur._errors import FormatError, KernelError
from secateur.engines import ENGINES, EngineModel, _openvino

needs_engine("openvino")
onnx = pytest.importorskip("onnx")
ENGINE = ENGINES["openvino"]
LONGEST = 8


def add_positions(path: Path) -> np.ndarray:
    """A model that adds one of a few positions to each column, and a second input: its shapes can be wrong."""
    positions = np.arange(LONGEST * 4, dtype=np.float32).reshape(1, LONGEST, 4)
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
        onnx.helper.make_node("Slice", ["positions", "zero", "length", "one"], ["some"]),
        onnx.helper.make_node("Add", ["x", "some"], ["sum"]),
        onnx.helper.make_node("Mul", ["sum", "y"], ["out"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(positions, "positions"),
        onnx.numpy_helper.from_array(np.array([0]), "zero"),
        onnx.numpy_helper.from_array(np.array([1]), "one"),
    ]
    kinds = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", "length", 4]) for n in ("x", "y", "out")
    ]
    graph = onnx.helper.make_graph(nodes, "positions", kinds[:2], kinds[2:], constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return positions


@pytest.fixture
def positions(tmp_path: Path) -> tuple[Path, np.ndarray]:
    path = tmp_path / "positions.onnx"
    return path, add_positions(path)


def filled(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, length, 4)).astype(np.float32)


def reshaped(array: np.ndarray, how: str) -> np.ndarray:
    """The same numbers, laid out in another way."""
    if how == "columns first":
        return np.asfortranarray(array)
    if how == "every second":
        return np.repeat(array, 2, axis=1)[:, ::2]
    return array[::-1].copy()[::-1]


@pytest.mark.parametrize("how", ["columns first", "every second", "backwards"])
def test_inputs_may_lie_in_memory_as_they_like(positions, how):
    session = ENGINE.load(positions[0], "float32", 1)
    x, y = filled(3, 5), filled(3, 5, seed=1)
    found = session({"x": reshaped(x, how), "y": reshaped(y, how)})["out"]
    np.testing.assert_allclose(found, (x + positions[1][:, :5]) * y, rtol=1e-6)


WRONG = {
    "too long": (filled(2, LONGEST + 3), filled(2, LONGEST + 3)),
    "other batch": (filled(3, 4), filled(2, 4)),
    "other length": (filled(2, 4), filled(2, 3)),
    "other width": (filled(2, 4)[..., :3], filled(2, 4)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_shapes_are_errors_and_what_comes_after_them_is_right(positions, wrong, first, threads):
    session = ENGINE.load(positions[0], "float32", threads)
    x, y = filled(2, 4, seed=2), filled(2, 4, seed=3)
    right = (x + positions[1][:, :4]) * y
    if not first:
        np.testing.assert_allclose(session({"x": x, "y": y})["out"], right, rtol=1e-6)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"OpenVINO cannot compute x 2x|x 3x"):
            session(dict(zip("xy", WRONG[wrong], strict=True)))
        np.testing.assert_allclose(session({"x": x, "y": y})["out"], right, rtol=1e-6)


def test_outputs_stay_when_the_next_call_comes(positions):
    model = EngineModel(ENGINE.load(positions[0], "float32", 1))
    ones = torch.ones(1, 2, 4)
    kept = model(ones, ones).out
    before = kept.clone()
    model(ones * 5, ones * 7)
    assert torch.equal(kept, before)


def test_threads_may_share_a_session(positions):
    from concurrent.futures import ThreadPoolExecutor

    session = ENGINE.load(positions[0], "float32", 1)

    def differs(length: int) -> float:
        x, y = filled(2, length, seed=length), filled(2, length)
        return float(np.abs(session({"x": x, "y": y})["out"] - (x + positions[1][:, :length]) * y).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(differs, [1 + number % LONGEST for number in range(32)])) < 1e-4


@pytest.mark.parametrize("content", [b"", b"<net></net>", b"\x08\x07rubbish"])
@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_files_that_are_no_models(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="is not a model that OpenVINO takes"):
        ENGINE.load(path, "float32", 1)


def test_bfloat16_is_refused_by_reason_where_the_processor_lacks_it(positions, monkeypatch):
    monkeypatch.setattr(_openvino, "lacks", lambda precision: "this one is old" if precision == "bfloat16" else "")
    with pytest.raises(KernelError, match=r"cannot run in bfloat16: this one is old. Take float32."):
        _openvino.load(positions[0], "bfloat16", 1)
    _openvino.load(positions[0], "float32", 1)


def test_a_precision_is_what_opens_or_what_is_lacking(positions):
    for precision in ENGINE.precisions:
        if ENGINE.lacks(precision):
            assert precision == "bfloat16"
            assert "no instructions" in ENGINE.lacks(precision)
        else:
            session = ENGINE.load(positions[0], precision, 1)
            hint = str(session._compiled.get_property("INFERENCE_PRECISION_HINT"))
            assert ("bfloat16" in hint) == (precision == "bfloat16")


QUIET = """
import pathlib, socket, subprocess, sys
from secateur.engines import import_openvino
import_openvino()
assert "openvino_telemetry" not in sys.modules, "the reporter was imported"
from openvino.tools.ovc import telemetry_utils
assert "telemetry_stub" in telemetry_utils.tm.__name__, telemetry_utils.tm.__name__
assert not list(pathlib.Path.home().iterdir()), "something was written below the home directory"
"""


def test_openvino_reports_nothing(tmp_path):
    """Without this, importing OpenVINO writes an identity below the home directory and sends it over the network."""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", QUIET], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
