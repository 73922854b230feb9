"""Two processes on one machine, over gloo and a file: what has to agree between them does."""

import copy
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import secateur
from secateur import RecipeError, SparseLinear

PROCESSES = 2


def on_two_processes(worker, tmp_path):
    """Run ``worker(rank)`` in two processes of one group; an assertion that fails in either fails here."""
    torch.multiprocessing.spawn(_join_group, args=(worker, str(tmp_path / "rendezvous")), nprocs=PROCESSES)


def _join_group(rank, worker, file):
    torch.set_num_threads(1)
    # A process that waits for one that never comes fails instead of hanging.
    distributed.init_process_group(
        "gloo", f"file://{file}", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    worker(rank)
    distributed.destroy_process_group()


def assert_same_everywhere(model):
    for name, tensor in model.state_dict().items():
        others = [torch.empty_like(tensor) for _ in range(PROCESSES)]
        distributed.all_gather(others, tensor)
        assert all(torch.equal(other, tensor) for other in others), name


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7))


def a_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 7, generator=generator)


def train(model, optimizer, steps, rank=None):
    """On the whole batch, or on the part of this process."""
    for step in steps:
        part = slice(None) if rank is None else slice(rank, None, PROCESSES)
        x, y = (tensor[part] for tensor in a_batch(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        for layer in model.modules():
            if isinstance(layer, SparseLinear) and layer.pattern is not None and layer.mask is None:
                layer.solve_threshold()


def assert_close_to(model, single):
    expected = single.state_dict()
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        torch.testing.assert_close(whole, expected[name.removeprefix("module.")], msg=lambda text: f"{name}: {text}")  # noqa: B023


def sparse_and_single(**keywords):
    model = a_model()
    secateur.sparsify_(model, **keywords)
    return model, copy.deepcopy(model)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def _ddp(rank):
    for keywords in (
        {"threshold": 0.1, "temperature": 20.0},
        {"threshold": 0.1, "structured": False},
        {"pattern": "2:4", "include": ["0"]},
        {"pattern": "unstructured", "sparsity": 0.7, "hard": True},
    ):
        model, single = sparse_and_single(**keywords)
        parallel = DistributedDataParallel(model)
        optimizers = optimizer_of(parallel), optimizer_of(single)
        train(parallel, optimizers[0], range(2), rank)
        train(single, optimizers[1], range(2))
        assert_same_everywhere(parallel)
        assert_close_to(parallel, single)

        for tree, optimizer in zip((model, single), optimizers, strict=True):
            for layer in secateur.nn._sparsify.sparse_layers(tree).values():
                layer.hard_prune(optimizer)
        before = {name: layer.hard_mask() for name, layer in secateur.nn._sparsify.sparse_layers(model).items()}
        train(parallel, optimizers[0], range(2, 5), rank)  # thresholds have no gradient now, and DDP waits for each
        train(single, optimizers[1], range(2, 5))
        assert_same_everywhere(parallel)
        assert_close_to(parallel, single)
        for name, layer in secateur.nn._sparsify.sparse_layers(model).items():
            assert 0 < layer.sparsity() < 1
            assert torch.equal(layer.mask, before[name])
            assert not layer.weight[~layer.mask].any()
            assert not layer.threshold.any()


def test_ddp_keeps_weights_thresholds_and_zeros_alike(tmp_path):
    on_two_processes(_ddp, tmp_path)


def test_ddp_is_wrapped_around_a_model_that_has_its_thresholds():
    class Wrapped(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(RecipeError, match="Call sparsify_ first and wrap the model then"):
        secateur.sparsify_(Wrapped(a_model()))
    assert list(secateur.sparsify_(Wrapped(a_model()), pattern="2:4", include=["module.0"])) == ["module.0"]


def _fsdp(rank):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for keywords in ({"threshold": 0.1}, {"pattern": "row", "sparsity": 0.5}, {"pattern": "2:4"}):
        model, single = sparse_and_single(**keywords)
        for child in model:
            if isinstance(child, SparseLinear):
                fully_shard(child, mesh=mesh)  # the last one has 7 rows: uneven shards
        fully_shard(model, mesh=mesh)
        optimizers = optimizer_of(model), optimizer_of(single)
        train(model, optimizers[0], range(2))
        train(single, optimizers[1], range(2))
        assert_close_to(model, single)

        if rank == 0:
            assert "density=?" in repr(model)  # asking the others would wait for ever
        for layer, alone in zip(model[::2], single[::2], strict=True):
            assert torch.equal(layer.hard_mask(), alone.hard_mask())
            torch.testing.assert_close(layer.effective_weight(), alone.effective_weight())
            with pytest.raises(RecipeError, match="to_linear cannot take over a weight that is sharded"):
                layer.to_linear()
            layer.hard_prune(optimizers[0])
            alone.hard_prune(optimizers[1])
            assert torch.equal(layer.mask, alone.mask)
            assert not layer.weight.full_tensor()[~layer.mask].any()
            assert layer.num_active() == alone.num_active()
        if rank == 0:
            assert f"density={model[0].density():.4f}" in repr(model)

        train(model, optimizers[0], range(2, 6))
        train(single, optimizers[1], range(2, 6))
        assert_close_to(model, single)
        for layer in model[::2]:
            assert 0 < layer.sparsity() < 1
            assert not layer.weight.full_tensor()[~layer.mask].any()

        layer = model[0]
        layer.freeze(~layer.mask, straight_through=True)
        train(model, optimizers[0], range(6, 7))
        layer._bake_()
        assert torch.equal(layer.weight.full_tensor() != 0, layer.mask & (layer.effective_weight() != 0))
        with pytest.raises(RecipeError, match="0: densify_ cannot take over a weight that is sharded"):
            secateur.densify_(model)

    dense = a_model()
    fully_shard(dense, mesh=mesh)
    with pytest.raises(RecipeError, match="call sparsify_ before fully_shard"):
        secateur.sparsify_(dense)


def test_fsdp_keeps_zeros_and_matches_one_process(tmp_path):
    on_two_processes(_fsdp, tmp_path)
