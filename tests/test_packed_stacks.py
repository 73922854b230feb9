"""Stacks in models: transformers' experts in all their ways to run, reports, decisions, and files that lie."""

import copy

import pytest
import torch
from fake_timing import kernels_win, routes_take
from torch import nn

import secateur
from secateur import FormatError, PackedLinear
from secateur.nn import PackedStack, packed_stacks
from secateur.packing import read_packed, write_packed
from secateur.reports import PackReport

EXPERTS, IN, OUT = 3, 8, 12


@pytest.fixture(autouse=True)
def _kernels_win(monkeypatch):
    torch.manual_seed(0)
    kernels_win(monkeypatch)


SHARED = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 8,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1,
                 "topk_group": 1, "first_k_dense_replace": 0, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_transformers_run_packed_in_all_their_ways(family, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **SHARED | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 32, (2, 40))
    history = secateur.prune_(model, [ids], pattern="2:4", method="wanda")
    packed = copy.deepcopy(model)
    secateur.pack_(packed, batch_sizes=[1], history=history)
    stacked = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert set(packed_stacks(packed)) == stacked != set()
    monkeypatch.setattr(PackedLinear, "matrix", None)  # nothing is unpacked
    for way in ("eager", "grouped_mm", "batched_mm"):
        try:
            for one in (model, packed):
                one.set_experts_implementation(way)
        except ValueError:  # the family has one way of its own
            assert way == "grouped_mm"
        with torch.no_grad():
            torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    is_transposed = False

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, OUT, IN)), nn.Parameter(torch.randn(EXPERTS, IN, OUT))

    def forward(self, x):
        return torch.bmm(torch.bmm(x, self.up.mT).relu(), self.down.mT)


def pruned(**options):
    model = nn.ModuleDict({"experts": Experts()})
    secateur.prune_(model, pattern="2:4", method="magnitude", **options)
    return model


def test_a_stack_is_one_entry_of_the_report():
    model = pruned()
    report = secateur.pack_(model, batch_sizes=[1])
    assert [(layer.name, layer.shape, layer.matrices) for layer in report.layers] == [
        ("experts.up", (OUT, IN), EXPERTS),
        ("experts.down", (IN, OUT), EXPERTS),
    ]
    up = report.layers[0]
    assert report.whole.weights == 2 * EXPERTS * OUT * IN  # of packed stacks, too
    assert report.whole.zeros == EXPERTS * OUT * IN
    assert up.dense_bytes == 4 * EXPERTS * OUT * IN
    assert up.stored_bytes == model["experts"].up.nbytes
    assert "3 of 12 x 8" in report.to_markdown()
    assert PackReport.from_json(report.to_json()) == report
    assert [layer.name for layer in secateur.pack_(model, batch_sizes=[1]).layers] == ["experts.up", "experts.down"]


def test_a_stack_is_packed_as_a_whole_or_not_at_all(monkeypatch):
    model = pruned(exclude=["experts.up.1"])
    report = secateur.pack_(model, batch_sizes=[1])
    assert [layer.name for layer in report.layers] == ["experts.down"]
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("experts.up", "no zeros")]
    report = secateur.pack_(pruned(), batch_sizes=[1], include=["experts.up.1", "experts.down"])
    assert {skip.name: skip.reason for skip in report.skipped if skip.reason != "not included"} == {
        "experts.up": "2 of its 3 matrices are left dense, and so are all"
    }
    routes_take(monkeypatch, lambda name, index: 1.0)
    model = pruned()
    report = secateur.pack_(model, batch_sizes=[1])
    assert report.layers[0].reason.startswith("matrix 0: no route is faster")
    assert not packed_stacks(model)


def test_a_packed_stack_that_no_longer_gains_becomes_dense_again(monkeypatch):
    model = pruned()
    before = model["experts"].up.detach().clone()
    secateur.pack_(model, batch_sizes=[1])
    routes_take(monkeypatch, lambda name, index: 1.0)
    secateur.pack_(model, batch_sizes=[1])
    assert torch.equal(model["experts"].up, before)


def test_a_stack_that_two_modules_share_stays_shared(tmp_path):
    def made():
        model = nn.ModuleDict({"one": Experts(), "two": Experts()})
        model["two"].up = model["one"].up
        return model

    model = made()
    secateur.prune_(model, pattern="2:4", method="magnitude")
    report = secateur.pack_(model, batch_sizes=[1])
    assert next(layer.tied_to for layer in report.layers if layer.name == "one.up") == ("two.up",)
    assert model["one"].up is model["two"].up
    path = tmp_path / "shared.sparse.safetensors"
    secateur.save(model, path)
    loaded = secateur.load(path, into=made())
    assert loaded["one"].up is loaded["two"].up
    secateur.unpack_(loaded)
    assert loaded["one"].up is loaded["two"].up
    assert isinstance(loaded["one"].up, nn.Parameter)


@pytest.mark.parametrize("batches", [False, True])
def test_parameters_of_unknown_modules_are_found_by_the_report_or_by_inputs(batches):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.usual = nn.Parameter(torch.randn(IN, OUT)), nn.Linear(OUT, IN)

        def forward(self, x):
            return self.usual(x @ self.kernel)

    model, data = Own(), [torch.randn(70, IN)]
    history = secateur.prune_(model, data, pattern="2:4", method="wanda")
    plain = copy.deepcopy(model)
    report = secateur.pack_(plain, batch_sizes=[1])
    assert [layer.name for layer in report.layers] == ["usual"]
    secateur.pack_(model, batch_sizes=[1], **({"batches": data} if batches else {"history": history}))
    assert isinstance(model.kernel, PackedStack)
    torch.testing.assert_close(model(data[0]), plain(data[0]), rtol=1e-4, atol=1e-5)


LIES = {
    "no parts": lambda stack: stack | {"parts": []},
    "parts that are numbers": lambda stack: stack | {"parts": [0, 1, 2]},
    "a part twice": lambda stack: stack | {"parts": ["0", "0", "2"]},
    "a part that is missing": lambda stack: stack | {"parts": ["0", "1", "9"]},
    "too few parts": lambda stack: stack | {"parts": ["0", "1"]},
    "a dotted part": lambda stack: stack | {"parts": ["0", "1", "2.3"]},
    "no bool": lambda stack: stack | {"stacked": 1},
    "another key": lambda stack: stack | {"more": 1},
    "a missing key": lambda stack: {"parts": stack["parts"]},
    "no table": lambda stack: ["0", "1", "2"],
    "turned": lambda stack: stack | {"transposed": True},
    "side by side": lambda stack: stack | {"stacked": False},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_about_a_stack_is_refused_and_changes_nothing(lie, tmp_path):
    model = pruned()
    secateur.pack_(model, batch_sizes=[1])
    path = tmp_path / "lie.sparse.safetensors"
    secateur.save(model, path)
    file = read_packed(path)
    metadata = copy.deepcopy(dict(file.metadata))
    metadata["stacks"]["experts.up"] = LIES[lie](metadata["stacks"]["experts.up"])
    write_packed(path, file.layers, file.tensors, metadata)
    into = nn.ModuleDict({"experts": Experts()})
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(FormatError):
        secateur.load(path, into=into)
    assert into.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())


def test_a_file_with_a_stack_is_not_put_into_another_model(tmp_path):
    model = pruned()
    secateur.pack_(model, batch_sizes=[1])
    path = tmp_path / "stack.sparse.safetensors"
    secateur.save(model, path)

    class Other(Experts):
        def __init__(self, up):
            super().__init__()
            del self.up
            self.up = up

    for up in (nn.Parameter(torch.randn(EXPERTS + 1, OUT, IN)), None, nn.Linear(2, 2)):
        with pytest.raises(FormatError, match="Give the model that was saved"):
            secateur.load(path, into=nn.ModuleDict({"experts": Other(up)}))


def test_a_file_without_a_stack_has_no_such_key(tmp_path):
    path = tmp_path / "plain.sparse.safetensors"
    secateur.save(nn.Sequential(PackedLinear.from_linear(nn.Linear(8, 4))), path)
    assert "stacks" not in read_packed(path).metadata


def test_compilers_trace_a_model_with_stacks():
    model, x = pruned()["experts"], torch.randn(EXPERTS, 4, IN)
    holder = nn.ModuleDict({"experts": model})
    secateur.pack_(holder, batch_sizes=[1])
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_recurrent_module_uses_what_is_loaded(tmp_path):
    def made():
        return nn.ModuleDict({"lstm": nn.LSTM(IN, IN), "experts": Experts()})

    model, x = made(), torch.randn(5, 2, IN)
    secateur.prune_(model, pattern="2:4", method="magnitude", include=["experts"])
    secateur.pack_(model, batch_sizes=[1])
    path = tmp_path / "mixed.sparse.safetensors"
    secateur.save(model, path)
    for dense in (False, True):
        loaded = secateur.load(path, into=made(), dense=dense)
        assert torch.equal(loaded["lstm"](x)[0], model["lstm"](x)[0])
