"""Does a model look at the values that its stages computed, and so decide by its data what to run next?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# Functions by which values become numbers of Python, or the size of a tensor.
_LOOKS = frozenset(
    {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__", "item", "tolist"}
    | {"numpy", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique"}
    | {"unique_consecutive"}
)


class Decisions(TorchFunctionMode):
    """Notices while it is entered when code outside of the stages looks at values that come from a stage.

    Attributes:
        found: whether that happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._depth = 0
        self._computed = WeakTensorKeyDictionary()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Everything that is computed inside comes from a stage, and may be looked at there."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.found and (self._depth or any(part in self._computed for part in tensors((args, kwargs)))):
            name = getattr(func, "__name__", "")
            if not self._depth and (name in _LOOKS or (name in ("__getitem__", "where") and _sizes(name, args))):
                self.found = True
            for part in tensors(result):
                self._computed[part] = True
        return result


def _sizes(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a tensor's values decide the size of the result."""
    if name == "where":
        return len(args) == 1
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(
        isinstance(part, Tensor) and not part.dtype.is_floating_point and part.element_size() == 1 for part in index
    )


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for entry in tree:
            yield from tensors(entry)
    elif isinstance(tree, dict):
        for entry in tree.values():
            yield from tensors(entry)
