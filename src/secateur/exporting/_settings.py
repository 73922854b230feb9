"""How a model is exported, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur._checks import flag, integer, number, one_of
from secateur._errors import KernelError, RecipeError
from secateur.engines import ENGINES, Engine, library
from secateur.exporting._onnx import check_exporter
from secateur.reports import EXPORT_TARGETS

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ExportSettings:
    """How a model is exported.

    Args:
        to: the format, a key of ``EXPORT_TARGETS``.
        int8: whether matrix products are computed in 8 bits.
        bfloat16: whether OpenVINO computes the rest in bfloat16.
        tolerance: the largest difference to PyTorch in float32, as a part of the largest number in an output.
        shapes: at which speed is measured: texts, and tokens in each; None for the usual ones.
        packed: whether layers with many zeros run by our kernels, inside the engine.

    Raises:
        RecipeError: an unknown format, or settings that do not go together.
    """

    to: str = "onnx"
    int8: bool = False
    bfloat16: bool = False
    tolerance: float = 1e-4
    shapes: Shapes | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        if self.to == "dense":
            raise RecipeError(
                "to='dense' writes a packed directory with plain weights, and a module has no directory.\nSave the "
                "module: secateur.unpack_(model), then secateur.save or its own save_pretrained."
            )
        one_of("format", self.to, EXPORT_TARGETS)
        flag("int8", self.int8)
        if flag("bfloat16", self.bfloat16) and self.to != "openvino":
            raise RecipeError(
                f"ONNX Runtime computes nothing in bfloat16 on CPUs, so that bfloat16 does not go with to={self.to!r}."
                "\nGive to='openvino' (--to openvino), or int8."
            )
        if flag("packed", self.packed) and self.int8 and self.to == "openvino":
            raise RecipeError(
                "in the files of OpenVINO packed layers compute in float32, and int8 rounds all weights, so that they "
                "do not go together there.\nGive to='onnx' (--to onnx), or one of packed (--packed) and int8 (--int8)."
            )
        number("tolerance", self.tolerance, above=0.0, finite=True)
        for rows, length in self.shapes or ():
            integer("a shape's number of texts", rows, 1)
            integer("a shape's number of tokens", length, 1)

    @property
    def precision(self) -> str:
        """In which the engine computes what is not in 8 bits."""
        return "bfloat16" if self.bfloat16 else "float32"

    @property
    def rounds(self) -> bool:
        """Whether numbers have fewer bits than those of PyTorch, so that the outputs differ."""
        return self.int8 or self.bfloat16

    @property
    def engine(self) -> Engine:
        """What runs the files."""
        return ENGINES["onnxruntime" if self.to == "onnx" else "openvino"]

    def check_calibration(self, given: object) -> None:
        """Raise unless inputs for ranges go with the format, if there are some.

        Raises:
            RecipeError: they do not.
        """
        if given is not None and not (self.int8 and self.to == "openvino"):
            why = "ONNX Runtime finds ranges in each call" if self.to == "onnx" else "int8 is off"
            raise RecipeError(
                f"calibration sets the ranges of 8 bits in OpenVINO, and {why}.\nLeave it out, or give to='openvino' "
                "with int8 (--to openvino --int8)."
            )

    def check_installed(self) -> None:
        """Raise unless all that this needs is here.

        Raises:
            ImportError: a package is missing; the message names the extra to install.
            KernelError: the processor cannot compute in the precision, or the library for packed layers was not built.
        """
        check_exporter()
        self.engine.check()
        if reason := self.engine.lacks(self.precision):
            raise KernelError(f"nothing can be checked in {self.precision}: {reason}.\nLeave out bfloat16.")
        if self.packed:
            library(self.engine.name)
