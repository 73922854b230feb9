"""recover_: zeros stay, nothing is left behind, the best state is returned, and bad input is named."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from recover_cases import (
    METHODS,
    MODELS,
    OPTIMIZERS,
    Block,
    Chain,
    Convolutions,
    assert_same,
    bert,
    changed,
    images,
    pair,
    rows,
    state,
    texts,
    zeros,
)
from shrunk_cases import llama, vit
from torch import nn

import secateur
from secateur import RecipeError, StatisticsError, recover_
from secateur.calibration import call_model
from secateur.nn import PackedLinear
from secateur.patterns import SparsityPattern
from secateur.recovery._run import _hash_model

PATTERNS = ("unstructured", "2:4", "block:4x4", "row", "column")
EASY = {"steps": 6, "learning_rate": 0.003}


def assert_zeros_kept(model, before, report):
    after = zeros(model)
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name
    count = sum(int(mask.sum()) for mask in after.values())
    assert report.zeros == (count, count)
    assert count > 0


# 1. Zeros.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_the_same_under_every_method_pattern_and_optimizer(method, pattern, optimizer):
    model, dense = pair(pattern=pattern)
    before, values = zeros(model), state(model)
    report = recover_(model, dense, rows(), method=method, steps=6, optimizer=OPTIMIZERS[optimizer])
    assert_zeros_kept(model, before, report)
    assert report.best <= report.start
    assert report.best == report.start or changed(values, state(model))
    if pattern != "unstructured":
        for layer in secateur.masks(model).values():
            SparsityPattern.parse(pattern).check(layer.flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_the_same_in_half_precision(method, autocast, dtype):
    model, dense = pair(pattern="2:4", dtype=dtype)
    with torch.no_grad():  # the smallest numbers, which rounding would make zero
        row = model.layers[0].up.weight[0]
        row[row != 0] = torch.finfo(dtype).smallest_normal
    before, values = zeros(model), state(model)
    report = recover_(model, dense, rows(dtype=dtype), method=method, autocast=autocast, **EASY)
    assert_zeros_kept(model, before, report)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.best < report.start
    assert changed(values, state(model))


@pytest.mark.parametrize("method", ["full", "norms", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_zeros_are_the_same_in_every_kind_of_layer(name, method):
    make, batches = MODELS[name]
    model, dense = pair(make)
    before, values, objects = zeros(model), state(model), list(model.parameters())
    report = recover_(model, dense, batches(), method=method, steps=4, learning_rate=3e-3)
    assert_zeros_kept(model, before, report)
    assert all(one is other for one, other in zip(objects, model.parameters(), strict=True))
    assert report.best < report.start
    moved = changed(values, state(model))
    if method == "lora":  # all matrices that pruning considers
        unused = {"pooler.dense.weight"}  # token states do not depend on it
        assert {name for name in moved if values[name].ndim > 1} == set(secateur.masks(model)) - unused
    if method == "norms":
        assert moved
        assert all(values[name].ndim == 1 for name in moved)


@pytest.mark.parametrize("name", ["experts", "gpt2", "tied", "bert"])
def test_blocks_keep_zeros_in_every_kind_of_layer(name):
    make, batches = MODELS[name]
    model, dense = pair(make)
    before = zeros(model)
    report = recover_(model, dense, batches(), method="blocks", steps=8, learning_rate=3e-3)
    assert_zeros_kept(model, before, report)
    assert report.best < report.start


def test_a_weight_that_training_makes_zero_does_not_become_a_zero():
    model, dense = pair()
    before = zeros(model)

    class ToZero(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.zero_()

    with torch.no_grad():
        for parameter in dense.parameters():  # zeros are what the teacher has, too
            parameter.mul_(1e-6)
    report = recover_(
        model, dense, rows(), steps=2, optimizer=lambda parameters: ToZero(parameters, lr=1.0),
        loss=lambda ours, theirs, batch: (ours - theirs.float()).square().mean(),
    )  # fmt: skip
    assert report.best < report.start
    assert_zeros_kept(model, before, report)


# 2. Low-rank changes, and what is left behind.


def fingerprints(model):
    return {
        name: (
            id(module), set(vars(module)), module.training, list(module._parameters), list(module._forward_hooks),
            [(id(p), p.requires_grad, p.dtype, p.grad is None) for p in module._parameters.values() if p is not None],
            [id(weight) for weight in getattr(module, "_flat_weights", ())],
            getattr(getattr(module, "config", None), "use_cache", None),
        )
        for name, module in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["normal", "error", "interrupt"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in ("tied", "lstm", "convolutions", "chain") for method in ("full", "norms", "lora")),
        ("tied", "blocks"),
        ("chain", "blocks"),
        ("convolutions", "batchnorm"),
    ],
)
def test_nothing_is_left_on_either_model(name, method, ending):
    make, batches = MODELS.get(name, (Chain, rows))
    model, dense = pair(make)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before, teacher, values = fingerprints(model), fingerprints(dense), state(dense)
    steps = []

    def tell(description, done, total):
        steps.append(done)
        if len(steps) == 2 and ending != "normal":
            raise KeyboardInterrupt if ending == "interrupt" else ValueError("the progress bar is broken")

    try:
        recover_(model, dense, batches(), method=method, progress=tell, **EASY)
    except ValueError:
        assert ending == "error"
    assert fingerprints(model) == before
    assert fingerprints(dense) == teacher
    assert_same(state(dense), values)


def test_gradients_that_were_there_are_there_again():
    model, dense = pair()
    model(rows()[0]).sum().backward()
    before = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in model.named_parameters()}
    recover_(model, dense, rows(), method="norms", **EASY)
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name][0]
        assert torch.equal(parameter.grad, before[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_computes_what_the_unmerged_one_did(name):
    make, batches = MODELS[name]
    model, dense = pair(make)
    seen = []

    def loss(ours, theirs, batch):
        value = (tensor_of(ours) - tensor_of(theirs).float()).square().mean()
        if not torch.is_grad_enabled():
            seen.append((float(value), tensor_of(ours).clone()))
        return value

    report = recover_(model, dense, batches(), method="lora", loss=loss, steps=6, learning_rate=3e-3)
    assert 0 < report.best < report.start
    best, expected = min(seen, key=lambda entry: entry[0])
    assert best == report.best
    with torch.no_grad():
        out = tensor_of(call_model(model.eval(), batches()[3]))
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    if name not in ("experts", "convolutions", "lstm"):  # these may add up in another order
        assert torch.equal(out, expected)


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_lora_trains_recurrent_weights():
    model, dense = pair(MODELS["lstm"][0])
    before = state(model)
    recover_(model, dense, MODELS["lstm"][1](), method="lora", **EASY)
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0"} <= set(changed(before, state(model)))


# Interrupts at every moment.


class Stops:
    """Raises at the n-th call."""

    def __init__(self, at, kind=KeyboardInterrupt):
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.kind


def held_out_loss(model, dense, batches, **settings):
    """Of a model as it is, measured by a run whose steps change nothing."""
    copied = copy.deepcopy(model)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    return recover_(copied, dense, batches, steps=1, optimizer=optimizer, **settings).start


@pytest.mark.parametrize("where", ["progress", "forward", "loss"])
@pytest.mark.parametrize(
    ("make", "method"),
    [(make, method) for make in (Chain, Convolutions) for method in METHODS if make is Chain or method != "blocks"],
)
def test_an_interrupt_keeps_the_best_state_at_every_moment(make, method, where):
    batches = rows() if make is Chain else images()
    settings = {"loss": lambda ours, theirs, batch: (ours - theirs.float()).square().mean()}
    start = None
    moments = interrupted = 0
    for at in range(1, 200):
        model, dense = pair(make)
        before, masks = state(model), zeros(model)
        stop = Stops(at)
        keywords = dict(settings)
        hook = None
        if where == "progress":
            keywords["progress"] = stop
        elif where == "loss":
            keywords["loss"] = lambda ours, theirs, batch, stop=stop: stop() or settings["loss"](ours, theirs, batch)
        else:
            hook = model.get_submodule("head").register_forward_pre_hook(stop)
            if method == "blocks":
                hook.remove()
                hook = model.layers[1].register_forward_pre_hook(stop)
        try:
            report = recover_(model, dense, batches, method=method, steps=3, learning_rate=0.01, **keywords)
        except KeyboardInterrupt:
            assert_same(state(model), before)  # nothing was known yet
            report = None
        if hook is not None:
            hook.remove()
        start = start or held_out_loss(model, dense, batches, **settings)
        for name, mask in zeros(model).items():
            assert torch.equal(mask, masks[name])
        if stop.calls < at:
            break
        moments += 1
        if report is not None:
            assert report.interrupted
            interrupted += 1
            found = held_out_loss(model, dense, batches, **settings)
            assert found <= report.start
            assert found == pytest.approx(report.best, rel=1e-6)
    assert stop.calls < at
    assert report.stopped != "interrupted"
    assert moments >= 2
    assert interrupted


# 3. The best state.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_diverges_ends_as_it_began(method, dtype):
    model, dense = pair(dtype=dtype)
    before = state(model)
    report = recover_(model, dense, rows(dtype=dtype), method=method, steps=8, learning_rate=1e6)
    assert_same(state(model), before)
    assert report.best == report.start
    assert report.best_step == 0
    assert all(math.isfinite(point.held_out) for point in report.curve)
    report.to_json().index("curve")


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_becomes_nan_ends_in_the_best_state(method, at):
    model, dense = pair()
    steps = 0

    def loss(ours, theirs, batch):
        nonlocal steps
        value = (ours - theirs.float()).square().mean()
        if torch.is_grad_enabled():
            steps += 1
            if steps >= at:
                value = value * math.nan
        return value

    # "blocks" has a loss of its own
    bad = {} if method == "blocks" else {"loss": loss}
    calls = []
    if method == "blocks":
        model.layers[1].register_forward_hook(lambda *args: bad_after(calls, at, args[-1]))
    report = recover_(model, dense, rows(), method=method, steps=6, learning_rate=0.003, **bad)
    assert report.stopped == "the loss is not finite"
    assert math.isfinite(report.best)
    assert report.best <= report.start
    assert all(torch.isfinite(tensor).all() for tensor in state(model).values())
    if method != "blocks":
        assert (report.best_step, report.best < report.start) == (at - 1, at > 1)
        assert report.curve[-1].step == at - 1


def bad_after(calls, at, output):
    if torch.is_grad_enabled():
        calls.append(1)
        if len(calls) >= at:
            return output * math.nan
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [1e-5, 1e-2])
def test_the_returned_model_has_the_loss_that_is_reported(method, dtype, rate):
    model, dense = pair(dtype=dtype)
    batches = rows(dtype=dtype)
    report = recover_(model, dense, batches, method=method, steps=5, learning_rate=rate)
    if method == "blocks":  # it measures in the precision of the model; others in float32
        assert report.best <= report.start
        return
    assert held_out_loss(model, dense, batches) == pytest.approx(report.best, rel=1e-6)
    assert report.best <= report.start
    assert report.best == min(point.held_out for point in report.curve)


# 9. Batch norms.


def test_batch_norms_are_estimated_again_where_that_helps():
    _model, dense = pair(Convolutions)
    x = torch.cat(images())
    dense.train()
    with torch.no_grad():
        for _ in range(50):
            dense(x)
    dense.eval()
    worse = copy.deepcopy(dense)
    worse.norm.running_mean.add_(3.0)
    before = state(worse)
    report = recover_(worse, dense, images(), method="batchnorm")
    assert report.best < 0.5 * report.start
    assert changed(before, state(worse)) == ["norm.running_mean", "norm.running_var"]
    assert any("1 batch norms were estimated again" in note for note in report.notes)

    right = copy.deepcopy(dense)  # it is already what its teacher is
    before = state(right)
    report = recover_(right, dense, images(), method="batchnorm")
    assert_same(state(right), before)
    assert report.stopped == "nothing was gained"
    assert not [note for note in report.notes if "again" in note]


def test_batchnorm_alone_works_on_a_frozen_model_and_not_without_batch_norms():
    model, dense = pair(Convolutions)
    model.requires_grad_(False)
    report = recover_(model, dense, images(), method="batchnorm")
    assert (report.steps, report.trained) == (0, 0)
    model, dense = pair()
    with pytest.raises(RecipeError, match="needs a model with batch norms"):
        recover_(model, dense, rows(), method="batchnorm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norms_in_half_precision(dtype):
    model, dense = pair(Convolutions, dtype=dtype)
    report = recover_(model, dense, [x.to(dtype) for x in images()], **EASY)
    assert report.best < report.start
    assert model.norm.running_mean.dtype == dtype


# 10. Accumulation and gradient checkpointing.


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
@pytest.mark.parametrize("name", ["chain", "tied"])
def test_gradient_checkpointing_gives_the_same(name, method):
    make, batches = MODELS.get(name, (Chain, rows))
    found = []
    for again in (False, True):
        model, dense = pair(make)
        recover_(model, dense, batches(), method=method, gradient_checkpointing=again, **EASY)
        found.append(state(model))
    assert_same(*found)


def test_gradient_checkpointing_computes_blocks_again_also_without_a_correspondence():
    counts = []
    for again in (False, True):
        model, dense = pair(lambda: Chain(3))
        del model.layers[0]
        with torch.no_grad():
            model.layers[0].up.bias.add_(1)
            for p in model.layers.parameters():
                p.add_(1e-3)
        calls = []
        model.layers[0].up.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        report = recover_(model, dense, rows(), gradient_checkpointing=again, **EASY)
        assert not report.blocks
        counts.append(len(calls))
    assert counts[1] == counts[0] + 6
    model, dense = pair(Convolutions)
    report = recover_(model, dense, images(), gradient_checkpointing=True, **EASY)
    assert any("gradient checkpointing did nothing" in note for note in report.notes)


@pytest.mark.parametrize("method", ["full", "norms", "lora"])
def test_accumulated_halves_are_the_whole(method):
    whole, held = rows(2, 16)
    results = []
    for batches, accumulate in (([whole, held], 1), ([whole[:8], held, whole[8:]], 2)):
        model, dense = pair()
        report = recover_(
            model, dense, batches, method=method, steps=3, accumulate=accumulate, optimizer=OPTIMIZERS["sgd"],
            autocast=None, loss=lambda ours, theirs, batch: (ours - theirs.float()).square().mean(),
        )  # fmt: skip
        assert (report.samples, report.held_out_samples) == (16, 16)
        results.append((report, state(model)))
    assert results[0][0].best == pytest.approx(results[1][0].best, rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name])


# 11. Frozen parameters.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay(method, dtype):
    model, dense = pair(dtype=dtype)
    model.layers[0].requires_grad_(False)
    before = state(model)
    report = recover_(model, dense, rows(dtype=dtype), method=method, **EASY)
    moved = changed(before, state(model))
    assert moved
    assert not [name for name in moved if name.startswith("layers.0")]
    assert report.best < report.start
    if method == "blocks":
        assert any("1 of 2 blocks are frozen" in note for note in report.notes)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_frozen_as_a_whole_is_refused(method):
    model, dense = pair()
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match=rf"(?s)'{method}' finds nothing to train .* frozen.*requires_grad_\(True\)"):
        recover_(model, dense, rows(), method=method, **EASY)
    assert not any(p.requires_grad for p in model.parameters())


# 8. Errors, and all kinds of inputs.


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"minutes": 1, "steps": 1}, RecipeError, "minutes and steps exclude each other.*Give one"),
        ({"minutes": 0}, RecipeError, "minutes must be above 0"),
        ({"minutes": math.nan}, RecipeError, "minutes must be a number"),
        ({"minutes": math.inf}, RecipeError, "minutes must be finite"),
        ({"minutes": 1e-7}, RecipeError, "too small for one step.*Give more minutes"),
        ({"steps": 0}, RecipeError, "steps must be at least 1"),
        ({"steps": 2.5}, TypeError, "steps must be an int"),
        ({"method": "ful"}, RecipeError, "unknown method 'ful'; did you mean 'full'"),
        ({"loss": "kl"}, RecipeError, "unknown loss 'kl'.*Valid are"),
        ({"learning_rate": 0}, RecipeError, "learning_rate must be above 0"),
        (
            {"learning_rate": 0.1, "optimizer": OPTIMIZERS["sgd"]},
            RecipeError,
            "learning_rate=0.1 is a setting of AdamW",
        ),
        ({"weight_decay": 0.1, "optimizer": OPTIMIZERS["sgd"]}, RecipeError, "weight_decay=0.1 is a setting of AdamW"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a function of parameters"),
        ({"optimizer": lambda parameters: None}, TypeError, "must return a torch.optim.Optimizer, got NoneType"),
        ({"weight_decay": -1}, RecipeError, "weight_decay must be at least 0"),
        ({"clip": 0}, RecipeError, "clip must be above 0"),
        ({"temperature": 0}, RecipeError, "temperature must be above 0"),
        ({"held_out": 0.6}, RecipeError, "held_out is the part of the batches"),
        ({"held_out": 0.0}, RecipeError, "held_out is the part of the batches"),
        ({"accumulate": 0}, RecipeError, "accumulate must be at least 1"),
        ({"top_k": 0}, RecipeError, "top_k must be at least 1"),
        ({"rank": 0}, RecipeError, "rank must be at least 1"),
        ({"seed": -1}, RecipeError, "seed must be at least 0"),
        ({"autocast": torch.float32}, RecipeError, "autocast must be torch.bfloat16"),
        ({"max_memory": "much"}, RecipeError, "max_memory should be a number of bytes or a size"),
        ({"gradient_checkpointing": 1}, TypeError, "gradient_checkpointing must be a bool"),
        (
            {"method": "blocks", "steps": 1},
            RecipeError,
            "budget of 1 steps is too small for one step of each of 2 blocks",
        ),
        ({"loss": "logits"}, RecipeError, "(?s)needs an output with logits, and the model has none.*Load it"),
        ({"loss": "embeddings"}, RecipeError, "(?s)needs token states, and the model returns none.*Use"),
        ({"loss": lambda ours, theirs, batch: ours}, RecipeError, r"returned a tensor of shape \(8, 4\). Return one"),
        ({"loss": lambda ours, theirs, batch: 1.0}, RecipeError, "returned float. Return one number as a tensor"),
    ],
)
def test_wrong_settings_are_named(keywords, error, text):
    model, dense = pair()
    before = state(model)
    keywords = {"steps": 4} | keywords if "minutes" not in keywords else keywords
    with pytest.raises(error, match=text):
        recover_(model, dense, rows(), **keywords)
    assert_same(state(model), before)


def test_models_that_cannot_be_trained_are_named():
    model, dense = pair()
    with pytest.raises(TypeError, match=r"teacher must be an nn.Module, got str"):
        recover_(model, "dense", rows(), steps=1)
    with pytest.raises(RecipeError, match=r"model and teacher are the same object"):
        recover_(model, model, rows(), steps=1)
    sharing = copy.deepcopy(model)
    sharing.head = dense.head
    with pytest.raises(RecipeError, match=r"(?s)share 2 parameters \(head.weight is one\).*copy.deepcopy"):
        recover_(sharing, dense, rows(), steps=1)
    with torch.device("meta"):
        meta = Chain()
    with pytest.raises(RecipeError, match="the teacher has parameters on the meta device"):
        recover_(model, meta, rows(), steps=1)
    quantized = copy.deepcopy(model)
    quantized.head.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RecipeError, match=r"the model is quantized: head.weight"):
        recover_(quantized, dense, rows(), steps=1)
    packed = copy.deepcopy(model)
    packed.head = PackedLinear.from_linear(packed.head)
    for given in ((packed, dense), (model, packed)):
        with pytest.raises(RecipeError, match="unpack_"):
            recover_(*given, rows(), steps=1)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size"])
def test_a_teacher_of_another_kind_is_named(field):
    if field == "vocab_size":
        model, dense = llama(), llama(vocab_size=80)
        text = r"(?s)do not correspond: their vocabularies or classes differ, \(3, 6, 64\) and \(3, 6, 80\)"
    else:
        model, dense = bert(), bert()
        dense = transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=24, num_attention_heads=2,
                                                               num_hidden_layers=2, intermediate_size=24))  # fmt: skip
        text = "(?s)do not correspond: their hidden sizes differ, 16 and 24"
    with pytest.raises(RecipeError, match=text):
        recover_(model, dense, texts(), steps=1)


@pytest.mark.parametrize("bad", ["model", "teacher", "batch"])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_refused_before_training(method, bad):
    model, dense = pair()
    batches = rows()
    if bad == "batch":
        batches = [torch.full_like(x, math.nan) for x in batches]
    else:
        (model if bad == "model" else dense).head.bias.data[0] = math.nan
    before = _hash_model(model)
    with pytest.raises(RecipeError, match=r"held-out loss is nan before the first step.*mend these first"):
        recover_(model, dense, batches, method=method, **EASY)
    assert _hash_model(model) == before


def test_batches_that_are_too_few_or_do_not_fit():
    model, dense = pair()
    for batches in ([], iter([])):
        with pytest.raises(StatisticsError, match=r"batches is empty"):
            recover_(model, dense, batches, steps=1)
    with pytest.raises(StatisticsError, match=r"(?s)at least two are needed.*Cut it"):
        recover_(model, dense, rows(1), steps=1)
    with pytest.raises(TypeError, match=r"batches must be an iterable of batches, got one Tensor"):
        recover_(model, dense, rows()[0], steps=1)
    with pytest.raises(TypeError, match=r"batches must be an iterable of batches, got one dict"):
        recover_(model, dense, texts()[0], steps=1)


def test_an_endless_source_is_read_as_far_as_needed():
    class Endless(torch.utils.data.IterableDataset):
        read = 0

        def __iter__(self):
            while True:
                self.read += 1
                yield rows(1, seed=self.read)[0]

    source = Endless()
    for batches in (iter(source), source, torch.utils.data.DataLoader(source, batch_size=None)):
        source.read = 0
        model, dense = pair()
        report = recover_(model, dense, batches, steps=3, accumulate=2)
        assert report.steps == 3
        assert 6 <= source.read <= 12


def test_numpy_and_loaders_and_labels():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Chain()

        def forward(self, x):
            return self.inner(x)

    loaders = {
        "numpy": [x.numpy() for x in rows()],
        "float64": [x.numpy().astype(np.float64) for x in rows()],
        "labels": [(x, torch.zeros(8, dtype=torch.long)) for x in rows()],
        "loader": torch.utils.data.DataLoader(torch.cat(rows()), batch_size=8),
        "generator": (x for x in rows()),
        "dicts": [{"x": x} for x in rows()],
    }
    results = []
    for name, batches in loaders.items():
        model, dense = pair(Labelled)
        report = recover_(model, dense, batches, **EASY)
        results.append((report.start, report.best))
        assert ("left out of the batches" in " ".join(report.notes)) == (name == "labels")
    assert len(set(results)) == 1


class TupleOutput(Chain):
    def forward(self, x):
        return super().forward(x), {"boxes": super().forward(x) * 2, "count": 3}


@pytest.mark.parametrize("kind", ["tuple", "vision", "classifier", "encoder", "regression", "batch encoding", "detr"])
def test_all_kinds_of_outputs(kind):
    make, batches, loss = {
        "tuple": (TupleOutput, rows(), "output tensors"),
        "vision": (vit, [{"pixel_values": x.view(2, 3, 16, 16)} for x in rows(6, 24, 64)], "token states"),
        "classifier": (lambda: bert(transformers.BertForSequenceClassification, num_labels=5), texts(), "distribution"),
        "encoder": (bert, texts(), "pooled cosine"),
        "regression": (
            lambda: bert(transformers.BertForSequenceClassification, num_labels=1),
            texts(12, size=24),
            "output tensors",
        ),
        "batch encoding": (bert, [transformers.BatchEncoding(batch) for batch in texts()], "pooled cosine"),
        "detr": (Detector, rows(), "distribution of the logits"),
    }[kind]
    model, dense = pair(make)
    report = recover_(model, dense, batches, steps=20, learning_rate=2e-4)
    assert report.best < report.start
    assert loss in report.loss


class Detector(Chain):
    """Logits and boxes for some queries."""

    def __init__(self):
        super().__init__(outputs=8)

    def forward(self, x):
        found = super().forward(x).unsqueeze(1).expand(-1, 3, -1)
        return {"logits": found[..., :4], "pred_boxes": found[..., 4:].sigmoid()}


class Tokens(nn.Module):
    """The first module of a sentence transformer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, features):
        x = self.embedding(features["input_ids"])
        for block in self.layers:
            x = block(x)
        return features | {"token_embeddings": x}


@pytest.mark.parametrize("method", METHODS)
def test_a_sentence_transformer(method):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

    def make():
        return library.SentenceTransformer(modules=[Tokens(), modules.Pooling(8), modules.Normalize()], device="cpu")

    real = torch.arange(6) < torch.tensor([[6], [4], [1]])
    batches = [batch | {"attention_mask": real.long()} for batch in texts()]
    model, dense = pair(make)
    report = recover_(model, dense, batches, method=method, **EASY)
    assert report.loss == "token states + states behind each block + pooled cosine + similarity matrix"
    assert report.best < report.start
    assert set(report.blocks) == {"0.layers.0", "0.layers.1"}
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_not_changed(method):
    class InPlace(Block):
        def forward(self, x):
            return x.add_(self.down(torch.relu(self.up(x.clone()))))

    class Model(Chain):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([InPlace(), InPlace()])
            self.first = nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.first(x)
            for block in self.layers:
                x = block(x * 1)
            return self.head(x)

    batches, results = rows(), []
    for keep in (True, False):
        model, dense = pair(Model)
        report = recover_(model, dense, batches, method=method, keep_teacher_outputs=keep, **EASY)
        results.append(state(model))
        assert report.best < report.start
    assert all(torch.equal(one, other) for one, other in zip(batches, rows(), strict=True))
    assert_same(*results)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_of_another_precision(method, ours, theirs):
    model, dense = pair(dtype=getattr(torch, ours))
    dense.to(getattr(torch, theirs))
    report = recover_(model, dense, rows(dtype=getattr(torch, ours)), method=method, **EASY)
    assert report.best < report.start


def test_a_wrapped_model_is_recovered_inside():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model, dense = pair()
    report = recover_(Wrapped(model), Wrapped(dense), rows(), **EASY)
    assert report.best < report.start
    model, dense = pair(dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match=r"weights of 16 bits inside Wrapped. Give model.module"):
        recover_(Wrapped(model), dense, rows(), **EASY)


def test_the_report_says_what_was_done():
    model, dense = pair()
    report = recover_(model, dense, rows(), steps=9, learning_rate=0.01, seed=3)
    assert report.asked == {"steps": 9}
    assert report.steps <= 9
    assert (report.samples, report.held_out_samples) == (40, 8)
    assert report.epochs == pytest.approx(report.steps / 5)
    assert report.settings["seed"] == 3
    assert report.curve[0].step == 0
    assert report.curve[0].held_out == report.start
    assert report.curve[-1].step == report.steps
    assert report.seconds >= report.curve[-1].seconds
    assert (report.model_name, report.teacher_name) == ("Chain", "Chain")
    assert report.trained == sum(p.numel() for p in model.parameters()) - report.zeros[0]


def test_the_same_call_gives_the_same_bits_and_another_seed_another_order():
    found = []
    for seed in (0, 0, 1):
        model, dense = pair()
        recover_(model, dense, rows(), seed=seed, **EASY)
        found.append(_hash_model(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("steps", [2, 5, 7])
def test_blocks_use_all_steps(steps):
    model, dense = pair()
    report = recover_(model, dense, rows(), method="blocks", steps=steps, learning_rate=1e-3)
    assert report.steps == steps
    assert report.best < report.start


@pytest.mark.parametrize("method", METHODS)
def test_few_steps_are_all_made_and_none_is_lost(method):
    model, dense = pair()
    report = recover_(model, dense, rows(), method=method, steps=2, learning_rate=1e-3)
    assert report.steps == 2
    assert report.best < report.start


# 12. What is decided by the model and its device.


def test_training_is_in_bfloat16_where_the_device_multiplies_it(monkeypatch):
    seen = []
    for native in (True, False):
        monkeypatch.setattr("secateur.recovery._settings.multiplies_bfloat16", lambda device, native=native: native)
        model, dense = pair()
        report = recover_(
            model, dense, rows(), steps=2, loss=lambda ours, theirs, batch: seen.append(ours.dtype) or ours.mean()
        )
        assert report.settings["autocast"] == ("bfloat16" if native else None)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert seen[0] == torch.float32  # what is measured
        assert (torch.bfloat16 in seen) is native
        seen.clear()


def test_the_learning_rate_follows_from_the_zeros():
    rates = {}
    for sparsity in (0.0, 0.8):
        model, dense = pair(pattern="unstructured", sparsity=sparsity)
        rates[sparsity] = recover_(model, dense, rows(), steps=2).settings["learning_rate"]
    assert rates[0.8] > rates[0.0]
