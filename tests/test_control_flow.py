"""Models that decide by their data what to run: calibrated as by the full computation, whatever the rehearsal saw."""

import pytest
import torch
from calibration_cases import CASES, Block, Chain, assert_stages_equal_the_slow_truth, run, vectors

from secateur.calibration import gather, quiet, replayed
from secateur.calibration._stages import find_stages
from secateur.layers import select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scaled(*factors, width=8, rows=4):
    """Batches that differ in size of values, and so in what the models below decide."""
    generator = torch.Generator().manual_seed(1)  # they are made when the module is imported
    return [factor * torch.randn(rows, width, dtype=torch.float64, generator=generator) for factor in factors]


class EarlyExit(Chain):
    """Ends as soon as it is confident."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if x.abs().mean() > 2.5:
                break
        return x


class Patience(Chain):
    """Ends when two blocks after one another agree: it looks at the output of the block before the last one."""

    def forward(self, x):
        last = None
        for block in self.blocks:
            x = block(x)
            guess = x.sum(0).argmax()
            if last is not None and bool(guess == last) and x[0, 0] > 0:
                break
            last = guess
        return x


class ComparedToTheFirst(Chain):
    """Ends when the mean moves on in the direction of the first block's."""

    def forward(self, x):
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
            if (first.mean() * (x - first).mean()).item() > 0:
                break
        return x


class SkipsABlock(Chain):
    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index in (1, 2) and float(x.mean()) > 0:
                continue
            x = block(x)
        return x


class UntilConvergence(Chain):
    """Repeats each block until its output hardly changes."""

    def forward(self, x):
        for block in self.blocks:
            for _ in range(5):
                before, x = x, 0.5 * block(x)
                if (x - before).abs().max().tolist() < 1.0:
                    break
        return x


class RoundsUntilSmall(Chain):
    """Repeats all blocks, one round after the other."""

    def forward(self, x):
        for _ in range(4):
            x = 0.6 * super().forward(x)
            if not (x.abs() > 2).any():
                break
        return x


class DepthByToken(Chain):
    """Each token goes as deep as it needs; the blocks see fewer and fewer."""

    def forward(self, x):
        active = torch.ones(len(x), dtype=torch.bool)
        for block in self.blocks:
            x = x.clone()
            x[active] = block(x[active])
            active = active & (x.abs().mean(-1) < 1.2)
            if not active.any():
                break
        return x


class FewerRows(Chain):
    """No number of Python's decides, but the size of a tensor."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if len(x[x.mean(-1) > 0]) > 1:
                break
        return x


class ThroughNumpy(Chain):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if x.numpy().mean() > 0.1:
                break
        return x


class DoneBlock(Block):
    def forward(self, x):
        x = super().forward(x)
        return x, bool(x.mean() > 0.1)


class BlockSaysDone(Chain):
    """A block decides itself, and says so in a plain value."""

    def __init__(self):
        super().__init__(block=DoneBlock)

    def forward(self, x):
        for block in self.blocks:
            x, done = block(x)
            if done:
                break
        return x


class BlockSaysAgain(Chain):
    def __init__(self):
        super().__init__(block=DoneBlock)

    def forward(self, x):
        for block in self.blocks:
            x, again = block(x)
            if again:
                x, _ = block(x)
        return x


class SkipByShape(Chain):
    """Short batches skip a block; that nothing but their shape says so, no look at values shows."""

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index != 2 or len(x) > 3:
                x = block(x)
        return x


class RoundsByShape(Chain):
    def forward(self, x):
        for row in x.split(2):
            x = super().forward(row)
        return x


MODELS = {
    "early_exit": (EarlyExit, scaled(0.5, 4, 1, 2.7, 0.1)),
    "early_exit_first": (EarlyExit, scaled(4, 0.5, 2.7, 1, 0.1)),
    "patience": (Patience, scaled(1, 1, 1, 1, 1, 1)),
    "compared_to_the_first": (ComparedToTheFirst, scaled(1, 1, 1, 1, 1, 1)),
    "skips_a_block": (SkipsABlock, scaled(1, 1, 1, 1)),
    "until_convergence": (UntilConvergence, scaled(0.1, 1, 5)),
    "rounds_until_small": (RoundsUntilSmall, scaled(0.1, 1, 5)),
    "depth_by_token": (DepthByToken, scaled(1, 1.3, 0.5, 4)),
    "fewer_rows": (FewerRows, scaled(1, 1, 1, 1, 1, 1)),
    "through_numpy": (ThroughNumpy, scaled(1, 1, 1, 1)),
    "block_says_done": (BlockSaysDone, scaled(1, 1, 1, 1, 1)),
    "block_says_again": (BlockSaysAgain, scaled(1, 1, 1, 1, 1)),
    "skip_by_shape": (SkipByShape, [x[:rows] for x, rows in zip(scaled(1, 1, 1), (4, 3, 4), strict=True)]),
    "rounds_by_shape": (RoundsByShape, [x[:rows] for x, rows in zip(scaled(1, 1, 1), (2, 4, 3), strict=True)]),
}


def routes(model, batches):
    """Which blocks each batch runs, in order, counted by hooks on them."""
    found, handles = [], []
    for index, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: found[-1].append(index)))
    with torch.no_grad():
        for batch in batches:
            found.append([])
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {tuple(route) for route in found}


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_batches_of_different_routes_teach_what_the_full_computation_teaches(name, first):
    kind, batches = MODELS[name]
    batches = batches[first:] + batches[:first]  # another one is rehearsed
    model = kind().double()
    taken = routes(model, batches)
    assert len(taken) > 1, "the batches do not differ"
    assert {block for route in taken for block in route} == {0, 1, 2, 3}
    assert_stages_equal_the_slow_truth(model, batches)


def source_of(model, batches):
    layers, _ = select_layers(model)
    with quiet(model):
        source = replayed(model, batches, layers)
        for index in range(len(source.stages)):
            gather(source, index, {"input_norm"})
    return source


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("early_exit", "in full (5 of 5 batches: the model decides by its data what to run)"),
        (
            "skip_by_shape",
            "with replay, but for some batches (1 of 3 batches: they take another route than the rehearsal)",
        ),
        ("rounds_by_shape", "in full (3 of 3 batches: its blocks do not run once each, one after the other)"),
    ],
)
def test_how_the_batches_were_run_is_told(name, text):
    kind, batches = MODELS[name]
    assert source_of(kind().double(), batches).mode == f"sequential {text}"


def test_ordinary_models_do_not_decide_by_their_data():
    for name in ("llama", "bert", "gpt2", "in_place", "mixture"):
        model, batches, _ = CASES[name]()
        assert source_of(model, batches).mode == "sequential with replay", name
    model, batches, _ = CASES["mlp"]()
    assert source_of(model, batches).mode == "one pass"
    layers, _ = select_layers(model)
    assert replayed(model, batches, layers, sequential=False).mode == "one pass"


class Counted(Block):
    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


class Mixed(Chain):
    """Batches of one kind skip a block; that is known beforehand, because their structure says so."""

    def __init__(self):
        super().__init__(count=6, block=Counted)

    def forward(self, x, short=False):
        for block in self.blocks[:2] if short else self.blocks:
            x = block(x)
        return x


def test_a_kind_of_batch_that_cannot_be_replayed_does_not_slow_down_the_others(monkeypatch):
    batches = [*vectors(6), {"x": vectors(1)[0], "short": True}]
    assert_stages_equal_the_slow_truth(Mixed().double(), batches)
    monkeypatch.setattr(Counted, "runs", 0)
    source_of(Mixed().double(), batches)
    assert Counted.runs <= 6 * (2 * 6 + 4) + 2 * 8


def test_the_largest_batch_of_a_structure_is_rehearsed():
    model, seen = Chain().double(), []
    batches = [torch.randn(rows, 8, dtype=torch.float64) for rows in (2, 5, 3)]
    layers, _ = select_layers(model)
    with quiet(model):
        find_stages(model, layers, batches, lambda model, batch: (seen.append(len(batch)), model(batch)))
    assert seen == [5]


class SpeakingBlock(Block):
    def forward(self, x):
        return super().forward(x), False


class Tail(Chain):
    """What comes after the last block fails on values that were not computed."""

    def __init__(self):
        super().__init__(block=SpeakingBlock)

    def forward(self, x):
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1])[0])
        return [torch.linalg.eigvalsh(y @ y.T) for y in outputs]


def test_code_behind_the_last_block_may_fail_on_what_was_not_computed():
    batches = vectors(3)
    assert_stages_equal_the_slow_truth(Tail().double(), batches)
    assert all(route.skips for route in source_of(Tail().double(), batches)._routes)


class Ends(Chain):
    def forward(self, x):
        x = super().forward(x)
        self.ended += 1
        return x


def test_a_model_whose_blocks_return_nothing_but_tensors_is_not_run_to_its_end():
    model = Ends().double()
    model.ended = 0
    source_of(model, vectors(5))
    assert model.ended == 1  # to see which blocks run


class Failing(Block):
    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_model_itself_is_not_taken_for_another_route(error):
    model = Chain(3, Failing).double()
    layers, _ = select_layers(model)
    with quiet(model):
        source = replayed(model, vectors(6), layers)
        gather(source, 0, {"input_norm"})
        model.blocks[1].error = error
        with pytest.raises(type(error)) as raised:
            gather(source, 1, {"input_norm"})
    assert raised.value is error
