"""A recovery that was killed goes on to the same bits; a state of another run, or a damaged one, is named."""

import json
import math
from contextlib import suppress

import pytest
import torch
from recover_cases import METHODS, OPTIMIZERS, Chain, Convolutions, assert_same, images, pair, rows, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import FormatError, RecipeError, recover_
from secateur.recovery import _checkpoint
from secateur.recovery._budget import Clock, Steps, WorkingTime
from secateur.recovery._checkpoint import Checkpoint
from secateur.recovery._settings import Settings
from secateur.recovery._train import Loop
from secateur.recovery._trained import OwnWeights

STEPS = 4


@pytest.fixture(autouse=True)
def _at_every_point(monkeypatch):
    """Write a state whenever there is one: otherwise short runs would write none before their end."""
    monkeypatch.setattr(_checkpoint, "_PATIENCE", 0)


class Terminated(KeyboardInterrupt):
    """As the command line raises it."""


class Killed:
    """Raises at the n-th report of progress."""

    def __init__(self, at, kind):
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.kind


def figures(report):
    """All of a report but its times."""
    table = report.to_dict()
    del table["seconds"]
    for point in table["curve"]:
        del point["seconds"]
    return table


def run(folder=None, make=Chain, dtype=torch.float32, progress=None, method="full", **keywords):
    model, dense = pair(make, dtype=dtype)
    batches = images() if make is Convolutions else rows(dtype=dtype)
    keywords = {"steps": STEPS, "seed": 1, "autocast": None} | keywords
    if "optimizer" not in keywords:
        keywords = {"learning_rate": 0.003} | keywords
    report = recover_(model, dense, batches, method=method, checkpoint=folder, progress=progress, **keywords)
    return report, state(model)


CASES = {
    **{method: {"method": method} for method in METHODS},
    **{name: {"optimizer": OPTIMIZERS[name]} for name in OPTIMIZERS},
    "lora and sgd": {"method": "lora", "optimizer": OPTIMIZERS["sgd"]},
    "blocks and sgd": {"method": "blocks", "optimizer": OPTIMIZERS["sgd"]},
    "bfloat16": {"dtype": torch.bfloat16},
    "lora in float16": {"dtype": torch.float16, "method": "lora"},
    "autocast float16": {"autocast": torch.float16},
    "autocast bfloat16": {"autocast": torch.bfloat16},
    "batch norms": {"make": Convolutions},
    "accumulate": {"accumulate": 3},
    "diverges": {"learning_rate": 1e6},
}


@pytest.mark.parametrize("kind", [ValueError, Terminated, KeyboardInterrupt])
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_killed_at_any_step_goes_on_to_the_same_bits(name, kind, tmp_path):
    whole, expected = run(**CASES[name])
    for at in range(1, STEPS + 1):
        folder = tmp_path / str(at)
        try:
            killed = Killed(at, kind)
            report, _ = run(folder, progress=killed, **CASES[name])
            assert report.interrupted == (killed.calls == at)
        except (ValueError, Terminated):
            assert kind is not KeyboardInterrupt
        again, values = run(folder, **CASES[name])
        assert_same(values, expected)
        assert figures(again) == figures(whole)
        steps = Killed(0, kind)
        finished, values = run(folder, progress=steps, **CASES[name])
        assert_same(values, expected)
        assert figures(finished) == figures(whole)
        assert not steps.calls, "a finished run makes no step"


def test_a_run_that_is_killed_at_each_step_in_turn(tmp_path):
    _, expected = run()
    made = []
    found = None
    for _ in range(20):
        steps = Killed(2, ValueError)
        with suppress(ValueError):
            found = run(tmp_path, progress=lambda text, done, total, steps=steps: made.append(text) or steps())
            break
    report, values = found
    assert_same(values, expected)
    assert report.steps == STEPS
    assert len(made) == 2 * STEPS - 1


def test_a_loss_that_is_not_finite_is_how_a_run_ends_for_good(tmp_path):
    def loss(ours, theirs, batch):
        value = (ours - theirs.float()).square().mean()
        return value * math.nan if torch.is_grad_enabled() else value

    first, values = run(tmp_path, loss=loss)
    again, other = run(tmp_path, loss=loss)
    assert first.stopped == again.stopped == "the loss is not finite"
    assert_same(values, other)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("seed", {"seed": 2}, r"seed \(1, now 2\)"),
        ("rate", {"learning_rate": 0.002}, r"learning_rate \(0.003, now 0.002\)"),
        ("steps", {"steps": 5}, r"steps \(4, now 5\)"),
        ("minutes", {"steps": None, "minutes": 3}, r"minutes \(None, now 3.0\)"),
        ("method", {"method": "norms"}, r"method \(full, now norms\)"),
        ("other file", {"method": "blocks"}, r"method \(full, now blocks\)"),
        ("accumulate", {"accumulate": 2}, r"accumulate \(1, now 2\)"),
        ("dtype", {"dtype": torch.bfloat16}, "batches.*model.*teacher"),
        ("loss", {"loss": "outputs"}, r"loss \(auto, now outputs\)"),
        ("clip", {"clip": 2.0}, r"clip \(1.0, now 2.0\)"),
        ("held out", {"held_out": 0.3}, r"held_out \(0.1, now 0.3\)"),
        ("autocast", {"autocast": torch.bfloat16}, r"autocast \(None, now bfloat16\)"),
    ],
)
def test_what_changed_is_named(name, change, text, tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pattern = rf"(?s)state of another run; what differs: .*{text}.*Give another folder as checkpoint=, or remove"
    with pytest.raises(RecipeError, match=pattern):
        run(tmp_path, **change)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["batches", "model", "teacher"])
def test_other_inputs_are_named(what, method, tmp_path):
    model, dense = pair()
    batches = rows()
    recover_(model, dense, batches, method=method, steps=STEPS, checkpoint=tmp_path)
    model, dense = pair()
    if what == "batches":
        batches[0] = batches[0] + 1
    else:
        {"model": model, "teacher": dense}[what].head.bias.data.add_(1)
    with pytest.raises(RecipeError, match=f"what differs: {what}[.]"):
        recover_(model, dense, batches, method=method, steps=STEPS, checkpoint=tmp_path)


@pytest.mark.parametrize(
    "other", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05), OPTIMIZERS["adamw"]]
)
def test_an_optimizer_that_differs_is_named_although_functions_have_no_names(other, tmp_path):
    run(tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
    with pytest.raises(RecipeError, match="what differs: optimizer"):
        run(tmp_path, optimizer=other)


# Damaged files.


def rewritten(path, table=None, drop=(), shape=None):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in drop:
        del tensors[name]
    if shape:
        tensors[shape] = torch.zeros(3)
    found = json.loads(metadata["secateur.recovery"])
    for name, value in (table or {}).items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    save_file(tensors, path, {"secateur.recovery": json.dumps(found)})


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "another file": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "no JSON": lambda path: save_file({}, path, {"secateur.recovery": "{"}),
    "a list": lambda path: save_file({}, path, {"secateur.recovery": "[]"}),
    "not a number": lambda path: save_file({}, path, {"secateur.recovery": '{"identity": {}, "seconds": NaN}'}),
    "no progress": lambda path: rewritten(path, {"progress": None}),
    "no seconds": lambda path: rewritten(path, {"seconds": None}),
    "no optimizer": lambda path: rewritten(path, {"optimizer": None}),
    "progress of another kind": lambda path: rewritten(path, {"progress": {"step": 1}}),
    "a curve of another kind": lambda path: rewritten(path, {"progress": {"curve": [{}]}}),
    "a weight is missing": lambda path: rewritten(path, drop=["leaf.0"]),
    "the best is missing": lambda path: rewritten(path, drop=["best.1"]),
    "another shape": lambda path: rewritten(path, shape="leaf.1"),
}


@pytest.mark.parametrize("method", ["full", "blocks"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused(name, method, tmp_path):
    with pytest.raises(ValueError, match="stop"):
        run(tmp_path, method=method, progress=lambda text, done, total: stop())
    run(tmp_path, method=method)
    path = tmp_path / ("recovery.safetensors" if method == "full" else "block.1.safetensors")
    DAMAGE[name](path)
    before = path.read_bytes()
    with pytest.raises(FormatError, match=rf"(?s){path}.*(damaged|not a readable safetensors|not the state of)"):
        run(tmp_path, method=method)
    assert path.read_bytes() == before
    path.unlink()
    _, values = run(tmp_path, method=method)
    assert_same(values, run(method=method)[1])


def stop():
    raise ValueError("stop")


def test_other_files_in_the_folder_do_no_harm(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    _, values = run(tmp_path)
    assert_same(values, run()[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors",
        "notes.txt",
        "recovery.safetensors",
    ]


def test_an_optimizer_whose_state_cannot_be_kept_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["history"] = [1, 2]

    with pytest.raises(
        RecipeError, match=r"the optimizer Odd keeps a list \(history\), which a checkpoint cannot hold"
    ):
        run(tmp_path, optimizer=lambda parameters: Odd(parameters, 0.1))
    run(optimizer=lambda parameters: Odd(parameters, 0.1))


# Working time, with a clock that tests set.


class Time:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Quadratic:
    """One weight that should be three; each batch takes a second, the held-out ones half of one."""

    train = range(5)
    measure = range(1)

    def __init__(self, time):
        torch.manual_seed(0)
        self.time, self.weight, self.steps = time, nn.Parameter(torch.tensor([1.0])), 0
        self.trained = OwnWeights([self.weight])

    def loss(self, index):
        self.time.now += 1.0
        self.steps += 1
        return (self.weight - 3).square().sum()

    def held_out(self):
        self.time.now += 0.5
        return float((self.weight.detach() - 3).square())


def trained(time, folder, end=60.0, at=0, before=0.0):
    """Train for a minute of working time; return what happened, the problem, and the clock."""
    clock = Clock(time)
    time.now += before
    problem = Quadratic(time)
    settings = Settings(minutes=end / 60, learning_rate=0.1)
    killed = Killed(at, ValueError)
    loop = Loop(settings, clock, torch.device("cpu"), killed)
    checkpoint = Checkpoint(folder, {"settings": "a"})
    progress = loop.run(problem, lambda now, measuring: WorkingTime(clock, now, end - measuring), checkpoint)
    return progress, problem, clock


@pytest.mark.parametrize("before", [0.0, 7.0])
def test_minutes_are_kept(before):
    time = Time()
    progress, problem, clock = trained(time, None, before=before)
    assert progress.stopped == "the budget is used"
    assert abs(clock.seconds - 60) <= 6
    assert problem.steps >= 0.8 * (60 - before)
    assert progress.best < 1e-2
    assert float((problem.weight.detach() - 3).square()) == pytest.approx(progress.best)


@pytest.mark.parametrize("pause", [0.0, 1e6])
@pytest.mark.parametrize("at", [1, 20, 40])
def test_a_pause_is_no_working_time(at, pause, tmp_path):
    whole, _, _ = trained(Time(), None)
    time = Time()
    with pytest.raises(ValueError, match=r"^$"):
        trained(time, tmp_path, at=at)
    time.now += pause
    progress, problem, clock = trained(time, tmp_path)
    assert progress.stopped == "the budget is used"
    assert abs(clock.seconds - 60) <= 6
    assert abs(progress.step - whole.step) <= 2
    assert problem.steps <= whole.step
    if at == 40:
        assert problem.steps < 0.6 * whole.step
    steps = [point.step for point in progress.curve]
    seconds = [point.seconds for point in progress.curve]
    assert steps == sorted(steps)
    assert seconds == sorted(seconds)


def test_held_out_passes_that_take_long_are_few():
    class Slow(Quadratic):
        def held_out(self):
            self.time.now += 10.0
            return super().held_out()

    time = Time()
    clock, problem = Clock(time), Slow(time)
    loop = Loop(Settings(minutes=5, learning_rate=0.1), clock, torch.device("cpu"), lambda *args: None)
    progress = loop.run(problem, lambda now, measuring: WorkingTime(clock, now, 300 - measuring), Checkpoint(None, {}))
    assert 2 <= len(progress.curve) <= 5
    assert abs(clock.seconds - 300) <= 30


@pytest.mark.parametrize("total", [1, 3, 40])
def test_steps_are_all_made(total):
    problem = Quadratic(Time())
    loop = Loop(Settings(steps=total, learning_rate=0.1), Clock(problem.time), torch.device("cpu"), lambda *args: None)
    progress = loop.run(problem, lambda now, measuring: Steps(total), Checkpoint(None, {}))
    assert progress.step == problem.steps == total
    assert progress.best < 4
