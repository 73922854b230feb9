"""Shrunk models on the disk: found again by transformers alone where a config can say the sizes, else with secateur."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from shrunk_cases import CASES, FEW, TEXT, bert, by_hand
from torch import nn

import secateur
from secateur import FormatError, RecipeError
from secateur.packing import FILE, export_directory, pack_directory
from secateur.pruning import prune_directory
from secateur.shapes import Facts, facts_of, find_uniform, load_shrunk, remember_facts, save_shrunk

SHRUNK = "model.shrunk.safetensors"
EXPRESSIBLE = [name for name, case in CASES.items() if case.expressible]
OTHERS = [name for name, case in CASES.items() if not case.expressible]


def inputs_of(name):
    return dict(CASES[name].inputs)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


LOAD = """
import sys, torch
torch.set_num_threads({threads})
for line in {imports!r}:
    exec(line)
import transformers
for path, kind, inputs in {wanted!r}:
    model = getattr(transformers, kind).from_pretrained(path)
    inputs = torch.load(inputs)
    with torch.no_grad():
        torch.save((model(**inputs)[0], model.state_dict()), path + "/output.pt")
assert ("secateur" in sys.modules) == {with_secateur!r}
"""


def in_another_process(wanted, *imports, with_secateur):
    """Load directories with from_pretrained there, run the models, and leave their outputs in the directories."""
    program = LOAD.format(imports=imports, wanted=wanted, with_secateur=with_secateur, threads=torch.get_num_threads())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_sizes_that_a_config_can_say_are_found(name):
    model, facts = CASES[name].shrunk()
    found = find_uniform(model, facts)
    assert found.reason == ""
    assert {k: v.shape for k, v in type(model)(found.config).state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("name", OTHERS)
def test_sizes_that_no_config_can_say_have_a_reason(name):
    model, facts = CASES[name].shrunk()
    found = find_uniform(model, facts)
    assert found.config is None
    assert "weight is" in found.reason or "no setting of the config" in found.reason


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert ffn", {"intermediate_size": 24}),
        ("llama groups, ffn and layers", {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                                          "num_key_value_heads": 1}),
        ("gpt-2 ffn and layers", {"n_layer": 2, "n_inner": 100}),
        ("t5 heads, ffn and encoder layers", {"num_heads": 2, "num_layers": 2, "d_ff": 24}),
        ("vit heads and ffn", {"num_attention_heads": 2, "head_dim": 8, "intermediate_size": 24}),
    ],
)  # fmt: skip
def test_nothing_but_sizes_changes_in_the_config(name, changes):
    model, facts = CASES[name].shrunk()
    assert find_uniform(model, facts).changes == changes


def test_a_config_of_the_right_shapes_but_another_function_is_refused():
    model, facts = CASES["llama groups, ffn and layers"].shrunk()
    model.model.layers[1].self_attn.num_key_value_groups = 2
    wrong = replace(facts, attributes={**facts.attributes, "model.layers.1.self_attn": {"num_key_value_groups": 2}})
    assert "num_key_value_groups is 2, and would be 4" in find_uniform(model, wrong).reason
    # In these, blocks alternate by their number, so that a block that moved would become one of the other kind.
    model, facts = CASES["gemma 3 layers"].shrunk()
    model.model.layers[0].self_attn.sliding_window = 2
    facts = replace(facts, attributes={**facts.attributes, "model.layers.0.self_attn": {"sliding_window": 2}})
    assert "sliding_window is 2, and would be 4" in find_uniform(model, facts).reason


def check_loaded(expected):
    """The weights are the same bit for bit. Where tensors lie in memory may change the last bit of an output."""
    for path, (model, inputs) in expected.items():
        tensor, state = torch.load(path / "output.pt")
        torch.testing.assert_close(tensor, output(model, inputs), rtol=1e-6, atol=1e-6)
        assert {name: value.shape for name, value in state.items()} == {
            n: v.shape for n, v in model.state_dict().items()
        }
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), path
        (path / "output.pt").unlink()


def test_uniform_directories_load_without_secateur(tmp_path):
    expected, wanted = {}, []
    for number, name in enumerate(EXPRESSIBLE):
        model, facts = CASES[name].shrunk()
        path = tmp_path / str(number)
        assert save_shrunk(model, facts, path).config is not None
        torch.save(inputs_of(name), tmp_path / f"{number}.pt")
        expected[path] = model, inputs_of(name)
        wanted.append((str(path), type(model).__name__, str(tmp_path / f"{number}.pt")))
        assert not (path / SHRUNK).exists()
    done = in_another_process(wanted, with_secateur=False)
    assert done.returncode == 0, done.stderr
    check_loaded(expected)


def test_other_directories_load_with_secateur_only(tmp_path):
    expected, wanted = {}, []
    for number, name in enumerate(OTHERS):
        model, facts = CASES[name].shrunk()
        path = tmp_path / str(number)
        assert save_shrunk(model, facts, path).config is None
        assert not list(path.glob("model.safetensors*"))
        readme = (path / "README.md").read_text()
        assert "import secateur.huggingface" in readme
        torch.save(inputs_of(name), tmp_path / f"{number}.pt")
        expected[path] = model, inputs_of(name)
        wanted.append((str(path), type(model).__name__, str(tmp_path / f"{number}.pt")))
        assert torch.equal(output(secateur.load(path), inputs_of(name)), output(*expected[path]))
    for imports in (("import secateur.huggingface",), ("import transformers.quantizers.auto", "import secateur")):
        done = in_another_process(wanted, *imports, with_secateur=True)
        assert done.returncode == 0, done.stderr
        check_loaded(expected)
        wanted, expected = wanted[:1], dict(list(expected.items())[:1])
    done = in_another_process(wanted[:1], with_secateur=False)
    assert done.returncode != 0
    assert 'run "import secateur.huggingface" first' in done.stderr.splitlines()[-1]


def test_a_base_model_and_another_head_load_from_the_directory_of_a_model_with_a_head(tmp_path):
    model, facts = by_hand(
        bert(transformers.BertForMaskedLM).eval(),
        {r".*1\.intermediate\.dense\.(weight|bias)": (0, FEW), r".*1\.output\.dense\.weight": (1, FEW)},
        blocks={"bert.encoder.layer": (0, 2)},
        attributes={r".*1\.intermediate\.dense": {"out_features": 24}, r".*1\.output\.dense": {"in_features": 24}},
        config={"num_hidden_layers": (3, 2)},
    )
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "lm")
    expected = model.bert(TEXT)[0]
    base = transformers.AutoModel.from_pretrained(tmp_path / "lm")
    assert type(base) is transformers.BertModel
    assert torch.equal(base(TEXT)[0], expected)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert torch.equal(other.bert(TEXT)[0], expected)
    # and the other way round
    secateur.save(base, tmp_path / "base")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert(TEXT)[0], expected)


def test_a_loaded_model_is_like_any_other(tmp_path):
    model, facts = CASES["llama one layer's groups"].shrunk()
    save_shrunk(model, facts, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_hidden_layers == 2
    assert not hasattr(again.config, "quantization_config")
    assert not getattr(again, "is_quantized", False)
    assert facts_of(again) == facts
    tokens = [m.generate(TEXT, max_new_tokens=5, do_sample=False, use_cache=c) for m in (model, again) for c in (1, 0)]
    assert all(torch.equal(found, tokens[0]) for found in tokens)
    assert copy.deepcopy(again).half().dtype == torch.float16  # which transformers refuses for quantized models
    with pytest.raises(RecipeError, match=r"secateur\.save"):
        again.save_pretrained(tmp_path / "wrong")
    secateur.save(again, tmp_path / "second")
    assert torch.equal(
        output(secateur.load(tmp_path / "second"), {"input_ids": TEXT}), output(model, {"input_ids": TEXT})
    )
    half = secateur.load(tmp_path / "second", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_save_writes_an_ordinary_directory_where_it_can(tmp_path):
    model, facts = CASES["bert ffn"].shrunk()
    bert().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "notes.txt").write_text("mine")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "out", source=tmp_path / "source", dtype=torch.bfloat16)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {key for key in {**written, **config} if written.get(key) != config.get(key)}
    assert changed == {"intermediate_size", "dtype", "shrunk"}
    assert written["dtype"] == "bfloat16"
    again = secateur.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(
        again.encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight.bfloat16()
    )
    with pytest.raises(FormatError, match="already exists"):
        secateur.save(model, tmp_path / "out")
    secateur.save(model, tmp_path / "out", overwrite=True)
    assert secateur.load(tmp_path / "out").dtype == torch.float32
    with pytest.raises(RecipeError, match="only a transformers model"):
        save_shrunk(nn.Linear(2, 2), Facts(), tmp_path / "linear")


def test_the_model_card_says_first_what_to_import(tmp_path):
    model, facts = CASES["bert heads"].shrunk()
    bert().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n# My model\n")
    save_shrunk(model, facts, tmp_path / "out", source=tmp_path / "source")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n## How to load this model\n")
    assert text.endswith("# My model\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda claim: claim.update(shrunk=None), "should be a table"),
        (lambda claim: claim.update(prefix=3), "the prefix"),
        (lambda claim: claim["shrunk"].update(more=1), "unknown entry 'more'"),
        (lambda claim: claim["shrunk"]["attributes"].update({"encoder": {"forward": 1}}), "forward = None"),
        (lambda claim: claim["shrunk"]["attributes"].update({"encoder": {"training": 1}}), "training = "),
        (lambda claim: claim["shrunk"].update(blocks={"encoder.layer": [0]}), "in both"),
        (lambda claim: claim["shrunk"].update(blocks={"pooler": [0]}, original_blocks={"pooler": 2}), "pooler is a"),
        (lambda claim: claim["shrunk"]["original_shapes"].update({"encoder.layer.1.output.dense.weight": [32, 49]}),
         "48"),
    ],
)  # fmt: skip
def test_a_config_that_was_changed_is_refused(tmp_path, change, message):
    model, facts = CASES["bert one layer's ffn"].shrunk()
    save_shrunk(model, facts, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        secateur.load(tmp_path / "out")


def test_weights_of_other_sizes_are_refused(tmp_path):
    for name in ("bert one layer's ffn", "bert heads"):
        model, facts = CASES[name].shrunk()
        save_shrunk(model, facts, tmp_path / name)
    os.replace(tmp_path / "bert heads" / SHRUNK, tmp_path / "bert one layer's ffn" / SHRUNK)
    with pytest.raises(FormatError, match="cannot be loaded by transformers"):
        load_shrunk(tmp_path / "bert one layer's ffn")


class Net(nn.Module):
    """A plain module with a list of blocks, one size that its code reads, and tied ends."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)) for _ in range(3))
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.width = 16

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x) * self.width


def small_net():
    torch.manual_seed(0)
    return by_hand(
        Net().eval(),
        {r"blocks\.1\.0\.(weight|bias)": (0, range(8)), r"blocks\.1\.2\.weight": (1, range(8))},
        blocks={"blocks": (0, 2)},
        attributes={r"blocks\.1\.0": {"out_features": 8}, r"blocks\.1\.2": {"in_features": 8}, "": {"width": 8}},
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_a_file_of_a_plain_module_has_its_sizes(tmp_path, packed, dense):
    model, facts = small_net()
    remember_facts(model, facts)
    if packed:
        secateur.prune_(model, None, method="magnitude", sparsity=0.8)
        model.blocks[0][0] = secateur.PackedLinear.from_linear(model.blocks[0][0])
    path = tmp_path / "x.safetensors"
    secateur.save(model, path)
    x = torch.randn(3, 6)
    for into in (Net().eval(), copy.deepcopy(small_net()[0])):  # of the original sizes, and of the shrunk ones
        again = secateur.load(path, into=into, dense=dense)
        assert again is into
        torch.testing.assert_close(again(x), model(x))
        assert len(again.blocks) == 2
        assert again.width == 8
        assert again.last.weight is again.first.weight
    assert facts_of(secateur.load(path, into=Net())) == facts  # so that it can be saved again
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["secateur"])["metadata"]["shrunk"] == facts.to_dict()


def test_a_file_of_a_model_that_was_not_shrunk_has_no_sizes(tmp_path):
    secateur.save(Net(), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert "shrunk" not in json.loads(file.metadata()["secateur"])["metadata"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.blocks.append(nn.Linear(6, 6)), "blocks has 4 blocks"),
        (lambda net: setattr(net, "width", 4), "width"),
        (lambda net: setattr(net, "more", nn.Linear(2, 2)), "hash"),
        (lambda net: setattr(net.blocks[2], "0", nn.Linear(6, 12)), r"the shape \[12"),
    ],
)
def test_a_model_that_does_not_fit_a_file_stays_as_it_is(tmp_path, change, message):
    model, facts = small_net()
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "x.safetensors")
    into = Net()
    change(into)
    before = {name: (id(tensor), tensor.shape) for name, tensor in into.state_dict(keep_vars=True).items()}
    with pytest.raises(FormatError, match=message):
        secateur.load(tmp_path / "x.safetensors", into=into)
    assert {n: (id(t), t.shape) for n, t in into.state_dict(keep_vars=True).items()} == before
    assert not facts_of(into)


def test_a_model_is_put_back_if_the_tensors_of_a_file_do_not_fit(tmp_path):
    model, facts = small_net()
    remember_facts(model, replace(facts, model_hash=""))
    model.more = nn.Linear(2, 2)
    secateur.save(model, tmp_path / "x.safetensors")
    into = Net()
    with pytest.raises(FormatError, match=r"more\.bias"):
        secateur.load(tmp_path / "x.safetensors", into=into)
    assert len(into.blocks) == 3
    assert into.width == 16
    assert into.blocks[1][0].weight.shape == (16, 6)


def test_packed_directories_of_shrunk_models(tmp_path):
    model, facts = CASES["llama one layer's groups"].shrunk()
    save_shrunk(model, facts, tmp_path / "shrunk")
    inputs = {"input_ids": TEXT}
    prune_directory(tmp_path / "shrunk", tmp_path / "pruned", secateur.Recipe(method="magnitude", sparsity=0.9))
    pruned = secateur.load(tmp_path / "pruned")
    assert (pruned.model.layers[1].mlp.up_proj.weight == 0).float().mean() > 0.8
    pack_directory(tmp_path / "pruned", tmp_path / "packed", secateur.PackSettings(batch_sizes=(1,)))
    assert (tmp_path / "packed" / FILE).exists()
    packed = secateur.load(tmp_path / "packed")
    torch.testing.assert_close(output(packed, inputs), output(pruned, inputs), rtol=1e-4, atol=1e-4)
    assert facts_of(packed) == facts
    export_directory(tmp_path / "packed", tmp_path / "dense")
    assert (tmp_path / "dense" / SHRUNK).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(output(again, inputs), output(pruned, inputs))


def test_a_copy_is_saved_with_its_sizes_if_the_report_is_given(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    report = secateur.shrink_(model, [torch.randn(64, 8)], keep={"channels": 0.5})
    other = copy.deepcopy(model)
    for number, history in enumerate((report, [report])):
        secateur.save(other, tmp_path / f"{number}.safetensors", history=history)
        again = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        secateur.load(tmp_path / f"{number}.safetensors", into=again)
        x = torch.randn(3, 8)
        assert torch.equal(again(x), model(x))
        assert again[0].out_features == 16
    secateur.save(other, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="shape"):
        secateur.load(tmp_path / "x.safetensors", into=nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)))
