import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import KernelError, PatternError, RecipeError, kernels
from secateur.formats import VALUE_DTYPES
from secateur.kernels import BitmaskLayout, GroupLayout, PanelLayout, TileLayout, _native_backend

ISAS = [*kernels.isas(), "reference"]


def random_mask(rows, columns, density):
    return torch.rand(rows, columns) < density


def group_mask(rows, columns, n, m):
    scores = torch.rand(rows, columns // m, m)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n).indices, True).view(rows, columns)


def block_mask(rows, columns, height, width, density):
    kept = torch.rand(rows // height, columns // width) < density
    return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)


def free(layout, density, **options):
    def case(rows, columns):
        return layout, random_mask(rows, columns, density), options

    return case


def groups(n, m):
    def case(rows, columns):
        columns = max(columns // m, 1) * m
        return GroupLayout, group_mask(rows, columns, n, m), {"n": n, "m": m}

    return case


def tiles(height, width, density=0.4):
    def case(rows, columns):
        rows, columns = max(rows // height, 1) * height, max(columns // width, 1) * width
        return TileLayout, block_mask(rows, columns, height, width, density), {"height": height, "width": width}

    return case


CASES = {
    "bitmask": free(BitmaskLayout, 0.5),
    "bitmask full": free(BitmaskLayout, 1.0),
    "bitmask empty": free(BitmaskLayout, 0.0),
    "panels": free(PanelLayout, 0.3),
    "panels full": free(PanelLayout, 1.0),
    "panels empty": free(PanelLayout, 0.0),
    "panels small": free(PanelLayout, 0.3, height=5, width=7),
    "panels wide": free(PanelLayout, 0.2, height=64, width=32768),
    "groups 1:1": groups(1, 1),
    "groups 1:2": groups(1, 2),
    "groups 2:3": groups(2, 3),
    "groups 2:4": groups(2, 4),
    "groups 1:4": groups(1, 4),
    "groups 3:4": groups(3, 4),
    "groups 3:5": groups(3, 5),
    "groups 4:8": groups(4, 8),
    "groups 2:16": groups(2, 16),
    "groups 11:16": groups(11, 16),
    "tiles 1x1": tiles(1, 1),
    "tiles 4x4": tiles(4, 4),
    "tiles 16x1": tiles(16, 1),
    "tiles 1x16": tiles(1, 16),
    "tiles 2x9": tiles(2, 9),
    "tiles 8x3": tiles(8, 3),
    "tiles 32x32": tiles(32, 32),
    "tiles 31x2": tiles(31, 2),
    "tiles empty": tiles(4, 4, 0.0),
}


def packed_case(name, rows, columns, dtype=torch.float32):
    layout, mask, options = CASES[name](rows, columns)
    weight = torch.randn(mask.shape).masked_fill(~mask, 0)
    return weight, mask, layout.pack(weight, mask, value_dtype=dtype, **options)


def run(isa, x, packed, bias=None):
    if isa == "reference":
        with kernels.use("reference"):
            return kernels.linear(x, packed, bias)
    with kernels.use("native", isa=isa):
        return kernels.linear(x, packed, bias)


def assert_close(y, x, weight, bias, isa=""):
    """Within the accuracy of float32: relative to the sizes of the summands, because the sums may cancel."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T + 1
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2e-6 * scale).all(), (isa, len(x))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_multiplies_at_every_batch_and_shape(name):
    torch.manual_seed(0)
    for rows, columns in [(1, 1), (3, 5), (17, 70), (40, 128), (130, 300)]:
        weight, _, packed = packed_case(name, rows, columns)
        for batch in [0, 1, 2, 3, 4, 5, 8, 11, 16, 17, 24, 33, 57, 64, 70, 259]:
            x = torch.randn(batch, weight.shape[1])
            bias = torch.randn(weight.shape[0]) if batch % 2 else None
            for isa in ISAS if batch < 16 else kernels.isas():  # the reference has one algorithm for all batches
                assert_close(run(isa, x, packed, bias), x, weight, bias, isa)


@pytest.mark.skipif(not kernels.isas(), reason="no native kernels")
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(("full", "empty"))])
def test_every_value_dtype_multiplies(name):
    """With float32, the test above compares more."""
    torch.manual_seed(0)
    for dtype in set(VALUE_DTYPES) - {torch.float32}:
        _, _, packed = packed_case(name, 48, 130, dtype)
        for batch in [1, 3, 8, 20, 70, 128, 259]:
            x, bias = torch.randn(batch, packed.shape[1]), torch.randn(packed.shape[0])
            for isa in kernels.isas():
                assert_close(run(isa, x, packed, bias), x, packed.to_dense(), bias, isa)


@pytest.mark.parametrize("name", CASES)
def test_packing_loses_only_the_precision_of_the_value_dtype(name):
    torch.manual_seed(0)
    for rows, columns in [(1, 1), (17, 70), (64, 96)]:
        weight, mask, packed = packed_case(name, rows, columns)
        assert torch.equal(packed.to_dense(), weight)
        for dtype in [torch.bfloat16, torch.float16]:
            options = CASES[name](1, 1)[2]
            narrow = type(packed).pack(weight, mask, value_dtype=dtype, **options)
            assert torch.equal(narrow.to_dense(), weight.to(dtype).float())
        eight = type(packed).pack(weight, mask, value_dtype=torch.int8, **CASES[name](1, 1)[2])
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((eight.to_dense() - weight).abs() <= step * 0.5001).all()
        assert (eight.to_dense()[~mask] == 0).all()


def test_half_precision_values_are_read_exactly():
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()].view(-1, 1)[:63488]
    packed = BitmaskLayout.pack(finite, torch.ones_like(finite, dtype=torch.bool), value_dtype=torch.float16)
    for isa in kernels.isas():
        assert torch.equal(run(isa, torch.ones(1, 1), packed)[0], finite[:, 0].float())


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("name", ["bitmask", "panels", "panels small", "groups 2:4", "tiles 4x4", "tiles 31x2"])
def test_results_do_not_depend_on_threads_or_repetition(name, isa):
    torch.manual_seed(0)
    _, _, packed = packed_case(name, 256, 512)
    try:
        for batch in [1, 40, 300]:  # threads share the rows of the weight, or those of x
            x = torch.randn(batch, packed.shape[1])
            torch.set_num_threads(1)
            once = run(isa, x, packed)
            for threads in [2, 3, 1, 2]:
                torch.set_num_threads(threads)
                assert torch.equal(run(isa, x, packed), once)
    finally:
        torch.set_num_threads(1)


@given(st.data())
def test_any_shape_density_and_batch(data):
    name = data.draw(st.sampled_from(sorted(CASES)))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    _, _, packed = packed_case(name, rows, columns, data.draw(st.sampled_from(VALUE_DTYPES)))
    x = torch.randn(data.draw(st.integers(1, 80)), packed.shape[1])
    assert_close(run(data.draw(st.sampled_from(ISAS)), x, packed), x, packed.to_dense(), None)


def test_a_group_may_keep_fewer_than_n():
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    packed = GroupLayout.pack(weight, n=2, m=4)
    assert torch.equal(packed.to_dense(), weight)
    assert kernels.linear(torch.arange(8.0), packed).item() == 15.0


def test_a_mask_keeps_zeros_and_drops_values():
    weight, mask = torch.tensor([[1.0, 0.0, 3.0, 4.0]]), torch.tensor([[True, True, False, False]])
    packed = BitmaskLayout.pack(weight, mask)
    assert packed.offsets.tolist() == [0, 2]
    assert packed.to_dense().tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_leading_dimensions_and_type_of_x_are_kept():
    packed = PanelLayout.pack(torch.eye(6))
    for x in [torch.randn(6), torch.randn(2, 3, 6), torch.randn(0, 6), torch.randn(6, 2).T]:
        assert torch.equal(kernels.linear(x, packed), x)
    for dtype in [torch.bfloat16, torch.float16, torch.float64]:
        x = torch.randn(2, 6).to(torch.bfloat16).to(dtype)
        y = kernels.linear(x, packed)
        assert y.dtype == dtype
        assert torch.equal(y, x)


def test_sizes_are_what_the_bits_say():
    torch.manual_seed(0)
    mask = random_mask(256, 512, 0.25)
    kept, dense = int(mask.sum()), mask.numel()
    spare = 16
    bitmask = BitmaskLayout.pack(torch.ones(256, 512), mask)
    assert bitmask.nbytes == 4 * (kept + spare) + dense // 8 + 8 * 257
    panels = PanelLayout.pack(torch.ones(256, 512), mask, value_dtype=torch.int8)
    assert panels.nbytes == 2 * (kept + spare) + 2 * (256 * 2) + 8 * 5 + 4 * 256
    pairs = GroupLayout.pack(torch.ones(256, 512), group_mask(256, 512, 2, 4), n=2, m=4, value_dtype=torch.bfloat16)
    assert pairs.nbytes == 2 * (dense // 2 + spare) + dense // 2 // 4
    blocks = TileLayout.pack(torch.ones(256, 512), block_mask(256, 512, 4, 4, 1.0), height=4, width=4)
    assert blocks.nbytes == 4 * (dense + spare) + 4 * (dense // 16) + 8 * 65


# --- backends


def test_a_compiler_means_native_kernels():
    if shutil.which("g++") or shutil.which("clang++"):
        assert kernels.available()["native"] == "ok"


def test_one_openmp_runtime():
    """In a process of its own: other libraries bring theirs."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system has no /proc")
    code = "import secateur.kernels as k; k.available(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    files = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(files) <= 1


def test_without_the_module_the_reference_runs_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(_load_module(), "_loaded", None)
    monkeypatch.setitem(sys.modules, "secateur.kernels._native", None)
    packed, x = PanelLayout.pack(torch.eye(4)), torch.randn(2, 4)
    (native, reason), _, (reference, state) = kernels.explain(x, packed)
    assert (native, reference, state) == ("native", "reference", "ok")
    assert "the native module is missing" in reason
    assert "C++17" in reason
    assert kernels.isas() == []
    assert torch.equal(kernels.linear(x, packed), x)
    with pytest.raises(KernelError, match="the native module is missing"), kernels.use("native"):
        pass


def _load_module():
    return sys.modules["secateur.kernels._load"]


@pytest.fixture
def isa_not_read():
    """As in a process that has not read SECATEUR_ISA yet, which happens once."""
    _native_backend.default_isa.cache_clear()
    yield
    _native_backend.default_isa.cache_clear()


@pytest.mark.skipif(not kernels.isas(), reason="no native kernels")
def test_the_variable_forces_an_instruction_set(monkeypatch, isa_not_read):
    packed, x = PanelLayout.pack(torch.eye(4)), torch.randn(1, 4)
    monkeypatch.setenv("SECATEUR_ISA", "generic")
    assert _native_backend.default_isa() == "generic"
    monkeypatch.setenv("SECATEUR_ISA", "sse9")
    assert _native_backend.default_isa() == "generic"
    _native_backend.default_isa.cache_clear()
    assert "sse9" in kernels.available()["native"]
    assert "sse9" in kernels.explain(x, packed)[0][1]
    with pytest.raises(KernelError, match=r"SECATEUR_ISA is 'sse9'.*generic"):
        kernels.linear(x, packed)


def test_use_is_undone():
    packed, x = PanelLayout.pack(torch.eye(4)), torch.randn(1, 4)
    with kernels.use("reference"):
        assert kernels.explain(x, packed)[0] == ("native", "use('reference') is in force")
    assert kernels.explain(x, packed)[0][1] == kernels.available()["native"]
    with pytest.raises(KernelError, match=r"no backend 'fast'.*valid are native, reference"), kernels.use("fast"):
        pass
    with pytest.raises(KernelError, match="isa='sse9'"), kernels.use("reference", isa="sse9"):
        pass


def test_gradients_go_through_the_reference():
    torch.manual_seed(0)
    weight, _, packed = packed_case("panels", 5, 9)
    x, bias = torch.randn(3, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    assert "gradient" in kernels.explain(x, packed)[0][1]
    kernels.linear(x, packed, bias).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(3, 9))
    assert torch.equal(bias.grad, torch.full((5,), 3.0))
    with torch.no_grad():
        assert not kernels.linear(x, packed, bias).requires_grad


# --- errors


def test_wrong_sizes_are_named():
    packed = BitmaskLayout.pack(torch.eye(4))
    with pytest.raises(KernelError, match=r"\(2, 5\).*takes 4 features"):
        kernels.linear(torch.ones(2, 5), packed)
    with pytest.raises(KernelError, match=r"shape \(\).*takes 4 features"):
        kernels.linear(torch.tensor(1.0), packed)
    with pytest.raises(KernelError, match=r"bias has shape \(3,\).*4 outputs"):
        kernels.linear(torch.ones(2, 4), packed, torch.ones(3))


def test_wrong_types_are_named():
    packed = BitmaskLayout.pack(torch.eye(4))
    with pytest.raises(TypeError, match=r"layout of secateur.kernels or a format of secateur.formats, got Tensor"):
        kernels.linear(torch.ones(2, 4), torch.eye(4))
    with pytest.raises(TypeError, match=r"input of a packed weight must be floating point, got int64"):
        kernels.linear(torch.ones(2, 4, dtype=torch.int64), packed)
    with pytest.raises(TypeError, match="floating-point tensor"):
        BitmaskLayout.pack(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="a mask must be a bool tensor, got float32"):
        BitmaskLayout.pack(torch.eye(2), torch.eye(2))
    with pytest.raises(RecipeError, match="unknown value_dtype 'float64'"):
        BitmaskLayout.pack(torch.eye(2), value_dtype=torch.float64)


def test_what_does_not_fit_a_layout_is_named():
    with pytest.raises(PatternError, match=r"\(2, 2, 2\).*flatten"):
        BitmaskLayout.pack(torch.ones(2, 2, 2))
    with pytest.raises(PatternError, match=r"mask has shape \(2, 3\), but the weight has shape \(2, 2\)"):
        BitmaskLayout.pack(torch.eye(2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(KernelError, match="0 rows and 8 columns"):
        PanelLayout.pack(torch.eye(2), height=0, width=8)
    with pytest.raises(KernelError, match="2:4 does not fit a weight of 6 inputs"):
        GroupLayout.pack(torch.zeros(2, 6), n=2, m=4)
    with pytest.raises(KernelError, match="2:17 does not fit"):
        GroupLayout.pack(torch.zeros(2, 17), n=2, m=17)
    with pytest.raises(KernelError, match="a group of 4 inputs keeps 3 weights; 2:4 keeps at most 2"):
        GroupLayout.pack(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), n=2, m=4)
    with pytest.raises(KernelError, match="tiles of 3x3 do not divide a weight of 4x6"):
        TileLayout.pack(torch.zeros(4, 6), height=3, width=3)
