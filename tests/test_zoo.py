"""What the zoo asks of every family, for one family of each kind: see benchmarks/zoo."""

import re
from functools import cache
from pathlib import Path

import examine
import pytest
from families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
# One of each kind. A law that today's code breaks has its reason.
UNREACHED = "a layer that no input reaches stops the default run"
READ = "a weight that is read without calling its layer is not served"
STACKED = "stacked experts are no layers"
SEVERAL = "a module with several weights is no layer"
KINDS = {
    "Llama": {},
    "GPT2": {"trains": "transformers' Conv1D learns no mask"},
    "Falcon": {"trains": "a subclass of nn.Linear learns no mask"},
    "Mixtral": {"reaches": STACKED},
    "GptOss": {"reaches": STACKED},
    "Mamba": {"reaches": UNREACHED, "trains": READ},
    "EsmModel": {"reaches": UNREACHED},
    "T5ForConditionalGeneration": {},
    "ViTModel": {},
    "WavLMModel": {"reaches": UNREACHED, "trains": READ, "reloads": "a route that fits one layer is given to another"},
    "SiglipModel": {"reaches": SEVERAL},
    "TransformerEncoder": {"reaches": SEVERAL, "trains": "no layer that is called may learn a mask"},
    "MultiheadAttention kdim vdim": {"reaches": SEVERAL},
    "LSTM packed sequence": {"reaches": SEVERAL},
    "U-Net": {"reaches": "nn.ConvTranspose2d is no layer"},
    "F.linear on a layer's weight": {"reaches": READ, "trains": READ},
    "Experts by einsum": {"reaches": STACKED},
}


@cache
def line(name):
    return examine.examine(BY_NAME[name])


def kinds(law):
    """Every kind, expected to fail where the table above says so."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=broken[law])] if law in broken else [])
            for name, broken in KINDS.items()
        ],
    )


@kinds("reaches")
def test_the_default_call_reaches_every_matrix_and_makes_exactly_the_zeros_it_reports(name):
    found = line(name)
    assert found.prune in ("2:4, 60 %", "2:4 but for the remainder, 60 %")
    assert found.coverage >= 0.95


@kinds("trains")
def test_masks_act_while_the_model_trains(name):
    assert line(name).train.startswith("yes")


@kinds("reloads")
def test_a_packed_file_gives_the_same_outputs(name):
    assert line(name).reload == "equal"
    assert "changes" not in line(name).pack


def test_models_and_inputs_are_the_same_in_every_run():
    family = BY_NAME["Mixtral"]
    first, second = (examine.outputs(family, family.model()) for _ in range(2))
    assert examine.differ(first, second) == 0


def test_every_family_has_a_line_in_the_document():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (?!family|---)([^|]+) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(BY_NAME)
