import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.formats import GRIDS, int4_codes

each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def weight_of(rows=5, columns=150, seed=0, drop=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) >= drop)


def rounded(grid, weight):
    scales = grid.scales(weight)
    return grid.codes(weight, scales) * grid.spread(scales, weight.shape[1])


@each_grid
def test_a_scale_belongs_to_a_row_or_to_a_group_of_its_columns(grid):
    scales = grid.scales(weight_of())
    assert scales.shape == (5, 1 if grid.group is None else 3)
    assert scales.dtype == grid.dtype
    codes = grid.codes(weight_of(), scales)
    assert codes.dtype == torch.int8
    assert codes.shape == (5, 150)
    assert int(codes.abs().max()) == grid.limit
    if grid.group is not None:  # each group is rounded on its own
        alone = grid.scales(weight_of()[:, 64:128])
        assert torch.equal(alone[:, 0], scales[:, 1])


@each_grid
def test_codes_are_the_nearest(grid):
    weight = weight_of(drop=0.4)
    scales = grid.scales(weight)
    steps = grid.spread(scales, 150)
    codes = (torch.arange(-grid.limit, grid.limit + 1)[:, None, None] * steps - weight).abs().argmin(0) - grid.limit
    assert torch.equal(grid.codes(weight, scales).long(), codes)
    assert torch.equal(grid.round(weight, steps), codes * steps)


@each_grid
@given(seed=st.integers(0, 10_000), drop=st.sampled_from([0.0, 0.5, 0.95]), largest=st.integers(1, 7))
def test_rounding_again_changes_nothing(grid, seed, drop, largest):
    weight = rounded(grid, weight_of(seed=seed, drop=drop))
    torch.testing.assert_close(rounded(grid, weight), weight, rtol=2e-7, atol=0)
    # A group may have lost its largest codes since its scale was chosen.
    if grid.group is not None:
        scales = grid.scales(weight)
        fewer = grid.codes(weight, scales).clamp(-largest, largest) * grid.spread(scales, weight.shape[1])
        assert torch.equal(rounded(grid, fewer), fewer)


@each_grid
def test_what_has_no_size_is_rounded(grid):
    for shape in ((0, 8), (3, 0), (0, 0)):
        weight = torch.zeros(shape)
        assert grid.codes(weight, grid.scales(weight)).shape == shape
    assert torch.equal(rounded(grid, torch.zeros(2, 70)), torch.zeros(2, 70))
    tiny = torch.full((1, 4), 1e-42)
    assert rounded(grid, tiny).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_grid_is_found_again_in_weights_of_half_precision(dtype):
    codes, scales = int4_codes(weight_of())
    weight = GRIDS["int4"].spread(scales, 150) * codes
    again, _ = int4_codes(weight.to(dtype))
    assert torch.equal(again, codes)


def test_groups_have_less_error_than_with_their_largest_weight_as_the_largest_code():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain = weight.abs().amax(1, keepdim=True) / 7
    error = (rounded(GRIDS["int4"], weight) - weight).square().sum(1)
    assert bool((error <= ((weight / plain).round() * plain - weight).square().sum(1) * 1.001).all())
    assert float(error.sum()) < 0.93 * float(((weight / plain).round() * plain - weight).square().sum())
