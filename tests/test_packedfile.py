import copy
import errno
import hashlib
import json
import os
import random
import re
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import NM, Block, Column, FormatError, Row, SparsityPattern, Unstructured
from secateur.formats import FORMATS, Bitmask, BlockPacked, ColumnPacked, NMPacked, RowPacked
from secateur.packing import PackedFile, read_compressed_tensors, read_packed, write_packed

NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float64: "F64", torch.bool: "BOOL", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_layers():
    weight = randn(6, 10)
    return {
        "block.0.up": Bitmask.from_dense(weight, weight > 0.3),
        "block.0.down": NMPacked.from_dense(weight, NM(2, 4, "dense").mask(weight.abs()), NM(2, 4, "dense")),
        "block.1.up": BlockPacked.from_dense(
            weight, Block(2, 3, "dense").mask(weight.abs(), 0.5), Block(2, 3, "dense"), torch.int8
        ),
        "block.1.down": RowPacked.from_dense(weight.bfloat16(), Row().mask(weight.abs(), 0.5)),
        "head": ColumnPacked.from_dense(weight.half(), Column(2).mask(weight.abs(), 0.4), Column(2), torch.int8),
    }


def some_tensors():
    return {"block.0.up.bias": randn(6), "norm.weight": torch.ones(10).bfloat16(), "steps": torch.tensor(7)}


def contents(file):
    """The contents of a file as values that can be compared."""
    layers = {
        name: (type(packed), packed.shape, packed.pattern, hashed(packed.tensors()))
        for name, packed in file.layers.items()
    }
    return layers, hashed(file.tensors), file.metadata


def hashed(tensors):
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in tensors.items()}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.sparse.safetensors"


# A second writer, made from docs/format.md, that also writes what the first one refuses


def assemble(path, header, tensors, offsets=None, checksum=None):
    """Write a file from its header and ``{name: tensor}``; the checksum is right unless given."""
    header = copy.deepcopy(header)
    header.pop("checksum", None)
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        what = [name, str(tensor.dtype).split(".")[1], list(tensor.shape)]
        digest.update(json.dumps(what, separators=(",", ":")).encode() + raw(tensor))
    header["checksum"] = checksum or digest.hexdigest()
    table, data = {"__metadata__": {"secateur": json.dumps(header)}}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += raw(tensor)
    for name, pair in (offsets or {}).items():
        table[name]["data_offsets"] = pair
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def disassemble(path):
    """Header and tensors of a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["secateur"])
    return header, {name: tensor.clone() for name, tensor in load_file(path).items()}  # not views into the file


@pytest.fixture
def parts(path):
    write_packed(path, some_layers(), some_tensors(), {"note": "x"})
    return disassemble(path)


def rejects(path, match, header, tensors, **options):
    assemble(path, header, tensors, **options)
    with pytest.raises(FormatError, match=match) as caught:
        read_packed(path)
    assert str(path) in str(caught.value)


# What is written comes back


def test_round_trip(path):
    metadata = {"config": {"hidden": 4, "list": [1, None, "é\n"]}, "float": 0.1}
    write_packed(path, some_layers(), some_tensors(), metadata)
    file = read_packed(str(path))
    assert contents(file) == contents(PackedFile(some_layers(), some_tensors(), metadata))
    for name, packed in some_layers().items():
        assert torch.equal(file.layers[name].to_dense(), packed.to_dense())


def test_nothing_at_all_round_trips(path):
    write_packed(path, {})
    assert contents(read_packed(path)) == ({}, {}, {})


def test_empty_tensors_and_layers_round_trip(path):
    layers = {"a": Bitmask.from_dense(torch.zeros(0, 5)), "b": RowPacked.from_dense(torch.zeros(3, 4))}
    tensors = {"c": torch.zeros(0), "d": torch.zeros(2, 0, 3)}
    write_packed(path, layers, tensors)
    assert contents(read_packed(path)) == contents(PackedFile(layers, tensors))


def test_the_same_is_written_twice(path, tmp_path):
    other = tmp_path / "other.safetensors"
    write_packed(path, some_layers(), some_tensors(), {"b": 1, "a": 2})
    layers = dict(reversed(some_layers().items()))
    write_packed(other, layers, dict(reversed(some_tensors().items())), {"a": 2, "b": 1})
    assert path.read_bytes() == other.read_bytes()


def test_a_second_writer_agrees(path, parts):
    before = contents(read_packed(path))
    assemble(path, *parts)
    assert contents(read_packed(path)) == before


def test_the_example_of_the_specification(path):
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    header = json.loads(re.search(r"^## The file.*?```json\n(.*?)```", page, re.DOTALL | re.MULTILINE)[1])
    weight = json.loads(re.search(r"^## `bitmask`.*?```json\n(.*?)```", page, re.DOTALL | re.MULTILINE)[1])["weight"]
    write_packed(path, {"up": Bitmask.from_dense(torch.tensor(weight).float())}, {"up.bias": torch.ones(4)})
    assert disassemble(path)[0] == header


def test_golden_bytes(path):
    """A file of version 1, as it was first written. Every later version must read it."""
    header = {
        "version": 1,
        "layers": {"up": {"format": "bitmask", "pattern": "unstructured", "shape": [4, 8]}},
        "metadata": {},
        "checksum": "8420dc2d73839467387d095551937ee9",
    }
    table = {
        "__metadata__": {"secateur": json.dumps(header)},
        "up.row_offsets": {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]},
        "up.bias": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]},
        "up.values": {"dtype": "F32", "shape": [8], "data_offsets": [48, 80]},
        "up.bitmask": {"dtype": "U8", "shape": [4, 1], "data_offsets": [80, 84]},
    }
    data = "0000000000000000" + "0300000000000000" * 2 + "0400000000000000" + "0000803f" * 4
    data += "0000c03f000000c00000803e00004040000080bf000080400000003f000000bf" + "920001cc"
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes.fromhex(data))
    file = read_packed(path)
    assert file.layers["up"].to_dense().tolist() == [
        [0, 1.5, 0, 0, -2, 0, 0, 0.25],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [3, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, -1, 4, 0, 0, 0.5, -0.5],
    ]
    assert file.tensors["up.bias"].tolist() == [1, 1, 1, 1]


def test_names_of_tensors_in_the_safetensors_file(path):
    write_packed(path, some_layers(), some_tensors())
    names = load_file(path).keys()
    assert {"block.0.up.values", "block.0.up.bitmask", "block.0.up.row_offsets", "block.0.up.bias"} <= names
    assert {"head.values", "head.scales", "head.columns", "norm.weight"} <= names


def test_what_was_read_does_not_change_with_the_file(path):
    write_packed(path, {}, {"a": torch.ones(4)})
    file = read_packed(path)
    with path.open("r+b") as opened:
        opened.seek(-16, os.SEEK_END)
        opened.write(bytes(16))
    assert file.tensors["a"].tolist() == [1, 1, 1, 1]


def test_tensors_of_any_strides_and_ties(path):
    base = randn(4, 6)
    tensors = {"a": base, "b": base, "t": base.T, "slice": base[1:3, ::2], "p": torch.nn.Parameter(base)}
    write_packed(path, {}, tensors)
    file = read_packed(path)
    for name, tensor in tensors.items():
        assert torch.equal(file.tensors[name], tensor)


# What is refused


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "Model.SafeTensors",
        "model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "consolidated.00.safetensors",
    ],
)
def test_names_of_dense_models_are_refused(tmp_path, name):
    with pytest.raises(FormatError, match=r"dense model.*random.*\n.*\.sparse\.safetensors"):
        write_packed(tmp_path / name, some_layers())
    assert not any(tmp_path.iterdir())


def test_a_link_to_a_dense_model_is_refused(tmp_path):
    dense = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, dense)
    (tmp_path / "link.safetensors").symlink_to(dense)
    with pytest.raises(FormatError, match="dense model"):
        write_packed(tmp_path / "link.safetensors", some_layers())
    assert load_file(dense)["a"].tolist() == [1, 1]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"should end in \.safetensors"):
        write_packed(tmp_path / "model.bin", some_layers())


def test_other_names_are_accepted(tmp_path):
    for name in ("model.sparse.safetensors", "my-model.safetensors", "model-small.safetensors"):
        write_packed(tmp_path / name, {})


def test_tensors_that_cannot_be_written_are_refused(path):
    layers = {"a": Bitmask.from_dense(torch.eye(2))}
    for name in ("a.values", "a.row_offsets", "a.scales"):
        with pytest.raises(FormatError, match=rf"'{name}' is the name of a tensor of the packed layer 'a'"):
            write_packed(path, layers, {name: torch.ones(2)})
    for name in ("", "__metadata__", 3):
        with pytest.raises(FormatError, match="cannot be the name"):
            write_packed(path, {}, {name: torch.ones(2)})
    with pytest.raises(FormatError, match=r"x: safetensors cannot store a .* of complex128"):
        write_packed(path, {}, {"x": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(FormatError, match=r"x: safetensors cannot store a .* on meta"):
        write_packed(path, {}, {"x": torch.ones(2, device="meta")})
    with pytest.raises(FormatError, match=r"x: safetensors cannot store a torch.sparse_coo"):
        write_packed(path, {}, {"x": torch.eye(2).to_sparse()})
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        write_packed(path, {}, {"x": [1.0]})
    for metadata in ({"x": torch.ones(1)}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(TypeError, match="JSON"):
            write_packed(path, {}, {}, metadata)
    assert not any(path.parent.iterdir())


# Whole or not at all


def test_an_existing_file_is_replaced_and_keeps_its_mode(path):
    path.write_text("old")
    path.chmod(0o640)
    write_packed(path, some_layers())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_packed(path).layers.keys() == some_layers().keys()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_new_file_has_the_usual_mode_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.safetensors"
    write_packed(path, {})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_and_its_target_is_replaced(tmp_path, path):
    write_packed(path, {})
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    write_packed(link, some_layers())
    assert link.is_symlink()
    assert read_packed(path).layers.keys() == some_layers().keys()


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    write_packed(path, {}, {"old": torch.ones(3)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match=r"No space left.*\n.*disk is full.*old tiny.sparse.safetensors is as it was"):
        write_packed(path, some_layers())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_write_that_stops_half_way_leaves_the_old_file(path):
    resource = pytest.importorskip("resource")
    write_packed(path, {}, {"old": torch.ones(3)})
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FormatError, match=r"could not be written.*\n.*is as it was"):
            write_packed(path, {}, {"big": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_too_little_room_is_an_error_before_anything_is_written(path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(FormatError, match=r"needs 400 bytes, but the disk has 10 left"):
        write_packed(path, {}, {"x": torch.ones(100)})
    assert not any(path.parent.iterdir())


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="not a directory"):
        write_packed(tmp_path / "file" / "x.safetensors", {})
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FormatError, match=r"folder\.safetensors is a directory"):
        write_packed(tmp_path / "folder.safetensors", {})
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder.safetensors"}


# Attacks and accidents: a test for each error


def test_no_such_file(path):
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        read_packed(path)
    with pytest.raises(FormatError, match="cannot be read: Is a directory"):
        read_packed(path.parent)


def test_a_truncated_file_is_refused(path, parts):
    whole = path.read_bytes()
    for keep in (0, 7, 8, 100, -1, -60):
        path.write_bytes(whole[:keep])
        with pytest.raises(FormatError, match=r"it is truncated.*copy it again"):
            read_packed(path)


def test_a_file_that_is_longer_than_its_tensors_is_refused(path, parts):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FormatError, match="1 bytes more than its tensors"):
        read_packed(path)


def test_a_header_of_absurd_length(path):
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(FormatError, match=r"header would have 1,152,921,504,606,846,976 bytes"):
        read_packed(path)


def test_overlapping_tensors_and_gaps_are_refused(path):
    write_packed(path, {}, {"a": torch.ones(4), "b": torch.ones(4)})
    rejects(path, "tensor 'b' overlaps the one before it", *disassemble(path), offsets={"b": [8, 24]})
    rejects(path, "tensor 'b' leaves a gap", *disassemble_valid(path), offsets={"b": [20, 36]})
    for pair in ([16, 15], [-1, 16], [16.0, 32], [16], None, [True, 16]):
        rejects(path, "tensor 'b' has no valid data_offsets", *disassemble_valid(path), offsets={"b": pair})


def disassemble_valid(path):
    write_packed(path, {}, {"a": torch.ones(4), "b": torch.ones(4)})
    return disassemble(path)


def test_shapes_that_do_not_fit_their_bytes_are_refused(path):
    write_packed(path, {}, {"a": torch.ones(4)})
    for shape in ([5], [2**40, 2**40], [-4], [4.0]):
        text = path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}"
        table = json.loads(text)
        table["a"]["shape"] = shape
        text = json.dumps(table).encode()
        other = path.with_name("other.safetensors")
        other.write_bytes(struct.pack("<Q", len(text)) + text + raw(torch.ones(4)))
        with pytest.raises(FormatError, match="not a readable safetensors file"):
            read_packed(other)


def test_a_header_that_is_not_a_json_object_is_refused(path):
    for text in (b"", b"[1]", b'{"a":', b"\xff\xfe{}", b"[" * 5000, b'{"a":NaN}', b'{"a":1e999}', b'"x"'):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(FormatError, match="has a header that is"):
            read_packed(path)


def test_a_key_that_is_given_twice_is_refused(path):
    tensor = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + tensor + b"," + tensor + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FormatError, match="a key is there twice"):
        read_packed(path)


def test_metadata_that_is_not_a_table_of_texts_is_refused(path):
    for text in (b'{"__metadata__":1}', b'{"__metadata__":{"secateur":{}}}'):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(FormatError, match="metadata is not a table of texts"):
            read_packed(path)


def test_a_safetensors_file_of_another_library_is_refused(path):
    save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"not one of packed weights: its metadata has no 'secateur' entry"):
        read_packed(path)


def test_a_later_version_is_refused(path, parts):
    header, tensors = parts
    rejects(path, r"version 2, but this secateur reads up to 1\.\n.*upgrade", header | {"version": 2}, tensors)
    rejects(path, "version 2", {"version": 2, "other": []}, tensors)  # whatever else it may hold


def test_an_invalid_version_is_refused(path, parts):
    for version in (0, -1, 1.0, "1", None, True):
        rejects(path, "format version", parts[0] | {"version": version}, parts[1])


def test_missing_and_unknown_header_entries_are_refused(path, parts):
    header, tensors = parts
    rejects(path, "header entries", {key: value for key, value in header.items() if key != "layers"}, tensors)
    rejects(path, "header entries", header | {"more": 1}, tensors)
    rejects(path, "header entries", header | {"layers": []}, tensors)
    rejects(path, "header entries", header | {"metadata": "x"}, tensors)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"format": "csr"}, "no format 'csr'"),
        ({"format": ["bitmask"]}, "no format"),
        ({"pattern": "3 of 4"}, "names no pattern"),
        ({"pattern": "5:4"}, "0 <= n <= m"),
        ({"pattern": 24}, "pattern a str of up to"),
        ({"pattern": "row" + " " * 200}, "pattern a str of up to"),
        ({"shape": [6]}, "two integers"),
        ({"shape": "6x10"}, "two integers"),
        ({"shape": [6.0, 10]}, "two integers"),
        ({"shape": [6, -10]}, "out of range"),
        ({"shape": [7, 10]}, "should be"),
        ({"extra": 1}, "should have format, pattern and shape"),
    ],
    ids=str,
)
def test_an_invalid_entry_of_a_layer_is_refused(path, parts, entry, match):
    header, tensors = copy.deepcopy(parts)
    header["layers"]["block.0.up"] |= entry
    rejects(path, rf"layer block.0.up: .*{match}", header, tensors)


def test_a_layer_without_its_tensors_is_refused(path, parts):
    header, tensors = copy.deepcopy(parts)
    header["layers"]["ghost"] = header["layers"]["head"]
    rejects(path, r"layer ghost: .* missing", header, tensors)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "metadata", "removed", "added", "checksum"])
def test_a_checksum_that_differs_is_refused(path, parts, change):
    header, tensors = copy.deepcopy(parts)
    checksum = header["checksum"]
    bias = tensors.pop("block.0.up.bias")
    match change:
        case "value":
            tensors["block.0.up.bias"] = bias + 1e-6
        case "name":
            tensors["block.0.up.bios"] = bias
        case "dtype":
            tensors["block.0.up.bias"] = bias.view(torch.int32)
        case "shape":
            tensors["block.0.up.bias"] = bias[None]
        case "added":
            tensors |= {"block.0.up.bias": bias, "more": bias}
        case "metadata":
            tensors["block.0.up.bias"] = bias
            header["metadata"]["note"] = "y"
        case "checksum":
            tensors["block.0.up.bias"] = bias
            checksum = checksum.upper()
    rejects(path, r"has the checksum \w{32}, but its header says '\w{32}'", header, tensors, checksum=checksum)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("block.0.up.row_offsets", lambda t: t.flip(0), "start at"),
        ("block.0.up.row_offsets", lambda t: torch.cat([t[:1], t[1:].flip(0)]), "row_offsets fall from"),
        ("block.0.up.row_offsets", lambda t: t + torch.tensor([0, 0, 0, 0, 0, 2**62]), "row_offsets reach"),
        ("block.0.up.row_offsets", lambda t: t.int(), r"should be int64 \[6\], got int32"),
        ("block.0.up.bitmask", torch.zeros_like, "bitmask marks 0 weights"),
        ("block.0.up.values", lambda t: t[:-1], "row_offsets reach|bitmask marks"),
        ("block.0.up.values", lambda t: t.double(), "values should be float32.* got float64"),
        ("block.0.down.indices", torch.zeros_like, "should ascend"),
        ("block.0.down.right", lambda t: t[:, :1], r"right should be float32 \[6, 2\], got float32 \[6, 1\]"),
        ("block.1.up.block_columns", lambda t: t + 3, "block_columns has the index"),
        ("block.1.up.scales", lambda t: t * torch.nan, "scales should be finite"),
        ("block.1.down.rows", lambda t: t - 6, "rows has the index"),
        ("head.columns", lambda t: t.flip(0), "columns has .* should ascend"),
    ],
)  # fmt: skip
def test_invalid_tensors_with_a_right_checksum_are_refused(path, parts, name, change, match):
    header, tensors = copy.deepcopy(parts)
    tensors[name] = change(tensors[name])
    rejects(path, rf"layer {name.rsplit('.', 1)[0]}: .*({match}).*\n.*damaged", header, tensors)


# Random changes


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 2500))  # the header, too
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice(b'0123456789"{}[],:\\ \x00\xff')
            case 2:
                del data[at : at + rng.choice([1, 8, 100])]
            case 3:
                data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 4:
                del data[at:]
            case 5:
                data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, struct.pack("<q", rng.choice([-1, 1, 2**40]))])
            case 6:
                start = rng.randrange(len(data))
                data[at : at + 16] = data[start : start + 16]
        data = data or bytearray(b"\x00")
    return bytes(data)


def test_changed_files_have_the_same_contents_or_are_refused(path, parts):
    data, before = path.read_bytes(), contents(read_packed(path))
    rng, refused = random.Random(0), 0
    for _ in range(600):
        path.write_bytes(mutated(data, rng))
        try:
            assert contents(read_packed(path)) == before
        except FormatError:
            refused += 1
    assert 450 < refused < 600  # spaces in the header may change


def test_changed_tensors_with_a_right_checksum_never_point_outside(path, parts):
    """A weight that passes the checks becomes dense, and another format, without an error: kernels trust it."""
    header, tensors = parts
    names = [name for name in tensors if name.rsplit(".", 1)[0] in header["layers"]]
    rng, accepted, refused = random.Random(0), 0, 0
    for _ in range(600):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        name = rng.choice([name for name in names if rng.random() < 0.3 or not name.endswith("values")] or names)
        flat = changed[name].view(-1).view(torch.uint8)
        for _ in range(rng.choice([1, 1, 3])):
            flat[rng.randrange(len(flat))] = rng.choice([0, 1, 255, rng.randrange(256)])
        entry = copy.deepcopy(header)
        if rng.random() < 0.3:
            layer = entry["layers"][name.rsplit(".", 1)[0]]
            layer["shape"][rng.randrange(2)] += rng.choice([-1, 1, 3, 8])
            layer["pattern"] = rng.choice([layer["pattern"], "2:4,remainder=dense", "1:3,remainder=dense", "row"])
        assemble(path, entry, changed)
        try:
            file = read_packed(path)
        except FormatError:
            refused += 1
            continue
        accepted += 1
        for packed in file.layers.values():
            dense = packed.to_dense()
            assert dense.shape == packed.shape
            assert packed.convert(Bitmask).mask().sum() == packed.mask().sum()
    assert accepted > 100
    assert refused > 100


# Checkpoints of compressed-tensors


def compress(weight, mask=None):
    """sparse-bitmask, written here by numpy from its description."""
    kept = (weight != 0 if mask is None else mask).numpy()
    counts = kept.sum(-1)
    values = weight[torch.from_numpy(kept)]
    bitmask = torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little"))
    return {
        "compressed": values,
        "bitmask": bitmask,
        "shape": torch.tensor(weight.shape),
        "row_offsets": torch.tensor(np.cumsum(counts, 0) - counts),
    }


def compress24(weight, mask):
    parts = compress(weight.float(), mask)
    values = weight.view(torch.uint8)[mask].view(weight.dtype) if weight.element_size() == 1 else weight[mask]
    del parts["row_offsets"]
    return parts | {"compressed": values.view(len(weight), -1), "shape": parts["shape"].view(-1, 1)}


def under(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def sparse(*shape, seed=0, dtype=torch.bfloat16):
    weight = randn(*shape, seed=seed).to(dtype)
    return torch.where(randn(*shape, seed=seed + 99) > 0, weight, torch.zeros((), dtype=dtype))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_sparse_bitmask_of_later_versions(checkpoint):
    weight, bias = sparse(6, 19), torch.ones(6)
    save_file(under("a.up", compress(weight)) | {"a.up.bias": bias}, checkpoint / "model.safetensors")
    for path in (checkpoint, checkpoint / "model.safetensors"):
        file = read_compressed_tensors(path)
        assert isinstance(file.layers["a.up"], Bitmask)
        assert file.layers["a.up"].value_dtype == torch.bfloat16
        assert torch.equal(file.layers["a.up"].to_dense(), weight)
        assert list(file.tensors) == ["a.up.bias"]


def test_sparse_bitmask_of_early_versions_compresses_everything(checkpoint):
    weight, bias, norm, conv = sparse(6, 19), sparse(6, seed=3), torch.ones(9), sparse(3, 2, 5, seed=4)
    tensors = under("up.weight", compress(weight)) | under("up.bias", compress(bias))
    tensors |= under("norm.weight", compress(norm)) | under("conv.weight", compress(conv))
    save_file(tensors, checkpoint / "model.safetensors")
    file = read_compressed_tensors(checkpoint)
    assert torch.equal(file.layers["up"].to_dense(), weight)
    assert list(file.layers) == ["up"]
    assert torch.equal(file.tensors["up.bias"], bias)
    assert torch.equal(file.tensors["norm.weight"], norm)
    assert torch.equal(file.tensors["conv.weight"], conv)
    assert len(file.tensors) == 3


def test_sparse_24_bitmask(checkpoint):
    weight = randn(6, 16).half()
    mask = NM(2, 4).mask(weight.abs())
    weight[mask & (weight < 0.2) & (weight > -0.2)] = 0.0  # a kept zero
    save_file(under("up", compress24(weight, mask)), checkpoint / "model.safetensors")
    packed = read_compressed_tensors(checkpoint).layers["up"]
    assert isinstance(packed, NMPacked)
    assert packed.pattern == NM(2, 4)
    assert torch.equal(packed.mask(), mask)
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))


def test_sparse_24_bitmask_whose_groups_cross_rows(checkpoint):
    weight = randn(4, 6)
    mask = NM(2, 4).mask(weight.abs().view(1, 24)).view(4, 6)
    mask[:] = torch.tensor([True, False, True, False, True, False])
    save_file(under("up", compress24(weight, mask)), checkpoint / "model.safetensors")
    packed = read_compressed_tensors(checkpoint).layers["up"]
    assert isinstance(packed, Bitmask)
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))


def test_tensors_of_one_weight_in_two_files(checkpoint):
    weight = sparse(6, 19)
    tensors = under("up", compress(weight))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first = {name: tensors[name] for name in ("up.bitmask", "up.shape")}
    rest = {name: tensors[name] for name in tensors.keys() - first.keys()}
    save_file(first, checkpoint / shards[0])
    save_file(rest, checkpoint / shards[1])
    places = dict.fromkeys(first, shards[0]) | dict.fromkeys(rest, shards[1])
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(read_compressed_tensors(checkpoint).layers["up"].to_dense(), weight)
    save_file(tensors, checkpoint / shards[1])
    with pytest.raises(FormatError, match=r"tensor 'up.bitmask' is in two files"):
        read_compressed_tensors(checkpoint)


@pytest.mark.parametrize("scale", [torch.tensor([0.25]), torch.tensor(0.5), torch.arange(1.0, 7).view(6, 1)], ids=str)
def test_int8_stays_int8(checkpoint, scale):
    weight = torch.randint(-128, 128, (6, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    mask = NM(2, 4).mask(weight.float().abs())
    tensors = under("up", compress24(weight, mask)) | {
        "up.weight_scale": scale.bfloat16(),
        "up.weight_zero_point": torch.zeros(6, 1, dtype=torch.int8),
        "up.input_scale": torch.ones(1),
    }
    save_file(tensors, checkpoint / "model.safetensors")
    file = read_compressed_tensors(checkpoint)
    packed = file.layers["up"]
    assert packed.value_dtype == torch.int8
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0).float() * scale.view(-1, 1))
    assert list(file.tensors) == ["up.input_scale"]


def test_float8_takes_the_dtype_of_its_scale(checkpoint):
    weight = randn(6, 16).to(torch.float8_e4m3fn)
    mask = NM(2, 4).mask(weight.float().abs())
    scale = torch.arange(1.0, 7).view(6, 1).bfloat16() / 10
    tensors = under("up", compress24(weight, mask)) | {"up.weight_scale": scale}
    save_file(tensors, checkpoint / "model.safetensors")
    file = read_compressed_tensors(checkpoint)
    wanted = torch.where(mask, (weight.float() * scale.float()).bfloat16(), 0.0)
    assert torch.equal(file.layers["up"].to_dense(), wanted)
    assert not file.tensors
    save_file(under("up", compress24(weight, mask)), checkpoint / "model.safetensors")
    assert torch.equal(read_compressed_tensors(checkpoint).layers["up"].to_dense(), weight.bfloat16().where(mask, 0))


def without(name):
    return lambda parts: {key: value for key, value in parts.items() if key != name}


def with_(name, value):
    return lambda parts: parts | {name: value(parts[name]) if callable(value) else value}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("bitmask"), r"up: \['bitmask'\] are missing"),
        (without("shape"), r"up: \['shape'\] are missing"),
        (without("compressed"), r"no tensor is called \*\.compressed"),
        (with_("shape", torch.tensor([6.0, 19.0])), "1 to 8 int64 sizes"),
        (with_("shape", torch.tensor([-6, 19])), "out of range"),
        (with_("shape", torch.tensor([2**62, 2**62])), "out of range"),
        (with_("shape", torch.tensor([0, 2**62, 19])), "out of range"),
        (with_("shape", torch.tensor([6, 99])), "bitmask should be uint8 and fit the shape"),
        (with_("bitmask", lambda t: t.short()), "bitmask should be uint8"),
        (with_("bitmask", lambda t: t | 0x80), "bits set beyond the last of 19"),
        (with_("compressed", lambda t: t[:-1]), "bitmask marks|row_offsets reach"),
        (with_("compressed", lambda t: t.double()), "values are float64, which"),
        (with_("compressed", lambda t: t.to(torch.int8)), "values are int8, but weight_scale is missing"),
        (with_("row_offsets", lambda t: t.flip(0)), "row_offsets start at"),
        (without("row_offsets"), "half of each row"),
    ],
)  # fmt: skip
def test_an_invalid_checkpoint_is_refused(checkpoint, change, match):
    save_file(under("up", change(compress(sparse(6, 19)))), checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match=match):
        read_compressed_tensors(checkpoint)


def test_a_mask_that_is_not_2_of_4_is_refused(checkpoint):
    weight, mask = randn(2, 8), torch.tensor([[True, True, True, False, True, False, False, False]] * 2)
    save_file(under("up", compress24(weight, mask)), checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match="exactly 2 of every 4"):
        read_compressed_tensors(checkpoint)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"up.weight_scale": torch.ones(6, 4)}, "weight_scale should be one float"),
        ({"up.weight_scale": torch.ones(6, dtype=torch.int32)}, "weight_scale should be one float"),
        ({"up.weight_scale": torch.full((6,), torch.nan)}, "scales should be finite"),
        ({"up.weight_scale": torch.ones(6), "up.weight_zero_point": torch.ones(6)}, "only symmetric"),
        (
            {"up.weight_scale": torch.ones(6), "up.weight_zero_point": torch.zeros(6).to(torch.complex64)},
            "only symmetric",
        ),
        ({"up.weight_scale": torch.ones(6), "up.weight": torch.ones(6)}, "both dense and compressed"),
        ({"up.weight_scale": torch.ones(6), "down.bitmask": torch.ones(6)}, "'down.bitmask' has no compressed tensor"),
    ],
    ids=["groups", "integer", "nan", "asymmetric", "complex", "twice", "stray"],
)
def test_other_quantisation_is_refused(checkpoint, extra, match):
    parts = compress((sparse(6, 19) * 50).to(torch.int8))
    save_file(under("up", parts) | extra, checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match=match):
        read_compressed_tensors(checkpoint)


def test_other_checkpoints_are_named(checkpoint):
    with pytest.raises(FormatError, match="does not exist"):
        read_compressed_tensors(checkpoint / "nowhere")
    save_file({"up.weight_packed": torch.ones(2), "up.meta": torch.ones(2)}, checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match=r"'up.\w+' has another format of compressed-tensors"):
        read_compressed_tensors(checkpoint)
    save_file({"up.weight": torch.ones(2)}, checkpoint / "model.safetensors")
    with pytest.raises(FormatError, match="has no sparse-bitmask weights"):
        read_compressed_tensors(checkpoint)


def test_what_was_read_can_be_written(checkpoint, path):
    save_file(under("up", compress(sparse(6, 19))), checkpoint / "model.safetensors")
    file = read_compressed_tensors(checkpoint)
    write_packed(path, file.layers, file.tensors)
    assert contents(read_packed(path)) == contents(file)
    assert FORMATS["bitmask"] is Bitmask
    assert read_packed(path).layers["up"].pattern == SparsityPattern.parse("unstructured") == Unstructured()
