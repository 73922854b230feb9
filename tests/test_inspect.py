import pytest
import torch
from safetensors.torch import save_file

from secateur import NM, Block, Column, FormatError, Row, Unstructured
from secateur.files import inspect, summarize
from secateur.patterns import satisfied

PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 16), Block(4, 4), Block(16, 16), Block(1, 8), Row(), Column()]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_is_recognised_in_its_own_zeros(pattern):
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    mask = pattern.mask(scores, pattern.sparsity if pattern.sparsity is not None else 0.5)
    assert pattern in satisfied(~mask)


def test_unstructured_zeros_satisfy_nothing():
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    assert satisfied(~Unstructured().mask(scores, 0.3)) == ()


def test_a_weaker_pattern_that_follows_is_not_repeated():
    zero = ~NM(2, 4).mask(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)))
    assert [pattern for pattern in satisfied(zero) if isinstance(pattern, NM)] == [NM(2, 4)]
    tiles = ~Block(16, 16).mask(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)), 0.5)
    assert [pattern for pattern in satisfied(tiles) if isinstance(pattern, Block)] == [Block(16, 16)]


def test_one_wrong_weight_breaks_the_pattern():
    zero = ~NM(2, 4).mask(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)))
    row, column = (int(index) for index in zero.nonzero()[0])
    zero[row, column] = False
    assert NM(2, 4) not in satisfied(zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_file_summary(tmp_path, dtype):
    weight = torch.ones(8, 8)
    weight[:, ::2] = -0.0
    save_file(
        {"w": weight.to(dtype), "bias": torch.zeros(3), "ids": torch.zeros(4, dtype=torch.int64)},
        tmp_path / "m.safetensors",
    )
    found = {summary.name: summary for summary in inspect(tmp_path / "m.safetensors")}
    assert set(found) == {"w", "bias"}
    assert found["w"].sparsity == 0.5
    assert NM(1, 2) in found["w"].patterns
    assert Column() in found["w"].patterns
    assert found["bias"].patterns == ()


def test_convolution_is_read_as_out_by_rest():
    weight = torch.ones(4, 2, 3, 3)
    weight[1] = 0
    summary = summarize("conv", weight, "F32")
    assert summary.sparsity == 0.25
    assert Row() in summary.patterns


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (1, 7)])
def test_odd_shapes(shape):
    assert satisfied(torch.zeros(shape, dtype=torch.bool)) == ()
    assert satisfied(torch.ones(shape, dtype=torch.bool)) == ((Row(), Column()) if 0 not in shape else ())


def test_what_is_no_model(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        list(inspect(tmp_path / "nowhere"))
    with pytest.raises(FormatError, match="no weights"):
        list(inspect(tmp_path))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(FormatError, match="not a readable"):
        list(inspect(tmp_path / "junk.safetensors"))
