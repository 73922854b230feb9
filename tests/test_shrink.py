"""Models that become smaller in one call, and stay the function that was left of them."""

import copy

import pytest
import torch
from shrink_cases import CASES, outputs
from shrink_families import FAMILIES
from torch import nn

import secateur
from secateur.graph import Removal
from secateur.shrinking import analyze

ALL = {case.name: case for case in (*CASES, *FAMILIES)}
# One of each kind of structure; the others are traced and cut in their own files.
SOME = ("cascaded concat", "depthwise convolutions", "fused attention", "MPNet", "GPT-2", "Llama", "T5", "Qwen3-MoE")


def mlp(hidden=16, inputs=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()


class Block(nn.Sequential):
    """A feed-forward with a norm before it, added to its input."""

    def forward(self, x):
        return x + super().forward(x)


class Blocks(nn.Module):
    """Residual blocks between two layers."""

    def __init__(self, count=4, width=8, inner=16):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            Block(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(count)
        )
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def data(batches=4, rows=64, inputs=8):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator)
    return [torch.randn(rows, inputs, generator=generator) @ mixing for _ in range(batches)]


def error(model, dense, batches):
    """Relative error of outputs."""
    with torch.no_grad():
        pairs = [(model(x), dense(x)) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("name", SOME)
def test_half_of_each_kind_goes_and_is_proved(name):
    case = ALL[name]
    dense, batch = case.make(), case.batch()
    kinds = analyze(dense, [batch]).kinds
    assert kinds
    for kind in kinds:
        model = copy.deepcopy(dense)
        report = secateur.shrink_(model, [batch, batch], keep={kind: 0.5})
        assert report.proof.error <= 1e-5
        assert report.after.parameters == sum(p.numel() for p in model.parameters()) < report.before.parameters
        assert all(out.isfinite().all() for out in outputs(model, batch))


def test_what_is_asked_for_is_what_stays():
    model = mlp(hidden=20)
    report = secateur.shrink_(model, data(), keep={"channels": 0.5}, round_to=8)
    assert model[0].weight.shape == (8, 8)
    assert model[2].in_features == 8
    (row,) = report.dimensions
    assert (row.before, row.after, len(row.removed)) == (20, 8, 12)
    assert report.removed == {"channels": row.removed}


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_target_is_reached_and_not_overshot_by_a_unit(what, allocation):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    report = secateur.shrink_(model, data(), target={what: 0.5}, allocation=allocation)
    before, after = (
        (report.before.parameters, report.after.parameters)
        if what == "params"
        else (report.before.macs, report.after.macs)
    )
    assert 0.42 < after / before <= 0.5


def test_units_that_are_named_go():
    dense, batches = mlp(), data()
    model = copy.deepcopy(dense)
    report = secateur.shrink_(model, batches, remove={"channels": [3, 5]}, method="obs")
    stay = [unit for unit in range(16) if unit not in (3, 5)]
    assert torch.equal(model[0].weight, dense[0].weight[stay])
    assert torch.equal(model[2].weight, dense[2].weight[:, stay])
    again = copy.deepcopy(dense)
    secateur.shrink_(again, batches, remove=Removal(report.removed, report.model_hash), method="obs")
    assert torch.equal(again[2].weight, model[2].weight)


def test_a_fit_takes_over():
    dense, batches = mlp(hidden=32), data()
    errors = {}
    for method in ("magnitude", "obs", "obs+refit"):
        model = copy.deepcopy(dense)
        report = secateur.shrink_(model, batches, keep={"channels": 0.5}, method=method)
        errors[method] = error(model, dense, batches)
    assert errors["obs+refit"] < 0.5 * min(errors["obs"], errors["magnitude"])
    (row,) = report.dimensions
    assert row.error < row.error_without
    assert row.error == pytest.approx(errors["obs+refit"], rel=0.05)  # the layer's output is the model's


def test_blocks_go_whose_absence_changes_least_and_the_one_before_takes_over():
    torch.manual_seed(0)
    dense = Blocks().eval()
    with torch.no_grad():
        dense.blocks[2][3].weight *= 0.01  # it does nearly nothing
        dense.blocks[2][3].bias.zero_()
    batches = data(inputs=6)
    model = copy.deepcopy(dense)
    report = secateur.shrink_(model, batches, keep={"layers": 0.75}, method="obs")
    assert report.removed == {"blocks": (2,)}
    assert report.kept_blocks == {"blocks": (0, 1, 3)}
    worse = {}
    for method in ("obs", "obs+refit"):
        model = copy.deepcopy(dense)
        report = secateur.shrink_(model, batches, remove={"layers": [3]}, method=method)
        worse[method] = error(model, dense, batches)
    assert len(model.blocks) == 3
    assert worse["obs+refit"] < 0.8 * worse["obs"]
    (row,) = [row for row in report.dimensions if row.kind == "layers"]
    assert row.error < row.error_without


def test_blocks_by_influence():
    dense = Blocks().eval()
    with torch.no_grad():
        dense.blocks[1][3].weight *= 0.001
        dense.blocks[1][3].bias.zero_()
    report = secateur.shrink_(dense, data(inputs=6), keep={"layers": 0.75}, method="obs+influence")
    assert report.removed == {"blocks": (1,)}


def test_layers_and_neurons_together():
    torch.manual_seed(0)
    model = Blocks().eval()
    report = secateur.shrink_(model, data(inputs=6), keep={"layers": 0.5, "ffn": 0.5})
    assert len(model.blocks) == 2
    assert all(block[1].out_features == 8 for block in model.blocks)
    assert report.uniform
    assert {row.kind for row in report.dimensions} == {"layers", "ffn"}
    assert len([row for row in report.dimensions if row.kind == "ffn"]) == 2  # of the blocks that stayed


def test_global_allocation_takes_most_where_it_costs_least():
    torch.manual_seed(0)
    model = Blocks(count=2).eval()
    with torch.no_grad():
        model.blocks[0][3].weight[:, :12] *= 1e-3  # most of its neurons are hardly heard
    report = secateur.shrink_(model, data(inputs=6), keep={"ffn": 0.5}, allocation="global", method="wanda")
    sizes = [block[1].out_features for block in model.blocks]
    assert sum(sizes) == 16
    assert sizes[0] < sizes[1]
    assert not report.uniform
    assert "ffn" in report.uniform_reason


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_scores_from_a_loss(method):
    dense = mlp()
    with torch.no_grad():
        dense[2].weight[:, [2, 9]] *= 1e-4
    report = secateur.shrink_(
        dense,
        data(rows=8),
        keep={"channels": 14 / 16},
        method=method,
        loss=lambda output, batch: (output.sum(1) - batch[:, 0]).square().mean(),
    )
    assert report.removed == {"channels": (2, 9)}
    with pytest.raises(secateur.RecipeError, match="needs a loss"):
        secateur.shrink_(mlp(), data(), keep={"channels": 0.5}, method=method)


class TestZeros:
    def test_rows_that_were_pruned_go_and_their_constants_go_into_biases(self):
        dense, batches = mlp(), data()
        secateur.prune_(dense, pattern="row", sparsity=0.5, method="magnitude", include=["0"])
        with torch.no_grad():
            dense[0].bias.abs_()  # so that the rows that are zero give out constants
        model = copy.deepcopy(dense)
        report = secateur.shrink_(model, batches, zeros=True)
        assert model[0].out_features == 8
        assert error(model, dense, batches) < 1e-6
        assert report.method == ""

    def test_columns_that_were_pruned_go(self):
        dense, batches = mlp(), data()
        secateur.prune_(dense, pattern="column", sparsity=0.25, method="magnitude", include=["2"])
        model = copy.deepcopy(dense)
        secateur.shrink_(model, batches, zeros=True)
        assert model[2].in_features == 12
        assert error(model, dense, batches) < 1e-6

    def test_a_constant_that_no_bias_can_take_stays(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False)).eval()
        with torch.no_grad():
            model[0].weight[2] = 0
        report = secateur.shrink_(model, data(), zeros=True)
        assert model[0].out_features == 6
        assert any("stay" in note for note in report.notes)

    def test_nothing_is_zero(self):
        model = mlp()
        report = secateur.shrink_(model, data(), zeros=True)
        assert model[0].out_features == 16
        assert "no unit was zero" in report.notes


class TestPatterns:
    def test_a_pruned_layer_loses_whole_groups_and_keeps_its_pattern(self):
        model, batches = mlp(hidden=32), data()
        history = secateur.prune_(model, batches, pattern="2:4", include=["2"])
        report = secateur.shrink_(model, batches, keep={"channels": 0.5}, history=history)
        (row,) = report.dimensions
        assert row.after == 16
        groups = {unit // 4 for unit in row.removed}
        assert len(groups) * 4 == len(row.removed)
        assert ((model[2].weight != 0).view(4, -1, 4).sum(2) <= 2).all()

    def test_it_is_seen_in_the_zeros(self):
        model, batches = mlp(hidden=32), data()
        secateur.prune_(model, batches, pattern="2:4", include=["2"])
        report = secateur.shrink_(model, batches, keep={"channels": 0.5})
        assert len({unit // 4 for unit in report.dimensions[0].removed}) * 4 == 16

    def test_what_does_not_fill_a_group_stays_and_says_so(self):
        class Joined(nn.Module):
            def __init__(self):
                super().__init__()
                self.narrow, self.wide, self.last = nn.Linear(8, 3), nn.Linear(8, 5), nn.Linear(8, 4)

            def forward(self, x):
                return self.last(torch.cat([self.narrow(x), self.wide(x)], 1).relu())

        model = Joined().eval()
        history = secateur.prune_(model, pattern="2:4", method="magnitude", include=["last"])
        report = secateur.shrink_(model, data(), keep={"channels": 0.5}, history=history)
        assert model.last.in_features == 8
        assert all("Shrink first" in row.notes[0] for row in report.dimensions)


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({}, "exactly one of keep, target, remove and zeros"),
            ({"keep": {"channels": 0.5}, "zeros": True}, "exactly one"),
            ({"keep": {"chanels": 0.5}}, "did you mean 'channels'"),
            ({"keep": {"channels": 0.0}}, "channels"),
            ({"keep": {"channels": 1.5}}, "channels"),
            ({"keep": {"heads": 0.5}}, "has no heads"),
            ({"remove": {"channels": [16]}}, "counted from 0 to 15"),
            ({"remove": {"channels": list(range(16))}}, "Keep at least one"),
            ({"remove": {"layers": [0]}}, "layers"),
            ({"target": {"params": 0.001}}, "cannot be reached"),
            ({"target": {"bytes": 0.5}}, "bytes"),
            ({"keep": {"channels": 0.5}, "method": "obz"}, "did you mean 'obs'"),
            ({"keep": {"channels": 0.5}, "method": "obs+wanda"}, "two of a kind"),
            ({"keep": {"channels": 0.5}, "allocation": "some"}, "uniform"),
            ({"keep": {"channels": 0.5}, "include": ["nothing"]}, "matches nothing"),
            ({"remove": Removal({"channels": (1,)}, "0" * 64, "Other")}, "another model"),
        ],
    )
    def test_a_request_that_cannot_be_met_changes_nothing(self, asked, message):
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(secateur.SparsityError, match=message):
            secateur.shrink_(model, data(), **asked)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_model_that_cannot_run_the_example(self):
        with pytest.raises(secateur.RecipeError, match="cannot run the example"):
            secateur.shrink_(mlp(), [torch.randn(2, 7)], keep={"channels": 0.5})

    def test_a_packed_and_a_gated_model(self):
        packed = mlp(hidden=64)
        secateur.sparsify_(packed)
        with pytest.raises(secateur.RecipeError, match="finalize"):
            secateur.shrink_(packed, data(), keep={"channels": 0.5})

    def test_nothing_removable(self):
        model = nn.Sequential(nn.Linear(8, 4)).eval()
        with pytest.raises(secateur.RecipeError, match="has no channels"):
            secateur.shrink_(model, data(), keep={"channels": 0.5})

    def test_a_failed_proof_puts_all_back(self, monkeypatch):
        def fails(undo, batches, forward):
            undo.restore()
            raise secateur.SolverError("channels: another function")

        model = mlp()
        before = copy.deepcopy(model.state_dict())
        monkeypatch.setattr("secateur.shrinking._work.prove", fails)
        with pytest.raises(secateur.SolverError, match="another function"):
            secateur.shrink_(model, data(), keep={"channels": 0.5})
        assert model[0].out_features == 16
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dtypes_gradients_and_ties_stay():
    torch.manual_seed(0)
    model = Blocks().to(torch.bfloat16).eval()
    model.blocks[0][1].weight.requires_grad_(False)
    model.blocks[1][3].weight = model.blocks[0][3].weight  # tied: one parameter, one set of units
    report = secateur.shrink_(model, [x.bfloat16() for x in data(inputs=6)], keep={"ffn": 0.5})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.blocks[0][1].weight.requires_grad
    assert model.blocks[1][3].weight is model.blocks[0][3].weight
    assert model.blocks[0][1].out_features == model.blocks[1][1].out_features == 8
    assert "float32" in report.proof.note


def test_only_what_is_included_goes():
    torch.manual_seed(0)
    model = Blocks().eval()
    secateur.shrink_(model, data(inputs=6), keep={"ffn": 0.5}, include=["blocks.1*"])
    assert [block[1].out_features for block in model.blocks] == [16, 8, 16, 16]


def test_the_residual_stream_on_request_is_not_exact_and_says_so():
    torch.manual_seed(0)
    model = Blocks().eval()
    report = secateur.shrink_(model, data(inputs=6), keep={"hidden": 0.5})
    assert model.first.out_features == 4
    assert model.last.in_features == 4
    (row,) = [row for row in report.dimensions if row.kind == "hidden"]
    assert "not exact" in row.notes[0]


def test_training_goes_on():
    model = mlp()
    secateur.shrink_(model, data(), keep={"channels": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(data()[0]).square().mean().backward()
    optimizer.step()
    assert model[0].weight.grad.shape == (8, 8)


def test_a_model_that_draws_random_numbers_is_proved():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x * (torch.rand(x.shape) > 0.5))

    report = secateur.shrink_(Noisy().eval(), data(), keep={"channels": 0.5})
    assert report.proof.error <= 1e-5


@pytest.mark.parametrize("activation", [nn.GLU(), nn.Hardswish(), nn.LogSigmoid(), nn.Softplus(), nn.PReLU(16)])
def test_activations_keep_or_halve_channels(activation):
    inner = 8 if isinstance(activation, nn.GLU) else 16
    model = nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(inner, 4)).eval()
    report = secateur.shrink_(model, data(), keep={"channels": 0.5}, method="magnitude")
    assert model[2].in_features == inner // 2
    assert report.proof.error <= 1e-5


def test_code_that_keeps_a_number_of_channels_is_a_boundary_and_no_error():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.last = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.last(self.down(self.up(x).view(-1, 4, 4).flatten(1)).relu())

    model = Fixed().eval()
    report = secateur.shrink_(model, data(), keep={"channels": 0.5})
    assert model.up.out_features == 16
    assert model.down.out_features == 6
    assert any(boundary.tensor == "up.weight" and boundary.dim == 0 for boundary in report.boundaries)


def test_heads_of_attention_with_capped_scores_are_heads():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (
                part(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v)
            )
            scores = torch.tanh(q @ k.transpose(2, 3) / 10) * 10
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = Capped().eval()
    secateur.shrink_(model, [torch.randn(2, 5, 8)], keep={"heads": 0.5})
    assert model.num_heads == 2
    assert model.o.in_features == 4
