import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur import RecipeError
from secateur.layers import _kinds, kind_of, select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def own_kinds(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(_kinds, "_KINDS", dict(_kinds._KINDS))


def output_from_rows(module, x):
    """[groups, tokens, out / groups]: what the module computes, as a product of rows and matrix."""
    kind = kind_of(module)
    rows = kind.input_rows(module, x)
    matrix = kind.to_matrix(module, getattr(module, kind.parameter).detach())
    output = rows @ matrix.reshape(len(rows), -1, matrix.shape[1]).transpose(1, 2)
    bias = getattr(module, "bias", None)
    return output if bias is None else output + bias.detach().view(len(rows), 1, -1)


def conv_output_as_rows(module, y, space):
    """A convolution's output, [batch, out, *positions] or without batch, as [groups, tokens, out / groups]."""
    y = y if y.ndim == space + 2 else y[None]
    return torch.stack([part.flatten(2).transpose(1, 2).flatten(0, 1) for part in y.chunk(module.groups, dim=1)])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_rows_times_the_matrix_is_what_a_linear_layer_computes(bias):
    module = nn.Linear(6, 4, bias=bias).double()
    for shape in ((6,), (5, 6), (2, 3, 6), (2, 3, 2, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(output_from_rows(module, x)[0], module(x).reshape(-1, 4))


def test_rows_times_the_matrix_is_what_a_transposed_linear_layer_computes():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    module = transformers.Conv1D(4, 6).double()
    nn.init.normal_(module.bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = select_layers(nn.Sequential(module))[0][0]
    assert layer.matrix().shape == (4, 6)
    torch.testing.assert_close(output_from_rows(module, x)[0], module(x).reshape(-1, 4))


CONVOLUTIONS = [
    *({"padding_mode": mode, "padding": padding, "dilation": dilation}
      for mode in ("zeros", "reflect", "replicate", "circular")
      for padding, dilation in ((2, 1), ("same", 1), ("same", 2), ("valid", 2), (1, 2))),
    {"stride": 2, "padding": 1},
    {"stride": 3},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    {"groups": 2, "padding": 1},
    {"groups": 4, "out_channels": 4},
    {"groups": 4, "out_channels": 8, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 1},
    {"kernel_size": 2, "padding": "same"},  # an even window is padded by more on the far side
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "bias": False},
]  # fmt: skip


# The axes of a convolution are treated alike, so that not every option is tried in one and three dimensions.
OF_ANY_SPACE = [
    {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    {"padding": "valid", "padding_mode": "zeros", "dilation": 2},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "bias": False},
]


def _conv_id(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) if isinstance(options, dict) else f"{options}d"


@pytest.mark.parametrize(
    ("space", "options"),
    [(2, options) for options in CONVOLUTIONS] + [(space, options) for space in (1, 3) for options in OF_ANY_SPACE],
    ids=_conv_id,
)
def test_rows_times_the_matrix_is_what_a_convolution_computes(space, options):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    module = kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options).double()
    for batch in ((2,), ()):
        x = torch.randn(*batch, 4, *(7, 6, 5)[:space], dtype=torch.float64)
        with warnings.catch_warnings():  # PyTorch says that an even window with padding="same" needs a copy
            warnings.simplefilter("ignore")
            y = module(x)
        torch.testing.assert_close(output_from_rows(module, x), conv_output_as_rows(module, y, space))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
        {"kernel_size": (1, 4), "stride": (2, 1), "padding": (2, 3), "dilation": (1, 2), "groups": 2},
        {"kernel_size": (2, 3), "padding": (0, 2), "padding_mode": "circular"},
        {"kernel_size": (2, 3), "padding": (1, 0), "padding_mode": "reflect"},
    ],
    ids=_conv_id,
)
def test_rows_follow_each_axis_of_a_lopsided_convolution(options):
    module = nn.Conv2d(4, 6, **options).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(output_from_rows(module, x), conv_output_as_rows(module, module(x), 2))


def every_kind():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return [
        nn.Linear(6, 4),
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        nn.Conv3d(2, 3, 2),
        conv1d(4, 6),
    ]


@pytest.mark.parametrize("index", range(6))
def test_writing_the_matrix_back_changes_nothing(index):
    module = every_kind()[index].half()
    (layer,), _ = select_layers(module)
    before, strides = module.weight.detach().clone(), module.weight.stride()
    parameter, matrix = module.weight, layer.matrix().clone()
    layer.write_(matrix)
    assert module.weight is parameter
    assert module.weight.stride() == strides
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("index", range(6))
def test_a_written_matrix_is_read_back_whatever_its_dtype_and_strides(index):
    module = every_kind()[index].bfloat16()
    (layer,), _ = select_layers(module)
    rows, columns = layer.matrix().shape
    matrix = torch.randn(columns, rows).T  # columns are contiguous
    layer.write_(matrix)
    assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.matrix(), matrix.bfloat16(), rtol=0, atol=0)


def test_the_matrix_needs_no_gradient_and_writing_keeps_that_of_the_weight():
    module = nn.Linear(3, 2)
    (layer,), _ = select_layers(module)
    assert not layer.matrix().requires_grad
    layer.write_(torch.ones(2, 3))
    assert module.weight.requires_grad
    assert module.weight.is_leaf


def test_columns_of_one_input_channel_are_neighbours_and_channel_width_counts_them():
    module = nn.Conv2d(4, 6, (3, 2), groups=2)
    (layer,), _ = select_layers(module)
    assert layer.channel_width == 6
    torch.testing.assert_close(layer.matrix()[:, 6:12].reshape(6, 3, 2), module.weight[:, 1].detach())
    assert select_layers(nn.Linear(3, 2))[0][0].channel_width == 1


def test_a_parameter_in_two_layers_is_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    layers, skipped = select_layers(model)
    assert [(layer.name, layer.tied_to) for layer in layers] == [("0", ("2",)), ("1", ())]
    assert layers[0].modules == (model[0], model[2])
    assert layers[0].parameter_name == "0.weight"
    assert not skipped


def test_a_module_with_two_names_is_one_layer():
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = model.first
    layers, _ = select_layers(model)
    assert [layer.modules for layer in layers] == [(model.first,)]


def test_a_layer_tied_to_an_embedding_is_left_unless_included():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 10, bias=False)})
    model["out"].weight = model["embed"].weight
    layers, skipped = select_layers(model)
    assert [layer.name for layer in layers] == ["body"]
    reasons = {skip.name: skip.reason for skip in skipped}
    assert reasons["embed"] == "embedding"
    assert "tied to the embedding 'embed'" in reasons["out"]
    assert [layer.name for layer in select_layers(model, include=["out"])[0]] == ["out"]


@pytest.mark.parametrize("excluded", ["0", "2"])
def test_an_excluded_layer_keeps_its_weight_even_if_that_is_tied(excluded):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    layers, _ = select_layers(model, exclude=[excluded])
    assert [layer.name for layer in layers] == ["1"]


def test_a_weight_that_an_unknown_module_uses_too_is_left():
    model = nn.ModuleDict({"known": nn.Linear(4, 4), "own": OwnLinear(), "other": nn.Linear(4, 4)})
    model["own"].kernel = model["known"].weight
    layers, _ = select_layers(model)
    assert [layer.name for layer in layers] == ["other"]


class OwnLinear(nn.Module):
    """Computes 2 x K with K [in, out]."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return 2 * x @ self.kernel


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.words = nn.Linear(4, 10)

    def get_output_embeddings(self):
        return self.words


def _integer_linear():
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return module


def _float8_linear():
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return module


SKIPPED = [
    ("embedding", lambda: nn.Embedding(5, 4), "odd", "embedding"),
    ("embedding_bag", lambda: nn.EmbeddingBag(5, 4), "odd", "embedding"),
    ("layer_norm", lambda: nn.LayerNorm(4), "odd", "no weight matrix"),
    ("batch_norm", lambda: nn.BatchNorm1d(4), "odd", "no weight matrix"),
    ("parametrized", lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "odd", "weight is computed"),
    ("torch_pruned", lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "odd", "weight is computed"),
    ("int8", _integer_linear, "odd", "int8"),
    ("float8", _float8_linear, "odd", "float8"),
    ("complex", lambda: nn.Linear(4, 4, dtype=torch.complex64), "odd", "complex64"),
    ("unknown", OwnLinear, "odd", "OwnLinear is no known kind of layer; see secateur.register_layer"),
]


@pytest.mark.parametrize(("make", "name", "reason"), [case[1:] for case in SKIPPED], ids=[case[0] for case in SKIPPED])
def test_what_is_not_pruned_is_skipped_with_the_reason(make, name, reason):
    model = nn.ModuleDict({"odd": make(), "usual": nn.Linear(4, 4)})
    layers, skipped = select_layers(model)
    assert [layer.name for layer in layers] == ["usual"]
    (found,) = [skip for skip in skipped if skip.name == name]
    assert reason in found.reason
    assert found.kind == type(model.get_submodule(name)).__name__


@pytest.mark.parametrize("make", [case[1] for case in SKIPPED if case[0] not in ("embedding", "embedding_bag")])
def test_include_does_not_force_what_cannot_be_pruned(make):
    model = nn.ModuleDict({"odd": make(), "usual": nn.Linear(4, 4)})
    for include in (["*"], ["odd*", "usual"]):
        assert [layer.name for layer in select_layers(model, include=include)[0]] == ["usual"]


def test_the_output_head_is_left_unless_included():
    model = nn.ModuleDict({"a": WithHead(), "lm_head": nn.Linear(4, 4), "classifier": nn.Linear(4, 4)})
    layers, skipped = select_layers(model)
    # Only the outermost model is asked for its head, and `words` is not the usual name of one.
    assert [layer.name for layer in layers] == ["a.body", "a.words"]
    assert all("output head" in skip.reason for skip in skipped)
    assert [layer.name for layer in select_layers(WithHead())[0]] == ["body"]
    assert [layer.name for layer in select_layers(model, include=["lm_head"])[0]] == ["lm_head"]


def deep():
    return nn.ModuleDict({
        "encoder": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(2)),
        "pool": nn.Linear(4, 4),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ([], [], ["encoder.0.up", "encoder.0.down", "encoder.1.up", "encoder.1.down", "pool"]),
        (["encoder.*"], [], ["encoder.0.up", "encoder.0.down", "encoder.1.up", "encoder.1.down"]),
        (["encoder.*"], ["*.down"], ["encoder.0.up", "encoder.1.up"]),
        ([], ["*.1.*", "pool"], ["encoder.0.up", "encoder.0.down"]),
        (["pool", "*.1.u[pq]"], [], ["encoder.1.up", "pool"]),
    ],
    ids=str,
)
def test_globs_choose_by_whole_names_and_exclude_wins(include, exclude, names):
    layers, skipped = select_layers(deep(), include, exclude)
    assert [layer.name for layer in layers] == names
    assert len(layers) + len(skipped) == 5
    assert {skip.reason for skip in skipped} <= {"excluded", "not included"}


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error(where):
    for glob in ("up", "encoder", "Pool", "*.up.weight", ""):
        with pytest.raises(RecipeError, match="matches none of the 5 modules") as raised:
            select_layers(deep(), **{where: ["pool", glob]})
        assert repr(glob) in str(raised.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(), ["no layer to prune", "none"]),
        (nn.Sequential(nn.ReLU()), ["no layer to prune", "none"]),
        (nn.ModuleDict({"norm": nn.LayerNorm(4), "lm_head": nn.Linear(4, 4)}), ["norm (LayerNorm)", "lm_head"]),
        (nn.LayerNorm(4), ["(the model itself) (LayerNorm)", "no weight matrix"]),
    ],
    ids=["empty", "activation", "head_and_norm", "root_norm"],
)
def test_nothing_to_prune_is_an_error_that_says_why(model, words):
    with pytest.raises(RecipeError) as raised:
        select_layers(model)
    assert all(word in str(raised.value) for word in words)


def test_a_glob_on_a_model_without_parameters_is_an_error():
    with pytest.raises(RecipeError, match="no parameters"):
        select_layers(nn.ReLU(), include=["*"])


def test_a_registered_class_and_its_subclasses_are_layers(own_kinds):
    class Narrower(OwnLinear):
        pass

    kind = secateur.LayerKind(
        to_matrix=lambda module, kernel: kernel.T,
        from_matrix=lambda module, matrix: matrix.T,
        input_rows=lambda module, x: 2 * x.reshape(1, -1, x.shape[-1]),
        parameter="kernel",
    )
    model = nn.Sequential(OwnLinear(), Narrower()).double()
    with pytest.raises(RecipeError, match="register_layer"):
        select_layers(model)
    secateur.register_layer(OwnLinear, kind)
    layers, skipped = select_layers(model)
    assert [layer.parameter_name for layer in layers] == ["0.kernel", "1.kernel"]
    assert not skipped
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(output_from_rows(model[1], x)[0], model[1](x))


def test_the_kind_of_the_nearest_base_class_counts_and_a_later_registration_replaces(own_kinds):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    first, second = (secateur.LayerKind(lambda m, w: w, lambda m, w: w, lambda m, x: x[None]) for _ in range(2))
    linear = kind_of(nn.Linear(2, 2))
    assert kind_of(Doubled(2, 2)) is linear
    secateur.register_layer(Doubled, first)
    secateur.register_layer(Doubled, second)
    assert kind_of(Doubled(2, 2)) is second
    assert kind_of(nn.Linear(2, 2)) is linear


def test_a_subclass_of_the_transposed_layer_can_be_registered(own_kinds):
    base = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Own(base):
        pass

    class Inherited(Own):
        pass

    kind = secateur.LayerKind(lambda m, w: w.T, lambda m, w: w.T, lambda m, x: x[None])
    secateur.register_layer(Own, kind)
    assert kind_of(Own(2, 2)) is kind
    assert kind_of(Inherited(2, 2)) is kind


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), int, "Linear"], ids=["instance", "other_class", "name"])
def test_only_module_classes_can_be_registered(wrong, own_kinds):
    with pytest.raises(TypeError, match="module_type"):
        secateur.register_layer(wrong, kind_of(nn.Linear(2, 2)))


def test_only_a_layer_kind_can_be_registered(own_kinds):
    with pytest.raises(TypeError, match="LayerKind"):
        secateur.register_layer(OwnLinear, "linear")
