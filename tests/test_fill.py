"""A file that does not fit a model changes nothing of it, whatever is wrong."""

import copy
import importlib.util
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from fake_timing import kernels_win
from torch import nn

import secateur
from secateur import FormatError, PackedLinear
from secateur.files import read_header
from secateur.formats import Bitmask, RowPacked, check_sizes
from secateur.packing import read_packed, write_packed

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _kernels_win(monkeypatch):
    kernels_win(monkeypatch)


class Model(nn.Module):
    """A layer that is packed, one that is stored without its zeros, and buffers and parameters of every kind."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(16, 32)
        self.again = self.up
        self.twin = nn.Linear(16, 32)
        self.twin.weight = self.up.weight
        self.embedding = nn.Embedding(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("code", torch.ones(2, dtype=torch.int8))
        self.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))


FLOATS = ["norm.weight", "norm.bias", "norm.running_mean", "up.bias", "twin.bias", "embedding.weight"]
OTHERS = ["norm.num_batches_tracked", "mask", "wave", "code", "small"]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.uint16]


def pruned(seed=0):
    model = Model(seed).eval()
    with torch.no_grad():
        for weight in (model.up.weight, model.embedding.weight):
            weight[weight.abs() < weight.abs().median()] = 0
    secateur.pack_(model)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.sparse.safetensors"


def rewritten(path, change):
    """Change what is in a file: layers, tensors and metadata."""
    file = read_packed(path)
    layers, tensors, metadata = dict(file.layers), dict(file.tensors), copy.deepcopy(dict(file.metadata))
    change(layers, tensors, metadata)
    write_packed(path, layers, tensors, metadata)


def everything(model):
    """All that a failed load must leave: modules, and the tensors themselves with their contents."""
    state = model.state_dict(keep_vars=True)
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)], state, copies


def refuses(path, match, model=None, **options):
    model = Model(1) if model is None else model
    modules, state, copies = everything(model)
    with pytest.raises(FormatError, match=match) as caught:
        secateur.load(path, into=model, **options)
    assert str(path) in str(caught.value)
    after = everything(model)
    assert after[0] == modules
    assert after[1].keys() == state.keys()
    for name, tensor in after[1].items():
        assert tensor is state[name]
        same = (
            torch.equal
            if tensor.dtype.itemsize > 1
            else lambda a, b: torch.equal(a.view(torch.int8), b.view(torch.int8))
        )
        assert tensor.is_meta or same(tensor.detach(), copies[name])


def test_what_a_model_has_comes_back(path):
    model = pruned()
    secateur.save(model, path)
    again = secateur.load(path, into=Model(1))
    assert isinstance(again.up, PackedLinear)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
    dense = secateur.load(path, into=Model(1), dense=True)
    assert type(dense.up) is nn.Linear
    assert dense.again is dense.up
    assert dense.twin.weight is dense.up.weight
    assert dense.up.weight.count_nonzero() == model.up.weight.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FLOATS + OTHERS)
def test_tensors_of_another_kind_are_refused(path, name, dtype):
    model = pruned()
    secateur.save(model, path)
    own = model.state_dict()[name].dtype if name != "embedding.weight" else torch.float32

    def change(layers, tensors, metadata):
        layers.pop(name, None)
        metadata["sparse"].pop(name, None)
        tensors[name] = torch.ones(Model().state_dict()[name].shape).to(dtype)

    rewritten(path, change)
    if dtype == own or (name in FLOATS and dtype in (torch.float32, torch.bfloat16)):
        loaded = secateur.load(path, into=Model(1))
        assert loaded.state_dict()[name].dtype == dtype
    else:
        for options in ({}, {"dense": True}, {"dtype": torch.bfloat16}):
            refuses(path, f"{name} is {str(dtype)[6:]}, but in the model it is {str(own)[6:]}", **options)


def test_a_dtype_converts_floats_only(path):
    secateur.save(pruned(), path, dtype=torch.float16)
    loaded = secateur.load(path, into=Model(1), dtype=torch.bfloat16)
    kinds = {name: loaded.state_dict()[name].dtype for name in ("norm.weight", "small", "wave", "code", "mask")}
    assert [str(kind)[6:] for kind in kinds.values()] == ["bfloat16", "float8_e4m3fn", "complex64", "int8", "bool"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _, t, m: t.update({"up.bias": torch.ones(31)}), r"up.bias has the shape \[31\]"),
        (lambda _, t, m: t.pop("norm.bias"), "lacks"),
        (lambda _, t, m: t.update(more=torch.ones(1)), "has"),
        (lambda _, t, m: m["modules"].update({"norm": "up"}), "layer norm is a linear layer of 32x16, but"),
        (lambda _, t, m: m["modules"].update({"": "up"}), "layer  is a linear layer"),
        (lambda _, t, m: m["modules"].update({"nowhere": "up"}), "has the layer nowhere"),
        (lambda _, t, m: m["kinds"]["up"].update(plan="dense@1 " * 9999 + "dense"), "plan a str of up to"),
        (lambda _, t, m: m["sparse"].update({"embedding.weight": [64, 0, 10**200]}), "out of range"),
        (lambda _, t, m: m["sparse"].update({"embedding.weight": [64, *[1] * 50, 16]}), "at most 8"),
        (lambda _, t, m: m["sparse"].update({"embedding.weight": [64, 16, 1]}), r"has the shape \[64, 16, 1\]"),
        (lambda layers, t, m: layers.update({"": RowPacked.from_dense(torch.zeros(2, 2))}), "has|layer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(path, change, match):
    secateur.save(pruned(), path)
    rewritten(path, change)
    refuses(path, match)
    refuses(path, match, dense=True)


def test_a_model_that_is_a_layer_itself_is_refused(path):
    write_packed(path, {"": Bitmask.from_dense(torch.eye(4))})
    refuses(path, "a layer without a name", nn.Linear(4, 4, bias=False))


def test_a_failure_while_tensors_are_made_changes_nothing(path, monkeypatch):
    """Such as a device that is full."""
    secateur.save(pruned(), path)
    model = Model(1)
    modules, state, _ = everything(model)

    def full(self):
        raise MemoryError

    for name in ("to_dense", "to_linear"):
        with monkeypatch.context() as patch:
            patch.setattr(Bitmask if name == "to_dense" else PackedLinear, name, full)
            with pytest.raises(MemoryError):
                secateur.load(path, into=model, dense=True)
        assert everything(model)[0] == modules
        assert all(tensor is state[key] for key, tensor in everything(model)[1].items())


def test_state_that_is_no_parameter_is_refused_before_anything_changes(path):
    extra = torch.ones(2)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return extra

        def set_extra_state(self, state):
            raise AssertionError

    secateur.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), path)
    refuses(path, "1._extra_state in the state of the model is neither", nn.Sequential(nn.Linear(4, 4), Extra(4, 4)))
    with pytest.raises(FormatError, match="extra state"):
        secateur.save(nn.Sequential(Extra(2, 2)), path)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(renamed=state.pop("0.bias")))
    refuses(path, "renamed in the state of the model", model)
    with pytest.raises(FormatError, match=r"1.weight of the model has no shape yet"):
        secateur.load(path, into=nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))


def test_a_missing_tensor_of_a_model_on_meta_is_not_taken_from_another(path):
    """Tensors on the meta device have no memory, so that they must not count as tied."""
    secateur.save(nn.Sequential(nn.LayerNorm(4)), path)
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
        tied = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    refuses(path, r"lacks \['1.bias', '1.weight'\]", model)
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    assert secateur.load(path, into=tied)[1].weight is tied[0].weight


# Numbers, shapes and headers that no writer makes


def raw_file(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def with_entry(entry):
    return json.dumps({"__metadata__": {"secateur": "{}"}, "a": entry}).encode()


DIGITS = "9" * 4300


@pytest.mark.parametrize(
    "text",
    [
        with_entry({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}).replace(b"4]", DIGITS.encode() + b"]"),
        with_entry({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}).replace(b"[1]", f"[{DIGITS}]".encode()),
        with_entry({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}).replace(b"[1]", f"[{DIGITS}9]".encode()),
        with_entry({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}),
        with_entry({"dtype": "F32", "shape": [2**63 - 1, 0], "data_offsets": [0, 0]}),
        with_entry({"dtype": "F32", "shape": [0] * 65, "data_offsets": [0, 0]}),
        with_entry({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}),
        with_entry({"dtype": "F32", "data_offsets": [0, 4]}),
        with_entry([1, 2]),
        b'{"' + b"a" * 2000 + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"secateur":"{}"}' + b" " * (1 << 20) + b"}",
        b'{"a":1e' + DIGITS.encode() + b"}",
        b'{"a":-' + DIGITS.encode() + b"}",
    ],
)  # fmt: skip
def test_numbers_and_headers_that_no_writer_makes_are_refused(path, text):
    raw_file(path, text, bytes(4) if b"[0, 4]" in text or DIGITS.encode() in text else b"")
    for read in (read_header, read_packed, lambda path: secateur.load(path, into=Model())):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert len(str(caught.value)) < 1000 + len(str(path))


def test_a_long_header_needs_many_bytes_of_tensors(path):
    entries = {f"tensor{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    for size, match in ((0, "bytes for 0 of tensors; at most 1,048,576 are read"), (8 << 20, None)):
        entries["last"] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        raw_file(path, json.dumps(entries).encode(), bytes(size))
        if match:
            with pytest.raises(FormatError, match=match):
                read_header(path)
        else:
            assert len(read_header(path)[0]) == 20_001


def test_a_file_that_could_not_be_read_is_not_written(path):
    path.write_bytes(b"old")
    with pytest.raises(FormatError, match=r"header of [\d,]+ bytes for 40,000 bytes of tensors"):
        write_packed(path, {}, {f"tensor{i}": torch.zeros(1) for i in range(10_000)}, {"text": "x" * (1 << 20)})
    with pytest.raises(FormatError, match=r"layer a: the shape 0x1048577 is out of range"):
        write_packed(path, {"a": Bitmask.from_dense(torch.zeros(0, 2**20 + 1))})
    with pytest.raises(TypeError, match="digits"):
        write_packed(path, {}, {}, {"number": 10**400})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("shape", [(0, 2**31 - 1), (2**31 - 1, 0), (0, 2**20 + 1), (5, 0, 10**400), (2**19, 2**18)])
def test_sizes_that_cost_memory_without_a_byte_in_the_file_are_refused(shape):
    with pytest.raises(FormatError, match="out of range"):
        check_sizes(shape)
    check_sizes((0, 2**20))


# The campaign of changed files, of which `make hostile` makes many more


def test_changed_files_are_refused_or_run(tmp_path):
    spec = importlib.util.spec_from_file_location("hostile_files", ROOT / "benchmarks" / "hostile_files.py")
    campaign = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(campaign)
    files, outcomes = campaign.valid_files(tmp_path), set()
    small = [(name, side, data) for name, side, data in files if len(data) < 1 << 18]
    path = tmp_path / "changed.sparse.safetensors"
    for number in range(120):
        _, name, side, data = campaign.changed(small, random.Random(number))
        path.write_bytes(data)
        outcomes.add(campaign.outcome(path, name, side))
    assert outcomes == {"refused", "ran"}
