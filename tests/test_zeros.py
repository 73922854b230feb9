"""Zeros that were lost come back, in any copy; what a report says of the whole model is what the model holds."""

import copy
import dataclasses
import pickle

import pytest
import torch
from calibration_cases import CASES
from torch import nn
from torch.optim.swa_utils import AveragedModel

import secateur
from secateur.nn import linear_of
from secateur.reports import PackedMask, StoredMasks
from secateur.zeros import weights_of


class Net(nn.Module):
    """A convolution, a tied weight, and names like those of wrappers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.model = nn.ModuleDict({"module": nn.Linear(8, 16)})
        self.twins = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.twins[1].weight = self.twins[0].weight
        self.norm = nn.LayerNorm(8)


class Wrapper(nn.Module):
    """As a LightningModule holds a model, beside something else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.metric = nn.Linear(8, 16)


class Distributed(nn.Module):
    """DistributedDataParallel needs processes; only its attribute matters here."""

    def __init__(self, model):
        super().__init__()
        self.module = model


def compiled(model):
    return torch.compile(model, backend="eager")


def half_compiled(model):
    model.model["module"] = compiled(model.model["module"])
    return model


def without_twin(model):
    """As safetensors stores tied weights: once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "twins.0.weight"}


COPIES = {
    "copy": lambda model: model,
    "average": AveragedModel,
    "compiled": compiled,
    "compiled inside": half_compiled,
    "average of compiled": lambda model: AveragedModel(compiled(model)),
    "lightning": Wrapper,
    "distributed lightning": lambda model: Distributed(Wrapper(model)),
    "state dict": lambda model: model.state_dict(),
    "state dict of an average": lambda model: AveragedModel(model).state_dict(),
    "one name of a tied weight": without_twin,
    "bfloat16": lambda model: model.bfloat16(),
}


def pruned(**options):
    torch.manual_seed(0)
    model = Net()
    settings = {"sparsity": 0.5, "method": "magnitude"} | options
    return model, secateur.prune_(model, **settings)


def filled(model):
    """A copy whose weights are all larger than zero."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.rand_like(parameter) + 1)
    return made


def tensors(holder):
    return holder.state_dict() if isinstance(holder, nn.Module) else holder


@pytest.mark.parametrize("name", COPIES)
def test_zeros_come_back_in_any_copy(name):
    model, report = pruned()
    target = COPIES[name](filled(model))
    before = {key: tensor.clone() for key, tensor in tensors(target).items()}
    with pytest.raises(
        secateur.PatternError, match=r"zeros were lost in \d parameters:\n .*conv.*weight: 36 of its 36 "
    ):
        report.verify(target)
    changed = secateur.apply_masks_(target, report)
    assert sum(changed.values()) in (report.num_pruned, report.num_pruned + 32)  # a copied state has both twins apart
    assert "all 132 pruned weights are zero, in 3 parameters" in str(report.verify(target))
    expected = report.masks
    for key, tensor in tensors(target).items():
        own = next((mask for path, mask in expected.items() if key.replace("_orig_mod.", "").endswith(path)), None)
        if own is None and key.endswith("twins.1.weight"):
            own = expected["twins.0.weight"]
        kept = torch.ones_like(tensor, dtype=torch.bool) if own is None else own
        assert torch.equal(tensor, before[key] * kept), key
    assert not any(secateur.apply_masks_(target, report).values())


@pytest.mark.parametrize("wrap", [AveragedModel, Wrapper, compiled], ids=["average", "lightning", "compiled"])
def test_a_report_of_a_wrapped_model_fits_the_bare_one(wrap):
    torch.manual_seed(0)
    model = Net()
    names = ["*conv", "*model.module", "*twins.*"]
    report = secateur.prune_(wrap(model), sparsity=0.5, method="magnitude", include=names)
    target = filled(model)
    secateur.apply_masks_(target, report)
    assert report.verify(target).pruned == 132


KINDS = {
    "linear": lambda: nn.Linear(8, 4),
    "conv1d": lambda: nn.Conv1d(4, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "conv1d of transformers": lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 8),
}


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_the_shape_and_the_name_of_the_parameter(kind, bare):
    layer = KINDS[kind]()
    model = layer if bare else nn.Sequential(layer)
    report = secateur.prune_(model, sparsity=0.25, method="magnitude")
    name = "weight" if bare else "0.weight"
    read = secateur.masks(model)
    assert list(report.masks) == list(read) == [name]
    assert torch.equal(report.masks[name], layer.weight != 0)
    assert torch.equal(read[name], report.masks[name])
    assert report.verify(model.state_dict()).by_masks


METHODS = ["gate", "sr-ste", "magnitude", "set", "rigl", "static"]


@pytest.mark.parametrize("method", METHODS)
def test_a_training_gives_its_masks_to_a_copy(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(32, 16))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    training = secateur.SparseTraining(model, optimizer, method=method, pattern="2:4", steps=4)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(4, 4, 2, 2)).square().mean().backward()
            optimizer.step()
            if training._masked.report is None:
                training.step()

    steps(2)
    early = filled(plain)
    secateur.apply_masks_(early, training)
    for name, mask in training.masks.items():
        weight = early.get_parameter(f"{name}.weight")
        assert torch.equal(weight != 0, mask.view(weight.shape))
    steps(2)
    report = training.finalize()
    report.verify(model)
    late = filled(plain)
    secateur.apply_masks_(late, training)
    report.verify(late)
    assert report.masks["0.weight"].shape == (8, 4, 1, 1)
    steps(1)  # momentum and gradients move what nothing holds any more
    with pytest.raises(secateur.PatternError, match=r"0\.weight: \d+ of its 16 pruned weights are not zero"):
        report.verify(model)
    secateur.apply_masks_(model, report)
    report.verify(model)


def test_a_lottery_ticket_gives_its_masks():
    model = nn.Sequential(nn.Linear(8, 16))
    ticket = secateur.LotteryTicket(model, torch.optim.SGD(model.parameters(), 0.1), pattern="unstructured")
    ticket.prune(0.5)
    target = filled(model)
    assert secateur.apply_masks_(target, ticket) == {"0.weight": 64}
    assert ticket.finalize().verify(target).by_masks


def test_masks_that_were_read_serve_a_report_without_masks():
    model, report = pruned()
    read = secateur.Report.from_json(report.to_json())
    target = AveragedModel(filled(model))
    with pytest.raises(secateur.RecipeError, match=r"no masks.*read from a file\.\n.*secateur\.masks\(model\)"):
        secateur.apply_masks_(target, read)
    with pytest.raises(secateur.RecipeError, match=r"secateur\.masks\(model\)"):
        _ = read.masks
    with pytest.raises(secateur.PatternError, match=r"it has 0 zeros, but 64 weights were pruned(.|\n)*Only numbers"):
        read.verify(target)
    secateur.apply_masks_(target, secateur.masks(model))
    text = str(read.verify(target))
    assert text.startswith("as many zeros as were pruned, 132 in 3 parameters; their places were not compared, because")
    assert not read.verify(target).by_masks


def test_masks_of_some_layers():
    model, _ = pruned()
    assert list(secateur.masks(model, include=["conv"])) == ["conv.weight"]
    assert list(secateur.masks(model, exclude=["conv", "twins.*"])) == ["model.module.weight"]


def without(model, name):
    return {key: tensor for key, tensor in model.state_dict().items() if key != name}


def changed(model, name, tensor):
    return model.state_dict() | {name: tensor}


def with_adapter(model):
    return {name.replace(".weight", ".base_layer.weight"): tensor for name, tensor in model.state_dict().items()}


LAST = "twins.0.weight"  # by then other parameters could have been written

REFUSED = {
    "missing": (
        lambda m: without(m, "conv.weight"),
        secateur.RecipeError,
        r"1 of 3 pruned .* not in the dict: conv\.w",
    ),
    "another model": (lambda m: nn.Linear(8, 4), secateur.RecipeError, r"3 of 3 .*\n.*prefixes.*\nPass a copy"),
    "nothing": (lambda m: {}, secateur.RecipeError, r"It has 0 tensors\."),
    "shape": (
        lambda m: changed(m, LAST, torch.ones(8, 9)),
        secateur.PatternError,
        r"twins\.0\.weight: .*\(8, 9\), but",
    ),
    "integers": (
        lambda m: changed(m, LAST, torch.ones(8, 8, dtype=torch.int8)),
        secateur.RecipeError,
        r"twins\.0\.weight: it is int8.*\n.*quantized",
    ),
    "meta": (lambda m: changed(m, LAST, torch.ones(8, 8, device="meta")), secateur.RecipeError, "without values"),
    "two alike": (
        lambda m: nn.ModuleDict({"model": m, "module": copy.deepcopy(m)}),
        secateur.RecipeError,
        r"any of 'module\.conv\.weight' and 'model\.conv\.weight'.*\nPass only the part",
    ),
    "a checkpoint": (
        lambda m: {"state_dict": m.state_dict(), "epoch": 3},
        secateur.RecipeError,
        r"pass the state_dict that is in the checkpoint",
    ),
    "adapters": (with_adapter, secateur.RecipeError, "merge_and_unload"),
    "packed": (
        lambda m: nn.ModuleDict({"twins": nn.ModuleList([secateur.PackedLinear.from_linear(m.twins[0])])}),
        secateur.RecipeError,
        r"'twins\.0\.weight' is computed by PackedLinear .* secateur\.unpack_",
    ),
    "a list": (lambda m: [m], TypeError, "expected an nn.Module or a state_dict, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(name):
    make, error, match = REFUSED[name]
    model, report = pruned()
    target = make(filled(model))
    held = {k: v.clone() for k, v in tensors(target).items() if isinstance(v, torch.Tensor)} if name != "a list" else {}
    with pytest.raises(error, match=match):
        secateur.apply_masks_(target, report)
    for key, tensor in held.items():
        assert tensor.is_meta or torch.equal(tensors(target)[key], tensor), key


NO_MASKS = ["report.json", {"conv.weight": torch.ones(4, 2, 3, 3)}, {"conv.weight": [True]}, None]


@pytest.mark.parametrize("source", NO_MASKS)
def test_what_is_no_mask_is_refused(source):
    with pytest.raises(TypeError, match="mask"):
        secateur.apply_masks_(Net(), source)


def test_an_inference_tensor_is_refused():
    model, report = pruned()
    with torch.inference_mode():
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(secateur.RecipeError, match="inference mode"):
        secateur.apply_masks_(state, report)


def test_a_packed_model_is_verified():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = secateur.prune_(model, pattern="2:4", method="magnitude")
    packed = nn.Sequential(secateur.PackedLinear.from_linear(model[0]), model[1])
    assert report.verify(packed).pruned == 4096
    linear_of(packed[0]).values.fill_(0)
    assert report.verify(packed).pruned == 4096  # zeros more than were pruned are no fault


@pytest.mark.parametrize("parts", [(1, 0), (slice(1, 2), slice(0, 1))], ids=["numbers", "slices"])
def test_masks_of_matrices_inside_one_parameter_become_one(parts):
    expected = torch.ones(3, 4, 5, dtype=torch.bool)
    expected[1, 2] = expected[0, 3, :2] = False
    masks = StoredMasks(PackedMask.of(("stack",), expected[part], expected.shape, part) for part in parts)
    assert torch.equal(masks["stack"], expected)
    (packed,) = masks.packed()
    assert (packed.pruned, packed.nbytes) == (7, 6)
    state = {"module.stack": torch.ones(3, 4, 5)}
    assert secateur.apply_masks_(state, masks) == {"module.stack": 7}
    assert torch.equal(state["module.stack"] != 0, expected)


def test_names_that_are_the_same_are_no_guess():
    """A model that holds a copy of itself under the name of a wrapper: the exact names count."""
    held = {"a.weight": torch.zeros(1, 1), "module.a.weight": torch.ones(1, 1)}
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    report = secateur.prune_(model, sparsity=1.0, method="magnitude")
    assert secateur.apply_masks_(held, report) == {"a.weight": 0}


def test_a_report_keeps_its_masks_but_writes_them_nowhere():
    _, report = pruned()
    later = dataclasses.replace(report, seconds=1.0)
    for kept in (later, copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert all(torch.equal(kept.masks[name], mask) for name, mask in report.masks.items())
    assert "masks" not in str(dataclasses.asdict(report))
    assert "masks" not in report.to_json()
    assert sum(mask.nbytes for mask in report.masks.packed()) == (72 + 128 + 64) // 8
    with pytest.raises(ValueError, match="never part"):
        secateur.Report.from_json(report.to_json()[:-1] + ', "stored_masks": {}}')


# The whole model


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.ones(3, 4, 5))


def tied_embedding():
    head = nn.Linear(8, 10, bias=False)
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "body": nn.Linear(8, 8), "lm_head": head})
    model.lm_head.weight = model.embed.weight
    return model


MODELS = {
    "net": Net,
    "tied embedding": tied_embedding,
    "experts": lambda: nn.Sequential(nn.Linear(4, 4), Experts(), nn.BatchNorm1d(4)),
    "integers": lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ParameterList([torch.ones(3)])}),
    "attention": lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_model_are_counted_once(name):
    model = MODELS[name]()
    report = secateur.prune_(model, sparsity=0.5, method="magnitude")
    distinct = {id(parameter): parameter for parameter in model.parameters()}.values()
    assert report.whole == weights_of(model)
    assert report.whole.weights == sum(parameter.numel() for parameter in distinct)
    assert report.whole.zeros == sum(int((parameter == 0).sum()) for parameter in distinct)
    assert report.whole.nbytes == 4 * report.whole.weights
    left = {entry.name for entry in report.skipped}
    others = {id(p): p for key, p in model.named_parameters() if p.ndim < 2 and key.rpartition(".")[0] not in left}
    biases = sum(parameter.numel() for parameter in others.values())
    assert report.num_weights + sum(entry.weights for entry in report.skipped) + biases == report.whole.weights
    matrices = sum(parameter.numel() for parameter in distinct if parameter.ndim >= 2)
    assert report.num_weights + sum(entry.matrix_weights for entry in report.skipped) == matrices


def test_a_packed_model_counts_as_if_it_were_dense():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    secateur.prune_(model, sparsity=0.5, method="magnitude")
    dense = weights_of(model)
    packed = secateur.PackedLinear.from_linear(model[0])
    assert weights_of(nn.Sequential(packed, model[1])) == dense
    assert weights_of(nn.ModuleList([packed, packed, model[1]])) == dense


def test_weights_without_values_and_narrow_ones_are_counted():
    model = nn.ParameterList(
        [torch.zeros(3, device="meta"), torch.zeros(4, dtype=torch.float8_e4m3fn), torch.ones(2, dtype=torch.bfloat16)]
    )
    for parameter in model:
        parameter.requires_grad_(False)
    model.append(nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False))
    found = weights_of(model)
    assert (found.weights, found.zeros, found.nbytes, found.without_values) == (9, 4, 3 * 4 + 4 + 2 * 2, 3)


def test_the_size_of_a_model_is_told_as_shares():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Embedding(16, 8))
    report = secateur.prune_(model, sparsity=0.5, method="magnitude")
    assert str(report).splitlines()[0] == ("16.67% of the model's 192 weights are zero now; 33.33% were considered")
    assert report.warnings == ()  # an embedding is left alone by what it is


def test_what_was_left_alone_is_told_by_class_and_reason():
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "experts": nn.ModuleList([Experts(), Experts()]),
            "embed": nn.Embedding(10, 4),
            "lm_head": nn.Linear(4, 10),
        }
    )
    (warning,) = secateur.prune_(model, sparsity=0.5, method="magnitude").warnings
    assert warning == (
        "88.24% of the weights in matrices were left alone (120 of 136, without embeddings and output heads): 120 in 2 "
        "Experts (Experts is no known kind of layer; see secateur.register_layer), 40 in embeddings, 40 in output "
        "heads"
    )


@pytest.mark.parametrize("options", [{"include": ["0"]}, {"exclude": ["1"]}])
def test_what_the_user_left_out_is_no_warning(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400))
    report = secateur.prune_(model, sparsity=0.5, method="magnitude", **options)
    assert report.warnings == ()
    assert "0.99% were considered" not in str(report)
    assert report.skipped[0].matrix_weights == 1600


def test_layers_and_rows_that_ended_empty_are_noted():
    """At 0.999 the nearest number of weights to keep in a row is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    report = secateur.prune_(model, [torch.randn(9, 16)], sparsity=0.999, method="wanda")
    assert [layer.remarks[-1] for layer in report.layers] == [
        "all weights are zero: the output no longer depends on the input"
    ] * 2
    assert "2 layers are entirely zero, so nothing of the input passes: 0, 1" in str(report)
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]]))
    report = secateur.prune_(model, sparsity=0.5, method="magnitude")
    assert report.layers[0].remarks == ("1 of 3 output rows are entirely zero",)
    assert "1 of 3 output rows" in report.to_markdown()
    assert report.warnings == ()
    assert secateur.prune_(model, pattern="row", sparsity=1 / 3, method="magnitude").layers[0].remarks == ()


def test_a_training_notes_empty_layers():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = secateur.SparseTraining(model, optimizer, method="static", sparsity=0.99, steps=1).finalize()
    assert report.layers[0].empty_rows == 4
    assert report.whole == weights_of(model)
    assert report.warnings == ("1 layer is entirely zero, so nothing of the input passes: 0",)


MODES = {
    "replay": ("glue_between", {}, "sequential with replay"),
    "full": ("swallowed_nan", {}, "sequential in full"),
    "no blocks": ("mlp", {}, "one pass"),
    "not sequential": ("unet", {"sequential": False}, "one pass"),
}


@pytest.mark.parametrize("name", MODES)
def test_the_report_says_how_it_was_calibrated(name):
    case, options, mode = MODES[name]
    model, batches, _ = CASES[case]()
    report = secateur.prune_(model, batches, sparsity=0.5, method="wanda", **options)
    assert report.calibration_mode == mode
    assert f"calibration {mode}" in str(report)
    assert secateur.Report.from_json(report.to_json()) == report


def test_without_calibration_there_is_no_mode():
    _, report = pruned()
    assert report.calibration_mode == ""
    assert "calibration" not in str(report)
