"""What is no model that can be changed, and weights that are not there to be changed: each with what to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from secateur._errors import RecipeError

_BEFORE = "Prune, train or pack the module that it was made from, and then make it again."


def check_model(model: object) -> nn.Module:
    """Return a model whose weights can be changed.

    Raises:
        TypeError: no module: a state dict, a path, an exported program.
        RecipeError: a module whose code is frozen: scripted, traced or exported.

    Example:
        >>> import torch, secateur
        >>> secateur.prune_(torch.nn.Linear(4, 4).state_dict(), sparsity=0.5, method="magnitude")
        Traceback (most recent call last):
        TypeError: model must be an nn.Module, got a state dict of 2 tensors; load it into its module first ...
    """
    if not isinstance(model, nn.Module):
        found, advice = type(model).__name__, ""
        if isinstance(model, Mapping):
            found = f"a state dict of {len(model)} tensors"
            advice = "; load it into its module first: model.load_state_dict(state_dict)"
        elif isinstance(model, str):
            advice = (
                "; load the model first, or use the command line for a model directory: secateur prune, secateur pack"
            )
        elif (program := getattr(sys.modules.get("torch.export"), "ExportedProgram", None)) and isinstance(
            model, program
        ):
            advice = f", which is exported. {_BEFORE}"
        raise TypeError(f"model must be an nn.Module, got {found}{advice}")
    if isinstance(model, torch.jit.ScriptModule):
        raise RecipeError(f"the model is scripted or traced by torch.jit, which freezes its code.\n{_BEFORE}")
    if _is_exported(model):
        raise RecipeError(f"the model is exported by torch.export, which freezes its code.\n{_BEFORE}")
    return model


def _is_exported(model: nn.Module) -> bool:
    if type(model).__module__ == "torch.export.unflatten":
        return True
    # A module that torch.fx traced still calls its layers; one that was exported calls operators.
    return isinstance(model, torch.fx.GraphModule) and any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    )


def computed_by(module: nn.Module, name: str) -> str:
    """Return who computes a tensor of a module that is no parameter, and the call that makes it one again.

    Example:
        >>> import torch
        >>> from secateur.layers import computed_by
        >>> computed_by(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)), "weight")
        "_WeightNorm; torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') makes it a parameter again"
    """
    if parametrize.is_parametrized(module, name):
        steps = ", ".join(type(step).__name__ for step in module.parametrizations[name])  # type: ignore[index]
        call = f"parametrize.remove_parametrizations(module, {name!r})"
        return f"{steps}; torch.nn.utils.{call} makes it a parameter again"
    calls = {
        "WeightNorm": ("weight_norm", f"remove_weight_norm(module, {name!r})"),
        "SpectralNorm": ("spectral_norm", f"remove_spectral_norm(module, {name!r})"),
        "BasePruningMethod": ("torch.nn.utils.prune", f"prune.remove(module, {name!r})"),
    }
    for hook in module._forward_pre_hooks.values():
        for base in type(hook).__mro__:
            if base.__module__.startswith("torch.nn.utils") and base.__name__ in calls:
                tool, call = calls[base.__name__]
                return f"{tool}; torch.nn.utils.{call} makes it a parameter again"
    return "code that secateur does not know; make it a parameter first"


def why_no_values(modules: tuple[nn.Module, ...]) -> str:
    """Return why the weight of some modules is on the meta device, and what to do."""
    if any(hasattr(module, "_hf_hook") for module in modules):
        return (
            "its weight is offloaded by accelerate, which loads it only while the layer runs.\n"
            "Load the model whole, without device_map or offloading, in a smaller dtype if it must."
        )
    return "its weight is on the meta device, without values. Load the weights first."
