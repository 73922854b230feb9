"""Statistics of batch norms, computed again: beside a slow truth in float64, and with nothing else changed."""

import copy

import pytest
import torch
from torch import nn

from secateur import StatisticsError
from secateur.recovery import reestimate_


class Residual(nn.Module):
    """Norms in sequence and side by side, with dropout between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.short, self.norm2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.drop = nn.Dropout(0.5)
        self.norm3, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.drop(self.norm1(self.conv1(x))) + self.norm2(self.short(x)))
        return self.head(self.norm3(x.mean((2, 3))))


def trained(model):
    """Weights and statistics that are not those of a new model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 * torch.randn_like(tensor).abs())
    return model.train()


def images(*sizes):
    torch.manual_seed(4)
    return [3 * torch.randn(size, 3, 8, 8) + 2 for size in sizes]


def truth(model, batches):
    """One norm after the other, in float64, on all rows at once: mean and unbiased variance of what comes in."""
    model = copy.deepcopy(model).double().eval()
    order, seen = [], {}
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda module, args, name=name: (order.append(name), seen.update({name: args[0]}))[1]
        )
    everything = torch.cat(batches).double()
    model(everything)
    for name in list(dict.fromkeys(order)):
        model(everything)
        rows = seen[name].detach().movedim(1, -1).flatten(0, -2)
        norms[name].running_mean.copy_(rows.sum(0) / len(rows))
        norms[name].running_var.copy_((rows - rows.mean(0)).square().sum(0) / (len(rows) - 1))
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def statistics(model):
    return {n: (m.running_mean, m.running_var) for n, m in model.named_modules() if hasattr(m, "running_mean")}


@pytest.mark.parametrize("sizes", [(24,), (1, 7, 16), (8, 8, 8), (1,) * 24])
def test_the_statistics_are_those_of_all_rows_however_they_are_cut_into_batches(sizes):
    model, batches = trained(Residual()), images(24)
    expected = truth(model, batches)
    found = reestimate_(model, list(batches[0].split(list(sizes))))
    assert found.norms == ("stem.1", "norm1", "norm2", "norm3")
    assert not found.left
    for name, (mean, variance) in statistics(model).items():
        torch.testing.assert_close(mean.double(), expected[name][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance.double(), expected[name][1], rtol=1e-4, atol=1e-5)


def test_one_pass_normalises_each_batch_by_itself_and_pools():
    model, batches = trained(Residual()), images(10, 14)
    expected = truth(model, batches)
    reestimate_(model, batches, exact=False)
    got = statistics(model)
    for part in (0, 1):  # nothing comes before the first norm
        torch.testing.assert_close(got["stem.1"][part].double(), expected["stem.1"][part], rtol=1e-5, atol=1e-6)
    manual = []
    for batch in batches:
        x = model.stem[0](batch)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = x * model.stem[1].weight.view(1, -1, 1, 1) + model.stem[1].bias.view(1, -1, 1, 1)
        manual.append(model.conv1(torch.relu(x)).movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(got["norm1"][0], torch.cat(manual).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["norm1"][1], torch.cat(manual).var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_else_changes(exact):
    model = trained(Residual())
    model.norm1.eval()  # modes differ within the model
    model.norm1.momentum = 0.3
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    batches = images(6, 6)
    kept = copy.deepcopy(batches)
    reestimate_(model, batches, exact=exact)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(("running_mean", "running_var")), name
    assert [module.training for module in model.modules()] == modes
    assert model.norm1.momentum == 0.3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(map(torch.equal, batches, kept))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm1d(4), (5, 4, 3)),
        (nn.BatchNorm2d(4), (5, 4, 3, 2)),
        (nn.BatchNorm3d(4), (5, 4, 3, 2, 2)),
        (nn.SyncBatchNorm(4), (5, 4, 3, 2)),
        (nn.BatchNorm2d(4).to(torch.bfloat16), (5, 4, 3, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else f"{len(value)} dimensions",
)
def test_every_kind_of_batch_norm(norm, shape):
    torch.manual_seed(0)
    batches = [torch.randn(shape).to(norm.running_mean.dtype) * 3 + 1 for _ in range(3)]
    assert reestimate_(norm, batches).norms == ("",)
    rows = torch.cat(batches).double().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(norm.running_mean, rows.mean(0).to(norm.running_mean.dtype))
    torch.testing.assert_close(norm.running_var, rows.var(0).to(norm.running_var.dtype))


def test_a_mean_that_is_large_beside_the_variance_loses_no_digits():
    norm = nn.BatchNorm1d(1)
    reestimate_(norm, [torch.tensor([[4096.0], [4097.0]]), torch.tensor([[4098.0]])])
    assert norm.running_var.item() == 1.0


def test_norms_that_stay_as_they_are_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.free = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x):
            return self.free(self.used(x))

    model = trained(Two())
    before = model.unused.running_mean.clone()
    found = reestimate_(model, [torch.randn(4, 2)])
    assert found.norms == ("used",)
    assert found.left == {"free": "it keeps no running statistics", "unused": "no batch reached it"}
    assert torch.equal(model.unused.running_mean, before)


def test_a_norm_that_runs_twice_has_the_rows_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x, y):
            return self.norm(x) + self.norm(y)

    model = Twice()
    reestimate_(model, [(torch.zeros(2, 1), torch.ones(2, 1))] * 2)
    assert model.norm.running_mean.item() == 0.5
    assert model.norm.running_var.item() == pytest.approx(8 * 0.25 / 7)


def test_padding_does_not_count():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 3), nn.BatchNorm1d(3)

        def forward(self, input_ids, attention_mask):
            return self.norm(self.embed(input_ids).transpose(1, 2))

    model = trained(Tokens())
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    reestimate_(model, [{"input_ids": ids, "attention_mask": (ids != 0).long()}])
    torch.testing.assert_close(model.norm.running_mean, model.embed.weight[1:6].mean(0))
    torch.testing.assert_close(model.norm.running_var, model.embed.weight[1:6].var(0))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([torch.full((2, 3, 8, 8), torch.nan)], "stem.1: .* NaN or infinite"),
        ([torch.zeros(1, 3, 8, 8)], "norm3: the batches give it 1 row, and a variance needs two"),
    ],
)
def test_after_an_error_all_is_as_before(batches, said):
    model = trained(Residual())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match=said):
        reestimate_(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_statistics_beyond_the_range_of_the_norm_are_refused():
    norm = nn.BatchNorm1d(1).half()
    with pytest.raises(
        StatisticsError, match=r"\(the model itself\): its statistics reach 2\.45e\+09, beyond the range of float16"
    ):
        reestimate_(norm, [torch.tensor([[-4e4], [3e4]]).half()])


def test_a_model_without_batch_norms_is_not_run():
    assert reestimate_(nn.LayerNorm(3), [None]).norms == ()


def test_progress_counts_forward_passes():
    told = []
    reestimate_(trained(Residual()), images(4, 4), progress=lambda *what: told.append(what))
    assert [done for _, done, _ in told] == list(range(1, 9))
    assert {total for _, _, total in told} == {8.0}
