import json
import math

import pytest

pytest.importorskip("transformers")

from secateur import Recipe
from secateur.demo import _demo


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_demo, "METHODS", ("magnitude", "sparsegpt+refit"))
    monkeypatch.setattr(_demo, "TARGETS", (("2:4", None), ("unstructured", 0.7)))
    monkeypatch.setattr(_demo, "SAMPLES", 16)
    monkeypatch.setattr(_demo, "HELDOUT_WINDOWS", 16)


@pytest.mark.slow
def test_the_demo_prunes_the_model_that_the_package_carries(small, tmp_path):
    steps = []
    rows = _demo.run(tmp_path, lambda description, done, total: steps.append((done, total)))
    assert [(row["method"], row["target"]) for row in rows] == [
        ("magnitude", "2:4"),
        ("sparsegpt+refit", "2:4"),
        ("magnitude", "unstructured 70 %"),
        ("sparsegpt+refit", "unstructured 70 %"),
    ]
    assert steps[-1] == (4, 4)
    assert {row["sparsity"] for row in rows[:2]} == {0.5}
    for worse, better in (rows[:2], rows[2:]):
        assert better["before"] < better["after"] < worse["after"]
        assert better["error"] < worse["error"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "unstructured 70 %" in page
    assert json.loads(json.dumps(rows)) == rows


def test_the_model_knows_its_language(small):
    """An untrained model would be at the size of the vocabulary."""
    demo = _demo.DemoModel()
    perplexity = demo.perplexity(demo.model)
    assert 5 < perplexity < 25 < len(demo.model.get_input_embeddings().weight)
    assert math.isfinite(perplexity)


@pytest.mark.slow
def test_pruning_a_copy_leaves_the_model_alone(small):
    demo = _demo.DemoModel()
    before = demo.perplexity(demo.model)
    demo.prune(Recipe(pattern="2:4", method="magnitude"), demo.batches(), before)
    assert demo.perplexity(demo.model) == before


def test_calibration_windows_follow_the_seed(small):
    demo = _demo.DemoModel()
    first, again, other = demo.batches(0), demo.batches(0), demo.batches(1)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(first, again, strict=True))
    assert any((a["input_ids"] != b["input_ids"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_the_last_act_packs_the_pruned_model_and_measures_it(small, monkeypatch):
    monkeypatch.setattr(_demo, "PACKED", (("unstructured", 0.9),))
    monkeypatch.setattr(_demo, "INPUTS", ((1, 1), (2, 8)))
    monkeypatch.setattr(_demo, "ROUNDS", 3)
    rows = _demo.run_packed(lambda description, done, total: None)
    assert [(row["target"], row["windows"], row["tokens"]) for row in rows] == [
        ("unstructured 90 %", 1, 1),
        ("unstructured 90 %", 2, 8),
    ]
    for row in rows:
        assert row["dense_bytes"] > 4 * 4e6  # 4.2 million float32 weights, those shared by embedding and head once
        assert row["packed_bytes"] < 0.3 * row["dense_bytes"]  # 3.7 million of them pruned at 90 %
        assert row["difference"] < 1e-4
        assert min(row["dense_speed"], row["packed_speed"], row["ratio"]) > 0
    assert json.loads(json.dumps(rows)) == rows
    assert [row[:2] for row in _demo.packed_runs_table(rows).rows] == [
        ("unstructured 90 %", "1 x 1"),
        ("unstructured 90 %", "2 x 8"),
    ]
