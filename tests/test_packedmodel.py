import copy
import json
import shutil

import pytest
import torch
from fake_timing import kernels_win
from safetensors.torch import load_file, save_file
from tiny import with_tokenizer
from torch import nn

import secateur
from secateur import FormatError, PackedLinear, RecipeError
from secateur.formats import Bitmask
from secateur.kernels import usable_plan
from secateur.nn import PackedConv2d, packed_layers
from secateur.packing import (
    FILE,
    REPORT,
    PackedFile,
    export_directory,
    pack_directory,
    read_packed,
    write_packed,
)
from secateur.packing._contents import Contents


@pytest.fixture(autouse=True)
def _kernels_win(monkeypatch):
    """Every layer with zeros is packed, without measuring."""
    kernels_win(monkeypatch)


class Small(nn.Module):
    """Every kind of layer and of shared tensor that a file must store."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 32)
        self.twin = nn.Linear(16, 32)  # shares its weight with up, not its bias
        self.again = self.up
        self.down = nn.Linear(32, 16, bias=False)
        self.convolution = nn.Conv2d(4, 8, 1, stride=2)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.twin.weight = self.up.weight
        self.head.weight = self.embedding.weight

    def forward(self, ids, picture):
        x = self.norm(self.down((self.up(self.embedding(ids)) + self.again(self.embedding(ids))).relu()))
        return self.head(x * self.scale), self.twin(x), self.convolution(picture)


def small(seed=0, pattern="unstructured"):
    torch.manual_seed(seed)
    model = Small()
    parsed = secateur.SparsityPattern.parse(pattern)
    with torch.no_grad():
        for layer in (model.up, model.down, model.convolution):
            matrix = layer.weight.flatten(1)
            mask = parsed.mask(matrix.abs(), None if isinstance(parsed, secateur.NM) else 0.7)
            layer.weight.mul_(mask.view_as(layer.weight))
        model.norm.running_mean.normal_()
    return model.eval()


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, (5,), generator=generator)
    with torch.no_grad():
        return model(ids, torch.randn(2, 4, 6, 6, generator=generator))


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(other), strict=True))


@pytest.mark.parametrize("values", [None, "bfloat16", "int8"])
def test_a_loaded_module_is_the_saved_one(tmp_path, values):
    model = small()
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    secateur.pack_(model, value_dtype=values)
    assert sorted(packed_layers(model)) == ["again", "convolution", "down", "twin", "up"]
    path = tmp_path / "small.sparse.safetensors"
    secateur.save(model, path)
    assert path.stat().st_size < dense
    other = small(seed=7)
    assert secateur.load(path, into=other) is other
    assert same(other, model)
    assert not other.training
    assert isinstance(other.convolution, PackedConv2d)
    assert other.again is other.up
    assert other.twin.values is other.up.values
    assert not torch.equal(other.twin.bias, other.up.bias)
    assert other.head.weight is other.embedding.weight
    assert str(other.up.plan) == str(model.up.plan)
    assert other.up.weight_dtype == torch.float32


def test_a_file_can_be_loaded_into_a_packed_module(tmp_path):
    first, second = small(seed=0, pattern="2:4"), small(seed=3, pattern="unstructured")
    secateur.pack_(first)
    secateur.pack_(second)
    secateur.save(first, tmp_path / "a.sparse.safetensors")
    secateur.load(tmp_path / "a.sparse.safetensors", into=second)
    assert same(first, second)
    assert str(second.up.pattern) == "2:4"


def test_a_file_can_be_loaded_dense(tmp_path):
    model = small()
    expected = copy.deepcopy(model)
    secateur.pack_(model)
    secateur.save(model, tmp_path / "a.sparse.safetensors")
    other = secateur.load(tmp_path / "a.sparse.safetensors", into=small(seed=4), dense=True)
    assert not packed_layers(other)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert other.twin.weight is other.up.weight
    assert other.head.weight is other.embedding.weight
    assert other.convolution.stride == (2, 2)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_file_can_be_loaded_into_a_module_on_the_meta_device(tmp_path):
    model = small()
    secateur.pack_(model)
    secateur.save(model, tmp_path / "a.sparse.safetensors")
    with torch.device("meta"):
        skeleton = Small()
    skeleton.scratch = torch.zeros(3)
    secateur.load(tmp_path / "a.sparse.safetensors", into=skeleton.eval())
    assert same(skeleton, model)


def test_dtypes(tmp_path):
    model = small()
    secateur.pack_(model)
    path = tmp_path / "a.sparse.safetensors"
    secateur.save(model, path, dtype=torch.bfloat16)
    other = secateur.load(path, into=small())
    assert other.up.values.dtype == torch.float32  # packed weights are as they were packed
    assert other.up.bias.dtype == other.embedding.weight.dtype == torch.bfloat16
    assert other.up.weight_dtype == torch.bfloat16
    assert other.norm.num_batches_tracked.dtype == torch.int64
    other = secateur.load(path, into=small(), dtype=torch.float32)
    assert other.up.bias.dtype == other.embedding.weight.dtype == other.up.weight_dtype == torch.float32


def test_tied_tensors_are_stored_once(tmp_path):
    model = small()
    secateur.pack_(model)
    secateur.save(model, tmp_path / "a.sparse.safetensors")
    file = read_packed(tmp_path / "a.sparse.safetensors")
    assert sorted(file.layers) == ["convolution", "down", "up"]
    assert "head.weight" not in file.tensors
    assert file.metadata["tied"] == {"head.weight": "embedding.weight"}
    assert file.metadata["weights"] == {"twin": "up"}
    assert file.metadata["modules"] == {"again": "up"}
    untied = small()
    untied.head.weight = nn.Parameter(torch.zeros(20, 16))
    untied.again = nn.Linear(16, 32)
    secateur.load(tmp_path / "a.sparse.safetensors", into=untied)
    assert untied.head.weight is untied.embedding.weight
    assert untied.again is untied.up


def test_plans_of_another_machine_are_not_taken(tmp_path, monkeypatch):
    model = small()
    secateur.pack_(model)
    for layer in (model.up, model.down):
        layer.plan = layer.plan.parse("prepacked")
    secateur.save(model, tmp_path / "a.sparse.safetensors")
    assert str(secateur.load(tmp_path / "a.sparse.safetensors", into=small()).up.plan) == "prepacked"
    monkeypatch.setattr("secateur.packing._fill.machine", lambda: {"processor": "another", "kernels": "avx2"})
    assert "bitmask" in str(secateur.load(tmp_path / "a.sparse.safetensors", into=small()).up.plan)


def test_a_plan_that_the_weight_cannot_take_is_replaced():
    weight = torch.randn(16, 16).masked_fill(torch.rand(16, 16) < 0.5, 0)
    packed = Bitmask.from_dense(weight)
    for plan in ("panels:1x1", "rows", "nonsense", "", "groups:3:2", "groups:1:4", "tiles:7x7", "panels:99999x9"):
        assert str(usable_plan(packed, plan)) == "bitmask@2 panels:128x256"
    assert str(usable_plan(packed, "bitmask")) == "bitmask"


def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model = small()
    secateur.pack_(model)
    path = tmp_path / "a.sparse.safetensors"
    secateur.save(model, path)

    def refuses(change, match):
        other = small()
        change(other)
        before = copy.deepcopy(other.state_dict())
        kinds = [type(module) for module in other.modules()]
        with pytest.raises(FormatError, match=match):
            secateur.load(path, into=other)
        assert kinds == [type(module) for module in other.modules()]
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    refuses(lambda m: delattr(m, "down"), "the layer down, but the model has not")
    refuses(lambda m: setattr(m, "down", nn.Linear(32, 17, bias=False)), "layer down is a linear layer of 16x32")
    refuses(lambda m: setattr(m, "down", nn.Linear(32, 16)), "layer down has no bias")
    refuses(lambda m: setattr(m, "convolution", nn.Conv2d(4, 8, 1)), "layer convolution is a convolution of 8x4")
    refuses(lambda m: setattr(m, "more", nn.Linear(2, 2)), "lacks.*'more.bias'")
    refuses(lambda m: delattr(m, "norm"), "has.*'norm.bias'")
    refuses(lambda m: setattr(m, "scale", torch.ones(2)), r"scale has the shape \[1\]")


def test_other_models_files_and_places_are_refused(tmp_path):
    model = small()
    with pytest.raises(RecipeError, match="only a transformers model"):
        secateur.save(model, tmp_path / "directory")
    with pytest.raises(RecipeError, match="bare packed layer"):
        secateur.save(PackedLinear.from_linear(model.up), tmp_path / "a.sparse.safetensors")
    with pytest.raises(FormatError, match="take a file called"):
        secateur.save(model, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="does not exist"):
        secateur.load(tmp_path / "nothing")
    secateur.save(model, tmp_path / "a.sparse.safetensors")
    with pytest.raises(RecipeError, match="into="):
        secateur.load(tmp_path / "a.sparse.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match="not one of packed weights"):
        secateur.load(tmp_path / "b.safetensors", into=model)


def test_extra_state_that_is_not_a_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"counter": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(FormatError, match="extra state"):
        secateur.save(nn.Sequential(Odd(2, 2)), tmp_path / "a.sparse.safetensors")


def damaged(change):
    """Metadata of a good file after a change."""
    table = {
        "kinds": {"a": {"dtype": "float32", "transposed": False, "stride": None, "plan": ""}},
        "modules": {},
        "weights": {},
        "tied": {},
        "machine": {},
        "model": "",
        "absent": [],
    }
    change(table)
    return table


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["kinds"]["a"].update(dtype="int8"),
        lambda t: t["kinds"]["a"].update(dtype=[]),
        lambda t: t["kinds"]["a"].update(transposed=1),
        lambda t: t["kinds"]["a"].update(plan=3),
        lambda t: t["kinds"]["a"].update(stride=[0, 1]),
        lambda t: t["kinds"]["a"].update(stride=[1]),
        lambda t: t["kinds"]["a"].update(stride=5),
        lambda t: t["kinds"].update(a={}),
        lambda t: t.update(kinds=3),
        lambda t: t.update(modules={"b": "c"}),
        lambda t: t.update(modules={"a": "a"}),
        lambda t: t.update(weights={"b": "c"}),
        lambda t: t.update(tied={"x": "y"}),
        lambda t: t.update(tied={"x": 3}),
        lambda t: t.update(tied=[1]),
        lambda t: t.update(model=3),
        lambda t: t.update(absent=[3]),
        lambda t: t.update(absent=3),
    ],
)
def test_invalid_metadata_is_refused(tmp_path, change):
    path = tmp_path / "a.sparse.safetensors"
    model = nn.Sequential()
    model.add_module("a", nn.Linear(4, 4, bias=False))
    layers = {"a": Bitmask.from_dense(torch.eye(4))}
    write_packed(path, layers, {}, damaged(lambda table: None))
    secateur.load(path, into=copy.deepcopy(model))
    write_packed(path, layers, {}, damaged(change))
    with pytest.raises(FormatError, match="metadata"):
        secateur.load(path, into=model)


def test_a_file_without_metadata_loads(tmp_path):
    path = tmp_path / "a.sparse.safetensors"
    write_packed(path, {"0": Bitmask.from_dense(torch.eye(4))})
    model = secateur.load(path, into=nn.Sequential(nn.Linear(4, 4, bias=False)))
    assert torch.equal(model[0](torch.ones(1, 4)), torch.ones(1, 4))
    assert Contents.of(PackedFile({}, {})).tied == {}


# Model directories


transformers = pytest.importorskip("transformers")


def prune(model, sparsity=0.75):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            mask = secateur.Unstructured().mask(module.weight.detach().abs().float(), sparsity)
            with torch.no_grad():
                module.weight.mul_(mask)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    prune(model.model)
    model.save_pretrained(path)
    return with_tokenizer(path)


def logits(model):
    ids = torch.arange(12)[None] % 7
    with torch.no_grad():
        return model(input_ids=ids)[0].float()


def test_a_packed_directory_loads_as_the_model(llama, tmp_path):
    output = tmp_path / "packed"
    report = pack_directory(llama, output)
    assert len(report.layers) == 14
    assert all(layer.packed and layer.value_dtype == "bfloat16" and layer.error == 0 for layer in report.layers)
    assert not list(output.glob("model.safetensors*"))
    assert (output / FILE).stat().st_size < (llama / "model.safetensors").stat().st_size
    written, config = (json.loads((path / "config.json").read_text()) for path in (output, llama))
    assert {key: written[key] for key in config} == config
    assert written.keys() - config.keys() == {"quantization_config", "transformers_weights"}
    transformers.AutoTokenizer.from_pretrained(output)
    assert json.loads((output / REPORT).read_text())["layers"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = secateur.load(output, dtype=torch.float32)
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert secateur.load(output).dtype == torch.bfloat16
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


def test_an_exported_directory_is_the_original_bit_for_bit(llama, tmp_path):
    pack_directory(llama, tmp_path / "packed")
    reference = load_file(llama / "model.safetensors")
    dense = secateur.load(tmp_path / "packed", dense=True)
    state = dense.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in reference.items())
    export_directory(tmp_path / "packed", tmp_path / "dense")
    again = load_file(tmp_path / "dense" / "model.safetensors")
    assert again.keys() == reference.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in reference.items()
    )
    names = {entry.name for entry in (tmp_path / "dense").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {FILE, REPORT, ".weights"}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_heads_and_weights_that_were_never_trained(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    prune(model.bert.encoder)
    model.save_pretrained(tmp_path / "bert")
    with_tokenizer(tmp_path / "bert")
    pack_directory(tmp_path / "bert", tmp_path / "packed")
    again = secateur.load(tmp_path / "packed")
    assert type(again) is transformers.BertForSequenceClassification
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    # A base model whose checkpoint has no pooler: what was not stored is not stored as if it were.
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name and "classifier" not in name}
    save_file(kept, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    pack_directory(tmp_path / "bert", tmp_path / "second")
    file = read_packed(tmp_path / "second" / FILE)
    assert not any("pooler" in name or "classifier" in name for name in file.tensors)
    export_directory(tmp_path / "second", tmp_path / "dense")
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == kept.keys()


def test_save_from_python(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    secateur.pack_(model, value_dtype="int8")
    expected = logits(model)
    secateur.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert torch.equal(logits(secateur.load(tmp_path / "out")), expected)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(FormatError, match="already exists"):
        secateur.save(model, tmp_path / "out")
    secateur.save(model, tmp_path / "out", overwrite=True, source=llama)
    assert torch.equal(logits(secateur.load(tmp_path / "out")), expected)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FormatError, match="something other"):
        secateur.save(model, tmp_path / "other", overwrite=True)


def test_other_directories_are_refused(llama, tmp_path):
    with pytest.raises(FormatError, match="has a dense model"):
        secateur.load(llama)
    with pytest.raises(FormatError, match="no weights"):
        secateur.load(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        export_directory(tmp_path / "nothing", tmp_path / "out")
    pack_directory(llama, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"no config\.json"):
        secateur.load(tmp_path / "packed")
    table = json.loads((tmp_path / "config.json").read_text())
    for change in ({"model_type": "nothing-known"}, {"model_type": "bert"}, {"hidden_size": "x"}, {"hidden_size": 64}):
        (tmp_path / "packed" / "config.json").write_text(json.dumps({**table, **change}))
        with pytest.raises(FormatError):
            secateur.load(tmp_path / "packed")
    assert not (tmp_path / "out").exists()


def test_code_in_a_directory_is_not_run(llama, tmp_path):
    pack_directory(llama, tmp_path / "packed")
    (tmp_path / "packed" / "evil.py").write_text("raise SystemExit('ran')\n")
    path = tmp_path / "packed" / "config.json"
    table = json.loads(path.read_text())
    table["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    table["architectures"] = ["os.system"]
    path.write_text(json.dumps(table))
    assert type(secateur.load(tmp_path / "packed")) is transformers.LlamaForCausalLM


def test_files_of_compressed_tensors_load(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "ct")
    tensors = load_file(llama / "model.safetensors")
    compressed = {}
    for name, tensor in tensors.items():
        if "proj" not in name and "embed" not in name:
            compressed[name] = tensor
            continue
        packed = Bitmask.from_dense(tensor)
        compressed[f"{name}.compressed"] = packed.values
        compressed[f"{name}.bitmask"] = packed.bitmask
        compressed[f"{name}.row_offsets"] = packed.row_offsets
        compressed[f"{name}.shape"] = torch.tensor(tensor.shape)
    save_file(compressed, tmp_path / "ct" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "ct" / "config.json"
    table = json.loads(path.read_text())
    table["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask"},
    }
    path.write_text(json.dumps(table))
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = secateur.load(tmp_path / "ct", dtype=torch.float32)
    assert len(packed_layers(model)) == 14
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    dense = secateur.load(tmp_path / "ct", dense=True).state_dict()
    assert all(torch.equal(dense[name], tensor) for name, tensor in tensors.items())


def test_dense_weights_are_stored_without_zeros_and_loaded_dense(tmp_path):
    """The size of a file does not depend on which layers run packed."""

    def make():
        return nn.Sequential(
            nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 2)
        )

    torch.manual_seed(0)
    model = make()
    secateur.prune_(model, pattern="unstructured", sparsity=0.9, method="magnitude", include=["0", "2", "3"])
    model[2] = secateur.PackedLinear.from_linear(model[2])
    path = tmp_path / "pruned.safetensors"
    secateur.save(model, path)
    stored = sum(module.weight.numel() for module in (model[0], model[3])) + 64 * 128
    assert path.stat().st_size < stored * 4 * (0.1 + 1 / 32) + 128 * 2 * 4 + 8000  # offsets, header, what is dense
    again = secateur.load(path, into=make())
    assert [type(module) for module in again] == [type(module) for module in model]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    dense = secateur.load(path, into=make(), dense=True)
    assert torch.equal(dense[2].weight, model[2].to_linear().weight)
    assert torch.equal(dense[0].weight, model[0].weight)


@pytest.mark.parametrize("shape", [[127, 128], [128], [128, 128, 0], [128, -128], "128", [128.0, 128]], ids=str)
def test_a_sparse_tensor_of_another_shape_is_refused(tmp_path, shape):
    from secateur.packing import read_packed, write_packed

    model = nn.Sequential(nn.Linear(128, 128))
    secateur.prune_(model, sparsity=0.9, pattern="unstructured", method="magnitude")
    path = tmp_path / "pruned.safetensors"
    secateur.save(model, path)
    file = read_packed(path)
    assert file.metadata["sparse"] == {"0.weight": [128, 128]}
    write_packed(path, file.layers, file.tensors, {**file.metadata, "sparse": {"0.weight": shape}})
    with pytest.raises(FormatError):
        secateur.load(path, into=nn.Sequential(nn.Linear(128, 128)))


def test_a_small_file_that_claims_a_vast_tensor_allocates_nothing(tmp_path, monkeypatch):
    from secateur.formats import ColumnPacked
    from secateur.packing import read_packed, write_packed

    path = tmp_path / "vast.safetensors"
    side, shape = 1 << 16, (1 << 16, 1 << 20)
    packed = ColumnPacked.from_tensors(
        {"values": torch.zeros(side, 0), "columns": torch.zeros(0, dtype=torch.int32)}, shape, secateur.Column()
    )
    metadata = {"sparse": {"0.weight": list(shape)}}
    write_packed(path, {"0.weight": packed}, {"0.bias": torch.zeros(4)}, metadata)
    assert path.stat().st_size < 2000
    assert read_packed(path).layers["0.weight"].shape == shape
    monkeypatch.setattr(ColumnPacked, "to_dense", lambda self: pytest.fail("made whole"))
    with pytest.raises(
        FormatError, match=rf"0\.weight has the shape \[{side}, 1048576\], but in the model it has \[4, 4\]"
    ):
        secateur.load(path, into=nn.Sequential(nn.Linear(4, 4)))


def test_tied_weights_that_are_stored_without_zeros_load_tied(tmp_path):
    def make():
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
        model[1].weight = model[0].weight
        return model

    model = make()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 32) < 0.1)
    secateur.save(model, tmp_path / "tied.safetensors")
    again = secateur.load(tmp_path / "tied.safetensors", into=make())
    assert again[0].weight is again[1].weight
    assert torch.equal(again[0].weight, model[0].weight)
