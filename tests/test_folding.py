"""Folding of batch norms: exact, reported, and only where nothing else sees what is between."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import RecipeError, fold_


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def used(model):
    """The model in evaluation mode, with statistics and weights of batch norms that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Residual(nn.Module):
    def __init__(self, before=False):
        super().__init__()
        self.before = before
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        if self.before:  # pre-activation
            return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()


class Untraceable(nn.Module):
    """Decides by what it computed, so that only its children can be traced."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.Sequential(*inside)
        self.last = nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.inside(x)
        return self.last(y) if y.sum() > -1e9 else y


def mobile():
    return nn.Sequential(
        nn.Conv2d(6, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 6, 1, bias=False),
        nn.BatchNorm2d(6, affine=False),
    )


IMAGES = (2, 6, 8, 8)
FOLDED = {  # model, shape of its input, names of the batch norms that are folded
    "residual": (lambda: nn.Sequential(Residual(), Residual()), IMAGES, ["0.bn1", "0.bn2", "1.bn1", "1.bn2"]),
    "pre-activation": (lambda: Residual(before=True), IMAGES, ["bn2"]),
    "mobile": (mobile, IMAGES, ["1", "4", "7"]),
    "within what is not traced": (lambda: Untraceable(Residual()), IMAGES, ["inside.0.bn1", "inside.0.bn2"]),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)), (2, 6, 9), ["1"]),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (1, 2, 4, 4, 4), ["1"]),
    "transposed, in groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)),
        IMAGES,
        ["1"],
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)), (3, 6), ["1"]),
}


@pytest.mark.parametrize("case", FOLDED)
def test_a_folded_model_computes_the_same(case):
    make, shape, names = FOLDED[case]
    model = used(make()).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    report = fold_(model, batches=[x])
    assert [norm.name for norm in report.folded] == names
    for name in names:
        assert isinstance(model.get_submodule(name), nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert fold_(model).folded == ()


def shared_convolution():
    convolution = nn.Conv2d(6, 6, 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(6), convolution)


def shared_norm():
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.Conv2d(6, 6, 1), norm)


def tied():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


class Read(nn.Module):
    """What is between is read by something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class WeightRead(Read):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


class NormWithReLU(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


LEFT = {  # model, name of a batch norm that stays, and a part of the reason
    "before its convolution": (lambda: Residual(before=True), "bn1", "comes from outside of Residual"),
    "behind an activation": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.BatchNorm2d(6)),
        "2",
        "1 before it is ReLU",
    ),
    "behind what is not traced": (lambda: Untraceable(nn.Conv2d(6, 6, 1)), "last", "cannot be traced"),
    "shared convolution": (shared_convolution, "1", "0 before it is used 2 times"),
    "shared norm": (shared_norm, "1", "used 2 times"),
    "tied weights": (tied, "1", "shares its weight"),
    "hooks": (hooked, "1", "hooks"),
    "read by others": (Read, "bn", "the output of conv is also read by"),
    "weight that is read": (WeightRead, "bn", "used"),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)),
        "1",
        "no running statistics",
    ),
    "own batch norm": (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), NormWithReLU(6)), "1", "NormWithReLU"),
    "own convolution": (lambda: nn.Sequential(Scaled(6, 6, 1), nn.BatchNorm2d(6)), "1", "Scaled"),
    "computed weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)), nn.BatchNorm2d(6)),
        "1",
        "0 before it",
    ),
    "linear without batches": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm2d(6)),
        "1",
        "give batches",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_norm_that_cannot_be_folded_stays_and_is_named(case):
    make, name, reason = LEFT[case]
    model = used(make())
    x = torch.randn(IMAGES)
    before, expected = copy.deepcopy(model.get_submodule(name)), model(x)
    report = fold_(model)
    (left,) = [norm for norm in report.left if norm.name == name]
    assert reason in left.reason
    assert reason in str(report)
    assert type(model.get_submodule(name)) is type(before)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_features_of_sequences_are_not_normalised_by_a_norm_behind_a_linear_layer():
    model = used(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 4)  # [batch, length, features], as long as it has features
    expected = model(x)
    report = fold_(model, batches=[x])
    assert [norm.name for norm in report.left] == ["1"]
    assert torch.equal(model(x), expected)


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(RecipeError, match=r"1 is in training mode.*model\.eval\(\)"):
        fold_(model)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_weights_that_would_not_be_finite_stay():
    model = used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0)))
    model[1].running_var.zero_()
    weight = model[0].weight.clone()
    (left,) = fold_(model).left
    assert "finite" in left.reason
    assert torch.equal(model[0].weight, weight)


def test_zeros_stay_and_a_folded_model_is_packed():
    model = used(mobile())
    secateur.prune_(model, sparsity=0.75, method="magnitude")
    masks = [module.weight != 0 for module in model.modules() if isinstance(module, nn.Conv2d)]
    x = torch.randn(IMAGES)
    expected = model(x)
    assert len(fold_(model).folded) == 3
    assert [torch.equal(m.weight != 0, mask) for m, mask in zip(model[::3], masks, strict=True)] == [True] * 3
    secateur.pack_(model, batches=[x])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_rounding_happens_once():
    model = used(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).half())
    exact = copy.deepcopy(model).double()
    fold_(model)
    fold_(exact)
    assert torch.equal(model[0].weight, exact[0].weight.half())
    assert torch.equal(model[0].bias, exact[0].bias.half())
