"""Weights that functions multiply run packed: of layers, of stacks, and of parameters of unknown modules."""

import copy
import pickle

import pytest
import torch
from fake_timing import kernels_win
from read_cases import CASES, IN, Blocks

import secateur
from secateur import PackedLinear


@pytest.fixture(autouse=True)
def _kernels_win(monkeypatch):
    """Every weight with zeros is packed, without measuring."""
    torch.manual_seed(0)
    kernels_win(monkeypatch)


JOINED = "it is one matrix with joined dimensions, and no packed weight can take its place"


def batches(count=3, shape=(2, 40)):
    return [torch.randn(*shape, IN) for _ in range(count)]


def pruned(case, pattern="2:4"):
    model = Blocks(CASES[case]).eval()
    sparsity = None if pattern == "2:4" else 0.5
    report = secateur.prune_(model, batches(), pattern=pattern, sparsity=sparsity, method="wanda", include=["*"])
    return model, report


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "row", "column", "block:2x2"])
@pytest.mark.parametrize("case", CASES)
def test_what_functions_multiply_runs_packed(case, pattern, monkeypatch):
    model, history = pruned(case, pattern)
    packed = copy.deepcopy(model)
    report = secateur.pack_(packed, batches=batches(), batch_sizes=[1], history=history, include=["*"])
    dense = [name for name, p in packed.named_parameters() if p.ndim > 1 and not name.endswith("added")]
    skipped = {skip.name: skip.reason for skip in report.skipped if "is no known kind" not in skip.reason}
    assert skipped == dict.fromkeys(dense, JOINED)
    assert bool(dense) == (case in ("Heads", "ExpertsThatShare"))
    x = torch.randn(2, 40, IN)
    expected = model(x)
    if case != "ReadsACopy":  # in float64, which no kernel has
        monkeypatch.setattr(PackedLinear, "matrix", None)  # nothing is unpacked
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


def packed_model(case, pattern="2:4", **settings):
    model, history = pruned(case, pattern)
    secateur.pack_(model, batches=batches(), batch_sizes=[1], history=history, include=["*"], **settings)
    return model


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_model_is_saved_and_loaded(case, dense, tmp_path):
    path, model, x = tmp_path / "small.sparse.safetensors", packed_model(case), torch.randn(2, 40, IN)
    expected = model(x)
    secateur.save(model, path)
    fresh = Blocks(CASES[case]).eval()
    into = secateur.load(path, into=fresh, dense=dense)
    if dense:
        names = [name for name, _ in Blocks(CASES[case]).named_parameters()]
        assert sorted(name for name, _ in into.named_parameters()) == sorted(names)
        torch.testing.assert_close(into(x), expected, rtol=1e-4, atol=1e-5)
    else:
        assert into.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(into(x), expected)
        again = secateur.load(path, into=into)  # into a packed one
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("case", CASES)
def test_unpacking_restores_the_parameters(case):
    model, history = pruned(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    secateur.pack_(model, batches=batches(), batch_sizes=[1], history=history, include=["*"])
    secateur.unpack_(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name])
        assert parameter.stride() == before[name].stride()


@pytest.mark.parametrize("case", CASES)
def test_packed_reads_survive_copies_states_and_conversions(case):
    model, x = packed_model(case), torch.randn(2, 40, IN)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for buffer in other.buffers():
            if buffer.is_floating_point():
                buffer.zero_()
    assert case == "Heads" or not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    if case in ("OwnParameter", "ExpertsGrouped"):
        return  # one adds a float32 tensor, and PyTorch has no grouped product of so small matrices in bfloat16
    half = copy.deepcopy(model).to(torch.bfloat16)
    dense = copy.deepcopy(half)
    secateur.unpack_(dense)
    expected = dense(x.bfloat16())
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_passes_to_the_input(case):
    model, history = pruned(case)
    packed = copy.deepcopy(model)
    secateur.pack_(packed, batches=batches(), batch_sizes=[1], history=history, include=["*"])
    gradients = []
    for one in (model, packed):
        x = torch.randn(2, 40, IN, generator=torch.Generator().manual_seed(1), requires_grad=True)
        one(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
