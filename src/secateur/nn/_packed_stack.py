"""Packed matrices in the place of a parameter: a stack such as the experts of a mixture, or rows on rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import KernelError
from secateur.nn._packed import PackedLinear
from secateur.nn._packed_weight import PackedWeight


class PackedStack(nn.Module):
    """Packed matrices in the place of a parameter of a module.

    It is a submodule under the name that the parameter had, so that ``deepcopy``, ``state_dict`` and ``.to`` of the
    model work, and code of the module finds it there. It is used as the parameter was: ``stack[expert]`` is a
    :class:`PackedWeight`, and so is all that only takes matrices out of it or transposes them. ``F.linear``, ``@``,
    ``torch.bmm``, ``F.grouped_mm`` and ``torch.einsum`` run the packed kernels, matrix by matrix, and only for those
    that inputs reach. Any other function gets the dense weight.

    Methods that a tensor has, too, act as those of the tensor: ``stack.to(dtype)`` returns a weight and leaves the
    stack as it is. Those of the model that has the stack convert it.

    Args:
        parts: the matrices ``[out, in]`` by name. ``"0"``, ``"1"`` and so on for a stack.
        stacked: whether they are the matrices of a stack, all of one shape; else they follow on one another in the
            first dimension of the parameter.
        transposed: whether the parameter has them as ``[in, out]``.

    Raises:
        KernelError: no matrix, or matrices of shapes that do not go together.

    Example:
        >>> import torch, secateur
        >>> from secateur.nn import PackedStack
        >>> experts = torch.randn(3, 4, 8)
        >>> linears = [torch.nn.Linear(8, 4) for _ in range(3)]
        >>> parts = {str(i): secateur.PackedLinear.from_linear(linear) for i, linear in enumerate(linears)}
        >>> stack = PackedStack(parts)
        >>> x = torch.randn(2, 8)
        >>> stack.shape, (x @ stack[1].T).shape, torch.bmm(x.expand(3, 2, 8), stack.mT).shape
        (torch.Size([3, 4, 8]), torch.Size([2, 4]), torch.Size([3, 2, 4]))
    """

    def __init__(self, parts: Mapping[str, PackedLinear], *, stacked: bool = True, transposed: bool = False) -> None:
        super().__init__()
        # Of matrices that are side by side only the other side must be of one size.
        shapes = {part.matrix_shape if stacked else part.matrix_shape[not transposed] for part in parts.values()}
        if len(shapes) != 1:
            raise KernelError(
                f"a packed stack of {len(parts)} matrices has the {'shapes' if stacked else 'sizes'} {sorted(shapes)}; "
                "they should be the same. Check that the matrices come from one parameter."
            )
        self.stacked, self.transposed = stacked, transposed
        self._modules.update(parts)

    @property
    def parts(self) -> dict[str, PackedLinear]:
        """The matrices by name."""
        return dict(self._modules)  # type: ignore[arg-type]

    def tensor(self) -> PackedWeight:
        """Return the stack as a tensor of the parameter's shape: packed, but dense while a compiler traces."""
        if torch.compiler.is_compiling():
            dense = [part.weight.T if self.transposed else part.weight for part in self._modules.values()]  # type: ignore[union-attr]
            return torch.stack(dense) if self.stacked else torch.cat(dense)  # type: ignore[arg-type, return-value]
        first: Any = next(iter(self._modules.values()))
        made, of = self.__dict__.get("_view", (None, None))
        if of is not first._buffers["_like"]:  # another dtype or device
            parts: Any = list(self._modules.values())
            made = PackedWeight(parts, self.stacked, self.transposed, int(self.transposed))
            self.__dict__["_view"] = made, first._buffers["_like"]
        return made  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what reads this very stack."""
        return {key: value for key, value in self.__dict__.items() if key != "_view"}

    def to_dense(self) -> Tensor:
        """Return the dense parameter's values, in a new tensor."""
        return self.tensor().unpack().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of memory that kernels have taken so far, besides the stored weights."""
        return sum(part.runtime_nbytes for part in self.parts.values())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function with the tensor in the place of the module."""
        return func(*_as_tensors(args), **_as_tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Return what the parameter had under a name that no module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self.__dict__.get("_modules"):
                raise
            return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        """Return matrices of the stack."""
        return self.tensor()[index]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the matrices of the stack."""
        return iter(self.tensor())

    def __len__(self) -> int:
        """Return the size of the first dimension."""
        return len(self.tensor())

    def extra_repr(self) -> str:
        """Describe the stack."""
        return f"shape={tuple(self.shape)}, bytes={self.nbytes:,}"

    def __repr__(self) -> str:
        """Describe the stack in one line: there may be hundreds of matrices."""
        return f"PackedStack({self.extra_repr()})"


def _as_tensors(value: Any) -> Any:
    if isinstance(value, PackedStack):
        return value.tensor()
    if type(value) in (list, tuple):
        return type(value)(_as_tensors(one) for one in value)
    if type(value) is dict:
        return {key: _as_tensors(one) for key, one in value.items()}
    return value


def _of_tensor(name: str) -> Any:
    def method(self: PackedStack, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor(), name)(*_as_tensors(args), **_as_tensors(kwargs))

    method.__name__, method.__doc__ = name, f"``{name}`` of the tensor."
    return method


def _property_of_tensor(name: str) -> property:
    def read(self: PackedStack) -> Any:
        return getattr(self.tensor(), name)

    read.__doc__ = f"``{name}`` of the tensor."
    return property(read)


# Operators are looked up at the class. Conversions are those of a tensor, and not of a module: code that converts a
# parameter for one product must not convert the stack.
_OPERATORS = (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul") for side in ("", "r")),
    *("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__array__"),
)
_CONVERSIONS = ("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad_")
for _name in (*_OPERATORS, *_CONVERSIONS):
    setattr(PackedStack, _name, _of_tensor(_name))
# Compilers do not follow __getattr__: what code mostly asks a parameter for.
for _name in ("shape", "dtype", "device", "ndim", "T", "mT"):
    setattr(PackedStack, _name, _property_of_tensor(_name))
for _name in ("size", "dim", "transpose", "permute", "view", "reshape", "unbind", "chunk", "split", "detach", "select"):
    setattr(PackedStack, _name, _of_tensor(_name))


def packed_stacks(model: nn.Module) -> dict[str, PackedStack]:
    """Return the stacks of a model by qualified name. One with several names is there under each."""
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if isinstance(module, PackedStack)}


def put_in_place_(model: nn.Module, swaps: Sequence[tuple[nn.Parameter | nn.Module, nn.Parameter | nn.Module]]) -> None:
    """Replace parameters and modules of a model at every place where the model has them.

    A parameter may be replaced by a module, such as a stack, and a module by a parameter.

    Args:
        model: changed in place.
        swaps: pairs of an old parameter or module and its replacement.
    """
    new: dict[int, Any] = {id(old): replacement for old, replacement in swaps}
    for module in list(model.modules()):
        own = [*module._parameters.items(), *module._modules.items()]
        for name, old in own:
            if old is None or id(old) not in new:
                continue
            replacement = new[id(old)]
            held = isinstance(old, nn.Module), isinstance(replacement, nn.Module)
            if held[0] != held[1]:
                del (module._modules if held[0] else module._parameters)[name]
            (module._modules if held[1] else module._parameters)[name] = replacement
