"""Faults that were found in public pruning code, each with the tests that this library passes and the fault does not.

A test stands here if no other file has one; it computes what the faulty code does, and shows that it is different.
"""

import ast
import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import IMPORTANCES, PATTERNS, SOLVERS
from torch import nn

import secateur
from secateur import (
    NM,
    LayerProblem,
    LayerStatistics,
    Refit,
    Select,
    SparseGPT,
    StatisticsError,
    Unstructured,
    Wanda,
    prune_,
)
from secateur.calibration import GRADIENTS
from secateur.calibration._gather import RowSums
from secateur.solvers import UNIT_IMPORTANCES, parse_method

HERE = "test_public_faults.py"


@dataclass(frozen=True)
class Fault:
    """What public code does, and where a test would notice it.

    Args:
        code: whose it is.
        what: it does.
        tests: ``file::function``, or a function of this file.
    """

    code: str
    what: str
    tests: tuple[str, ...]


FAULTS = [
    Fault("SparseGPT", "score <= sorted[k] prunes k + 1 weights, and all ties", ("test_counts_are_exact_among_ties",)),
    Fault("SparseGPT", "index error at sparsity 1", ("test_solvers.py::test_sparsity_one_leaves_nothing",)),
    Fault("SparseGPT", "zeroes dead inputs even at sparsity 0", ("test_dead_inputs_keep_their_weights_at_sparsity_0",)),
    Fault(
        "SparseGPT",
        "an N:M mask needs a block size that m divides",
        ("test_solvers.py::test_groups_are_decided_one_after_the_other_whatever_the_block",),
    ),
    Fault(
        "SparseGPT",
        "read as diag(H^-1) where the paper has the diagonal of its Cholesky factor",
        ("test_solvers.py::test_solution_is_that_of_the_paper",),
    ),
    Fault(
        "Wanda",
        "its statistic is a mean of squared norms, and looks like a norm",
        (
            "test_importance.py::test_wanda_uses_the_norm_not_its_square",
            "test_importance.py::test_wanda_takes_the_root_once",
        ),
    ),
    Fault("Wanda", "the mean is over sequences, however long they are", ("test_tokens_count_not_batches",)),
    Fault("Wanda", "int(columns * sparsity) cuts off", ("test_counts_are_rounded_to_the_nearest",)),
    Fault("Wanda", "magnitude with <= prunes all ties", ("test_counts_are_exact_among_ties",)),
    Fault("aprender", "takes the root of a norm", ("test_importance.py::test_wanda_takes_the_root_once",)),
    Fault(
        "RIA",
        "compares within the layer, where its N:M results compare within rows",
        ("test_importance.py::test_scopes_are_those_of_the_papers",),
    ),
    Fault("RIA", "the stored weight is not N:M in the order in which it is stored", ("test_stored_weights_are_nm",)),
    Fault(
        "RIA",
        "a device is written into the code",
        ("test_oneshot.py::test_the_stored_weights_have_exactly_the_sparsity",),
    ),
    Fault("ADMM", "a schedule of sparsity that is not used", ("test_the_sparsity_rises_before_the_mask_is_chosen",)),
    Fault("ADMM", "2:4 is written into the code", ("test_every_pattern_and_every_count_is_met",)),
    Fault("ADMM", "one weight too many at an edge of kthvalue", ("test_every_pattern_and_every_count_is_met",)),
    Fault("ADMM", "torch.inverse of what may be singular", ("test_a_singular_gram_is_solved",)),
    Fault(
        "ALPS", "a view of the weights is zeroed in place", ("test_a_problem_is_left_as_it_was_and_shares_no_memory",)
    ),
    Fault("ALPS", "the sparsity is the part that is kept", ("test_every_pattern_and_every_count_is_met",)),
    Fault("ALPS", "one damping in the paper and another in the code", ("test_a_singular_gram_is_solved",)),
    Fault("OWL", "shares below 0 or above 1", ("test_shares_stay_within_0_and_1_and_meet_the_budget_of_weights",)),
    Fault(
        "OWL",
        "a mean over layers, however many weights they have",
        ("test_shares_stay_within_0_and_1_and_meet_the_budget_of_weights",),
    ),
    Fault(
        "AlphaPruning", "divides by 0 where all layers are alike", ("test_layers_that_are_all_alike_get_equal_shares",)
    ),
    Fault(
        "DSnoT",
        "allocates the Gram matrix and never gathers it",
        ("test_gather.py::test_exactly_what_is_needed_is_gathered", "test_a_gram_of_zeros_is_not_solved_as_a_gram"),
    ),
    Fault("DSnoT", "variance within batches only", ("test_the_variance_of_batches_is_that_of_all_tokens",)),
    Fault("DSnoT", "divides by a variance of 0", ("test_constant_and_dead_inputs_have_finite_scores",)),
    Fault("DSnoT", "a threshold that depends on the number of tokens", ("test_the_same_batches_twice_give_one_mask",)),
    Fault(
        "FLAP",
        "a mean that is updated in place biases the variance",
        ("test_the_variance_of_batches_is_that_of_all_tokens",),
    ),
    Fault(
        "FLAP",
        "a head dimension of 128 is written into the code",
        ("test_unit_scores.py::test_scores_are_those_of_the_formula",),
    ),
    Fault(
        "EvoPress",
        "masks of all columns from one snapshot, under the name of SparseGPT",
        ("test_solvers.py::test_sparsegpt_is_that_of_the_paper_over_many_blocks_and_panels",),
    ),
    Fault("EvoPress", "fails where no weight is to be pruned", ("test_counts_are_rounded_to_the_nearest",)),
    Fault("apex", "a cache of masks that does not know n and m", ("test_patterns_of_one_shape_do_not_mix",)),
    Fault("apex", "a shape error where m does not divide a row", ("test_what_m_does_not_divide_is_said_or_left",)),
    Fault("SR-STE", "groups in the order of memory", ("test_groups_run_along_the_inputs_however_a_weight_is_stored",)),
    Fault(
        "OATS",
        "divides by the root of an input's energy, 0 where it is dead",
        ("test_constant_and_dead_inputs_have_finite_scores",),
    ),
    Fault(
        "MaskLLM",
        "learns masks of 2:4 and 1:4 only",
        ("test_training_methods.py::test_gate_meets_its_budget_at_every_step_and_freezes_on_time",),
    ),
    Fault("STR", "thresholds that get no gradient", ("test_sparse.py::test_learned_thresholds_move",)),
    Fault(
        "STR",
        "counts zeros, whatever made them",
        ("test_oneshot.py::test_zeros_that_were_there_before_are_counted_apart_from_what_was_pruned",),
    ),
    Fault(
        "Sheared-LLaMA",
        "the number of units is a rounded NaN",
        ("test_sparse.py::test_hard_prune_of_weights_that_are_nan_changes_nothing",),
    ),
    Fault(
        "Sheared-LLaMA",
        "what is kept stays scaled by a soft mask",
        ("test_what_is_kept_after_learning_a_mask_is_not_scaled",),
    ),
    Fault(
        "PyTorch",
        "squares summed in float16 overflow at 65504",
        (
            "test_statistics.py::test_half_precision_inputs_do_not_overflow",
            "test_gather.py::test_squares_beyond_half_precision_are_finite",
        ),
    ),
    Fault("PyTorch", "sums in bfloat16 stall", ("test_statistics.py::test_half_precision_sums_do_not_stall",)),
    Fault(
        "several",
        "padding counts as text",
        (
            "test_gather.py::test_padded_batches_teach_the_same_as_sequences_one_by_one",
            "test_gather.py::test_nan_at_padding_does_not_matter",
        ),
    ),
    Fault("several", "a factorisation fails", ("test_solvers.py::test_a_raised_damping_is_noted_and_used",)),
    Fault(
        "several",
        "an expert that few tokens reach is solved on them alone, in silence",
        (
            "test_reads.py::test_an_expert_that_few_tokens_reach_is_calibrated_on_those_of_its_stack",
            "test_heldout.py::test_a_method_that_reads_the_gram_matrix_says_where_tokens_are_fewer_than_inputs",
        ),
    ),
    Fault(
        "several",
        "embeddings, norms and heads are pruned",
        (
            "test_layers.py::test_the_output_head_is_left_unless_included",
            "test_layers.py::test_what_is_not_pruned_is_skipped_with_the_reason",
        ),
    ),
]


def functions_of(path):
    return [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.code}: {fault.what}")
def test_every_fault_has_tests_that_are_there(fault):
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.rpartition("::")
        assert name in functions_of(Path(__file__).parent / (file or HERE)), test


def test_every_test_here_belongs_to_a_fault():
    named = {test for fault in FAULTS for test in fault.tests}
    ours = {name for name in functions_of(Path(__file__)) if name.startswith("test_")}
    assert ours - named == {"test_every_fault_has_tests_that_are_there", "test_every_test_here_belongs_to_a_fault"}


# What is tested nowhere else


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# What learns from a loss is in test_weight_gradients.py.
FROM_INPUTS = [solver for solver in SOLVERS if not solver.needs & GRADIENTS]
all_solvers = pytest.mark.parametrize("solver", FROM_INPUTS, ids=repr)


def inputs(tokens=40, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing


def statistics_of(x):
    return LayerStatistics(len(x), x.square().sum(0).sqrt(), x.T @ x)


def pruned_by(solver, weight, pattern, sparsity, x=None):
    x = inputs(columns=weight.shape[1]) if x is None else x
    return solver.solve(LayerProblem(weight, statistics_of(x), pattern, sparsity))


@all_solvers
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_counts_are_exact_among_ties(solver, scope):
    weight, x = torch.ones(6, 20, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
    for pruned in (1, 9, 10, 19):
        mask = pruned_by(solver, weight, Unstructured(scope), pruned / 20, x).mask
        assert int((~mask).sum()) == 6 * pruned
        threshold = weight.flatten().sort().values[6 * pruned]
        assert int((weight <= threshold).sum()) == weight.numel()  # what the public code prunes
        scores = torch.arange(120.0)
        assert int((scores <= scores.sort().values[6 * pruned]).sum()) == 6 * pruned + 1  # and where none are equal


@all_solvers
def test_dead_inputs_keep_their_weights_at_sparsity_0(solver):
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs()
    x[:, 3] = 0
    solution = pruned_by(solver, weight, Unstructured("layer"), 0.0, x)
    assert torch.equal(solution.weight, weight)
    assert (solution.weight[:, 3] != 0).all()


@all_solvers
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_counts_are_rounded_to_the_nearest(solver, scope):
    weight = torch.randn(5, 20, dtype=torch.float64)
    for sparsity, of_a_row in ((0.29, 6), (0.0, 0), (1e-9, 0), (0.024, 0), (0.999, 20), (1 - 1e-9, 20)):
        mask = pruned_by(solver, weight, Unstructured(scope), sparsity).mask
        of_the_layer = round(sparsity * 100)
        assert int((~mask).sum()) == (5 * of_a_row if scope == "row" else of_the_layer)
    assert int(20 * 0.29) == 5  # what is cut off
    assert int(100 * 0.29) == 28  # 0.29 * 100 is less than 29 in binary


def test_tokens_count_not_batches():
    """A short batch of large inputs weighs as much as its tokens; a mean over batches gives it half of all weight."""
    short, long = torch.randn(1, 8) * torch.arange(8.0, 0, -1), torch.randn(63, 8) * torch.arange(1.0, 9)
    sums = RowSums({"input_norm", "gram"})
    for batch in (short, long):
        sums.add(batch[None])
    found = sums.results()
    everything = torch.cat([short, long])
    torch.testing.assert_close(found["input_norm"][0], everything.norm(dim=0))
    torch.testing.assert_close(found["gram"][0], everything.T @ everything)
    over_batches = torch.stack([batch.square().mean(0) for batch in (short, long)]).mean(0).sqrt()
    assert not torch.equal(over_batches.argsort(), found["input_norm"][0].argsort())


@pytest.mark.parametrize("method", ["ria", "wanda", "sparsegpt", "ria+refit"])
def test_stored_weights_are_nm(method):
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    x = torch.randn(64, 16) * torch.arange(1.0, 17)
    prune_(model, [x], pattern="2:4", method=method)
    kept = model[0].weight != 0
    assert (kept.view(12, 4, 4).sum(2) == 2).all()
    turned = kept[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert not (turned.view(12, 4, 4).sum(2) == 2).all()  # in another order of the inputs it is not


def test_a_gram_of_zeros_is_not_solved_as_a_gram():
    """Without its statistics a method says so, and with them it is not the method that needs none."""
    weight = torch.randn(6, 20, dtype=torch.float64)
    for solver in (SparseGPT(), Refit(Select(Wanda()))):
        with pytest.raises(StatisticsError, match="was not gathered"):
            solver.solve(LayerProblem(weight, LayerStatistics(5), Unstructured("layer"), 0.5))
    zeros = LayerStatistics(5, torch.zeros(20).double(), torch.zeros(20, 20).double())
    nothing = SparseGPT().solve(LayerProblem(weight, zeros, Unstructured("layer"), 0.5))
    assert not torch.equal(nothing.mask, pruned_by(SparseGPT(), weight, Unstructured("layer"), 0.5).mask)


def test_the_variance_of_batches_is_that_of_all_tokens():
    """Batches with means of their own: what differs between them is most of the variance."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(tokens, 6, generator=generator).double() + mean for tokens, mean in ((9, -5), (20, 3), (4, 8))
    ]
    sums = RowSums({"input_norm", "input_mean"})
    for batch in batches:
        sums.add(batch[None])
    found = sums.results()
    variance = found["input_norm"][0].double().square() / sums.tokens - found["input_mean"][0].square()
    everything = torch.cat(batches)
    torch.testing.assert_close(variance, everything.var(0, correction=0), rtol=1e-5, atol=1e-5)

    pooled = sum(len(batch) * batch.var(0, correction=0) for batch in batches) / len(everything)
    mean, spread = torch.zeros(6).double(), torch.zeros(6).double()
    for count, batch in enumerate(batches, 1):  # the old mean is the new one, by aliasing
        mean += (batch.mean(0) - mean) / count
        spread += ((batch - mean) ** 2).sum(0)
    assert (pooled < 0.5 * variance).all()
    assert (spread / len(everything) < 0.9 * variance).all()


def test_constant_and_dead_inputs_have_finite_scores():
    x = inputs()
    x[:, 3], x[:, 4] = 0, 2.5
    weight = torch.randn(6, 20, dtype=torch.float64)
    statistics = LayerStatistics(
        len(x), x.norm(dim=0), x.T @ x, input_mean=x.mean(0), input_gradients=torch.randn(3, 20).double()
    )
    for importance in IMPORTANCES:
        if importance.needs & GRADIENTS:
            continue
        assert importance.scores(weight, statistics).isfinite().all(), importance
    for name, made in UNIT_IMPORTANCES.items():
        assert made().scores(weight, statistics, torch.arange(20).view(20, 1)).isfinite().all(), name
    for solver in FROM_INPUTS:
        assert pruned_by(solver, weight, Unstructured("row"), 0.5, x).weight.isfinite().all(), solver


@all_solvers
def test_the_same_batches_twice_give_one_mask(solver):
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs()
    for pattern in (Unstructured("row"), NM(2, 4)):
        once, twice = (pruned_by(solver, weight, pattern, 0.5, rows).mask for rows in (x, torch.cat([x, x])))
        assert torch.equal(once, twice)


def test_patterns_of_one_shape_do_not_mix():
    weight = torch.randn(6, 16, dtype=torch.float64)
    for _ in range(2):
        for pattern in [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2), NM(3, 4)]:
            mask = pattern.mask(weight.abs())
            pattern.check(mask)
            assert (mask.view(6, -1, pattern.m).sum(2) == pattern.n).all()


def test_what_m_does_not_divide_is_said_or_left():
    for strict in [pattern for pattern in PATTERNS if isinstance(pattern, NM)]:
        columns = 3 * strict.m + 1
        scores = torch.rand(5, columns, dtype=torch.float64)
        with pytest.raises(secateur.PatternError, match=f"multiple of {strict.m}, got {columns}"):
            NM(strict.n, strict.m).mask(scores)
        mask = NM(strict.n, strict.m, remainder="dense").mask(scores)
        assert mask.shape == scores.shape
        assert mask[:, -1].all()


class Unrolled(nn.Module):
    """A weight that is stored with its inputs first, as GPT-2's is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 12))

    def forward(self, x):
        return x @ self.weight


LAYERS = {  # a layer, its inputs, and its weight with a row for each output
    "linear": (lambda: nn.Linear(16, 12, bias=False), (64, 16), lambda weight: weight),
    "inputs first": (Unrolled, (64, 16), lambda weight: weight.T),
    "convolution": (lambda: nn.Conv2d(4, 12, 3, bias=False), (4, 4, 6, 6), lambda weight: weight.flatten(1)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 12, 3, bias=False),
        (4, 4, 6, 6),
        lambda weight: weight.transpose(0, 1).flatten(1),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_groups_run_along_the_inputs_however_a_weight_is_stored(kind):
    """A group is what one output reads, next to each other in its row. In memory it may be far apart."""
    make, shape, rows = LAYERS[kind]
    layer = make()
    prune_(nn.Sequential(layer), [torch.randn(shape)], pattern="2:4", method="wanda")
    kept = layer.weight.detach() != 0
    assert (rows(kept).reshape(12, -1, 4).sum(2) == 2).all()
    in_memory = (kept.reshape(-1, 4).sum(1) == 2).all()
    assert in_memory == (kind in ("linear", "convolution"))


def test_what_is_kept_after_learning_a_mask_is_not_scaled():
    model = nn.Sequential(nn.Linear(16, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = secateur.SparseTraining(model, optimizer, steps=8, method="gate", sparsity=0.5)
    x = torch.randn(4, 16)
    before = model[0].weight.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        training.step()
    training.finalize()
    after = model[0].weight.detach()
    assert torch.equal(after, torch.where(after != 0, before, 0.0))
    assert int((after == 0).sum()) == 96
    torch.testing.assert_close(model.eval()(x), nn.functional.linear(x, after, model[0].bias))


@pytest.mark.parametrize("method", ["admm", "alps"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_and_every_count_is_met(method, pattern):
    """Not 2:4 alone, and not one more or less where nothing, one weight or all of them go."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sparsity in [None] if pattern.sparsity is not None else [0.0, 1 / 120, 0.5, 0.9, 1.0]:
        solution = pruned_by(parse_method(method), weight, pattern, sparsity)
        used = solution.pattern or pattern
        used.check(solution.mask)
        assert int((~solution.mask).sum()) == used.num_pruned(weight.shape, sparsity)
        assert not solution.weight[~solution.mask].any()


def test_the_sparsity_rises_before_the_mask_is_chosen():
    """With the schedule inactive, the first mask is the last one: that of the weights before any made up for others."""
    errors = {1: 0.0, 8: 0.0}
    for seed in range(5):
        weight = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = inputs(seed=seed)
        solutions = {
            gradual: pruned_by(secateur.ADMM(gradual=gradual), weight, Unstructured(), 0.7, x) for gradual in errors
        }
        assert not torch.equal(solutions[1].mask, solutions[8].mask)
        for gradual, solution in solutions.items():
            errors[gradual] += float(((weight - solution.weight) @ x.T).square().sum())
    assert errors[8] < errors[1]


@pytest.mark.parametrize("method", ["admm", "alps"])
def test_a_problem_is_left_as_it_was_and_shares_no_memory(method):
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs()
    problem = LayerProblem(weight, statistics_of(x), Unstructured(), 0.5)
    before = weight.clone(), problem.statistics.gram.clone()
    first, second = (parse_method(method).solve(problem) for _ in range(2))
    assert torch.equal(weight, before[0])
    assert torch.equal(problem.statistics.gram, before[1])
    assert torch.equal(first.weight, second.weight)
    first.weight.zero_()
    assert torch.equal(weight, before[0])
    assert second.weight.any()


@pytest.mark.parametrize("method", ["admm", "alps"])
def test_a_singular_gram_is_solved(method):
    weight, x = torch.randn(6, 20, dtype=torch.float64), inputs(tokens=5)
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    solution = pruned_by(parse_method(method), weight, Unstructured(), 0.5, x)
    assert solution.weight.isfinite().all()
    assert float(((weight - solution.weight) @ x.T).norm()) < float((weight @ x.T).norm())


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_shares_stay_within_0_and_1_and_meet_the_budget_of_weights(allocation, sparsity):
    """Layers of very different sizes and inputs: a mean that is not weighted by weights misses the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:, 0] *= 1000
        model[2].weight.copy_(torch.randn(16, 1) @ torch.randn(1, 128) + 0.01 * torch.randn(16, 128))
    settings = {"sparsity": sparsity, "method": "wanda", "pattern": Unstructured("layer")}
    uniform = prune_(copy.deepcopy(model), [torch.randn(64, 8)], **settings)
    report = prune_(model, [torch.randn(64, 8)], **settings, allocation=allocation)
    assert all(0 <= layer.asked <= 1 for layer in report.layers)
    assert report.num_pruned == uniform.num_pruned
    assert len({round(layer.asked, 6) for layer in report.layers}) > 1


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_layers_that_are_all_alike_get_equal_shares(allocation):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(model[0].weight)
    report = prune_(model, [torch.eye(8)], sparsity=0.5, method="magnitude", allocation=allocation)
    assert {layer.pruned for layer in report.layers} == {32}
