"""Two processes on one machine, over gloo and a file: what has to agree between them does."""

import copy
import os
import sys
from datetime import timedelta
from functools import partial

import pytest
import recover_cases
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import secateur
from secateur import RecipeError, SparseLinear, SparseTraining
from secateur.training import SET, RigL

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
    distributed.barrier()
    # A device mesh keeps the group, and so gloo's threads, alive through destroy_process_group(). One that frees
    # its last tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291), long after all
    # assertions held. A process that comes here has nothing to clean up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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


@pytest.mark.slow
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
    with pytest.raises(RecipeError, match="replace layers before fully_shard"):
        secateur.sparsify_(dense)


@pytest.mark.slow
def test_fsdp_keeps_zeros_and_matches_one_process(tmp_path):
    on_two_processes(_fsdp, tmp_path)


# Sparse training


def a_larger_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 7))


def some_rows(step):
    x, y = a_batch(step)
    return x.view(8, 2, 6), y


def sparse_step(model, optimizer, training, step, rank=None):
    part = slice(None) if rank is None else slice(rank, None, PROCESSES)
    x, y = some_rows(step)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x[part]), y[part]).backward()
    optimizer.step()
    training.step()


def _train_ddp(rank):
    for number, (method, pattern) in enumerate(
        [("gate", "unstructured"), ("rigl", "unstructured"), (SET(initial="random"), "2:4"), ("gate", "2:4")]
    ):
        keywords = {"method": method, "pattern": pattern, "sparsity": 0.5, "steps": 8, "update_every": 2}
        keywords["exclude"] = ["*0"]  # 2:4 does not fit it
        model, single = a_larger_model(), a_larger_model()
        if number % 2:  # wrapped afterwards, or before
            optimizer = optimizer_of(model)
            training = SparseTraining(model, optimizer, **keywords)
            parallel = DistributedDataParallel(model)
        else:
            parallel = DistributedDataParallel(model)
            optimizer = optimizer_of(parallel)
            training = SparseTraining(parallel, optimizer, **keywords)
        its_optimizer = optimizer_of(single)
        its_training = SparseTraining(single, its_optimizer, **keywords)
        moved = 0
        for step in range(8):
            before = training.masks
            sparse_step(parallel, optimizer, training, step, rank)
            sparse_step(single, its_optimizer, its_training, step)
            for name, mask in training.masks.items():
                others = [torch.empty_like(mask) for _ in range(PROCESSES)]
                distributed.all_gather(others, mask)
                assert all(torch.equal(other, mask) for other in others), (method, step, name)
                assert torch.equal(mask, its_training.masks[name.removeprefix("module.")]), (method, step, name)
                moved += int((mask ^ before[name]).sum())
        assert moved
        assert_same_everywhere(parallel)
        assert_close_to(parallel, single)
        report = training.finalize()
        assert report.num_pruned == its_training.finalize().num_pruned == (16 * 16 + 16 * 7) // 2
        assert_same_everywhere(parallel)
        assert [type(module) for module in parallel.module] == [type(module) for module in a_larger_model()]


@pytest.mark.slow
def test_masks_are_alike_at_every_step_under_ddp(tmp_path):
    on_two_processes(_train_ddp, tmp_path)


def _train_fsdp(rank):
    mesh = init_device_mesh("cpu", (PROCESSES,))

    def sharded(model):
        for child in (model[3], model[5]):  # the last one has 7 rows: uneven shards; the first stays with the root
            fully_shard(child, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for method in ("magnitude", RigL(initial="random"), "set", "static", "gate", "sr-ste"):
        keywords = {"method": method, "steps": 8, "update_every": 2}
        model, single = a_larger_model(), a_larger_model()
        learned = method in ("gate", "sr-ste")
        if learned:
            for either in (model, single):
                secateur.sparsify_(either, pattern="2:4", include=["3", "5"])
        else:
            keywords |= {"pattern": "unstructured", "sparsity": 0.5}
        model = sharded(model)
        optimizer, its_optimizer = optimizer_of(model), optimizer_of(single)
        training = SparseTraining(model, optimizer, **keywords)
        its_training = SparseTraining(single, its_optimizer, **keywords)
        for step in range(8):
            sparse_step(model, optimizer, training, step)
            sparse_step(single, its_optimizer, its_training, step)
            with torch.no_grad():
                model(some_rows(step)[0])  # leaves the root's weights whole
            for name, mask in training.masks.items():
                assert torch.equal(mask, its_training.masks[name]), (method, step, name)
                layer = model.get_submodule(name)
                if not learned or (method == "gate" and step + 1 >= 6):
                    layer.reshard() if hasattr(layer, "reshard") else model.reshard()
                    assert not layer.weight.full_tensor().flatten(1)[~mask].any(), (method, step, name)
            if step == 3:
                state = training.state_dict()
                training.load_state_dict(state)
        with torch.no_grad():
            before = model(some_rows(9)[0])
        report = training.finalize()
        assert report.num_pruned == its_training.finalize().num_pruned
        assert [layer.pruned for layer in report.layers] == [n // 2 for n in ([] if learned else [24]) + [256, 112]]
        assert bool(report.layers[0].notes) == learned
        with torch.no_grad():
            assert torch.equal(model(some_rows(9)[0]), before)
        model.reshard()
        if not learned:  # there the sparse layers stay, with buffers of their own
            assert_close_to(model, single)
        for name, mask in training.masks.items():
            weight = model.get_submodule(name).weight.full_tensor().flatten(1)
            assert not weight[~mask].any()
            torch.testing.assert_close(weight, single.get_submodule(name).weight.detach().flatten(1))

    model = sharded(a_larger_model())
    for method in ("gate", "sr-ste"):
        with pytest.raises(RecipeError, match=r"0: its weight is sharded already.*\nCall secateur.sparsify_"):
            SparseTraining(model, optimizer_of(model), method=method, pattern="2:4", steps=4)


@pytest.mark.slow
def test_zeros_stay_zero_while_fsdp_trains(tmp_path):
    on_two_processes(_train_fsdp, tmp_path)


RECOVERIES = {
    **{method: {"method": method} for method in recover_cases.METHODS},
    "sgd": {"optimizer": recover_cases.OPTIMIZERS["sgd"]},
    "accumulate": {"accumulate": 2},
    "unused": {},
}


class _Forgetful(recover_cases.Chain):
    """One of its parameters is used for some batches only: its gradient is missing in one process."""

    def __init__(self):
        super().__init__()
        self.sometimes = nn.Linear(8, 4)
        self.never = nn.Linear(8, 4)

    def forward(self, x):
        return super().forward(x) + (self.sometimes(x) if x[0, 0] > 0 else 0)


def _recovered(name, wrap=lambda model: model, **more):
    model, dense = recover_cases.pair(_Forgetful if name == "unused" else recover_cases.Chain)
    keywords = RECOVERIES[name] | more
    if "optimizer" not in keywords:
        keywords = {"learning_rate": 0.003, "weight_decay": 0.1} | keywords
    return model, secateur.recover_(wrap(model), dense, recover_cases.rows(7), steps=6, held_out=0.3, **keywords)


def _recover(rank, folder):
    for name in RECOVERIES:
        model, report = _recovered(name, lambda model: DistributedDataParallel(model, find_unused_parameters=True))
        assert_same_everywhere(model)
        expected = torch.load(folder / f"{name}.pt")
        assert report.best == pytest.approx(expected.pop("best"), rel=1e-5), name
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], msg=lambda text: f"{name} {key}: {text}")  # noqa: B023

        def stop(text, done, total):
            if done >= 3:
                raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            _recovered(name, checkpoint=folder / "state" / name, progress=stop)
        again, other = _recovered(name, checkpoint=folder / "state" / name)
        assert other.best == report.best
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key]), (name, key)

    model, dense = recover_cases.pair()
    batches = recover_cases.rows(seed=rank)
    with pytest.raises(RecipeError, match=r"(?s)1 of 2 processes have other batches than the first .*Give"):
        secateur.recover_(model, dense, batches, steps=1)
    model.head.bias.data += rank
    with pytest.raises(RecipeError, match=r"(?s)1 of 2 processes have other weights than the first .*Give"):
        secateur.recover_(model, dense, recover_cases.rows(), steps=1)


@pytest.mark.slow
def test_two_processes_recover_a_model_as_one_does_that_accumulates(tmp_path):
    for name, keywords in RECOVERIES.items():
        model, report = _recovered(name, accumulate=2 * keywords.get("accumulate", 1))
        torch.save({**model.state_dict(), "best": report.best}, tmp_path / f"{name}.pt")
    on_two_processes(partial(_recover, folder=tmp_path), tmp_path)
