"""Does a file that was changed ever do more than raise FormatError?

Valid packed files and sparse checkpoints are changed in many ways, most of them with a checksum that is right again, so
that the deeper checks are reached. Each is loaded into a model, and what loads is run by every route. Counted are the
outcomes by kind of change, crashes, hangs, errors of other classes, and models that a refused file changed.

    python benchmarks/hostile_files.py --minutes 30               # the installed kernels
    python benchmarks/hostile_files.py --minutes 30 --sanitize    # those of `make asan`, after it has built them
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import json
import math
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur import FormatError, PackedLinear, formats, kernels
from secateur.kernels import PRECISIONS, RoutePlan
from secateur.nn import linear_of, packed_layers
from secateur.packing import read_compressed_tensors

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 120  # seconds after which a load counts as one that hangs
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64", "F4": "float4_e2m1fn_x2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
SIZES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "U64": 8, "U32": 4, "C64": 8, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
Table = dict[str, tuple[str, list[Any], bytes]]  # name -> dtype, shape, bytes


class Model(nn.Module):
    """One layer for each pattern, one without zeros, and what else a file stores."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=i % 2 == 0) for i in range(len(PATTERNS) + 1))
        self.again = self.layers[0]
        self.twin = nn.Linear(side, side)
        self.twin.weight = self.layers[1].weight  # type: ignore[assignment]
        self.pixels = nn.Conv2d(side, side, 1, stride=2)
        self.embedding = nn.Embedding(16, side)
        self.norm = nn.BatchNorm1d(side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.again, self.twin):
            x = layer(x)
        y: torch.Tensor = self.pixels(x.T.reshape(1, x.shape[1], len(x), 1)).flatten(2)[0].T
        y = self.norm(y + self.embedding.weight[0])
        return y


PATTERNS = ["unstructured", "2:4", "block:4x4", "row", "column", "3:8"]


def valid_files(folder: Path) -> list[tuple[str, int, bytes]]:
    """The files to change: name, side of the model and contents."""
    files = []
    for index, (side, dtype) in enumerate([(16, None), (24, torch.int8), (32, torch.bfloat16), (320, None)]):
        torch.manual_seed(index)
        model: Any = Model(side).eval()
        with torch.no_grad():
            for layer, name in zip(model.layers, PATTERNS, strict=False):
                pattern = secateur.SparsityPattern.parse(name)
                layer.weight.mul_(pattern.mask(layer.weight.abs(), 0.6 if pattern.sparsity is None else None))
            model.pixels.weight[model.pixels.weight.abs() < model.pixels.weight.abs().median()] = 0
            model.embedding.weight[model.embedding.weight.abs() < 0.7] = 0
            if dtype == torch.int8:
                model.layers[2].weight.zero_()
        model.twin = PackedLinear.from_linear(model.twin, None, dtype)
        for key in range(len(PATTERNS)):
            model.layers[key] = PackedLinear.from_linear(model.layers[key], None, dtype)
        whole = model.layers[-1]
        model.layers[-1] = PackedLinear(formats.DensePacked.from_dense(whole.weight, value_dtype=dtype), whole.bias)
        model.twin.share_(model.layers[1])
        model.again = model.layers[0]
        path = folder / f"valid{index}.sparse.safetensors"
        secateur.save(model, path)
        files.append((path.name, side, path.read_bytes()))
    files.append(("compressed", 24, compressed()))
    return files


def compressed() -> bytes:
    """A checkpoint of compressed-tensors, written from its description."""
    table: Table = {}
    for index, dtype in enumerate(("F16", "I8", "F32")):
        weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(index))
        kept = weight.abs() > 0.5 if index < 2 else secateur.NM(2, 4).mask(weight.abs())
        values = weight[kept].mul(20 if dtype == "I8" else 1).to(getattr(torch, DTYPES[dtype]))
        bits = [[sum(int(b) << i for i, b in enumerate(row[j : j + 8])) for j in (0, 8, 16)] for row in kept]
        parts = {f"layers.{index}.bitmask": torch.tensor(bits).to(torch.uint8)}
        parts[f"layers.{index}.shape"] = torch.tensor([24, 24])
        parts[f"layers.{index}.compressed"] = values if index < 2 else values.view(24, 12)
        if index < 2:
            parts[f"layers.{index}.row_offsets"] = kept.sum(1).cumsum(0) - kept.sum(1)
        if dtype == "I8":
            parts[f"layers.{index}.weight_scale"] = torch.full((24, 1), 0.05)
            parts[f"layers.{index}.weight_zero_point"] = torch.zeros(24, 1, dtype=torch.int8)
        for name, tensor in parts.items():
            stored = next(key for key, known in DTYPES.items() if known == str(tensor.dtype).removeprefix("torch."))
            table[name] = stored, list(tensor.shape), tensor.contiguous().numpy().tobytes()
    return assemble(table, None)


# Files as tables, and back


def disassemble(data: bytes) -> tuple[Table, dict[str, Any] | None]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    own = header.pop("__metadata__", {}).get("secateur")
    body = data[8 + length :]
    table = {n: (e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]]) for n, e in header.items()}
    return table, None if own is None else json.loads(own)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def assemble(table: Table, own: dict[str, Any] | None, text: str | None = None) -> bytes:
    """A file with a right checksum, written from docs/format.md. ``text`` replaces the entry of secateur."""
    header: dict[str, Any] = {}
    if own is not None:
        own = {key: value for key, value in own.items() if key != "checksum"}
        digest = hashlib.blake2b(canonical(own).encode(), digest_size=16)
        for name in sorted(table):
            dtype, shape, data = table[name]
            digest.update(canonical([name, DTYPES.get(dtype, dtype), shape]).encode() + data)
        header["__metadata__"] = {"secateur": text or json.dumps(own | {"checksum": digest.hexdigest()})}
    body = b""
    for name, (dtype, shape, data) in table.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


# Changes


# Values that a program may not expect.
NUMBERS = [0, 1, -1, 2, 16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**299, 10**4000, 0.5, 1e308, True, None]
TEXTS = ["", "a", "2:4", "row", "dense", "x" * 5000, "\ud800", "0:1", "16:16", "block:1x999999999", "column:3"]
PLANS = ["groups:1:1", "groups:2:4@3 tiles:4x4", "panels:64x24@1 dense", "rows:tiles", "prepacked", "layers.0"]
OTHERS = [[], {}, [0], [0, 2**31 - 1], [2**31 - 1, 0], [0, 2**20], [-1, 4], [16, 16], [[]], {"a": 1}]


def some_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice([*NUMBERS, *TEXTS, *PLANS, *OTHERS]))


def walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, part in items for found in walk(part, (*path, key))]


def change_json(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: replace, remove, copy from elsewhere, or add."""
    places = walk(value)
    place = rng.choice(places[1:] or places)
    if not place:
        return some_value(rng)
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    match rng.randrange(5):
        case 0:
            del owner[place[-1]]
        case 1:
            source = value
            for key in rng.choice(places):
                source = source[key]
            owner[place[-1]] = copy.deepcopy(source)
        case 2 if isinstance(owner[place[-1]], int) and not isinstance(owner[place[-1]], bool):
            owner[place[-1]] += rng.choice([-8, -4, -1, 1, 3, 4, 8])
        case 3 if isinstance(owner, dict):
            owner[rng.choice(["layers.1", "norm", "", "embedding.weight", "again", "x"])] = owner.pop(place[-1])
        case _:
            owner[place[-1]] = some_value(rng)
    return value


def change_bytes(data: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(first, max(first + 1, min(last or len(changed), len(changed)))) if changed else 0
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = rng.choice(b'0123456789"{}[],:\\ \x00\xff')
            case 2:
                del changed[at : at + rng.choice([1, 8, 100])]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 4:
                words = [bytes(8), b"\xff" * 8, struct.pack("<q", rng.choice([-1, 1, 2**31, 2**40, 2**62]))]
                changed[at : at + 8] = rng.choice(words)
            case 5 if changed:
                start = rng.randrange(len(changed))
                changed[at : at + 16] = changed[start : start + 16]
            case _:
                changed[at : at + 9] = b"9" * rng.choice([1, 20, 4300, 5000])
    return bytes(changed)


def changed_tensors(table: Table, rng: random.Random) -> Table:
    """Change bytes of tensors, their dtypes, shapes, names and number. Bytes always fit dtype and shape."""
    table = dict(table)
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(list(table))
        dtype, shape, data = table[name]
        match rng.randrange(12):
            case 0 | 1 | 2 | 8 | 9 | 10 | 11:  # other contents of the same size
                flat = bytearray(data)
                for _ in range(rng.choice([1, 1, 3, 20]) if flat else 0):
                    flat[rng.randrange(len(flat))] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
                table[name] = dtype, shape, bytes(flat)
            case 3:  # another dtype, the same bytes
                other = rng.choice(list(DTYPES))
                size = SIZES.get(other, 1)
                table[name] = other, [len(data) // size * (2 if other == "F4" else 1)], data[: len(data) // size * size]
            case 4:  # another dtype, the same shape
                other = rng.choice(list(DTYPES))
                count = len(data) // SIZES.get(dtype, 1)
                if other != "F4":
                    table[name] = other, shape, (bytes(8) + data * 8)[-count * SIZES.get(other, 1) :] if count else b""
            case 5:  # more, fewer, or other dimensions
                size = SIZES.get(dtype, 1)
                elements = len(data) // size
                fewer = max(elements - 1, 0)
                shapes = ([elements], [elements, 1], [fewer], [1] * 70, [0], [0, 2**31 - 1], [2**63 - 1, 0], [0] * 9)
                other_shape = rng.choice(shapes)
                table[name] = dtype, other_shape, data[: math.prod(other_shape) * size]
            case 6:
                del table[name]
            case 7:
                table[rng.choice([*table, "more", name + ".x"])] = table[name]
        if not table:
            break
    return table


def bomb(rng: random.Random) -> bytes:
    """A file that would take long to read, or much memory, for its size."""
    count = rng.choice([1000, 20_000, 200_000])
    zero = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    texts = [
        lambda: "{" + ",".join(f'"t{i}":{zero}' for i in range(count)) + "}",
        lambda: '{"a":' * count + "1" + "}" * count,
        lambda: '{"__metadata__":{"secateur":"' + "[" * count + '"}}',
        lambda: '{"__metadata__":{"secateur":"{' + ",".join(f'\\"k{i}\\":[]' for i in range(count)) + '}"}}',
        lambda: '{"a":{"dtype":"F32","shape":[' + ",".join(["1"] * count) + '],"data_offsets":[0,0]}}',
        lambda: (
            '{"a":{"dtype":"F32","shape":[' + "9" * rng.choice([20, 4300, 4301, 100_000]) + ',0],"data_offsets":[0,0]}}'
        ),
        lambda: '{"' + "n" * count + '":' + zero + "}",
        lambda: "[" + ",".join(["[]"] * count) + "]",
    ]
    text = rng.choice(texts)().encode()
    return struct.pack("<Q", len(text)) + text


def changed(files: list[tuple[str, int, bytes]], rng: random.Random) -> tuple[str, str, int, bytes]:
    """A kind of change, the name of the file and the side of its model, and the changed file."""
    name, side, data = rng.choices(files, [1 if len(data) > 1 << 18 else 4 for _, _, data in files])[0]
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(["bytes", "header", "truncated", "spliced", "bomb"] + ["tensors", "entry", "both"] * 4)
    if kind == "bytes":
        return kind, name, side, change_bytes(data, rng)
    if kind == "header":
        return kind, name, side, change_bytes(data, rng, 0, 8 + length)
    if kind == "truncated":
        return kind, name, side, data[: rng.randrange(len(data))]
    if kind == "spliced":
        other = rng.choice(files)[2]
        a, b = rng.randrange(len(data)), rng.randrange(len(other))
        return (
            kind,
            name,
            side,
            rng.choice([data[:a] + other[b:], data[:a] + data[-b:], data[: 8 + length] + other[-b:]]),
        )
    if kind == "bomb":
        return kind, name, side, bomb(rng)
    table, own = disassemble(data)
    text = None
    if kind != "entry" or own is None:
        table = changed_tensors(table, rng)
    if kind != "tensors" and own is not None:
        for _ in range(rng.choice([1, 1, 2, 3])):
            own = change_json(own, rng)
            if not isinstance(own, dict):
                text, own = json.dumps(own), {}
    try:
        return kind, name, side, assemble(table, own, text)
    except (ValueError, TypeError, struct.error):  # such as a number of too many digits to be written
        return "bytes", name, side, change_bytes(data, rng)


# What a file does


def run(layer: PackedLinear) -> None:
    """Run a packed weight by every route that says it can."""
    packed = layer.packed
    x = torch.ones(1, packed.shape[1])
    precisions = PRECISIONS if packed.value_dtype == torch.int8 else PRECISIONS[:-1]  # NaN has no code
    routes = [route for route in kernels.candidates(packed, (), precisions) if kernels.can_run(packed, route, x)]
    plans = {*map(str, routes), "groups:2:4", "groups:1:1", "tiles:4x4", "bitmask"}
    plans |= {"panels:128x256", "dense", "rows", "columns", "rows:tiles", "columns:tiles", "prepacked"}
    for plan in sorted(plans):
        if RoutePlan.parse(plan).routes[0].why_not(packed) is None:
            for rows in (1, 3, 40):
                kernels.linear(x.expand(rows, -1), packed, layer.bias, plan)


MEASURED = {"seconds": 0.0, "memory": 0}  # of the last load


@contextmanager
def measured() -> Iterator[None]:
    """Measure the time and the memory of a load, where the system says how much memory there was at most."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset.exists():
        reset.write_text("5", encoding="ascii")
        before = int(status.read_text(encoding="ascii").split("VmRSS:")[1].split()[0])
    start = time.perf_counter()
    try:
        yield
    finally:
        MEASURED["seconds"] = time.perf_counter() - start
        if reset.exists():
            peak = int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0])
            MEASURED["memory"] = (peak - before) * 1024


def outcome(path: Path, name: str, side: int) -> str:
    """Load a file, run what loads, and say what happened."""
    if name == "compressed":
        try:
            with measured():
                file = read_compressed_tensors(path)
        except FormatError:
            return "refused"
        for packed in file.layers.values():
            run(PackedLinear(packed))
        return "ran"
    model = Model(side).eval()
    before = [id(module) for module in model.modules()], {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    try:
        with measured():
            secateur.load(path, into=model)
    except FormatError as error:
        after = (
            [id(module) for module in model.modules()],
            {k: id(t) for k, t in model.state_dict(keep_vars=True).items()},
        )
        if len(str(error)) > 5000 + len(str(path)):
            return f"FormatError of {len(str(error))} characters"
        return "refused" if after == before else "refused, but the model changed"
    with torch.no_grad():
        for layer in {id(layer): linear_of(layer) for layer in packed_layers(model).values()}.values():
            run(layer)  # type: ignore[arg-type]
        dtype = model.norm.weight.dtype
        if all(t.dtype == dtype for t in model.state_dict().values() if t.dtype in (torch.float32, torch.float64)):
            model.to(torch.float32)(torch.ones(4, side))
    secateur.unpack_(model)
    return "ran"


def work(seed: int, seconds: float, folder: Path) -> None:
    """Change and load files until the time is over. Each leaves one line; after a crash its file is still there."""
    torch.set_num_threads(1)
    files, path = valid_files(folder), folder / "current.sparse.safetensors"
    for name, side, data in files:  # valid ones run; this also loads all code before memory is measured
        path.write_bytes(data)
        assert outcome(path, name, side) == "ran", name
    began, number = time.monotonic(), 0
    with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
        while time.monotonic() - began < seconds:
            number += 1
            kind, name, side, data = changed(files, random.Random(f"{seed}/{number}"))
            path.write_bytes(data)
            size = len(data)
            signal.alarm(SLOWEST)
            try:
                found = outcome(path, name, side)
            except Exception as error:
                found = f"{type(error).__name__}: {str(error)[:200]}"
                shutil.copy(path, folder / f"error-{seed}-{number}-{name}-{side}.safetensors")
            signal.alarm(0)
            line = {"kind": kind, "outcome": found, "bytes": size, **MEASURED}
            results.write(json.dumps(line | {"file": f"{seed}/{number}"}) + "\n")
            results.flush()


def report(folder: Path, crashes: list[str]) -> bool:
    """Print what was counted, and return whether nothing was wrong."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    others: collections.Counter[str] = collections.Counter()
    for line in lines:
        known = line["outcome"] in ("refused", "ran")
        by_kind[line["kind"]][line["outcome"] if known else "other"] += 1
        others.update([] if known else [line["outcome"]])
    print(f"{'change':<12}{'files':>8}{'refused':>9}{'ran':>8}{'other':>7}")
    for kind, counts in sorted(by_kind.items()):
        print(f"{kind:<12}{sum(counts.values()):>8}{counts['refused']:>9}{counts['ran']:>8}{counts['other']:>7}")
    for what, count in others.most_common():
        print(f"{count:>6} x {what}")
    slowest = max(lines, key=lambda line: line["seconds"])
    refused = [line for line in lines if line["outcome"] == "refused"]
    large = [line for line in lines if line["bytes"] >= 1 << 20] or lines
    memory = max(large, key=lambda line: line["memory"] / line["bytes"])
    figures = {
        "files": len(lines),
        "refused": len(refused),
        "ran": sum(counts["ran"] for counts in by_kind.values()),
        "other errors": sum(others.values()),
        "crashes": crashes,
        "slowest load": {key: slowest[key] for key in ("seconds", "kind", "bytes", "outcome")},
        "most memory over file size, files of 1 MiB and more": round(memory["memory"] / memory["bytes"], 1),
        "most memory, MiB": max(line["memory"] for line in lines) >> 20,
    }
    print(json.dumps(figures))
    return not (others or crashes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="run with the kernels that `make asan` built")
    parser.add_argument("--keep", type=Path, help="folder for files that did something else")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seed, options.minutes * 60, options.worker)
        return
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    ends, seed, crashes = time.monotonic() + options.minutes * 60, options.seed, []
    while (left := ends - time.monotonic()) > 1:
        command = [sys.executable] + ([str(ROOT / "native" / "sanitize.py"), "run"] if options.sanitize else [])
        command += [__file__, "--worker", str(folder), "--seed", str(seed), "--minutes", str(left / 60)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            what = "hang" if done.returncode == -signal.SIGALRM else f"exit {done.returncode}"
            crashes.append(f"seed {seed}: {what}: {done.stderr[-2000:]}")
            shutil.copy(folder / "current.sparse.safetensors", folder / f"crash-{seed}.safetensors")
            if left < options.minutes * 60 - 5 and len(crashes) > 20:
                break
        seed += 1
    good = report(folder, crashes)
    if options.keep is None and good:
        shutil.rmtree(folder)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
