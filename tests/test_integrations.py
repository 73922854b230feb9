"""The callbacks for other people's Trainers."""

import dataclasses
import importlib
import math
import shutil
import sys

import pytest
import torch
from torch import nn

import secateur
from secateur.nn import sparse_layers
from secateur.schedules import OneShot
from secateur.training import RigL

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pl = pytest.importorskip("lightning.pytorch")

from secateur.integrations import lightning as for_lightning  # noqa: E402
from secateur.integrations import read_state, write_state  # noqa: E402
from secateur.integrations import transformers as for_transformers  # noqa: E402
from secateur.integrations._shared import begin  # noqa: E402

STATE = "sparse_training.safetensors"
STEPS, ACCUMULATE, BATCH = 12, 2, 4  # of 32 examples: 4 steps an epoch

# Lightning 2.6 asks torch 2.13 about trees in a way that is going away, and warns of few workers and of the checkpoints
# that we resume from.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

# Random first masks tell whether resuming draws them anew. Updates fall on the step after the checkpoints at 5 and 8.
SETTINGS = {
    "gate": {"method": "gate", "sparsity": 0.75},
    "magnitude": {"method": "magnitude", "sparsity": 0.75, "update_every": 3},
    "rigl": {"method": RigL(initial="random"), "sparsity": 0.75, "update_every": 3},
    "sr-ste": {"method": "sr-ste", "pattern": "2:4"},
}
PRUNED = {name: 544 if name == "sr-ste" else 816 for name in SETTINGS}  # of 16 * 32 + 32 * 16 + 16 * 4


@pytest.fixture(params=SETTINGS)
def name(request):
    return request.param


class Net(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Dropout(dropout), nn.Linear(16, 4)
        )

    def forward(self, x, labels=None):
        y = self.layers(x)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def examples():
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(16, generator=generator), "labels": torch.randn(4, generator=generator)} for _ in range(32)
    ]


def weights(model):
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]


def zeros(model):
    return sum(int((weight == 0).sum()) for weight in weights(model))


def assert_same(model, other):
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs[key]), key


def assert_finished(model, callback, name):
    assert not sparse_layers(model)
    assert {type(m) for m in model.modules() if hasattr(m, "weight")} == {nn.Linear}
    assert zeros(model) == callback.report.num_pruned == PRUNED[name]
    assert callback.report.recipe["steps"] == STEPS
    assert callback.training.step_count == STEPS
    assert not any(layer.notes for layer in callback.report.layers)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


# transformers


def trainer_for(folder, callback, *, seed=0, model=None, callbacks=(), **options):
    torch.manual_seed(seed)
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "save_steps": 5,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(str(folder), **(defaults | options))
    data = examples()
    return transformers.Trainer(
        model or Net(), args, train_dataset=data, eval_dataset=data[:8], callbacks=[callback, *callbacks]
    )


def hf(folder, settings, *, resume=None, **options):
    callback = for_transformers.SparseTrainingCallback(**settings)
    trainer = trainer_for(folder, callback, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_transformers_trains_and_resumes_bit_for_bit(tmp_path, name):
    trainer, callback = hf(tmp_path, SETTINGS[name])
    assert_finished(trainer.model, callback, name)
    assert type(callback.training.optimizer) is torch.optim.AdamW  # not accelerate's wrapper of it
    trainer.save_model(str(tmp_path / "final"))
    plain = Net()
    saved = importlib.import_module("safetensors.torch").load_file(tmp_path / "final" / "model.safetensors")
    plain.load_state_dict(saved)  # strict: nothing of ours is in there
    assert_same(plain, trainer.model)

    five = str(tmp_path / "checkpoint-5")
    resumed, again = hf(tmp_path, SETTINGS[name], resume=five, seed=1)  # other weights, if they were not loaded
    assert_finished(resumed.model, again, name)
    assert_same(resumed.model, trainer.model)


def test_transformers_resumes_on_a_frozen_mask(tmp_path):
    trainer, _ = hf(tmp_path, SETTINGS["gate"])
    assert read_state(tmp_path / "checkpoint-10" / STATE)["weights"]["layers.0"]["mask"] is not None
    resumed, _ = hf(tmp_path, SETTINGS["gate"], resume=str(tmp_path / "checkpoint-10"), seed=1)
    assert_same(resumed.model, trainer.model)


def test_transformers_resumes_without_swapped_layers(tmp_path):
    """A callback that is added later, or a model from model_init, is plain when the checkpoint is loaded."""
    trainer, _ = hf(tmp_path, SETTINGS["gate"])
    callback = for_transformers.SparseTrainingCallback(**SETTINGS["gate"])
    late = trainer_for(tmp_path, transformers.TrainerCallback(), seed=1)
    late.add_callback(callback)
    late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_finished(late.model, callback, "gate")
    assert_same(late.model, trainer.model)


def test_transformers_finds_a_checkpoint_elsewhere(tmp_path):
    trainer, _ = hf(tmp_path / "a", SETTINGS["rigl"])
    moved = shutil.move(tmp_path / "a" / "checkpoint-5", tmp_path / "moved")
    with pytest.raises(
        secateur.FormatError, match=r"checkpoint-5 has no sparse_training\.safetensors.*\n.*checkpoint="
    ):
        hf(tmp_path / "b", SETTINGS["rigl"], resume=moved)
    resumed, _ = hf(tmp_path / "b", SETTINGS["rigl"] | {"checkpoint": moved}, resume=moved)
    assert_same(resumed.model, trainer.model)
    told, _ = hf(tmp_path / "b", SETTINGS["rigl"], resume=moved, resume_from_checkpoint=moved)
    assert_same(told.model, trainer.model)


def test_transformers_bf16(tmp_path):
    trainer, callback = hf(tmp_path, SETTINGS["gate"], bf16=True, save_strategy="no")
    assert_finished(trainer.model, callback, "gate")


def test_transformers_layers_compute_the_same_until_training_begins(tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 16)
    expected = model(x)["logits"]
    trainer = trainer_for(tmp_path, for_transformers.SparseTrainingCallback(**SETTINGS["gate"]), model=model)
    assert len(sparse_layers(trainer.model)) == 3
    torch.testing.assert_close(trainer.model(x)["logits"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gate", "magnitude"])
def test_transformers_best_model_brings_its_masks(tmp_path, name):
    # The highest loss is called the best, so that it is that of the first checkpoint.
    options = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_strategy": "steps"}
    trainer, callback = hf(tmp_path, SETTINGS[name], load_best_model_at_end=True, eval_steps=5, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert zeros(trainer.model) == callback.report.num_pruned == PRUNED[name]
    assert "finalized at step 5 of 12" in callback.report.layers[0].notes[0]
    best = importlib.import_module("safetensors.torch").load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    for layer, weight in zip((0, 2, 4), weights(trainer.model), strict=True):
        assert torch.equal(weight[weight != 0], best[f"layers.{layer}.weight"][weight != 0])


class Average(transformers.TrainerCallback):
    """An average of weights that is written to the model when training ends."""

    def on_train_end(self, args, state, control, *, model, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)


def test_transformers_says_that_a_later_callback_wrote_over_the_zeros(tmp_path):
    callback = for_transformers.SparseTrainingCallback(**SETTINGS["magnitude"])
    trainer = trainer_for(tmp_path, callback, callbacks=[Average()], save_strategy="no")
    trainer.train()
    assert zeros(trainer.model) == 0
    with pytest.warns(UserWarning, match=r"zeros were lost in 3 parameters:\n(.|\n)*apply_masks_"):
        trainer.evaluate()
    with pytest.raises(secateur.PatternError, match="zeros were lost"):
        callback.report.verify(trainer.model)
    secateur.apply_masks_(trainer.model, callback.report)
    trainer.evaluate()
    assert zeros(trainer.model) == PRUNED["magnitude"]


def test_transformers_prunes_what_an_earlier_callback_wrote(tmp_path, name):
    callback = for_transformers.SparseTrainingCallback(**SETTINGS[name])
    trainer = trainer_for(tmp_path, Average(), callbacks=[callback], save_strategy="no")
    trainer.train()
    assert zeros(trainer.model) == callback.report.num_pruned == PRUNED[name]
    assert callback.report.verify(trainer.model).by_masks
    trainer.evaluate()


class Bilinear(Net):
    """A weight that no method reaches, larger than all that are."""

    def __init__(self):
        super().__init__()
        self.left = nn.Bilinear(16, 16, 16)


@pytest.mark.parametrize("name", ["gate", "magnitude"])
def test_callbacks_tell_what_was_left_alone(tmp_path, caplog, name):
    caplog.set_level("INFO", logger="secateur")
    _, callback = hf(tmp_path, SETTINGS[name], model=Bilinear(), save_strategy="no")
    (warning,) = callback.report.warnings
    assert "4,096 in 1 Bilinear (Bilinear is no known kind of layer" in warning
    assert [record.levelname for record in caplog.records if record.name == "secateur"] == ["INFO", "WARNING"]
    assert "of the model's 5,252 weights are zero now; 20.72% were considered" in caplog.text


class Interrupt(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["gate", "rigl"])
def test_transformers_goes_on_in_the_same_process(tmp_path, name):
    uninterrupted, _ = hf(tmp_path / "a", SETTINGS[name])
    callback = for_transformers.SparseTrainingCallback(**SETTINGS[name])
    trainer = trainer_for(tmp_path / "b", callback, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train(resume_from_checkpoint=True)
    assert_finished(trainer.model, callback, name)
    assert_same(trainer.model, uninterrupted.model)


def test_transformers_trains_twice(tmp_path):
    callback = for_transformers.SparseTrainingCallback(**SETTINGS["gate"])
    trainer = trainer_for(tmp_path, callback, save_strategy="no")
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report is not first
    assert_finished(trainer.model, callback, "gate")


def test_transformers_own_steps(tmp_path):
    _, callback = hf(tmp_path, SETTINGS["magnitude"] | {"steps": 9}, save_strategy="no")
    assert callback.report.recipe["steps"] == 9
    assert callback.training.step_count == STEPS


@pytest.mark.parametrize("name", ["gate", "magnitude"])
def test_transformers_masks_of_another_run(tmp_path, name):
    hf(tmp_path / "a", SETTINGS[name])
    hf(tmp_path / "b", SETTINGS[name], seed=1)
    ten = str(tmp_path / "a" / "checkpoint-10")
    shutil.copy(tmp_path / "b" / "checkpoint-10" / STATE, tmp_path / "a" / "checkpoint-10" / STATE)
    with pytest.raises(secateur.RecipeError, match=r"layers\.0: the masks in .* are not those of the weights"):
        hf(tmp_path / "a", SETTINGS[name], resume=ten)
    shutil.copy(tmp_path / "b" / "checkpoint-5" / STATE, tmp_path / "a" / "checkpoint-10" / STATE)
    with pytest.raises(secateur.RecipeError, match=r"is of step 5, but the Trainer resumes at step 10"):
        hf(tmp_path / "a", SETTINGS[name], resume=ten)


def test_transformers_another_recipe(tmp_path):
    hf(tmp_path, SETTINGS["magnitude"])
    with pytest.raises(secateur.RecipeError, match=r"another recipe:\n  sparsity: saved 0\.75, here 0\.5"):
        hf(tmp_path, SETTINGS["magnitude"] | {"sparsity": 0.5}, resume=True)


def test_transformers_no_layer_changes_nothing(tmp_path):
    model = Net()
    callback = for_transformers.SparseTrainingCallback(sparsity=0.5, include=("nothing",))
    with pytest.raises(secateur.RecipeError, match="nothing"):
        trainer_for(tmp_path, callback, model=model)
    assert not sparse_layers(model)


# Lightning


class Lit(pl.LightningModule):
    def __init__(self, late=False):
        super().__init__()
        self.net = None if late else Net(dropout=0.0)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer)]

    def training_step(self, batch, index):
        return self.net(**batch)["loss"]

    def validation_step(self, batch, index):
        self.net(**batch)


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        if index % ACCUMULATE == 0:
            optimizer.zero_grad()
        self.manual_backward(self.net(**batch)["loss"] / ACCUMULATE)
        if index % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        layers = self.net.layers
        return [torch.optim.SGD(layers[0].parameters(), lr=0.01), torch.optim.SGD(layers[2:].parameters(), lr=0.01)]

    def training_step(self, batch, index):
        self.manual_backward(self.net(**batch)["loss"])
        if index % ACCUMULATE == ACCUMULATE - 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


class Late(Lit):
    def __init__(self):
        super().__init__(late=True)

    def configure_model(self):
        if self.net is None:
            self.net = Net(dropout=0.0)
            secateur.sparsify_(self, pattern="unstructured", sparsity=0.75)


def fit(settings, *, folder=None, kind=Lit, module=None, seed=0, ckpt_path=None, callbacks=(), **options):
    callback = for_lightning.SparseTrainingCallback(**settings) if isinstance(settings, dict) else settings
    checkpoints = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    torch.manual_seed(seed)
    module = module or kind()
    defaults = {"max_steps": STEPS, "accelerator": "cpu"}
    if module.automatic_optimization:
        defaults |= {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": 1.0}
    trainer = pl.Trainer(
        callbacks=[each for each in (callback, folder and checkpoints, *callbacks) if each is not None],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=folder is not None,
        **(defaults | options),
    )
    loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return module, callback, trainer


def test_lightning_trains_and_resumes_bit_for_bit(tmp_path, name):
    module, callback, trainer = fit(SETTINGS[name], folder=tmp_path)
    assert_finished(module.net, callback, name)
    assert not callback.training.optimizer._optimizer_step_post_hooks
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert_same(Lit.load_from_checkpoint(tmp_path / "final.ckpt", weights_only=True), module)

    resumed, again, _ = fit(SETTINGS[name], seed=1, folder=tmp_path, ckpt_path=tmp_path / "step=8.ckpt")
    assert_finished(resumed.net, again, name)
    assert_same(resumed, module)


@pytest.mark.parametrize("name", ["gate", "rigl"])
def test_lightning_manual_optimization(name):
    module, callback, _ = fit(SETTINGS[name] | {"steps": STEPS}, kind=Manual)
    assert_finished(module.net, callback, name)


def test_lightning_finds_the_optimizer_of_the_layers():
    module, callback, _ = fit(
        {"method": "rigl", "sparsity": 0.5, "steps": 6, "include": ("net.layers.2", "net.layers.4")}, kind=TwoOptimizers
    )
    assert [int((weight == 0).sum()) for weight in weights(module)] == [0, 256, 32]
    assert callback.training.step_count == 6  # the Trainer counts the steps of both optimizers
    with pytest.raises(secateur.RecipeError, match="not among the optimizer's 2 parameters"):
        fit({"method": "rigl", "sparsity": 0.5, "steps": 6}, kind=TwoOptimizers)


def test_lightning_model_built_late(tmp_path):
    module, callback, _ = fit(SETTINGS["gate"], folder=tmp_path, kind=Late)
    assert_finished(module.net, callback, "gate")
    resumed, _, _ = fit(SETTINGS["gate"], kind=Late, folder=tmp_path, ckpt_path=tmp_path / "step=8.ckpt")
    assert_same(resumed, module)


def test_lightning_bf16():
    module, callback, _ = fit(SETTINGS["gate"], precision="bf16-mixed")
    assert_finished(module.net, callback, "gate")


def test_lightning_epochs_make_the_steps():
    module, callback, _ = fit(SETTINGS["gate"], max_steps=-1, max_epochs=3)
    assert_finished(module.net, callback, "gate")


def test_lightning_without_a_known_number_of_steps():
    with pytest.raises(secateur.RecipeError, match=r"the Trainer expects inf optimizer steps.*steps="):
        fit(SETTINGS["gate"], max_steps=-1, max_epochs=-1)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 7:
            raise RuntimeError("stop")


def test_lightning_goes_on_in_the_same_process(tmp_path):
    uninterrupted, _, _ = fit(SETTINGS["rigl"])
    callback, module = for_lightning.SparseTrainingCallback(**SETTINGS["rigl"]), Lit()
    module.load_state_dict(initial_state())
    with pytest.raises(RuntimeError, match="stop"):
        fit(callback, folder=tmp_path, module=module, callbacks=[Stop()])
    fit(callback, folder=tmp_path, module=module, ckpt_path=tmp_path / "step=4.ckpt")
    assert_finished(module.net, callback, "rigl")
    assert_same(module, uninterrupted)


def initial_state():
    torch.manual_seed(0)
    return Lit().state_dict()


def test_lightning_checkpoint_without_state(tmp_path):
    fit(None, folder=tmp_path)
    with pytest.raises(secateur.FormatError, match=r"step=4\.ckpt has no state of a SparseTraining.*\n.*ckpt_path"):
        fit(SETTINGS["magnitude"], folder=tmp_path, ckpt_path=tmp_path / "step=4.ckpt")


def test_lightning_another_recipe(tmp_path):
    fit(SETTINGS["magnitude"], folder=tmp_path)
    with pytest.raises(secateur.RecipeError, match="another recipe:\n  update_every: saved 3, here 4"):
        fit(SETTINGS["magnitude"] | {"update_every": 4}, folder=tmp_path, ckpt_path=tmp_path / "step=4.ckpt")


# What they share


@pytest.fixture(params=[for_transformers, for_lightning], ids=["transformers", "lightning"])
def make(request):
    return request.param.SparseTrainingCallback


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"method": "gates"}, secateur.RecipeError, "did you mean 'gate'"),
        ({"method": 3}, TypeError, "method must be a Method or its name, got int"),
        ({"pattern": "2:x"}, secateur.PatternError, "'2:x'"),
        ({"pattern": 3}, TypeError, "pattern must be"),
        ({"sparsity": 1.5}, secateur.PatternError, "between 0 and 1"),
        ({"schedule": OneShot(0.5), "sparsity": 90}, secateur.PatternError, "Did you mean 0.9"),
        ({"steps": 0}, secateur.RecipeError, "steps must be at least 1, got 0"),
        ({"steps": math.inf}, TypeError, "steps must be an int, got float"),
        ({"steps": "many"}, TypeError, "steps must be an int, got str"),
    ],
)
def test_bad_settings_are_refused_at_once(make, settings, error, match):
    with pytest.raises(error, match=match):
        make(**settings)


@pytest.mark.parametrize(("package", "extra"), [("transformers", "trainer"), ("lightning", "lightning")])
def test_without_the_package_the_import_names_the_extra(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, "lightning.pytorch" if package == "lightning" else package, None)
    monkeypatch.delitem(sys.modules, f"secateur.integrations.{package}")
    with pytest.raises(ImportError, match=rf"needs {package}.*pip install 'secateur\[{extra}\]'"):
        importlib.import_module(f"secateur.integrations.{package}")


def test_state_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = secateur.SparseTraining(model, optimizer, sparsity=0.5, steps=7)
    state = training.state_dict()
    write_state(tmp_path / STATE, state)
    assert [entry.name for entry in tmp_path.iterdir()] == [STATE]
    again = read_state(tmp_path / STATE)
    assert again["recipe"] == state["recipe"]
    assert again["step"] == state["step"]
    assert torch.equal(again["generator"], state["generator"])
    assert list(again["weights"]) == list(state["weights"])
    for name, entry in state["weights"].items():
        assert again["weights"][name].keys() == entry.keys()
        assert torch.equal(again["weights"][name].pop("threshold"), entry.pop("threshold"))
        assert again["weights"][name] == entry


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "no safetensors":
        path.write_bytes(b"nothing of the kind")
    elif how == "other tensors":
        importlib.import_module("safetensors.torch").save_file({"a": torch.ones(1)}, path)
    elif how == "no JSON":
        importlib.import_module("safetensors.torch").save_file({}, path, metadata={"secateur.SparseTraining": "{"})
    elif how == "a tensor that is not there":
        header = '{"items": [["mask", {"tensor": "gone"}]]}'
        importlib.import_module("safetensors.torch").save_file({}, path, metadata={"secateur.SparseTraining": header})
    else:
        state = read_state(path)
        if how == "no weights":
            del state["weights"]
        elif how == "no mask":
            del state["weights"]["layers.0"]["mask"]
        else:
            state["weights"]["layers.0"]["mask"] = torch.ones(32, 16)  # a float mask
        write_state(path, state)


SPOILT = {
    "truncated": "not a readable safetensors file",
    "no safetensors": "not a readable safetensors file",
    "other tensors": "not the state of a sparse training",
    "no JSON": "not the state of a sparse training",
    "a tensor that is not there": "not the state of a sparse training",
    "no weights": "is incomplete",
    "no mask": r"layer 'layers\.0' is incomplete",
    "float mask": r"layer 'layers\.0' is not a bool tensor",
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_states_are_refused(tmp_path, how):
    model, path = Net(), tmp_path / STATE
    callback = for_transformers.SparseTrainingCallback(**SETTINGS["magnitude"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = dataclasses.replace(callback._settings, steps=STEPS)
    write_state(path, begin(model, optimizer, settings).state_dict())
    begin(model, optimizer, settings, state=read_state(path))  # unspoilt
    spoil(path, how)
    with pytest.raises(secateur.FormatError, match=SPOILT[how]):
        begin(model, optimizer, settings, state=read_state(path), source=str(path))


AVERAGES = {
    "swa": lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "ema": lambda: pl.callbacks.EMAWeightAveraging(decay=0.5),
}


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize(("average", "name"), [("swa", "gate"), ("swa", "magnitude"), ("ema", "magnitude")])
def test_lightning_prunes_what_an_average_leaves(average, name, first, tmp_path):
    """StochasticWeightAveraging wrote over the zeros: the report said 0.75 and the model had none."""
    callback, other = for_lightning.SparseTrainingCallback(**SETTINGS[name]), AVERAGES[average]()
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    listed = [saver, callback, other] if first else [other, callback, saver]
    torch.manual_seed(0)
    module = Lit()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=listed, accelerator="cpu", max_epochs=3, **quiet)
    loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH)
    trainer.fit(module, loader, loader)
    assert trainer.callbacks == [other, callback, saver]
    assert zeros(module.net) == callback.report.num_pruned == PRUNED[name]
    assert callback.report.verify(module).by_masks


class WritesAtTheEnd(Lit):
    def on_train_end(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(1)


@pytest.mark.parametrize("name", ["gate", "magnitude"])
def test_lightning_mends_the_model_that_it_leaves(name):
    with pytest.warns(
        UserWarning, match=r"816 pruned weights of 3 parameters, 'net\.layers\.0\.weight' first, were changed"
    ):
        module, callback, _ = fit(SETTINGS[name], kind=WritesAtTheEnd)
    assert zeros(module.net) == PRUNED[name]
    assert callback.report.verify(module).by_masks
