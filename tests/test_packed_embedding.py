"""Embeddings in rows of int8: exact lookups, what is refused, tables that are shared, and files."""

import copy
import re

import pytest
import torch
from fake_timing import kernels_win
from torch import nn
from torch.nn import functional

import secateur
from secateur import FormatError, KernelError, PackSettings, RecipeError
from secateur.formats import Bitmask, DensePacked
from secateur.layers import swap_modules_
from secateur.nn import PackedEmbedding
from secateur.packing import read_packed, write_packed
from secateur.packing._contents import take_apart
from secateur.packing._embeddings import embedding_jobs, pack_embeddings

IDS = torch.tensor([[3, 0, 199], [7, 7, 1]])


class Reader(nn.Module):
    """Looks up rows, and turns them into scores with a head that may share the table."""

    def __init__(self, tied=False, twin=False, **options):
        super().__init__()
        self.table = nn.Embedding(200, 64, padding_idx=0, **options)
        self.twin = nn.Embedding(200, 64)
        self.positions = nn.Embedding(8, 64)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 200, bias=False)
        if tied:
            self.head.weight = self.table.weight
        if twin:
            self.twin.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.twin(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.linear(x))


def pruned(**options):
    torch.manual_seed(0)
    model = Reader(**options)
    secateur.prune_(model, pattern="unstructured", sparsity=0.9, method="magnitude", include=["linear"])
    return model


def packed(model, **settings):
    return secateur.pack_(model, **{"precision": "int8", "batch_sizes": [1]} | settings)


# The module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_lookup_returns_codes_times_scale_exactly(dtype):
    torch.manual_seed(0)
    dense = nn.Embedding(50, 24, padding_idx=4).to(dtype)
    with torch.no_grad():
        dense.weight[7] *= 1000
        dense.weight[8] = 1e-6 * dense.weight[8]
        dense.weight[9] = 0
    layer = PackedEmbedding.from_embedding(dense)
    ids = torch.randint(50, (3, 5))
    wanted = (layer.values.double() * layer.scales.double()[:, None]).float().to(dtype)  # both factors are exact
    assert torch.equal(layer(ids), wanted[ids])
    assert torch.equal(layer.to_dense()(ids), layer(ids))
    assert not layer(torch.tensor([4, 9])).any()
    rounding = (layer.matrix().double() - dense.weight.double()).abs()
    slack = 1 if dtype.itemsize > 2 else 3
    assert (rounding <= slack * (0.5 + 1e-5) * layer.scales.double()[:, None]).all()


def test_lookups_outside_of_the_table_fail_as_those_of_a_dense_one():
    layer = PackedEmbedding.from_embedding(nn.Embedding(5, 4))
    for bad in (5, -1):
        with pytest.raises(IndexError, match="index out of range"):
            layer(torch.tensor([bad]))


def test_the_weight_can_be_read_and_multiplied():
    layer = PackedEmbedding.from_embedding(nn.Embedding(50, 24))
    x = torch.randn(3, 24)
    torch.testing.assert_close(functional.linear(x, layer.weight), x @ layer.matrix().T)
    assert (layer.weight.shape, layer.weight.dtype) == ((50, 24), torch.float32)
    assert torch.equal(functional.embedding(IDS.clamp(max=49), layer.weight), layer(IDS.clamp(max=49)))


def test_what_is_no_table_of_int8_rows_is_refused():
    weight = torch.randn(6, 4)
    for wrong in (DensePacked.from_dense(weight), Bitmask.from_dense(weight, value_dtype=torch.int8)):
        with pytest.raises(KernelError, match="rows should be whole and int8"):
            PackedEmbedding(wrong)
    rows = DensePacked.from_dense(weight, value_dtype=torch.int8)
    with pytest.raises(KernelError, match="6 rows has the padding row 6; it should be -6 to 5"):
        PackedEmbedding(rows, 6)
    with pytest.raises(TypeError, match="storage format"):
        PackedEmbedding(weight)
    with pytest.raises(TypeError, match=r"nn\.Embedding"):
        PackedEmbedding.from_embedding(nn.Linear(4, 6))


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


class WithMore(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.ones(1))


class OnlyNamed(nn.Embedding):
    """Nothing of its own but a name."""


def parametrized():
    made = nn.Embedding(200, 64)
    nn.utils.parametrize.register_parametrization(made, "weight", nn.Identity())
    return made


def not_finite():
    made = nn.Embedding(200, 64)
    made.weight.data[3, 5] = float("nan")
    return made


def hooked():
    made = nn.Embedding(200, 64)
    made.register_forward_hook(lambda *_: None)
    return made


REFUSED = {
    "max_norm": (lambda: nn.Embedding(200, 64, max_norm=1.5), "max_norm=1.5 changes rows"),
    "sparse": (lambda: nn.Embedding(200, 64, sparse=True), "with sparse=True its gradients are sparse"),
    "counts": (lambda: nn.Embedding(200, 64, scale_grad_by_freq=True), "with scale_grad_by_freq=True its gradients"),
    "forward": (lambda: Scaled(200, 64), "Scaled has its own forward"),
    "more": (lambda: WithMore(200, 64), "has 'scale' besides its weight"),
    "parametrized": (parametrized, "has its own (weight|parametrizations)|besides its weight"),
    "not finite": (not_finite, "the weight nan at row 3, column 5 has no int8 code"),
    "hooks": (hooked, "it has hooks"),
    "meta": (lambda: nn.Embedding(200, 64, device="meta"), "on the meta device, without values"),
    "integers": (
        lambda: nn.Embedding(200, 64, _weight=torch.ones(200, 64).to(torch.float8_e4m3fn)),
        "is float8_e4m3fn",
    ),
    "small": (lambda: nn.Embedding(8, 64), "its 512 numbers are so few"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_packed_stays_with_its_reason(make, reason):
    model = nn.Sequential(make(), nn.Linear(64, 64))
    jobs, skipped = embedding_jobs(model)
    assert not jobs
    (entry,) = skipped
    assert entry.name == "0"
    assert re.search(reason, entry.reason), entry.reason


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("hooks", "small")])
def test_from_embedding_refuses_the_same(name):
    make, reason = REFUSED[name]
    with pytest.raises(FormatError if name in ("meta", "not finite") else RecipeError, match=reason.split(",")[0]):
        PackedEmbedding.from_embedding(make())


def test_a_subclass_that_only_adds_a_name_is_packed():
    jobs, skipped = embedding_jobs(nn.Sequential(OnlyNamed(200, 64)))
    assert ([job.name for job in jobs], skipped) == (["0"], [])


# pack_


SETTINGS = {
    "int8": ({"precision": "int8"}, True),
    "bfloat16, int8 values": ({"precision": "bfloat16", "value_dtype": "int8"}, True),
    "bfloat16": ({"precision": "bfloat16"}, False),
    "int8 values alone": ({"value_dtype": "int8"}, False),
    "exact": ({}, False),
}


@pytest.mark.parametrize(("settings", "rounds"), SETTINGS.values(), ids=SETTINGS)
def test_pack_rounds_embeddings_only_where_eight_bits_were_asked_for(settings, rounds):
    model = pruned()
    report = secateur.pack_(model, batch_sizes=[1], **settings)
    assert isinstance(model.table, PackedEmbedding) is rounds
    assert isinstance(model.twin, PackedEmbedding) is rounds
    rows = {layer.name: layer for layer in report.layers if layer.format == "dense" and layer.name in ("table", "twin")}
    assert set(rows) == ({"table", "twin"} if rounds else set())
    skipped = {entry.name: entry for entry in report.skipped}
    assert skipped["positions"].weights == 8 * 64
    assert ("table" in skipped) is not rounds


def test_the_report_says_the_error_and_the_bytes_of_rows():
    model = pruned()
    dense = copy.deepcopy(model)
    report = packed(model)
    row = next(layer for layer in report.layers if layer.name == "table")
    table = dense.table.weight.detach()
    wanted = (model.table.matrix() - table).norm() / table.norm()
    assert row.error == pytest.approx(float(wanted), rel=1e-5)
    assert 0 < row.error < 0.01
    assert (row.packed, row.dense_bytes, row.stored_bytes) == (True, 200 * 64 * 4, 200 * 64 + 200 * 4)
    assert "table" in report.to_markdown()
    assert secateur.PackReport.from_json(report.to_json()) == report
    assert report.whole.weights == sum(p.numel() for p in dense.parameters())


def test_include_and_exclude_choose_embeddings():
    model = pruned()
    report = packed(model, include=["table"])
    assert [layer.name for layer in report.layers] == ["table"]
    assert not isinstance(model.twin, PackedEmbedding)
    model = pruned()
    packed(model, exclude=["table"])
    assert isinstance(model.twin, PackedEmbedding)
    assert isinstance(model.table, nn.Embedding)
    model = pruned()
    packed(model, include=["positions", "linear"])  # a small one that is named
    assert isinstance(model.positions, PackedEmbedding)
    with pytest.raises(RecipeError, match="matches none"):
        packed(pruned(), include=["tabel"])


def test_packing_again_leaves_rows_alone():
    model = pruned()
    packed(model)
    table, expected = model.table, model(IDS)
    report = packed(model)
    assert model.table is table
    assert {entry.name: entry.reason for entry in report.skipped}["table"] == "its rows are int8 already"
    torch.testing.assert_close(model(IDS), expected)


# Shared tables


def round_trip(model, make, tmp_path, **options):
    path = tmp_path / "tiny.sparse.safetensors"
    secateur.save(model, path)
    return secateur.load(path, into=make(), **options)


def test_embeddings_that_share_a_table_share_its_rows(tmp_path):
    model = pruned(twin=True)
    report = packed(model)
    row = next(layer for layer in report.layers if layer.name == "table")
    assert row.tied_to == ("twin",)
    for now in (model, round_trip(model, lambda: Reader(twin=True), tmp_path)):
        assert now.table.values is now.twin.values
        assert (now.table.padding_idx, now.twin.padding_idx) == (0, None)
        assert torch.equal(now(IDS), model(IDS))
    dense = round_trip(model, lambda: Reader(twin=True), tmp_path, dense=True)
    assert dense.table.weight is dense.twin.weight
    secateur.unpack_(model)
    assert model.table.weight is model.twin.weight
    assert torch.equal(model.table.weight, dense.table.weight)


def test_a_table_of_a_head_that_stays_dense_stays_dense():
    model = pruned(tied=True)
    report = packed(model)
    assert model.head.weight is model.table.weight
    assert "shares its weight with 'head', which stays dense" in {e.name: e.reason for e in report.skipped}["table"]


def test_a_head_that_is_packed_and_its_table_share_rows(tmp_path):
    model = pruned(tied=True)
    x = torch.randn(2, 64)
    (job,) = [job for job in embedding_jobs(model)[0] if job.name == "table"]
    head = secateur.PackedLinear(
        DensePacked.from_dense(model.head.weight.detach(), value_dtype=torch.int8), None, "dense"
    )
    new = {id(model.head): head}
    found = pack_embeddings([job], [], new, [])
    swap_modules_(model, [(model.head, head), *found.swaps])
    assert found.rows[0].tied_to == ("head",)
    assert model.table.values is model.head.values
    again = round_trip(model, lambda: Reader(tied=True), tmp_path)
    assert again.table.values is again.head.values
    assert torch.equal(again(IDS), model(IDS))
    secateur.unpack_(again)
    assert again.table.weight is again.head.weight
    torch.testing.assert_close(again.head(x), model.head(x))


def test_a_head_that_was_named_takes_its_table_along(monkeypatch):
    kernels_win(monkeypatch)
    model = pruned(tied=True)
    report = packed(model, include=["head"])
    assert [(row.name, row.packed, row.tied_to) for row in report.layers] == [
        ("head", True, ()),
        ("table", True, ("head",)),
    ]
    assert model.table.values is model.head.values
    assert type(model.twin) is nn.Embedding


def test_a_head_with_other_rows_leaves_its_table_dense():
    model = pruned(tied=True)
    (job,) = [job for job in embedding_jobs(model)[0] if job.name == "table"]
    head = secateur.PackedLinear.from_linear(model.head)
    found = pack_embeddings([job], [], {id(model.head): head}, [])
    assert (found.swaps, found.rows) == ([], [])
    assert "without rows" in found.skipped[0].reason


def test_a_table_that_something_else_reads_stays_dense():
    model = nn.ModuleDict({"table": nn.Embedding(200, 64), "other": nn.Conv1d(64, 200, 1)})
    model["other"].weight = model["table"].weight
    jobs, skipped = embedding_jobs(model)
    assert not jobs
    assert "shares its weight with 'other', a Conv1d" in skipped[0].reason


# Files


def test_a_file_has_rows_and_gives_them_back(tmp_path):
    model = pruned()
    packed(model)
    again = round_trip(model, Reader, tmp_path)
    assert type(again.table) is PackedEmbedding
    assert torch.equal(again(IDS), model(IDS))
    stored = read_packed(tmp_path / "tiny.sparse.safetensors")
    assert stored.layers["table"].name == "dense"
    assert stored.metadata["kinds"]["table"]["embedding"] == {"padding_idx": 0}
    dense = round_trip(model, Reader, tmp_path, dense=True)
    assert torch.equal(dense.table.weight, model.table.matrix())


WRONG = {
    "a row beyond": {"embedding": {"padding_idx": 200}},
    "a negative row": {"embedding": {"padding_idx": -1}},
    "no number": {"embedding": {"padding_idx": True}},
    "no object": {"embedding": 7},
    "nothing": {"embedding": {}},
    "a stride": {"stride": [1]},
    "turned": {"transposed": True},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_entries_of_embeddings_are_refused(change, tmp_path):
    model = pruned()
    packed(model)
    contents = take_apart(model, None)
    metadata = contents.metadata()
    metadata["kinds"]["table"] |= change
    path = tmp_path / "tiny.sparse.safetensors"
    write_packed(path, contents.layers, contents.tensors, metadata)
    with pytest.raises(FormatError, match="metadata is not that of a packed model"):
        secateur.load(path, into=Reader())


def test_an_embedding_of_another_format_is_refused(tmp_path):
    model = pruned()
    packed(model)
    contents = take_apart(model, None)
    layers = dict(contents.layers) | {"table": Bitmask.from_dense(model.table.matrix())}
    path = tmp_path / "tiny.sparse.safetensors"
    write_packed(path, layers, contents.tensors, contents.metadata())
    with pytest.raises(FormatError, match="whole rows of int8"):
        secateur.load(path, into=Reader())


def test_a_model_without_the_embedding_is_refused(tmp_path):
    model = pruned()
    packed(model)
    other = Reader()
    other.table = nn.Linear(64, 200, bias=False)
    with pytest.raises(FormatError, match="layer table is an embedding of 200x64, but in the model it is Linear"):
        round_trip(model, lambda: other, tmp_path)


def test_a_transformers_model_with_rows_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    secateur.prune_(model, pattern="unstructured", sparsity=0.9, method="magnitude")
    report = secateur.pack_(model, PackSettings(precision="int8", batch_sizes=[1]))
    assert {layer.name for layer in report.layers if layer.name.startswith("embeddings")} == {
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
    }
    secateur.save(model, tmp_path / "packed")
    ids = torch.tensor([[5, 7, 98]])
    for again in (secateur.load(tmp_path / "packed"), transformers.AutoModel.from_pretrained(tmp_path / "packed")):
        assert isinstance(again.embeddings.word_embeddings, PackedEmbedding)
        assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
