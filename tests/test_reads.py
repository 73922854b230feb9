"""Weights that are multiplied without a call of their layer: seen, calibrated and pruned like all others."""

import copy

import pytest
import torch
from read_cases import CASES, EXPERTS, IN, OUT, Blocks, Experts, ReadsWeight
from torch import nn
from torch.nn import functional

import secateur
from secateur import RecipeError, SparseTraining, StatisticsError, prune_
from secateur.calibration import gather, load_batches, observe, quiet, replayed
from secateur.layers import select_layers
from secateur.training import METHODS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batches(count=3, shape=(2, 40)):
    return [torch.randn(*shape, IN) for _ in range(count)]


def calibrated(model, data, sequential=False, strict=True):
    """Statistics and layers, both by name, of the model as it is."""
    loaded = load_batches(data, torch.device("cpu"))
    with quiet(model):
        observed = observe(model, loaded)
        layers, _ = select_layers(model, observed=observed)
        source = replayed(model, loaded, layers, sequential=sequential)
        found = {}
        for index in range(len(source.stages)):
            found |= gather(source, index, {"gram", "input_norm"}, observed=observed, strict=strict)
    return found, {layer.name: layer for layer in layers}


@pytest.mark.parametrize("case", CASES)
def test_a_weight_that_a_function_multiplies_is_calibrated_on_what_it_reads(case):
    model, data = CASES[case](), batches(count=4, shape=(2, 60))
    with torch.no_grad():
        truths = [model.truth(x) for x in data]
    found, layers = calibrated(model, data)
    assert found.keys() == layers.keys() == truths[0].keys()
    for name, statistics in found.items():
        rows = torch.cat([truth[name].reshape(-1, truth[name].shape[-1]) for truth in truths]).double()
        rows = rows[rows.any(1)]
        assert layers[name].matrix().shape[1] == rows.shape[1]
        if name != "cell.weight_hh":  # whose first state is zero
            assert statistics.tokens == len(rows), name
        torch.testing.assert_close(statistics.require("gram")[0].double(), rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_watching_changes_nothing(case):
    model, (x, *_) = CASES[case](), batches()
    state, expected = copy.deepcopy(model.state_dict()), model.eval()(x)
    calibrated(model, [x, x], strict=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("sequential", [True, False], ids=["stages", "one_pass"])
@pytest.mark.parametrize("case", CASES)
def test_pruning_reaches_what_functions_multiply(case, sequential):
    model = Blocks(CASES[case])
    report = prune_(model, batches(), pattern="2:4", method="sparsegpt", sequential=sequential, include=["*"])
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("added")]
    assert report.num_weights == sum(p.numel() for p in matrices)
    for layer in select_layers(model, observed=watched(model))[0]:
        assert int((layer.matrix() == 0).sum()) == layer.matrix().numel() // 2
    assert all(layer.relative_error is not None and layer.relative_error < 1 for layer in report.layers)


def watched(model):
    with quiet(model):
        return observe(model, batches(1))


def test_the_mask_of_an_expert_follows_the_tokens_that_are_routed_to_it():
    """Wanda on hand-made inputs: each expert reads another half of the features, so each keeps others."""

    class Halves(Experts):
        def routes(self, x):
            tokens = x.reshape(-1, IN)
            return tokens, [torch.where(tokens[:, 0] > 0)[0], torch.where(tokens[:, 0] < 0)[0], torch.empty(0).long()]

    model = Halves()
    nn.init.ones_(model.up)
    x = torch.zeros(1, 200, IN)
    x[:, :100, : IN // 2] = 1
    x[:, 100:, IN // 2 :] = 1
    x[:, 100:, 0] = -1e-3
    report = prune_(model, [x], method="wanda", sparsity=0.5, include=["up"])
    assert [layer.name for layer in report.layers] == [f"up.{expert}" for expert in range(EXPERTS)]
    kept = (model.up != 0).any(1)
    assert kept[0].tolist() == [True] * 4 + [False] * 4
    assert kept[1].tolist() == [False] * 4 + [True] * 4


def test_an_expert_that_few_tokens_reach_is_calibrated_on_those_of_its_stack():
    model, data = Experts(), [torch.randn(1, 90, IN)]
    with torch.no_grad():
        counts = [len(rows) for rows in model.routes(data[0])[1]]
    assert min(counts) < 64
    report = prune_(model, data, method="wanda", sparsity=0.5)
    for layer, own in zip(report.layers[:EXPERTS], counts, strict=True):
        assert layer.tokens == (90 if own < 64 else own)
        assert any(f"only {own} reached it" in note for note in layer.notes) == (own < 64)
    assert not report.skipped
    with pytest.raises(StatisticsError, match=r"^up\.\d: only \d+ calibration inputs reached it, and 64 are needed"):
        prune_(Experts(), data, method="wanda", sparsity=0.5, strict=True)


class Known(Experts):
    is_transposed = False


def test_globs_name_a_stack_its_module_or_one_of_its_matrices():
    model = nn.ModuleDict({"experts": Known(), "usual": nn.Linear(4, 4)})
    every = [f"experts.{part}.{expert}" for part in ("up", "down") for expert in range(EXPERTS)]
    assert [layer.name for layer in select_layers(model, ["experts"])[0]] == every
    assert [layer.name for layer in select_layers(model, ["experts.up"])[0]] == every[:EXPERTS]
    assert [layer.name for layer in select_layers(model, ["*.down.2"])[0]] == every[-1:]
    layers, skipped = select_layers(model, exclude=["experts.down"])
    assert [layer.name for layer in layers] == [*every[:EXPERTS], "usual"]
    assert [(skip.name, skip.reason) for skip in skipped] == [("experts.down", "excluded")]  # one line for a stack


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        ((3, 16, 6), (3, 6, 8), (16, 6)),  # gated: one reads half of what the other gives
        ((3, 6, 16), (3, 8, 6), (16, 6)),
        ((3, 8, 4), (3, 4, 4), (8, 4)),
        ((3, 8, 6), (3, 6, 8), None),  # either might be the first one
        ((3, 6, 6), (3, 6, 6), None),
        ((3, 16, 6), (4, 6, 8), None),
    ],
)
def test_without_inputs_a_stack_is_read_as_its_sizes_say_or_left_alone(up, down, expected):
    model = nn.ModuleDict({"odd": Experts(), "usual": nn.Linear(4, 4)})
    model["odd"].up, model["odd"].down = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
    layers, skipped = select_layers(model)
    if expected is None:
        assert [layer.name for layer in layers] == ["usual"]
        assert "no known kind" in skipped[0].reason
    else:
        assert len(layers) == 7
        assert layers[0].matrix().shape == expected


class Overlapping(nn.Module):
    """Multiplies parts of a weight that overlap by different inputs: no row of it has one input."""

    def __init__(self):
        super().__init__()
        self.pair, self.usual = nn.Linear(IN, 8), nn.Linear(IN, IN)

    def forward(self, x):
        return self.usual(x), functional.linear(x, self.pair.weight[:6]), functional.linear(2 * x, self.pair.weight[2:])


class WholeAndPart(Overlapping):
    def forward(self, x):
        return self.usual(x), functional.linear(x, self.pair.weight), functional.linear(2 * x, self.pair.weight[:4])


class SomeColumns(Overlapping):
    def forward(self, x):
        return self.usual(x), functional.linear(x[..., :4], self.pair.weight[:, :4])


class Turned(Overlapping):
    """Multiplies a plain parameter by inputs from either side."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Module()
        self.pair.square = nn.Parameter(torch.randn(IN, IN))

    def forward(self, x):
        return self.usual(x), x @ self.pair.square, functional.linear(x, self.pair.square)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Overlapping, "linear multiplies parts of it that overlap"),
        (WholeAndPart, "linear multiplies all of it, and parts of it"),
        (SomeColumns, "a function multiplies a part of it"),
        (Turned, "matmul and linear multiply it in different ways"),
    ],
)
def test_a_weight_that_has_no_one_input_is_left_alone_with_the_reason(kind, reason):
    model = kind()
    before = copy.deepcopy(model.pair.state_dict())
    report = prune_(model, batches(), method="wanda", sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["usual"]
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("pair", reason)]
    assert all(torch.equal(value, before[name]) for name, value in model.pair.state_dict().items())


RECURRENT = [
    (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for options in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"num_layers": 2, "bias": False})
] + [(nn.LSTM, {"proj_size": 3, "bidirectional": True}), (nn.RNN, {"nonlinearity": "relu"})]


def states_step_by_step(module, x, lengths):
    """What each weight reads, [rows, in], one step of one sequence at a time, with the equations of the manual."""
    found = {}
    directions = 2 if module.bidirectional else 1
    for batch, length in enumerate(lengths):
        inputs = [x[batch, t] for t in range(length)]
        for depth in range(module.num_layers):
            outputs = [[] for _ in range(length)]
            for direction in range(directions):
                end = f"l{depth}" + "_reverse" * direction
                steps = range(length) if direction == 0 else range(length - 1, -1, -1)
                state = x.new_zeros(module.proj_size or module.hidden_size)
                cell = x.new_zeros(module.hidden_size)
                own = {}
                for t in steps:
                    found.setdefault(f"weight_ih_{end}", []).append(inputs[t])
                    found.setdefault(f"weight_hh_{end}", []).append(state)
                    a = getattr(module, f"weight_ih_{end}") @ inputs[t]
                    b = getattr(module, f"weight_hh_{end}") @ state
                    if module.bias:
                        a, b = a + getattr(module, f"bias_ih_{end}"), b + getattr(module, f"bias_hh_{end}")
                    if isinstance(module, nn.LSTM):
                        i, f, g, o = (a + b).chunk(4)
                        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                        state = o.sigmoid() * cell.tanh()
                        if module.proj_size:
                            state = getattr(module, f"weight_hr_{end}") @ state
                    elif isinstance(module, nn.GRU):
                        (ra, za, na), (rb, zb, nb) = a.chunk(3), b.chunk(3)
                        z = (za + zb).sigmoid()
                        state = (1 - z) * (na + (ra + rb).sigmoid() * nb).tanh() + z * state
                    else:
                        state = (a + b).tanh() if module.nonlinearity == "tanh" else (a + b).relu()
                    own[t] = state
                for t in range(length):
                    outputs[t].append(own[t])
            inputs = [torch.cat(parts) for parts in outputs]
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_weights_of_recurrent_layers_are_calibrated_on_inputs_and_states(kind, options, packed):
    module = kind(5, 4, **options)
    x, lengths = torch.randn(3, 6, 5), [4, 6, 2] if packed else [6, 6, 6]
    given = x if module.batch_first else x.transpose(0, 1)
    if packed:
        given = nn.utils.rnn.pack_padded_sequence(
            given, torch.tensor(lengths), batch_first=module.batch_first, enforce_sorted=False
        )
    with torch.no_grad():
        truth = states_step_by_step(module, x, lengths)
    model, data = nn.Sequential(module), [given]
    with quiet(model):
        observed = observe(model, data)
        layers, skipped = select_layers(model, observed=observed)
        source = replayed(model, data, layers)
        found = gather(source, 0, {"gram"}, observed=observed)
    assert {layer.name for layer in layers} == {f"0.{name}" for name in truth}
    assert [skip.name for skip in skipped] == [
        f"0.weight_hr_l0{end}" for end in ("", "_reverse") if "proj_size" in options
    ]
    for name, rows in truth.items():
        statistics = found[f"0.{name}"]
        assert statistics.tokens == len(rows) == sum(lengths)
        torch.testing.assert_close(statistics.require("gram")[0], rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "row", "column", "block:2x2"])
def test_every_weight_of_a_recurrent_layer_is_pruned(pattern):
    model = nn.Sequential(nn.LSTM(8, 4, num_layers=2, bidirectional=True))
    sparsity = None if pattern == "2:4" else 0.5
    report = prune_(model, [torch.randn(7, 2, 8)], pattern=pattern, sparsity=sparsity, method="wanda")
    assert len(report.layers) == 8
    assert report.num_weights == sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    assert report.sparsity == 0.5
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if "weight" in name)
    assert zeros == report.num_pruned
    assert isinstance(model(torch.randn(3, 2, 8))[0], torch.Tensor)


def test_registering_a_function_gives_a_module_several_weights(monkeypatch):
    from secateur.layers import _kinds

    monkeypatch.setattr(_kinds, "_KINDS", dict(_kinds._KINDS))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return x @ self.a.T - x @ self.b.T

    def kinds(module):
        for name in ("a", "b"):
            yield secateur.LayerKind(
                lambda module, weight: weight, lambda module, matrix: matrix, lambda module, x: x.reshape(1, -1, 4),
                parameter=name, name=name,
            )  # fmt: skip

    secateur.register_layer(Two, kinds)
    model = nn.Sequential(Two())
    report = prune_(model, [torch.randn(9, 4)], pattern="2:4", method="wanda")
    assert [(layer.name, layer.tokens) for layer in report.layers] == [("0.a", 9), ("0.b", 9)]
    assert report.sparsity == 0.5


def test_a_model_of_which_nothing_is_read_says_so():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x

    with pytest.raises(RecipeError, match=r"no layer to prune(.|\n)*layer .*no calibration input reached it"):
        prune_(Nothing(), batches(), method="wanda", sparsity=0.5)


def test_reading_is_told_apart_from_calling():
    model = ReadsWeight()
    observed = watched(model)
    assert id(model.qkv) not in observed.called
    assert observed.read.keys() == {id(model.qkv.weight)}
    assert observed.read[id(model.qkv.weight)].function == "linear"


PLAIN = [method for method in METHODS if not METHODS[method]().learns]


@pytest.mark.parametrize("method", PLAIN)
def test_training_holds_the_zeros_of_parts_of_a_parameter(method):
    model = nn.Sequential(Known(), nn.LSTM(IN, 4, batch_first=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training = SparseTraining(model, optimizer, method=method, sparsity=0.5, steps=8, update_every=2)
    hooks = [len(parameter._backward_hooks or ()) for parameter in model.parameters()]
    assert max(hooks) == 1  # one for all experts of a stack
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 10, IN))[0].square().mean().backward()
        dense = method == "rigl"  # whose pruned weights have gradients before an update
        for layer in select_layers(model)[0]:
            pruned = ~training.masks[layer.name]
            assert dense or not layer.to_matrix(layer.parameter.grad)[pruned].any()
        optimizer.step()
        training.step()
        for layer in select_layers(model)[0]:
            pruned = ~training.masks[layer.name]
            assert not layer.matrix()[pruned].any()
            momenta = optimizer.state[layer.parameter].get("momentum_buffer")
            assert momenta is None or not layer.to_matrix(momenta)[pruned].any()
    report = training.finalize()
    assert [layer.pruned for layer in report.layers] == [OUT * IN // 2] * 2 * EXPERTS + [16 * IN // 2, 16 * 4 // 2]
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("method", PLAIN)
def test_a_training_of_parts_goes_on_from_its_state(method):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(Known())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, optimizer, SparseTraining(model, optimizer, method=method, sparsity=0.5, steps=8, update_every=2)

    def run(model, optimizer, training, steps):
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 10, IN, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            training.step()

    whole, interrupted, resumed = make(0), make(0), make(1)
    run(*whole, range(8))
    run(*interrupted, range(5))
    for one, other in zip(resumed, interrupted, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    run(*resumed, range(5, 8))
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def mixture(family, way, **sizes):
    """A tiny language model of transformers whose experts run in a certain way."""
    transformers = pytest.importorskip("transformers")
    sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    kind = {"Llama4": "Llama4TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, kind)(**sizes, vocab_size=40, head_dim=8, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config._experts_implementation = way
    return model


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_experts_of_transformers_are_pruned_however_they_run(family, way):
    model = mixture(family, way, num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2)
    ids = torch.randint(1, 40, (4, 40))
    truth = experts_by_hand(model, ids) if family != "Llama4" else None
    report = prune_(model, [{"input_ids": ids}], pattern="2:4", method="wanda", sequential=False)
    assert model.config._experts_implementation == way
    stacks = [p for p in model.parameters() if p.ndim == 3]
    assert len(stacks) == 4
    for stack in stacks:
        assert int((stack == 0).sum()) == stack.numel() // 2
    outside = {"embedding", "no weight matrix"}
    left = [skip for skip in report.skipped if skip.reason not in outside]
    assert all(skip.reason.startswith(("router", "output head")) for skip in left)
    if truth is not None:
        tokens = {layer.name: layer.tokens for layer in report.layers if "experts.gate_up_proj" in layer.name}
        assert {name: count for name, count in tokens.items() if truth[name] >= 64} == {
            name: count for name, count in truth.items() if count >= 64
        }


def experts_by_hand(model, ids):
    """How many tokens the router sends to each expert, from what the expert modules are given."""
    counts, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def count(module, args, kwargs, name=name):
                chosen = (list(args) + list(kwargs.values()))[1]
                for expert in range(module.num_experts):
                    counts[f"{name}.gate_up_proj.{expert}"] = int((chosen == expert).sum())

            handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_padding_is_kept_out_of_experts(family, way):
    """Tokens are gathered by index on their way to an expert, so that no mask has the shape of its inputs."""
    model = mixture(family, way, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    ids, mask = torch.randint(1, 40, (4, 50)), torch.ones(4, 50, dtype=torch.long)
    ids[1, 30:] = ids[3, 40:] = 0
    mask[1, 30:] = mask[3, 40:] = 0
    padded, _ = calibrated(model, [{"input_ids": ids, "attention_mask": mask}], strict=False)
    alone = [{"input_ids": row[None, : int(keep.sum())]} for row, keep in zip(ids, mask, strict=True)]
    expected, _ = calibrated(model, alone, strict=False)
    assert padded.keys() == expected.keys()
    assert any("experts.down_proj" in name for name in padded)
    for name, statistics in padded.items():
        assert statistics.tokens == expected[name].tokens, name
        torch.testing.assert_close(statistics.require("gram"), expected[name].require("gram"), rtol=1e-3, atol=1e-4)


def test_heads_for_other_tasks_are_named_by_one_glob():
    """Longformer has projections that only global attention uses, six of them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LongformerConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=80, attention_window=[8, 8], pad_token_id=1,
    )  # fmt: skip
    model = transformers.LongformerModel(config)
    with pytest.warns(UserWarning, match="no calibration input reached 6 layers") as warned:
        report = prune_(model, [{"input_ids": torch.randint(2, 40, (2, 32))}], pattern="2:4", method="wanda")
    parts = [f"encoder.layer.*.attention.self.{name}_global" for name in ("query", "key", "value")]
    assert f"exclude={parts!r}" in str(warned[0].message)
    assert report.sparsity == 0.5
    assert sum(skip.reason == "no calibration input reached it" for skip in report.skipped) == 6


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda x, w: torch.addmm(x[:, :1], x, w), 1),
        (lambda x, w: torch.addmm(x[:, :1], mat1=x, mat2=w), 1),
        (lambda x, w: x[:, :1].addmm(x, w, beta=0.5, alpha=2), 1),
        (lambda x, w: torch.addmm(input=x[:, :1], mat1=x, mat2=w, beta=0), 1),
        (lambda x, w: x[None, :, :1].baddbmm(batch1=x[None], batch2=w[None], beta=1.0, alpha=1.0), 0),
        (lambda x, w: torch.baddbmm(x[None, :, :1], x[None], w[None]), 0),
        (lambda x, w: torch.matmul(input=x, other=w), 1),
        (lambda x, w: torch.mm(x, mat2=w), 1),
        (lambda x, w: x.matmul(w), 1),
        (lambda x, w: functional.linear(input=x, weight=w.T), 1),
        (lambda x, w: torch.einsum("ti,io->to", [x, w]), 1),
        (lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), 1),
    ],
)
def test_functions_are_seen_however_they_are_called(call, count):
    """Those that add a third dimension make another matrix of the parameter; none of them fails for being watched."""
    from secateur.calibration._reads import FunctionWatch

    weight, x, seen = torch.randn(6, 5), torch.randn(7, 6), []
    expected = call(x, weight)
    with FunctionWatch(seen.append, lambda t: t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()):
        found = call(x, weight)
    assert torch.equal(found, expected)
    plain = [product for product in seen if product.matrix.ndim == 2]
    assert len(plain) == count
    for product in plain:
        assert torch.equal(product.matrix, weight.T)
        assert torch.equal(product.x, x)
