"""Does a model have plain weights, which can be cut and trained?"""

from __future__ import annotations

from torch import nn

from secateur._errors import RecipeError
from secateur.layers import check_model
from secateur.nn._counterpart import packed_layers
from secateur.nn._sparse_layer import SparseLayer


def check_dense(model: object, purpose: str) -> nn.Module:
    """Return a model that has plain weights.

    Args:
        model: that was given.
        purpose: what cannot be done to packed weights: ``"nothing can be cut out of it"``.

    Raises:
        TypeError: no module.
        RecipeError: a layer is packed, learns a mask, or holds other numbers than weights.
    """
    checked = check_model(model)
    packed = list(packed_layers(checked))
    if packed:
        raise RecipeError(f"{packed[0]} is packed, so that {purpose}. Unpack first: secateur.unpack_(model).")
    gated = [name for name, module in checked.named_modules() if isinstance(module, SparseLayer)]
    if gated:
        raise RecipeError(f"{gated[0]} has a mask that is being learned. Finish the training first: finalize().")
    return checked
