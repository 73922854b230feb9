"""What tests of exporting share."""

from collections.abc import Iterator
from functools import cache

import pytest
from torch.onnx._internal.exporter import _registration

from secateur import kernels
from secateur.engines import ENGINES


def needs_engine(name: str) -> None:
    """Skip where an engine is not installed. It is not imported to find out: OpenVINO would report to its makers."""
    if ENGINES[name].absence:
        pytest.skip(ENGINES[name].absence, allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def registry_is_read_once() -> Iterator[None]:
    """PyTorch's exporter parses its 500 functions anew in each call, which takes more time than all that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _registration.ONNXRegistry, "from_torchlib", staticmethod(cache(_registration.ONNXRegistry.from_torchlib))
        )
        yield


# Without VNNI the engines add pairs of products in 16 bits, which saturate: errors are several times larger there.
exact_products = pytest.mark.skipif(
    not any("vnni" in isa for isa in kernels.isas()),
    reason="the processor has no VNNI, so that the engines' products of 8 bits saturate",
)
