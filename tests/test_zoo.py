"""What the zoo asks of every family, for one family of each kind: see benchmarks/zoo."""

import re
from functools import cache
from pathlib import Path

import examine
import pytest
from families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
# One of each kind. A law that today's code breaks has its reason.
KINDS = {
    "Llama": {},
    "GPT2": {},
    "Falcon": {},
    "Mixtral": {},
    "GptOss": {},
    "Mamba": {},
    "EsmModel": {},
    "T5ForConditionalGeneration": {},
    "ViTModel": {},
    "WavLMModel": {"reaches": "a convolution under weight_norm stays dense"},
    "SiglipModel": {},
    "TransformerEncoder": {"trains": "no layer that is called may learn a mask"},
    "MultiheadAttention kdim vdim": {},
    "LSTM packed sequence": {},
    "U-Net": {},
    "F.linear on a layer's weight": {},
    "Experts by bmm": {},
    "Experts by einsum": {},
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
