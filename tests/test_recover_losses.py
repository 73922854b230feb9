"""What is compared between a model and its teacher: against slow references in float64, and what is kept of it."""

import copy
import math

import pytest
import torch
import transformers
from recover_cases import METHODS, Chain, assert_same, bert, pair, rows, state, texts
from shrunk_cases import llama, t5
from torch import nn

from secateur import RecipeError, recover_, shrink_
from secateur.calibration import Padding
from secateur.recovery import _teacher
from secateur.recovery._correspond import block_lists, correspondence
from secateur.recovery._losses import Criterion, choose_loss
from secateur.recovery._seen import Seen
from secateur.recovery._settings import Settings
from secateur.recovery._teacher import TeacherOutputs
from secateur.recovery._terms import Embeddings, Given, Logits, Outputs, States, TokenStates

EASY = {"steps": 6, "learning_rate": 0.003}
HALF = 2e-3  # what storing in half precision costs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=generator(seed))


def mask(kind, batch=3, length=6):
    """Which tokens are real: 6, 4 and 1 in the rows."""
    counts = torch.tensor([6, 4, 1]).unsqueeze(1)
    places = torch.arange(length).expand(batch, length)
    if kind == "none":
        return torch.ones(batch, length, dtype=torch.bool)
    return places < counts if kind == "right" else places >= length - counts


def batch_of(real):
    return {"input_ids": torch.ones(real.shape, dtype=torch.long), "attention_mask": real.long()}


def loss_of(term, ours, theirs, batch=None, states=((), ())):
    criterion = Criterion((term,), needs_states=bool(states[0]))
    batch = {} if batch is None else batch
    kept = criterion.keep(Seen(theirs, batch, states[1], Padding.of(batch)))
    assert all(tensor.dtype.itemsize <= 4 and tensor.is_contiguous() for tensor in kept.values())
    return criterion.loss(Seen(ours, batch, states[0], Padding.of(batch)), kept)


def same(output):
    return output


# Kullback-Leibler divergence.


def slow_divergence(ours, theirs, temperature=1.0, top_k=None, real=None):
    """Token by token, outcome by outcome, in float64; what is beyond the top k counts as one outcome."""
    total, count = 0.0, 0
    flat = real.flatten().tolist() if real is not None else [True] * ours[..., 0].numel()
    for own, other, counts in zip(ours.flatten(0, -2).double(), theirs.flatten(0, -2).double(), flat, strict=True):
        if not counts:
            continue
        q, p = (own / temperature).softmax(0).tolist(), (other / temperature).softmax(0).tolist()
        order = sorted(range(len(p)), key=lambda place: -p[place])[: top_k or len(p)]
        total += sum(p[place] * math.log(p[place] / q[place]) for place in order)
        p_rest, q_rest = 1 - sum(p[place] for place in order), 1 - sum(q[place] for place in order)
        if len(order) < len(p):
            total += p_rest * math.log(p_rest / q_rest)
        count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 3, 10, 11, 500])
def test_divergence(top_k, temperature, padding):
    ours, theirs, real = logits(3, 6, 11), logits(3, 6, 11, seed=1), mask(padding)
    got = float(loss_of(Logits(same, temperature, top_k), ours, theirs, batch_of(real)))
    expected = slow_divergence(ours, theirs, temperature, top_k if top_k < 11 else None, real)
    assert got == pytest.approx(expected, rel=HALF, abs=1e-3)
    whole = slow_divergence(ours, theirs, temperature, None, real)
    assert got <= whole * (1 + HALF) + 1e-5
    if top_k >= 11:
        assert got == pytest.approx(whole, rel=HALF)


@pytest.mark.parametrize("top_k", [2, 100])
@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 40)])
def test_divergence_of_a_model_from_itself_is_never_below_zero(shape, top_k):
    for seed in range(20):
        found = logits(*shape, seed=seed, scale=0.1 * seed)
        assert -1e-6 <= float(loss_of(Logits(same, top_k=top_k), found, found.clone())) < 2e-5


@pytest.mark.parametrize("top_k", [4, 100])
@pytest.mark.parametrize("never", [-math.inf, torch.finfo(torch.float32).min, -1e30])
def test_outcomes_that_cannot_be_add_nothing(never, top_k):
    ours, theirs = logits(4, 9), logits(4, 9, seed=1)
    expected = float(loss_of(Logits(same, top_k=top_k), ours[:, :6], theirs[:, :6]))
    ours[:, 6:] = theirs[:, 6:] = never
    ours.requires_grad_()
    got = loss_of(Logits(same, top_k=top_k), ours, theirs)
    assert float(got.detach()) == pytest.approx(expected, rel=HALF)
    got.backward()
    assert ours.grad.isfinite().all()


def test_divergence_has_the_gradient_of_the_whole_one():
    ours, theirs = logits(4, 9).double().requires_grad_(), logits(4, 9, seed=1)
    loss_of(Logits(same), ours, theirs).backward()
    expected = (ours.detach().softmax(-1) - theirs.double().softmax(-1)) / 4
    torch.testing.assert_close(ours.grad, expected, rtol=1e-2, atol=1e-4)


# Errors of states and outputs, embeddings.


def slow_error(ours, theirs, real=None):
    squares = (ours.double() - theirs.double()).square().sum(-1)
    sizes = theirs.double().square().sum(-1)
    if real is not None:
        squares, sizes = squares[real], sizes[real]
    return float(squares.sum() / sizes.sum())


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_states(padding):
    real = mask(padding)
    ours, theirs = [logits(3, 6, 8, seed=seed) for seed in (0, 1)], [logits(3, 6, 8, seed=seed) for seed in (2, 3)]
    got = loss_of(States(), torch.zeros(1), torch.zeros(1), batch_of(real), (tuple(ours), tuple(theirs)))
    expected = sum(slow_error(own, other, real) for own, other in zip(ours, theirs, strict=True)) / 2
    assert float(got) == pytest.approx(expected, rel=HALF)
    got = loss_of(TokenStates(same), ours[0], theirs[0], batch_of(real))
    assert float(got) == pytest.approx(slow_error(ours[0], theirs[0], real), rel=HALF)


def test_outputs():
    ours, theirs = [logits(4, 3), logits(2, 3, 5, 5, seed=1)], [logits(4, 3, seed=2), logits(2, 3, 5, 5, seed=3)]
    expected = (slow_error(ours[0], theirs[0]) + slow_error(ours[1], theirs[1])) / 2
    assert float(loss_of(Outputs(same), ours, theirs)) == pytest.approx(expected, rel=HALF)


def test_embeddings():
    term = Embeddings(lambda seen: seen.output, weight=10.0)
    ours, theirs = logits(4, 8), logits(4, 8, seed=1)
    a, b = ours.double(), theirs.double()

    def cosine(one, other):
        return float(one @ other / (one.norm() * other.norm()))

    expected = sum(1 - cosine(a[i], b[i]) for i in range(4)) / 4
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected += 10 * sum((cosine(a[i], a[j]) - cosine(b[i], b[j])) ** 2 for i, j in pairs) / len(pairs)
    assert float(loss_of(term, ours, theirs)) == pytest.approx(expected, rel=1e-5)
    assert float(loss_of(term, ours[:1], theirs[:1])) == pytest.approx(1 - cosine(a[0], b[0]), rel=1e-5)
    assert float(loss_of(term, ours, ours * 3)) == pytest.approx(0, abs=1e-6)


def terms():
    seen = Settings()
    output = {"last_hidden_state": torch.ones(3, 6, 8)}
    criterion = choose_loss(Seen(output, batch_of(mask("none"))), Seen(output, batch_of(mask("none"))), seen, None)
    return {
        "logits": (Logits(lambda output: output["last_hidden_state"], top_k=4), False),
        "all logits": (Logits(lambda output: output["last_hidden_state"]), False),
        "states": (States(), True),
        "tokens": (criterion.terms[0], False),
        "embeddings": (criterion.terms[-1], False),
        "outputs": (Outputs(lambda output: list(output.values())), False),
    }


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, 7e4])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", terms())
def test_what_padding_holds_changes_nothing(name, padding, garbage):
    term, by_states = terms()[name]
    real = mask(padding)
    found = []
    for value in (None, garbage):
        ours, theirs = logits(3, 6, 8), logits(3, 6, 8, seed=1)
        if value is not None:
            ours[~real] = theirs[~real] = value
        ours.requires_grad_()
        outputs = {"last_hidden_state": ours}, {"last_hidden_state": theirs}
        loss = loss_of(term, *outputs, batch_of(real), ((ours,), (theirs,)) if by_states else ((), ()))
        loss.backward()
        found.append((float(loss.detach()), ours.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not found[1][1][~real].any()
    assert found[1][1][real].any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, 1e15])
def test_huge_values_are_stored_in_16_bits(scale):
    ours, theirs = scale * logits(3, 6, 8), scale * logits(3, 6, 8, seed=1)
    criterion = Criterion((TokenStates(same),), needs_states=False)
    kept = criterion.keep(Seen(theirs, {}))
    assert {tensor.element_size() for tensor in kept.values()} == {2}
    assert float(criterion.loss(Seen(ours, {}), kept)) == pytest.approx(slow_error(ours, theirs), rel=2e-2)


def test_a_tensor_that_is_part_of_a_large_one_does_not_keep_it():
    large = torch.zeros(1000, 8, dtype=torch.float16)
    criterion = Criterion((Given(lambda ours, theirs, batch: ours.sum()),), needs_states=False)
    kept = criterion.keep(Seen((large[:2], large[:2], torch.arange(100)[:2]), {}))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept.values())
    assert len({tensor.data_ptr() for tensor in kept.values()}) == len(kept)


# The choice of a loss by what a model returns.


def test_a_causal_language_model_with_padding_on_either_side():
    for side in ("right", "left"):
        real = mask(side)
        batches = [batch | {"attention_mask": real.long()} for batch in texts()]
        model, dense = pair(llama)
        report = recover_(model, dense, batches, **EASY)
        assert report.loss == "distribution of the logits + states behind each block"
        assert report.best < report.start
        other = [dict(batch) for batch in batches]
        for batch in other:
            batch["input_ids"] = batch["input_ids"].masked_fill(~real, 5)
        again, dense = pair(llama)
        second = recover_(again, dense, other, **EASY)
        assert second.start == pytest.approx(report.start, rel=1e-5)
        assert second.best == pytest.approx(report.best, rel=1e-5)


def test_padding_is_known_by_the_names_of_positional_inputs():
    """In every method: also where blocks are run on their own."""

    class Model(Chain):
        def forward(self, inputs_embeds, attention_mask):
            return super().forward(inputs_embeds)

    real = mask("right")
    for method in METHODS:
        found = []
        for garbage in (0.0, 50.0):
            batches = [(x, real.long()) for x in logits(6, 3, 6, 8, scale=1.0)]
            for x, _ in batches:
                x[~real] = garbage
            model, dense = pair(Model)
            report = recover_(model, dense, batches, method=method, **EASY)
            found.append((report.start, report.best, state(model)))
        assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5), method
        for name, tensor in found[0][2].items():
            torch.testing.assert_close(tensor, found[1][2][name], rtol=1e-4, atol=1e-5)


def test_pooling_of_the_caller_is_used():
    calls = []

    def first(states, real):
        calls.append((tuple(states.shape), real.dtype, tuple(real.shape)))
        return states[:, 0]

    model, dense = pair(bert)
    report = recover_(model, dense, texts(), pooling=first, **EASY)
    assert report.best < report.start
    assert set(calls) == {((3, 6, 16), torch.bool, (3, 6))}


# 6. Which blocks correspond.


def removed(model, batches, *stages):
    return [shrink_(model, batches, remove={"layers": list(stage)}, verify=False) for stage in stages]


def chain(blocks=6):
    torch.manual_seed(0)
    return Chain(blocks)


@pytest.mark.parametrize("stages", [((1, 4),), ((0,),), ((5,),), ((1, 4), (0,)), ((0, 1), (1,), (0,))])
@pytest.mark.parametrize("reported", [True, False])
def test_blocks_that_are_left_stand_for_those_behind_them(stages, reported):
    model = chain()
    dense = copy.deepcopy(model)
    left = list(range(6))
    for stage in stages:
        left = [block for place, block in enumerate(left) if place not in stage]
    history = [shrink_(model, rows(2), remove={"layers": list(stage)}) for stage in stages]
    if reported:  # values that changed say nothing any more
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    found = correspondence(model, dense, history if reported else ())
    behind = [*(block - 1 for block in left[1:]), 5]
    assert found.names == {f"layers.{own}": f"layers.{other}" for own, other in enumerate(behind)}
    assert ("report" in found.how) == reported or "equal" in found.how
    assert found.teachers == tuple(dense.layers[other] for other in behind)


def test_blocks_of_an_unknown_origin_are_not_compared_and_the_report_says_so():
    torch.manual_seed(0)
    dense = llama(num_hidden_layers=4)
    model = llama(num_hidden_layers=2)
    report = recover_(model, dense, texts(), **EASY)
    assert not report.blocks
    assert report.loss == "distribution of the logits"
    assert any("neither a report nor equal parameters say which, so none is compared" in note for note in report.notes)
    with pytest.raises(RecipeError, match=r"(?s)'blocks' needs repeated blocks.*2 blocks of 4.*history="):
        recover_(model, dense, texts(), method="blocks", steps=4)
    report = recover_(dense, model, texts(), **EASY)
    assert any("the model has 4 blocks and the teacher only 2" in note for note in report.notes)


def test_blocks_that_are_all_alike_are_not_told_apart():
    model, dense = chain(), chain()
    for block in dense.layers[1:]:
        block.load_state_dict(dense.layers[0].state_dict())
    del model.layers[3:]
    for block in model.layers:
        block.load_state_dict(dense.layers[0].state_dict())
    found = correspondence(model, dense)
    assert not found.names
    assert "neither a report nor equal parameters" in found.how


@pytest.mark.parametrize("method", ["full", "blocks"])
def test_a_shallower_model_learns_from_its_teacher(method):
    model = chain(4)
    dense = copy.deepcopy(model)
    history = shrink_(model, rows(2), remove={"layers": [1]})
    report = recover_(model, dense, rows(), method=method, history=history, steps=24, learning_rate=0.003)
    assert report.best < report.start
    if method == "blocks":
        assert report.blocks == {"layers.0": "layers.1", "layers.1": "layers.2", "layers.2": "layers.3"}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.layer2 = nn.Sequential(Residual(8), Residual(8), Residual(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_a_convolutional_network_with_several_lists_of_blocks(method):
    model, dense = pair(ResNet)
    assert list(block_lists(model)) == ["layer1", "layer2"]
    batches = [torch.randn(4, 4, 8, 8, generator=generator(seed)) for seed in range(6)]
    report = recover_(model, dense, batches, method=method, steps=20, learning_rate=0.003)
    assert report.best < report.start
    if method == "blocks":
        names = [f"layer1.{i}" for i in range(2)] + [f"layer2.{i}" for i in range(3)]
        assert report.blocks == {name: name for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_and_a_decoder_of_unequal_depth(method):
    def make():
        config = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**config, num_decoder_layers=2))

    model, dense = pair(make)
    batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :4]} for batch in texts()]
    report = recover_(model, dense, batches, method=method, steps=20, learning_rate=0.001)
    assert report.best < report.start
    names = [f"encoder.block.{i}" for i in range(3)] + [f"decoder.block.{i}" for i in range(2)]
    assert report.blocks == {name: name for name in names}


def test_blocks_that_do_not_run_or_return_no_tensor():
    class Skips(Chain):
        """Its last block runs for large batches only."""

        def forward(self, x):
            for block in self.layers[: 3 if len(x) > 6 else 2]:
                x = block(x)
            return {"logits": self.head(x).unsqueeze(1)}

    class Wraps(Chain):
        def __init__(self):
            super().__init__()
            for block in self.layers:
                block.register_forward_hook(lambda module, args, output: {"state": output})

        def forward(self, x):
            for block in self.layers:
                x = block(x)["state"]
            return {"logits": self.head(x).unsqueeze(1)}

    model, dense = pair(Wraps)
    report = recover_(model, dense, rows(), **EASY)
    assert any("the blocks return no tensors" in note for note in report.notes)
    assert report.best < report.start
    mixed = [x if number % 2 else x[:4] for number, x in enumerate(rows())]
    model, dense = pair(lambda: Skips(3))
    report = recover_(model, dense, mixed, **EASY)
    assert report.best < report.start
    model, dense = pair(lambda: Skips(3))
    before = state(model)
    with pytest.raises(RecipeError, match=r"every block to run for every batch|do not run once"):
        recover_(model, dense, mixed, method="blocks", steps=6)
    assert_same(state(model), before)


# 7. What is kept of the teacher.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [llama, bert])
def test_it_makes_no_difference_where_the_teachers_outputs_are(make, method, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = []
    for keywords, note in (
        ({}, ""),
        ({"max_memory": 0}, "were kept on disk"),
        ({"max_memory": "3KB"}, "were kept on disk"),
        ({"keep_teacher_outputs": False}, ""),
    ):
        model, dense = pair(make)
        report = recover_(model, dense, texts(), method=method, **EASY, **keywords)
        assert (note in " ".join(report.notes)) if note else "on disk" not in " ".join(report.notes)
        assert not list(tmp_path.iterdir())
        found.append((report.start, report.best, state(model)))
    for start, best, values in found[1:]:
        assert (start, best) == found[0][:2]
        assert_same(values, found[0][2])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), _teacher.SafetensorError("I/O error")])
@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_does_not_stop_the_run(method, error, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, dense = pair(llama)
    recover_(model, dense, texts(), method=method, **EASY)
    expected = state(model)
    calls = []

    def save(kept, path):
        path.write_bytes(b"a part")
        calls.append(path)
        if len(calls) > 2:
            raise error
        path.unlink()
        save_file(kept, path)

    save_file = _teacher.save_file
    monkeypatch.setattr(_teacher, "save_file", save)
    model, dense = pair(llama)
    report = recover_(model, dense, texts(), method=method, max_memory=0, **EASY)
    assert any(f"the disk has no room for the teacher's outputs ({error})" in note for note in report.notes)
    assert_same(state(model), expected)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_file_is_removed_when_the_disk_is_full(tmp_path, monkeypatch):
    def save(kept, path):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_teacher, "save_file", save)
    outputs = TeacherOutputs(lambda index: {index: {"x": torch.ones(3)}}, 0, True, tmp_path)
    assert torch.equal(outputs[0]["x"], torch.ones(3))
    assert torch.equal(outputs[1]["x"], torch.ones(3))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_in_the_folder_of_temporary_files_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fails(*args):
        assert list(tmp_path.iterdir())
        raise ValueError("no")

    model, dense = pair()
    with pytest.raises(ValueError, match="no"):
        recover_(model, dense, rows(), progress=fails, max_memory=0, **EASY)
    assert not list(tmp_path.iterdir())


def test_a_loss_of_the_caller_gets_the_whole_output_of_the_teacher():
    seen = []

    def loss(ours, theirs, batch):
        assert type(ours) is type(theirs)
        assert theirs.keys() == ours.keys()
        seen.append(batch)
        return (ours.last_hidden_state - theirs.last_hidden_state.float()).square().mean()

    model, dense = pair(bert)
    report = recover_(model, dense, texts(), loss=loss, **EASY)
    assert report.loss == "loss()"
    assert report.best < report.start
    assert all(set(batch) == {"input_ids"} for batch in seen)


@pytest.mark.parametrize("method", ["full", "norms", "lora"])
def test_two_masks_of_one_shape_each_count_where_they_belong(method):
    left, right = mask("left"), mask("right")
    found = []
    for garbage in (5, 9):
        batches = [
            {
                "input_ids": batch["input_ids"].masked_fill(~right, garbage),
                "attention_mask": right.long(),
                "decoder_input_ids": batch["input_ids"].masked_fill(~left, garbage),
                "decoder_attention_mask": left.long(),
            }
            for batch in texts()
        ]
        model, dense = pair(t5)
        report = recover_(model, dense, batches, method=method, **EASY)
        assert report.best < report.start
        found.append((report.start, report.best))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
