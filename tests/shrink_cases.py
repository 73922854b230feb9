"""Small models for the tests of shrinking, with what must be found in each, and a check that shares no code with it.

`CASES` are topologies that tools for structured pruning stumble over; the families of transformers are in
shrink_families.py. `masked`, `disturbed` and `sliced` say independently whether units were found right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from secateur.calibration import call_model
from secateur.graph import Dimension, Graph


@dataclass(frozen=True)
class Case:
    """A model, an input, and what can be removed.

    Args:
        name: of the case.
        build: makes the model; see `make`.
        batch: makes an input, as `call_model` takes it.
        units: by kind, how many units each dimension has, ascending. That is all: a kind that is missing must not be
            found. Of ``layers``, the blocks of each list that the residual stream passes through.
        trial: like units, of dimensions from which an operation cuts a range, so that only trying tells.
        fixed: parameter dimensions that must be named as boundaries: ``"conv.weight 1"``.
        plain: whether slicing parameters is all that removal takes: the forward code reads no sizes of its own
            (but for query heads, of which it must know how many read a key).
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    units: Mapping[str, Sequence[int]]
    trial: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    plain: bool = True

    def make(self) -> nn.Module:
        """The model, the same each time and ready for inference. All weights are large enough to matter."""
        torch.manual_seed(0)
        model = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                    tensor.normal_(0, (tensor.shape[0] / tensor.numel()) ** 0.5, generator=generator)
                elif isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var")):
                    tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.5)
        return model.eval()

    def __str__(self) -> str:
        return self.name


def differences(
    case: Case, graph: Graph, kinds: Sequence[str] = ("heads", "query_heads", "ffn", "channels")
) -> list[str]:
    """What a graph says otherwise than a case, in words; of some kinds, and of the boundaries."""
    said = []
    for kind in kinds:
        found = [dimension for dimension in graph.dimensions if dimension.kind == kind]
        for label, wanted, is_cut in (("", case.units, False), (" on trial", case.trial, True)):
            sizes = sorted(dimension.size for dimension in found if bool(dimension.cut) is is_cut)
            if sizes != sorted(wanted.get(kind, ())):
                said.append(f"{kind}{label}: found {sizes}, not {sorted(wanted.get(kind, ()))}")
    named = {f"{boundary.tensor} {boundary.dim}" for boundary in graph.boundaries}
    said += [f"{place} is not named as a boundary" for place in case.fixed if place not in named]
    return said


# ---- an independent check ----


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All floating-point tensors that a model returns, in float64."""
    with torch.no_grad():
        result = call_model(model, copy.deepcopy(batch))
    leaves = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the first, of all tensors together; infinite where shapes differ."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return float("inf")
    norm = sum(float(tensor.square().sum()) for tensor in first)
    return float((sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True)) / norm) ** 0.5)


def double(value: Any) -> Any:
    """A copy of a model or a batch in float64."""
    if isinstance(value, nn.Module):
        value = copy.deepcopy(value).double()
        if hasattr(value, "set_experts_implementation"):  # PyTorch's grouped products take no float64
            value.set_experts_implementation("eager")
        return value
    if isinstance(value, Mapping):
        return {key: double(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(double(entry) for entry in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def half(dimension: Dimension) -> list[int]:
    """Numbers of half of the units, of each group as many."""
    group = dimension.group_size or dimension.size
    return [unit for unit in range(dimension.size) if unit % group < group // 2]


def masked(model: nn.Module, dimension: Dimension, units: Sequence[int]) -> nn.Module:
    """A copy in float64 in which all that reads some units multiplies them by zero: what removal must be equal to."""
    model = double(model)
    for place in dimension.places:
        if place.is_input:
            _entry(model, place.tensor).index_fill_(place.dim, torch.from_numpy(place.of(units)), 0)
    return model


def disturbed(model: nn.Module, dimension: Dimension, units: Sequence[int]) -> nn.Module:
    """A masked copy with other values in all that makes the units: the same outputs if nothing else reads them."""
    model = masked(model, dimension, units)
    generator = torch.Generator().manual_seed(2)
    for place in dimension.places:
        if not place.is_input:
            tensor, indices = _entry(model, place.tensor), torch.from_numpy(place.of(units))
            shape = tensor.index_select(place.dim, indices).shape
            values = 0.5 + torch.rand(
                shape, generator=generator, dtype=torch.float64
            )  # positive: a variance may be meant
            tensor.index_copy_(place.dim, indices, values.to(tensor.dtype))
    return model


def sliced(model: nn.Module, dimension: Dimension, units: Sequence[int]) -> nn.Module:
    """A copy in float64 without the units. Of sizes in attributes, only those of PyTorch's layers are changed."""
    model = double(model)
    made: dict[tuple[int, int], Tensor] = {}  # what is tied is sliced once, and stays tied
    for place in dimension.places:
        owner_name, _, leaf = place.tensor.rpartition(".")
        owner = model.get_submodule(owner_name)
        tensor = getattr(owner, leaf)
        gone = set(place.of(units).tolist())
        kept = torch.tensor([index for index in range(tensor.shape[place.dim]) if index not in gone])
        if isinstance(owner, nn.modules.conv._ConvNd) and leaf == "weight" and owner.groups > 1 and place.dim == 0:
            share = tensor.shape[0] // owner.groups
            whole = [
                group for group in range(owner.groups) if not gone.isdisjoint(range(group * share, (group + 1) * share))
            ]
            if len(whole) * share == len(gone):
                owner.groups -= len(whole)
        key = id(tensor), place.dim
        if key not in made:
            smaller = tensor.detach().index_select(place.dim, kept)
            made[key] = nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller
        setattr(owner, leaf, made[key])
        if isinstance(owner, nn.LayerNorm):
            owner.normalized_shape = tuple(owner.weight.shape)
    return model


def _entry(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).data


# ---- topologies ----


def images(channels: int = 3, size: int = 8, count: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(3))


def vectors(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Net(nn.Module):
    """Modules by name, and a forward function that gets the model and the inputs."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def net(forward: Callable[..., Any], modules: Callable[[], dict[str, Any]]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **modules())


def cascaded_concat(m: Any, x: Tensor) -> Tensor:
    x1 = functional.relu(m.c1(x))
    x2 = functional.relu(m.c2(x1))
    x12 = torch.cat([x1, x2], 1)
    x3 = functional.relu(m.c3(x12))
    return m.c4(torch.cat([x12, x3], 1))


def wide_and_deep(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.cat([m.wide(x), functional.relu(m.deep2(functional.relu(m.deep1(x))))], -1))


def split_by_shape(m: Any, x: Tensor) -> Tensor:
    x = functional.relu(m.c1(x))
    quarter = x.shape[1] // 4
    a, b, c = torch.split(x, [quarter, quarter, x.shape[1] - 2 * quarter], dim=1)
    return m.ca(a) + m.cb(b) + m.cc(c)


def split_chunks(m: Any, x: Tensor) -> Tensor:
    a, b = functional.relu(m.c1(x)).chunk(2, dim=1)
    return m.out(a * torch.sigmoid(b))


def split_by_number(m: Any, x: Tensor) -> Tensor:
    a, b = torch.split(functional.relu(m.c1(x)), [4, 8], dim=1)
    return m.ca(a) + m.cb(b)


def split_concat_residual(m: Any, x: Tensor) -> Tensor:
    a, b = m.c1(x).chunk(2, dim=1)
    return m.out(torch.cat([m.c2(a) + b, a], 1))


def concat_along_rows(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    return m.out(torch.cat([y, y.flip(2)], dim=2))


def concat_of_branches_along_rows(m: Any, x: Tensor) -> Tensor:
    return m.out(functional.relu(torch.cat([m.c1(x), m.c2(x)], dim=2)))


def through_images(m: Any, x: Tensor) -> Tensor:
    x = functional.relu(m.fc1(x)).view(x.shape[0], -1, 4, 4)
    x = functional.relu(m.up2(functional.relu(m.up1(x))))
    return m.fc3(functional.relu(m.fc2(x.flatten(1))))


def two_and_two(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([functional.relu(m.fx(x)), functional.relu(m.fy(y))], -1)
    return m.o1(both), m.o2(functional.relu(m.shared(both)))


class Direct(nn.Module):
    """Parameters that no layer owns: scale, class token and position table on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.back = nn.Linear(6, 12), nn.Linear(12, 6)
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.gain = nn.Parameter(torch.rand(12) + 0.5)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        x = x + self.scale * self.back(functional.gelu(self.inner(x)) * self.gain)
        return self.head(x[:, 0])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.idle = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.loose = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.relu(self.fc1(x)))


def plus_and_minus(m: Any, x: Tensor) -> Tensor:
    a, b = m.ca(x), m.cb(x)
    return m.o1(functional.relu(a + b)) + m.o2(functional.relu(b - a))


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.ca(x)
    y.add_(m.cb(x))
    y.relu_()
    z = torch.empty_like(y)
    torch.mul(y, m.cc(x), out=z)
    return m.out(z)


def channel_slice(m: Any, x: Tensor) -> Tensor:
    return m.out(functional.relu(m.c1(x))[:, :8])


def concat_of_itself(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    return m.out(torch.cat([y, y, y], 1))


def concat_of_concats(m: Any, x: Tensor) -> Tensor:
    a, b = m.c1(x), m.c2(x)
    ab, ba = torch.cat([a, b], 1), torch.cat([b, a], 1)
    return m.out(functional.relu(torch.cat([ab, m.c3(ab), ba], 1)))


def concat_that_is_added(m: Any, x: Tensor) -> Tensor:
    a, b = m.c1(x), m.c2(x)
    return m.out(functional.relu(torch.cat([a, b], 1) + m.c3(x)))


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    return m.out(functional.relu(m.twice(functional.relu(m.twice(y)))))


def grouped_chain(m: Any, x: Tensor) -> Tensor:
    return m.out(functional.relu(m.g2(functional.relu(m.bn(m.g1(functional.relu(m.c1(x))))))))


def depthwise_chain(m: Any, x: Tensor) -> Tensor:
    return m.out(functional.relu(m.bn2(m.d2(functional.relu(m.bn1(m.d1(functional.relu(m.c1(x)))))))))


def transposed_between(m: Any, x: Tensor) -> Tensor:
    x = functional.relu(m.fc1(x)).transpose(1, 2)  # the tokens are mixed: a linear layer over the second dimension
    x = m.mix2(functional.relu(m.mix1(x))).transpose(1, 2)
    return m.fc2(x)


def reads_shapes(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    batch, channels, height, width = y.shape
    assert channels == y.size(1)
    y = y.reshape(batch, channels, height * width).mean(-1)
    return m.fc(y / y.shape[0])


def branch_on_input(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    if float(x.mean()) > 1e9:
        y = m.c2(y) * 2
    return m.out(y)


def branch_on_channels(m: Any, x: Tensor) -> Tensor:
    y = functional.relu(m.c1(x))
    if float(y.mean()) > 1e9:  # without some channels the mean is another one
        y = y * 2
    return m.out(functional.relu(m.c2(y)))


def pooled(m: Any, x: Tensor) -> Tensor:
    y = functional.max_pool2d(functional.relu(m.c1(x)), 2)
    y = y + functional.interpolate(m.c2(functional.avg_pool2d(y, 2)), scale_factor=2.0)
    return m.fc(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.fc2(functional.relu(m.fc1(torch.flatten(functional.relu(m.bn(m.c1(x))), 1))))


def group_norm(m: Any, x: Tensor) -> Tensor:
    return m.out(functional.relu(m.norm(m.c1(x))))


def normed(m: Any, x: Tensor) -> Tensor:
    return m.fc3(functional.relu(m.fc2(m.norm(functional.relu(m.fc1(x))))))


def softmaxed(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x).softmax(-1))


def unfolded(m: Any, x: Tensor) -> Tensor:
    patches = functional.unfold(functional.relu(m.c1(x)), 2, stride=2)
    return m.fc(patches.transpose(1, 2))


def fused_attention(m: Any, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    q, k, v = m.qkv(x).view(batch, tokens, 3, -1, 4).unbind(2)
    mixed = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x + m.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))


def sorted_channels(m: Any, x: Tensor) -> Tensor:
    return m.fc2(torch.sort(functional.relu(m.fc1(x)), dim=-1).values)


class Block(nn.Module):
    def __init__(self, width: int = 6, inner: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class DenseLayer(nn.Module):
    """Bottleneck of DenseNet: its output is put behind its input."""

    def __init__(self, inputs: int, growth: int = 4, inner: int = 8) -> None:
        super().__init__()
        self.bn1, self.c1 = nn.BatchNorm2d(inputs), conv(inputs, inner, bias=False)
        self.bn2, self.c2 = nn.BatchNorm2d(inner), conv(inner, growth, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.c2(functional.relu(self.bn2(self.c1(functional.relu(self.bn1(x))))))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(DenseLayer(8), DenseLayer(12)),
        nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8, bias=False), nn.AvgPool2d(2)),
        nn.Sequential(DenseLayer(8), DenseLayer(12)),
        nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 5),
    )


def _lin(*sizes: tuple[str, int, int]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: nn.Linear(inputs, outputs) for name, inputs, outputs in sizes}


def _conv(*sizes: tuple[str, int, int], **others: Callable[[], nn.Module]) -> Callable[[], dict[str, Any]]:
    def modules() -> dict[str, Any]:
        made: dict[str, Any] = {name: conv(inputs, outputs, 3) for name, inputs, outputs in sizes}
        return made | {name: build() for name, build in others.items()}

    return modules


CASES = (
    Case(
        "cascaded concat",
        net(cascaded_concat, _conv(("c1", 3, 4), ("c2", 4, 6), ("c3", 10, 8), ("c4", 18, 5))),
        images(),
        {"channels": (4, 6, 8)},
        fixed=("c4.weight 0", "c4.bias 0", "c1.weight 1"),
    ),
    Case(
        "wide and deep",
        net(wide_and_deep, _lin(("wide", 5, 6), ("deep1", 5, 16), ("deep2", 16, 8), ("out", 14, 3))),
        vectors(4, 5),
        {"channels": (6, 8, 16)},
        fixed=("out.weight 0", "out.bias 0"),
    ),
    Case(
        "split by shape",
        net(split_by_shape, _conv(("c1", 3, 16), ("ca", 4, 5), ("cb", 4, 5), ("cc", 8, 5))),
        images(),
        {},
        trial={"channels": (4, 4, 8)},
    ),
    Case("chunks", net(split_chunks, _conv(("c1", 3, 16), ("out", 8, 5))), images(), {"channels": (8,)}),
    Case(
        "split by number",
        net(split_by_number, _conv(("c1", 3, 12), ("ca", 4, 5), ("cb", 8, 5))),
        images(),
        {},
        trial={"channels": (4, 8)},
    ),
    Case(
        "split, concat and residual",
        net(split_concat_residual, _conv(("c1", 3, 16), ("c2", 8, 8), ("out", 16, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "concat along rows",
        net(concat_along_rows, _conv(("c1", 3, 8), ("out", 8, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "concat of branches along rows",
        net(concat_of_branches_along_rows, _conv(("c1", 3, 8), ("c2", 3, 8), ("out", 8, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "fc, view, transposed convolution, flatten, fc",
        net(
            through_images,
            lambda: {
                "fc1": nn.Linear(5, 6 * 16),
                "up1": nn.ConvTranspose2d(6, 4, 2, stride=2),
                "up2": nn.ConvTranspose2d(4, 3, 1),
                "fc2": nn.Linear(3 * 64, 7),
                "fc3": nn.Linear(7, 2),
            },
        ),
        vectors(2, 5),
        {"channels": (3, 4, 6, 7)},
    ),
    Case(
        "two inputs, two outputs",
        net(two_and_two, _lin(("fx", 4, 6), ("fy", 5, 8), ("o1", 14, 2), ("shared", 14, 10), ("o2", 10, 3))),
        lambda: (vectors(2, 4)(), vectors(2, 5)()),
        {"channels": (6, 8, 10)},
        fixed=("o1.weight 0", "o2.weight 0"),
    ),
    Case(
        "parameters used directly",
        Direct,
        vectors(2, 4, 5),
        # No norm stands on the stream: its channels can go, too, and the neurons are no feed-forward of a fixed stream.
        {"channels": (6, 12)},
        fixed=("positions 1", "head.weight 0"),
    ),
    Case(
        "an unused parameter",
        Unused,
        vectors(8, 4),
        {"channels": (8,)},
        fixed=("idle.weight 0", "idle.weight 1", "idle.bias 0", "loose 0"),
    ),
    Case(
        "a + b with b - a",
        net(plus_and_minus, _conv(("ca", 3, 8), ("cb", 3, 8), ("o1", 8, 5), ("o2", 8, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "in-place add and out=",
        net(in_place, _conv(("ca", 3, 8), ("cb", 3, 8), ("cc", 3, 8), ("out", 8, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "a channel slice",
        net(channel_slice, _conv(("c1", 3, 12), ("out", 8, 5))),
        images(),
        {},
        trial={"channels": (8,)},
    ),
    Case("cat of itself", net(concat_of_itself, _conv(("c1", 3, 4), ("out", 12, 5))), images(), {"channels": (4,)}),
    Case(
        "cat of cats",
        net(concat_of_concats, _conv(("c1", 3, 4), ("c2", 3, 6), ("c3", 10, 8), ("out", 28, 5))),
        images(),
        {"channels": (4, 6, 8)},
    ),
    Case(
        "a cat that is added",
        net(concat_that_is_added, _conv(("c1", 3, 4), ("c2", 3, 6), ("c3", 3, 10), ("out", 10, 5))),
        images(),
        {"channels": (4, 6)},
    ),
    Case(
        "a convolution used twice",
        net(used_twice, _conv(("c1", 3, 8), ("twice", 8, 8), ("out", 8, 5))),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "grouped convolutions",
        net(
            grouped_chain,
            lambda: {
                "c1": conv(3, 8, 3),
                "g1": conv(8, 16, 3, groups=4),
                "bn": nn.BatchNorm2d(16),
                "g2": conv(16, 8, 3, groups=4),
                "out": conv(8, 5),
            },
        ),
        images(),
        # Whole groups of one chain: two, four and two channels of the three layers.
        {"channels": (4,)},
    ),
    Case(
        "depthwise convolutions",
        net(
            depthwise_chain,
            lambda: {
                "c1": conv(3, 8),
                "d1": conv(8, 8, 3, groups=8, bias=False),
                "bn1": nn.BatchNorm2d(8),
                "d2": conv(8, 16, 3, groups=8),
                "bn2": nn.BatchNorm2d(16),
                "out": conv(16, 5),
            },
        ),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "transpose between linears",
        net(transposed_between, _lin(("fc1", 5, 8), ("mix1", 6, 10), ("mix2", 10, 6), ("fc2", 8, 3))),
        vectors(2, 6, 5),
        {"channels": (8, 10)},
        fixed=("mix2.weight 0", "mix1.weight 1"),
    ),
    Case(
        "shapes are read",
        net(reads_shapes, lambda: {"c1": conv(3, 8, 3), "fc": nn.Linear(8, 5)}),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "a branch on the input",
        net(branch_on_input, _conv(("c1", 3, 8), ("c2", 8, 8), ("out", 8, 5))),
        images(),
        {"channels": (8,)},
        fixed=("c2.weight 0", "c2.weight 1"),
    ),
    Case(
        "a branch on channels",
        net(branch_on_channels, _conv(("c1", 3, 8), ("c2", 8, 6), ("out", 6, 5))),
        images(),
        {"channels": (6,)},
        fixed=("c1.weight 0", "c2.weight 1"),
    ),
    Case(
        "pools, interpolation and two means",
        net(pooled, lambda: {"c1": conv(3, 8, 3), "c2": conv(8, 8, 3), "fc": nn.Linear(16, 5)}),
        images(),
        {"channels": (8,)},
    ),
    Case(
        "flattened images",
        net(
            flattened,
            lambda: {"c1": conv(3, 4, 3), "bn": nn.BatchNorm2d(4), "fc1": nn.Linear(256, 6), "fc2": nn.Linear(6, 2)},
        ),
        images(),
        {"channels": (4, 6)},
    ),
    Case(
        "group norm",
        net(group_norm, lambda: {"c1": conv(3, 8, 3), "norm": nn.GroupNorm(4, 8), "out": conv(8, 5)}),
        images(),
        {"channels": (4,)},
        plain=False,
    ),
    Case(
        "a norm over the neurons",
        net(
            normed,
            lambda: {
                "fc1": nn.Linear(4, 8),
                "norm": nn.LayerNorm(8),
                "fc2": nn.Linear(8, 6),
                "fc3": nn.Linear(6, 2),
            },
        ),
        vectors(2, 4),
        {"channels": (6,)},
        fixed=("fc1.weight 0", "norm.weight 0", "fc2.weight 1"),
    ),
    Case(
        "a softmax over the neurons",
        net(softmaxed, _lin(("fc1", 4, 8), ("fc2", 8, 3))),
        vectors(2, 4),
        {},
        fixed=("fc1.weight 0", "fc2.weight 1"),
    ),
    Case(
        "unfolded patches",
        net(unfolded, lambda: {"c1": conv(3, 4, 3), "fc": nn.Linear(16, 5)}),
        images(),
        {"channels": (4,)},
    ),
    Case(
        "fused attention",
        net(fused_attention, lambda: {"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12)}),
        vectors(2, 5, 12),
        {"heads": (3,)},
        fixed=("qkv.weight 1", "out.weight 0"),
    ),
    Case(
        "sorted neurons",
        net(sorted_channels, _lin(("fc1", 4, 8), ("fc2", 8, 3))),
        vectors(2, 4),
        {},
        fixed=("fc1.weight 0", "fc2.weight 1"),
    ),
    Case(
        "residual blocks",
        lambda: nn.Sequential(nn.Linear(4, 6), Block(), Block(), Block(), nn.LayerNorm(6), nn.Linear(6, 3)),
        vectors(2, 4),
        {"ffn": (12, 12, 12), "layers": (6,)},
        fixed=("0.weight 0", "1.norm.weight 0", "5.weight 0"),
    ),
    Case("DenseNet", densenet, images(), {"channels": (4, 4, 4, 4, 8, 8, 8, 8, 8, 8)}, fixed=("7.weight 0",)),
)
