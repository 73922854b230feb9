"""Packed layers inside other engines: the operation in each of them, damaged weights, and files with packed layers."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import needs_engine

import secateur
from secateur import FormatError, KernelError, RecipeError, engines, kernels
from secateur.engines import _onnxruntime, _openvino
from secateur.exporting import OPERATION, export_directory, layout_for, layout_in_bytes, open_exported, pack_nodes
from secateur.exporting._packed_nodes import save_for_openvino
from secateur.kernels import (
    BitmaskLayout,
    GroupLayout,
    Int8BitmaskLayout,
    Int8PanelLayout,
    Int8TileLayout,
    Layout,
    PanelLayout,
    TileLayout,
)

onnx = pytest.importorskip("onnx")
helper, numpy_helper, FLOAT = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
pytest.importorskip("onnxruntime")

LOAD = {"onnxruntime": _onnxruntime.load, "openvino": _openvino.load}


@pytest.fixture(params=list(LOAD))
def engine(request: pytest.FixtureRequest) -> str:
    needs_engine(request.param)
    library_of(request.param)
    return str(request.param)


def library_of(engine: str) -> Path:
    try:
        return engines.library(engine)
    except KernelError as error:
        pytest.skip(str(error))


def sparse(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Half of the weights of every 4 neighbours of a row, in whole tiles of 8x4, so that every layout takes it."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows // 8, 8, columns // 4, 4, generator=made)
    weight[..., torch.randperm(4, generator=made)[:2]] = 0
    empty = torch.rand(rows // 8, 1, columns // 4, 1, generator=made) < 0.5
    return weight.masked_fill(empty, 0).view(rows, columns)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "bitmask": BitmaskLayout.pack,
    "panels": PanelLayout.pack,
    "panels of two-byte columns": lambda weight, **kw: PanelLayout.pack(weight, height=16, width=300, **kw),
    "groups": lambda weight, **kw: GroupLayout.pack(weight, n=2, m=4, **kw),
    "groups of 16": lambda weight, **kw: GroupLayout.pack(weight, n=9, m=16, **kw),
    "tiles": lambda weight, **kw: TileLayout.pack(weight, height=8, width=4, **kw),
}

BYTES: dict[str, Callable[..., Layout]] = {
    "int8 panels": Int8PanelLayout.pack,
    "int8 bitmask": Int8BitmaskLayout.pack,
    "int8 tiles 1x4": lambda weight: Int8TileLayout.pack(weight, height=1, width=4),
    "int8 tiles 4x4": lambda weight: Int8TileLayout.pack(weight, height=4, width=4),
    "int8 tiles 4x1": lambda weight: Int8TileLayout.pack(weight, height=4, width=1),
}


def write(path: Path, data: np.ndarray, bias: np.ndarray | None = None, rank: int = 2) -> Path:
    """A model of one packed layer, for inputs of any size."""
    constants = [numpy_helper.from_array(data, "weight")]
    if bias is not None:
        constants.append(numpy_helper.from_array(bias, "bias"))
    node = helper.make_node("PackedLinear", ["x", *(c.name for c in constants)], ["y"], domain=engines.DOMAIN)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", FLOAT, [f"x{i}" for i in range(rank)])],
        [helper.make_tensor_value_info("y", FLOAT, [f"y{i}" for i in range(rank)])],
        constants,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(engines.DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engine_computes_what_the_kernels_do(engine, layout, dtype, tmp_path):
    weight, bias = sparse(40, 320), torch.randn(40)
    packed = LAYOUTS[layout](weight, value_dtype=dtype)
    run = LOAD[engine](write(tmp_path / "m.onnx", kernels.to_bytes(packed), bias.numpy()), "float32", 2)
    for rows in (1, 2, 3, 17, 100, 0):
        x = torch.randn(rows, 320)
        found = torch.from_numpy(run({"x": x.numpy()})["y"])
        torch.testing.assert_close(found, kernels.linear(x, packed, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [320, 317, 2100], ids=str)
@pytest.mark.parametrize("layout", BYTES)
def test_an_engine_computes_in_8_bits_what_the_kernels_do(engine, layout, columns, tmp_path):
    """To the bit: sums are whole numbers. More than 2048 columns are stored in sections."""
    weight, bias = sparse(40, 2120)[:, :columns], torch.randn(40)
    packed = BYTES[layout](weight)
    run = LOAD[engine](write(tmp_path / "m.onnx", kernels.to_bytes(packed), bias.numpy()), "float32", 2)
    for rows in (1, 2, 3, 17, 100, 0):
        x = torch.randn(rows, columns)
        found = torch.from_numpy(run({"x": x.numpy()})["y"])
        torch.testing.assert_close(found, kernels.linear(x, packed, bias), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(320,), (2, 3, 320), (1, 1, 2, 320), (2, 0, 320)])
def test_an_input_may_have_any_leading_sizes(engine, shape, tmp_path):
    packed, x = PanelLayout.pack(sparse(40, 320)), torch.randn(shape)
    run = LOAD[engine](write(tmp_path / "m.onnx", kernels.to_bytes(packed), rank=len(shape)), "float32", 1)
    found = torch.from_numpy(run({"x": x.numpy()})["y"])
    torch.testing.assert_close(found, kernels.linear(x, packed), atol=1e-5, rtol=1e-5)


def test_results_do_not_depend_on_threads(engine, tmp_path):
    path = write(tmp_path / "m.onnx", kernels.to_bytes(PanelLayout.pack(sparse(256, 512))))
    x = np.random.default_rng(0).standard_normal((130, 512), np.float32)
    one, three = (LOAD[engine](path, "float32", threads)({"x": x})["y"] for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_two_threads_of_a_program_may_run_one_model(tmp_path):
    library_of("onnxruntime")
    run = _onnxruntime.load(
        write(tmp_path / "m.onnx", kernels.to_bytes(PanelLayout.pack(sparse(256, 512)))), "float32", 2
    )
    inputs = [np.random.default_rng(i).standard_normal((90, 512), np.float32) for i in range(8)]
    expected = [run({"x": x})["y"] for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: run({"x": x})["y"], inputs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def changed(layout: str, place: int, value: float, kind: str = "<i8") -> np.ndarray:
    data = kernels.to_bytes((LAYOUTS | BYTES)[layout](sparse(40, 320))).copy()
    data[place : place + np.dtype(kind).itemsize] = np.array([value], kind).view(np.uint8)
    return data


def arrays_of(layout: str) -> dict[str, int]:
    """Where the arrays after the values start."""
    packed = (LAYOUTS | BYTES)[layout](sparse(40, 320))
    names = {
        "bitmask": ("values", "mask", "offsets"),
        "panels": ("values", "index", "counts", "offsets"),
        "groups": ("values", "words"),
        "tiles": ("values", "first_tiles", "tile_columns"),
        "int8_panels": ("values", "scale", "sums"),
        "int8_tiles": ("values", "scale", "sums", "first_tiles", "places"),
        "int8_bitmask": ("values", "scale", "sums", "mask", "offsets"),
    }[packed.kernel]
    at, found = 128, {}
    for name in names:
        at += -at % 64
        found[name] = at
        at += getattr(packed, name).nbytes
    return found


DAMAGES = {
    "another beginning": lambda: changed("panels", 0, 0),
    "unknown layout": lambda: changed("panels", 16, 9),
    "unknown values": lambda: changed("panels", 24, 7),
    "no rows": lambda: changed("panels", 32, 0),
    "rows without end": lambda: changed("panels", 32, 1 << 62),
    "more rows": lambda: changed("bitmask", 32, 48),
    "more columns": lambda: changed("bitmask", 40, 64000),
    "fewer columns": lambda: changed("panels", 40, 8),
    "more values": lambda: changed("bitmask", 48, 1 << 60),
    "fewer values": lambda: changed("groups", 48, 20),
    "negative values": lambda: changed("tiles", 48, -1),
    "a scale that is not there": lambda: changed("panels", 56, 2),
    "height": lambda: changed("panels", 64, 0),
    "width": lambda: changed("panels", 72, 1 << 40),
    "index": lambda: changed("panels", 80, 2),
    "groups that do not divide": lambda: changed("groups", 72, 3),
    "tiles that do not divide": lambda: changed("tiles", 64, 7),
    "a column outside": lambda: changed(
        "panels of two-byte columns", arrays_of("panels of two-byte columns")["index"], 310, "<u2"
    ),
    "a count": lambda: changed("panels", arrays_of("panels")["counts"], 60000, "<u2"),
    "offsets": lambda: changed("panels", arrays_of("panels")["offsets"] + 8, 1 << 50),
    "negative offsets": lambda: changed("tiles", arrays_of("tiles")["first_tiles"] + 8, -5),
    "a bit": lambda: changed("bitmask", arrays_of("bitmask")["mask"], -1),
    "a tile outside": lambda: changed("tiles", arrays_of("tiles")["tile_columns"], 80, "<i4"),
    "bytes without scales": lambda: changed("int8 panels", 56, 0),
    "bytes of another type": lambda: changed("int8 panels", 24, 0),
    "more rows of bytes": lambda: changed("int8 panels", 32, 64),
    "too many columns of bytes": lambda: changed("int8 bitmask", 40, 65540),
    "fewer bytes": lambda: changed("int8 panels", 48, 40 * 320 - 64),
    "fewer bytes of tiles": lambda: changed("int8 tiles 1x4", 48, 256),
    "the size of a byte tile": lambda: changed("int8 tiles 1x4", 64, 2),
    "sections": lambda: changed("int8 tiles 4x1", 80, 0),
    "rows of a panel": lambda: changed("int8 tiles 1x4", 88, 32),
    "a byte tile outside": lambda: changed("int8 tiles 1x4", arrays_of("int8 tiles 1x4")["places"], 80, "<u2"),
    "a column of a byte tile outside": lambda: changed(
        "int8 tiles 4x1", arrays_of("int8 tiles 4x1")["places"], 320, "<u2"
    ),
    "offsets of byte tiles": lambda: changed("int8 tiles 4x4", arrays_of("int8 tiles 4x4")["first_tiles"] + 8, 1 << 40),
    "a bit of bytes": lambda: changed("int8 bitmask", arrays_of("int8 bitmask")["mask"], -1),
    # A kernel follows the places of a whole vector of tiles, and so some after the last one.
    "a place after the last byte tile": lambda: changed(
        "int8 tiles 1x4", len(kernels.to_bytes(BYTES["int8 tiles 1x4"](sparse(40, 320)))) - 2, 80, "<u2"
    ),
    "sections without end": lambda: changed("int8 tiles 1x4", 80, 1 << 61),
    **{
        f"{name}, {what}": lambda name=name, array=array, value=value, kind=kind: changed(
            name, arrays_of(name)[array], value, kind
        )
        for name in BYTES
        for what, array, value, kind in (
            ("an infinite scale", "scale", np.inf, "<f4"),
            ("a scale that is no number", "scale", np.nan, "<f4"),
            ("a negative scale", "scale", -1.0, "<f4"),
            ("another sum", "sums", 1 << 30, "<i4"),
            ("a byte out of range", "values", -128, "i1"),
        )
    },
    "cut off": lambda: changed("panels", 0, 0x5255455441434553)[:-8],
    "empty": lambda: np.zeros(0, np.uint8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_is_refused(engine, damage, tmp_path):
    path = write(tmp_path / "m.onnx", DAMAGES[damage]())
    with pytest.raises(FormatError, match="a packed weight is damaged"):
        LOAD[engine](path, "float32", 1)


def test_a_weight_of_a_later_version_is_refused_by_name(engine, tmp_path):
    path = write(tmp_path / "m.onnx", changed("panels", 8, 2))
    with pytest.raises(FormatError, match=r"has version 2; this library reads version 1\. Install"):
        LOAD[engine](path, "float32", 1)


def test_an_input_of_another_size_is_refused(engine, tmp_path):
    run = LOAD[engine](write(tmp_path / "m.onnx", kernels.to_bytes(PanelLayout.pack(sparse(40, 320)))), "float32", 1)
    with pytest.raises(Exception, match="320"):
        run({"x": np.zeros((2, 319), np.float32)})


@pytest.mark.parametrize("name", LOAD)
def test_without_the_library_a_packed_model_is_refused_and_others_run(name, tmp_path, monkeypatch):
    needs_engine(name)
    module = {"onnxruntime": _onnxruntime, "openvino": _openvino}[name]

    def library(engine: str) -> Path:
        raise KernelError(f"the library for {engine} was not built. Build it.")

    monkeypatch.setattr(module, "library", library)
    with pytest.raises(FormatError, match=f"the library for {name} was not built"):
        LOAD[name](write(tmp_path / "m.onnx", kernels.to_bytes(PanelLayout.pack(sparse(40, 320)))), "float32", 1)
    source = products(tmp_path / "dense.onnx")
    assert LOAD[name](source, "float32", 1).outputs == ("y",)


def test_a_library_that_was_not_built_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    with pytest.raises(
        KernelError, match=r"into openvino is not here: libsecateur_openvino was not built\. Build it in"
    ):
        engines.library("openvino")


def test_a_weight_without_elements_has_no_bytes():
    with pytest.raises(KernelError, match="0x4 cannot be put into the file of an engine"):
        kernels.to_bytes(PanelLayout.pack(torch.zeros(0, 4)))


# Files


def products(path: Path) -> Path:
    """Products of each kind, by weights that are sparse, dense, small, and used twice."""
    weights = {
        "sparse": sparse(160, 160) * (torch.rand(160, 160) < 0.5),
        "sparse_gemm": sparse(160, 160, seed=1) * (torch.rand(160, 160) < 0.5),
        "dense": torch.randn(160, 160),
        "small": torch.zeros(160, 8),
    }
    constants = [numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()]
    constants.append(numpy_helper.from_array(torch.randn(160).numpy(), "bias"))
    nodes = [
        helper.make_node("MatMul", ["x", "sparse"], ["a"], "first"),
        helper.make_node("Add", ["bias", "a"], ["b"]),
        helper.make_node("Gemm", ["b", "sparse_gemm", "bias"], ["c"], "second", transB=1),
        helper.make_node("MatMul", ["c", "sparse"], ["d"], "again"),
        helper.make_node("MatMul", ["d", "dense"], ["e"], "dense"),
        helper.make_node("Gemm", ["e", "sparse"], ["f"], "scaled", alpha=0.5),
        helper.make_node("MatMul", ["f", "small"], ["y"], "small"),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["n", size]) for name, size in (("x", 160), ("y", 8)))
    graph = helper.make_graph(nodes, "some", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_sparse_products_of_a_file_become_packed_layers(tmp_path):
    source = products(tmp_path / "dense.onnx")
    found = pack_nodes(source, tmp_path / "packed.onnx", sparsity=0.6)
    assert found.packed == {"first": "panels", "second": "panels", "again": "panels"}
    assert found.left == {
        "dense": "0% of its weight are zeros; packed layers are faster from 60% on",
        "small": "its weight has 1280 numbers; packed layers are faster from 16384 on",
    }
    assert found.bytes_before == 2 * 160 * 160 * 4
    assert found.bytes_after < 0.6 * found.bytes_before
    model = onnx.load(tmp_path / "packed.onnx")
    assert [node.op_type for node in model.graph.node] == [OPERATION] * 3 + ["MatMul", "Gemm", "MatMul"]
    assert [len(node.input) for node in model.graph.node[:3]] == [3, 3, 2]
    assert {entry.domain for entry in model.opset_import} == {"", engines.DOMAIN}
    names = [entry.name for entry in model.graph.initializer]
    assert sorted(names) == sorted({name for node in model.graph.node for name in node.input if name in names})
    onnx.checker.check_model(model)


def test_a_packed_file_computes_the_same(engine, tmp_path):
    source = products(tmp_path / "dense.onnx")
    pack_nodes(source, tmp_path / "packed.onnx", sparsity=0.6)
    x = {"x": np.random.default_rng(0).standard_normal((33, 160), np.float32)}
    expected, found = (LOAD[engine](p, "float32", 2)(x)["y"] for p in (source, tmp_path / "packed.onnx"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_openvino_keeps_packed_layers_in_its_own_files(tmp_path):
    needs_engine("openvino")
    library_of("openvino")
    source = products(tmp_path / "dense.onnx")
    pack_nodes(source, tmp_path / "packed.onnx", sparsity=0.6)
    save_for_openvino(tmp_path / "packed.onnx", tmp_path / "own")
    x = {"x": np.random.default_rng(0).standard_normal((33, 160), np.float32)}
    expected, found = (
        _openvino.load(p, "float32", 2)(x)["y"] for p in (source, tmp_path / "own" / "openvino_model.xml")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert (tmp_path / "own" / "openvino_model.xml").read_text(encoding="utf-8").count('type="PackedLinear"') == 3


def test_an_onnx_runtime_without_the_functions_is_refused_by_its_version():
    """The first one that ONNX Runtime 1.17 has is asked for by its number; an older one answers that with nothing."""
    said: list[bytes] = []
    name = ctypes.create_string_buffer(b"1.16.3")
    text = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, message: said.append(message) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(text, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version < 17 else None
    )
    number = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p), ctypes.cast(number, ctypes.c_void_p))
    register = ctypes.CDLL(str(library_of("onnxruntime"))).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert said == [b"secateur: PackedLinear needs ONNX Runtime 1.17 or later, this is 1.16.3. Upgrade onnxruntime."]


@pytest.mark.parametrize("pattern", ["2:4", "block:8x4", "unstructured"])
def test_the_zeros_choose_the_layout(pattern):
    weight = torch.randn(64, 64)
    weight[~secateur.SparsityPattern.parse(pattern).mask(weight.abs(), 0.5)] = 0
    kernel = layout_for(weight).kernel
    assert kernel == {"2:4": "groups", "block:8x4": "tiles", "unstructured": "panels"}[pattern]


@pytest.mark.parametrize(
    ("pattern", "sparsity", "kernel"),
    [
        ("2:4", None, "int8_bitmask"),
        ("block:8x4", 0.7, "int8_tiles"),
        ("block:1x8", 0.7, "int8_tiles"),
        ("block:4x1", 0.7, "int8_tiles"),
        ("unstructured", 0.7, "int8_bitmask"),
        ("unstructured", 0.4, "int8_panels"),
    ],
)
def test_the_zeros_choose_the_layout_in_8_bits(pattern, sparsity, kernel):
    weight = torch.randn(64, 64)
    weight[~secateur.SparsityPattern.parse(pattern).mask(weight.abs(), sparsity)] = 0
    assert layout_in_bytes(weight).kernel == kernel


def test_in_8_bits_products_of_a_file_are_packed_without_zeros_as_well(tmp_path):
    found = pack_nodes(products(tmp_path / "dense.onnx"), tmp_path / "packed.onnx", int8=True)
    kinds = {"first": "int8_bitmask", "second": "int8_bitmask", "again": "int8_bitmask", "dense": "int8_panels"}
    assert found.packed == kinds
    assert list(found.left) == ["small"]


def test_a_file_without_sparse_products_stays_an_ordinary_one(tmp_path):
    source = products(tmp_path / "dense.onnx")
    found = pack_nodes(source, tmp_path / "packed.onnx", sparsity=0.99)
    assert not found.packed
    assert onnx.load(tmp_path / "packed.onnx") == onnx.load(source)


# Exporting


def pruned() -> torch.nn.Module:
    """A layer with many zeros, and one without."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 192), torch.nn.ReLU(), torch.nn.Linear(192, 160))
    secateur.prune_(model, pattern="unstructured", sparsity=0.8, method="magnitude", include=["0"])
    return model.eval()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_model_is_exported_with_packed_layers(to, tmp_path):
    library_of({"onnx": "onnxruntime"}.get(to, to))
    model, x = pruned(), torch.randn(3, 160)
    report = secateur.export(model, x, tmp_path / "out", to=to, packed=True, shapes=())
    assert report.fused["packed layers"] == 1
    assert report.notes == (
        "products that stay dense: 1 (0% of its weight are zeros; packed layers are faster from 70% on)",
    )
    assert report.error < 1e-5
    torch.testing.assert_close(open_exported(tmp_path / "out")(x)["output"], model(x), atol=1e-5, rtol=1e-5)
    assert report.nbytes < 0.8 * report.bytes_before


def test_what_has_no_zeros_is_not_exported_with_packed_layers(tmp_path):
    library_of("onnxruntime")
    model = torch.nn.Linear(160, 160)
    with pytest.raises(RecipeError, match=r"no layer of Linear is worth packing \(.*0% of its weight are zeros"):
        secateur.export(model, torch.randn(3, 160), tmp_path / "out", packed=True, shapes=())
    assert not list(tmp_path.iterdir())


def test_a_model_is_exported_with_packed_layers_in_8_bits(tmp_path):
    library_of("onnxruntime")
    model, x = pruned(), torch.randn(300, 160)
    report = secateur.export(model, x, tmp_path / "out", packed=True, int8=True, shapes=())
    assert report.int8
    assert report.fused["packed layers"] == 2
    assert 0 < report.error < 0.05
    assert report.nbytes < 0.25 * report.bytes_before
    found = open_exported(tmp_path / "out")(x)["output"]
    assert (found - model(x)).norm() < 0.02 * model(x).norm()


def test_packed_in_8_bits_needs_onnx_runtime_and_packed_needs_an_engine(tmp_path):
    with pytest.raises(RecipeError, match=r"do not go together there\.\nGive to='onnx'"):
        secateur.export(pruned(), torch.randn(3, 160), tmp_path / "out", to="openvino", packed=True, int8=True)
    with pytest.raises(RecipeError, match="packed is for an engine"):
        export_directory(tmp_path, tmp_path / "out", packed=True)


def test_without_the_library_nothing_is_exported_with_packed_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path / "none")])
    with pytest.raises(KernelError, match="into onnxruntime is not here: libsecateur_onnxruntime was not built"):
        secateur.export(pruned(), torch.randn(3, 160), tmp_path / "out", packed=True)
    assert not list(tmp_path.iterdir())
