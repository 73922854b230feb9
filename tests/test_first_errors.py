"""What new users bring first: batches of every origin, and things that are no model. Served, or one sentence."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from tiny import with_tokenizer
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, Dataset, TensorDataset

import secateur
from secateur import RecipeError, StatisticsError, prune_
from secateur._errors import KernelError
from secateur.calibration import hash_batches


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12)


def pruned_by(batches, **options):
    model = made()
    report = prune_(model, batches, method="wanda", sparsity=0.5, **options)
    return model.state_dict(), report


class Labelled(nn.Module):
    """Takes one input by a name, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layers = made()

    def forward(self, input_values, scale=1.0):
        return self.layers(input_values * scale)


class Pairs(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"input": X[index], "label": Y[index]}


# Batches, and what was ignored in them. All calibrate on X.
SERVED = {
    "a loader of (x, y)": (lambda: DataLoader(TensorDataset(X, Y), 4), "the second item of each batch"),
    "tuples (x, y)": (lambda: [(X, Y)], "the second item of each batch"),
    "a loader of dicts with a label": (lambda: DataLoader(Pairs(), 4), "'label' of each batch"),
    "a loader of (x,)": (lambda: DataLoader(TensorDataset(X), 4), ""),
    "numpy, float32": (lambda: [X.numpy()], ""),
    "numpy, float64": (lambda: [X.numpy().astype(np.float64)], ""),
    "numpy in a tuple with a label": (lambda: [(X.numpy(), Y.numpy())], "the second item of each batch"),
    "numpy in a dict": (lambda: [{"input": X.numpy()}], ""),
    "numpy that is not writable": (lambda: [np.broadcast_to(X.numpy(), X.shape)], ""),
    "rows of an array": (lambda: list(X.numpy().reshape(3, 4, 8)), ""),
}


@pytest.mark.parametrize("kind", SERVED)
def test_batches_whose_meaning_is_clear_are_served(kind):
    make, ignored = SERVED[kind]
    expected, plain = pruned_by([X])
    found, report = pruned_by(make())
    torch.testing.assert_close(found, expected)
    assert {layer.tokens for layer in report.layers} == {layer.tokens for layer in plain.layers} == {12}
    assert report.calibration.get("ignored", "").startswith(ignored)
    assert bool(report.calibration) == bool(ignored)
    assert secateur.Report.from_json(report.to_json()) == report


def test_the_hash_is_of_what_the_model_reads():
    assert pruned_by([(X, Y)])[1].calibration_hash == hash_batches([(X,)])


def test_a_compiled_or_wrapped_model_is_asked_inside():
    class Wrapper(nn.DataParallel):
        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    report = prune_(Wrapper(made()), [(X, Y)], method="wanda", sparsity=0.5)
    assert "second item" in report.calibration["ignored"]


def test_a_model_with_two_inputs_gets_both():
    model = Labelled()
    prune_(model, [(X, 2.0)], method="wanda", sparsity=0.5)
    other = Labelled()
    prune_(other, [2 * X], method="wanda", sparsity=0.5)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_a_key_that_the_model_takes_is_no_label_to_ignore():
    class Trained(Labelled):
        def forward(self, input_values, labels):
            assert labels is Y or torch.equal(labels, Y)
            return self.layers(input_values)

    report = prune_(Trained(), [{"input_values": X, "labels": Y}], method="wanda", sparsity=0.5)
    assert not report.calibration


# Model, batches, and parts of the message.
UNCLEAR = {
    "three items": (made, [(X, Y, Y)], ["batch 0 is a tuple of 3 items", "takes 1 (input)", "forward="]),
    "no items": (made, [X, ()], ["batch 1 is a tuple of 0 items", "takes 1 (input)"]),
    "three items for two": (Labelled, [[X, 1.0, Y]], ["a list of 3 items", "takes 2 (input_values, scale)"]),
    "unknown key": (made, [{"x": X}], ["batch 0 is a dict with ['x']", "does not take ['x']", "forward="]),
    "unknown beside a label": (made, [{"input": X, "label": Y, "id": Y}], ["does not take ['id', 'label']"]),
    "only a label": (made, [{"label": Y}], ["does not take ['label']"]),
    "a text": (made, ["some text"], ["batch 0 is text", "Tokenize it first"]),
    "texts": (made, [["some text", "another"]], ["batch 0 is text", "Tokenize it first"]),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_batches_that_could_mean_anything_are_refused_before_any_weight_changes(kind):
    make, batches, parts = UNCLEAR[kind]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StatisticsError) as caught:
        prune_(model, batches, method="wanda", sparsity=0.5)
    assert all(part in str(caught.value) for part in parts), caught.value
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_named_way_out_works_and_changes_nothing_about_the_batches():
    expected, _ = pruned_by([X])
    found, report = pruned_by([(X, Y, np.ones(3))], forward=lambda model, batch: model(batch[0]))
    torch.testing.assert_close(found, expected)
    assert report.calibration == {}


def test_one_array_is_one_batch():
    with pytest.raises(TypeError, match=r"got one ndarray; wrap it in a list"):
        pruned_by(X.numpy())


# Sentences


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """Makes a tiny model of sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("sentences") / "bert"
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(path)
    with_tokenizer(path)
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "<|endoftext|>"}))

    def make():
        return library.SentenceTransformer(str(path), device="cpu", local_files_only=True)  # with mean pooling

    return make


TEXTS = ["def read(path):", "with open(path) as file:\n    return file.read()"]


def features(model):
    return model.preprocess(TEXTS) if hasattr(model, "preprocess") else model.tokenize(TEXTS)


SENTENCES = {
    "features": lambda model: [features(model)],
    "plain features": lambda model: [dict(features(model))],
    "lists of texts": lambda model: [TEXTS],
    "tuples of texts": lambda model: [tuple(TEXTS)],
    "a loader of texts": lambda model: DataLoader(TEXTS, 2),
}


@pytest.mark.slow  # importing the library takes seconds
@pytest.mark.parametrize("kind", SENTENCES)
def test_a_sentence_transformer_takes_features_and_texts(sentences, kind):
    plain = sentences()
    body = plain[0].auto_model
    inputs = {key: value for key, value in features(plain).items() if key in ("input_ids", "attention_mask")}
    expected = prune_(body, [inputs], method="wanda", sparsity=0.5, exclude=["pooler*"])
    model = sentences()
    batches = SENTENCES[kind](model)
    before = [dict(batch) for batch in batches] if "features" in kind else None
    report = prune_(model, batches, method="wanda", sparsity=0.5, exclude=["*pooler*"])
    torch.testing.assert_close(model[0].auto_model.state_dict(), body.state_dict())
    assert {layer.tokens for layer in report.layers} == {layer.tokens for layer in expected.layers}
    assert report.layers[0].tokens == int(inputs["attention_mask"].sum())
    if before is not None:
        assert [batch.keys() for batch in batches] == [batch.keys() for batch in before]


@pytest.mark.slow
def test_a_sentence_transformer_takes_texts_one_by_one(sentences):
    model = sentences()
    report = prune_(model, TEXTS, method="wanda", sparsity=0.5, exclude=["*pooler*"])
    assert report.layers[0].tokens == sum(len(model.preprocess([text])["input_ids"][0]) for text in TEXTS)


@pytest.mark.slow
def test_a_sentence_transformer_does_not_take_a_tensor(sentences):
    with pytest.raises(StatisticsError, match="takes a mapping of tensors, or texts"):
        prune_(sentences(), [X], method="wanda", sparsity=0.5, exclude=["*pooler*"])


# What is no model


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch no longer advises it
        return torch.jit.script(made())


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(made(), X)


def exported():
    return torch.export.export(made(), (X,))


def unflattened():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of its own code
        return torch.export.unflatten(exported())


NO_MODELS = {
    "a state dict": (lambda: made().state_dict(), TypeError, r"state dict of 4 tensors; .*load_state_dict"),
    "a path": (lambda: "models/llama", TypeError, r"got str; load the model first.*secateur prune"),
    "a function": (lambda: made().forward, TypeError, r"nn\.Module, got method"),
    "an optimizer": (lambda: torch.optim.SGD(made().parameters(), 0.1), TypeError, r"nn\.Module, got SGD"),
    "an exported program": (exported, TypeError, r"got ExportedProgram, which is exported\. Prune.*made from"),
    "a scripted module": (scripted, RecipeError, r"scripted or traced by torch\.jit.*\nPrune.*made from"),
    "a traced module": (traced, RecipeError, r"scripted or traced by torch\.jit.*\nPrune.*made from"),
    "an exported module": (lambda: exported().module(), RecipeError, r"torch\.export.*\nPrune.*made from"),
    "an unflattened one": (unflattened, RecipeError, r"torch\.export.*\nPrune"),
}

DOORS = {
    "prune_": lambda model: prune_(model, pattern="2:4", method="magnitude"),
    "pack_": secateur.pack_,
    "sparsify_": lambda model: secateur.sparsify_(model, pattern="2:4"),
    "SparseTraining": lambda model: secateur.SparseTraining(
        model, torch.optim.SGD([nn.Parameter(X)], 0.1), pattern="2:4", steps=10
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_gets_its_own_sentence_at_every_door(kind, door):
    make, error, message = NO_MODELS[kind]
    with pytest.raises(error, match=message):
        DOORS[door](make())


def test_a_module_that_fx_traced_is_a_model():
    expected, _ = pruned_by([X])
    model = torch.fx.symbolic_trace(made())
    report = prune_(model, [(X, Y)], method="wanda", sparsity=0.5)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected))
    assert "second item" in report.calibration["ignored"]


def test_a_scripted_part_is_left_alone_with_its_own_reason():
    model = nn.Sequential(nn.Linear(8, 8), scripted())
    report = prune_(model, [X], method="wanda", sparsity=0.5)
    assert {entry.reason for entry in report.skipped} == {
        "scripted or traced by torch.jit; prune the module that it was made from"
    }


# Weights that are computed


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch no longer advises it
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": old_weight_norm,
    "weight_norm of parametrizations": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm of parametrizations": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "torch's pruning": lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.5),
    "torch's pruning twice": lambda layer: torch_prune.random_unstructured(
        torch_prune.l1_unstructured(layer, "weight", 0.25), "weight", 0.25
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_call_that_makes_a_computed_weight_a_parameter_is_named_and_works(kind):
    model = made()
    COMPUTED[kind](model[0])
    report = prune_(model, [X], method="wanda", sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["2"]
    (reason,) = [entry.reason for entry in report.skipped if entry.name == "0"]
    call = reason.partition("; ")[2].partition(" makes it")[0]
    assert call.startswith("torch.nn.utils."), reason
    assert not any("register_layer" in entry.reason for entry in report.skipped)
    eval(call, {"torch": torch, "module": model[0]})  # as the user would
    assert len(prune_(model, [X], method="wanda", sparsity=0.5).layers) == 2


# Weights that are not here


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_is_called_one(place, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = made()
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with pytest.raises(RecipeError, match=r"0: its weight is offloaded by accelerate.*\nLoad the model whole"):
        prune_(model, [X], method="wanda", sparsity=0.5)


# ONNX


def packed():
    model = made()
    prune_(model, sparsity=0.8, method="magnitude")
    return nn.Sequential(secateur.PackedLinear.from_linear(model[0]), nn.ReLU()).eval()


@pytest.mark.filterwarnings("ignore")  # PyTorch no longer advises this exporter, which needs no other package
def test_onnx_export_of_a_packed_model_names_unpack():
    model = packed()
    model(X)
    with pytest.raises(KernelError, match=r"ONNX has no operator for packed weights[\s\S]*unpack_\(model\)"):
        torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False)
    model(X)


def test_the_newer_exporter_gets_the_same_sentence(monkeypatch):
    """It runs torch.export, and puts the error that it gets there into its own."""
    model = packed()
    torch.export.export(model, (X,))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(KernelError, match=r"unpack_\(model\)"):
        torch.export.export(model, (X,))


def test_pruning_a_packed_model_names_unpack():
    with pytest.raises(RecipeError, match=r"no layer to prune[\s\S]*unpack_"):
        prune_(packed(), [X], sparsity=0.5)
