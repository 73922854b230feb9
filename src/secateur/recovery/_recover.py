"""Train a pruned or shrunk model again for some minutes, with its dense model as the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError
from secateur._sharding import is_sharded
from secateur._types import Progress
from secateur.calibration import Forward, PaddingSource, call_model, quiet
from secateur.nn import check_dense
from secateur.recovery._batches import Batches
from secateur.recovery._budget import Clock
from secateur.recovery._correspond import correspondence, repeated_blocks
from secateur.recovery._run import Recovery
from secateur.recovery._runs import Runner
from secateur.recovery._settings import Loss, MakeOptimizer, Settings
from secateur.recovery._terms import Pool
from secateur.reports import RecoveryReport, Stage


def recover_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "full",
    loss: str | Loss = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer | None = None,
    accumulate: int = 1,
    clip: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 512,
    rank: int = 16,
    held_out: float = 0.1,
    autocast: torch.dtype | str | None = "auto",
    gradient_checkpointing: bool = False,
    max_memory: int | str = "1GB",
    keep_teacher_outputs: bool = True,
    pooling: Pool | None = None,
    history: Stage | Iterable[Stage] = (),
    forward: Forward | None = None,
    padding: PaddingSource | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> RecoveryReport:
    """Get the accuracy of a pruned or shrunk model back, in place, within a budget of minutes or steps.

    The model learns to give what the dense model gives for the same inputs; no labels are needed. Its zeros stay zeros,
    bit for bit, under every method and optimizer, and no other matrix entry becomes zero. A part of the batches is held
    out, and the model ends in the state that was best on it, which is never worse than the one that it came in. Dropout
    is off. Weights of 16 bits are trained in float32. Nothing is left behind on either model.

    Args:
        model: pruned, shrunk or both; dense, not packed. Frozen parameters (``requires_grad=False``) stay as they are.
        teacher: the dense model. It is not changed. It may be on another device and in another dtype.
        batches: inputs as for :func:`prune_`, without labels, read once. Where it is not known how many there are, only
            as many as ``steps`` needs; with ``minutes`` they must end.
        method: what is trained. ``"full"``: all weights. ``"norms"``: norms and biases, about 0.1 % of the weights.
            ``"lora"``: a low-rank change of each matrix, added to it at the end, and norms and biases. ``"blocks"``:
            each repeated block on its own, one after the other, which needs the memory of one block only.
            ``"batchnorm"``: nothing; only the statistics of batch norms are estimated again, as all other methods do
            first.
        loss: ``"auto"`` chooses by the output. ``"logits"``: Kullback-Leibler divergence, and for token logits the
            normalised error behind each block. ``"embeddings"``: for encoders, the error of token states and blocks,
            the cosine of pooled embeddings, and the cosines between the texts of a batch. ``"outputs"``: the squared
            error of all output tensors. Or a function ``loss(student_output, teacher_output, batch)`` that returns one
            number; there, tensors of the teacher have 16 bits.
        minutes: working time, all that happens in this call counted; kept within a tenth. 10 if neither is given.
        steps: of the optimizer, in place of minutes. With the same seed and threads the result is the same, bit for
            bit.
        learning_rate: the highest; by default by method. It rises over the first 5 % of the budget and falls to zero.
        weight_decay: of AdamW.
        optimizer: a function of parameters, in place of AdamW: ``lambda parameters: torch.optim.SGD(parameters, 0.1)``.
            Its learning rates are the highest; ``learning_rate`` and ``weight_decay`` are not given then.
        accumulate: batches of a step.
        clip: the largest norm of all gradients together.
        temperature: of ``"logits"``.
        top_k: outcomes of the teacher that ``"logits"`` keeps for each token.
        rank: of the changes of ``"lora"``.
        held_out: part of the batches that is not trained on, spread evenly; at most 64 batches.
        autocast: ``torch.bfloat16`` or ``torch.float16``, to compute training steps in; None for float32. ``"auto"``
            takes bfloat16 where the device multiplies it natively. Weights, and what is measured, stay in float32.
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, and compute the rest again.
        max_memory: bytes or a text such as ``"1GB"`` for the teacher's outputs, in half precision; the rest goes to
            disk.
        keep_teacher_outputs: False runs the teacher again each time. The result is the same.
        pooling: ``pooling(states, real)`` makes embeddings ``[batch, width]`` of token states ``[batch, length,
            hidden]`` and of which tokens are real ``[batch, length]``; by default their mean.
        history: reports of what was done to the model. That of :func:`shrink_` says which blocks are still there.
        forward: ``forward(model, batch)`` runs either model, if batches are of another kind.
        padding: as for :func:`prune_`.
        seed: of the order of the batches, and of the first values of ``"lora"``.
        checkpoint: a folder in which the state of the run is kept. The same call with the same folder goes on from it.
        progress: called with a description, and how much of how much is done.

    Returns:
        The report: held-out loss before and after, its curve, and what was trained. After Ctrl-C the model is in the
        best state so far, and the report says so; before the first held-out loss is known the interrupt is raised.
        After an error the model is in no worse state than the one that it came in.

    Raises:
        RecipeError: settings that contradict each other; a model and a teacher that do not correspond; a packed model;
            a held-out loss that is not finite before the first step.
        StatisticsError: fewer than two batches, or one that does not fit.
        TypeError: an argument of the wrong type.

    Example:
        >>> import copy, torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model = copy.deepcopy(dense)
        >>> _ = secateur.prune_(model, sparsity=0.7, method="magnitude")
        >>> batches = [torch.randn(64, 8) for _ in range(8)]
        >>> report = secateur.recover_(model, dense, batches, steps=60, learning_rate=0.01)
        >>> report.best < 0.5 * report.start, round((model[0].weight == 0).float().mean().item(), 2)
        (True, 0.7)

    References:
        Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023, arXiv:2310.06927;
        Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv:2312.15230; Wagner
        et al., "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025, arXiv:2510.14444.
    """
    clock = Clock()
    settings = Settings(
        method=method,
        loss=loss,
        minutes=minutes,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimizer=optimizer,
        accumulate=accumulate,
        clip=clip,
        temperature=temperature,
        top_k=top_k,
        rank=rank,
        held_out=held_out,
        autocast=autocast,
        gradient_checkpointing=gradient_checkpointing,
        max_memory=max_memory,
        keep_teacher_outputs=keep_teacher_outputs,
        seed=seed,
    )
    student, dense = _plain(model, "model"), _plain(teacher, "teacher")
    settings = settings.on(student)
    _check_pair(student, dense)
    read = Batches.of(student, batches, settings, forward)
    past = tuple(history) if isinstance(history, Iterable) else (history,)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    pair = correspondence(student, dense, past)
    run = forward or call_model
    recovery = Recovery(
        student=Runner(student, pair.blocks, run, padding, settings.precision, repeated_blocks(student)),
        teacher=Runner(dense, pair.teachers, run, padding),
        batches=read,
        pair=pair,
        settings=settings,
        clock=clock,
        pool=pooling,
        folder=folder,
        tell=progress or (lambda description, done, total: None),
    )
    with quiet(student), quiet(dense):
        return recovery.run()


def _plain(model: object, name: str) -> nn.Module:
    """The model itself, without the wrapper of another library."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        if name == "model" and any(p.is_floating_point() and p.element_size() == 2 for p in model.parameters()):
            # DistributedDataParallel would no longer see the gradients of parameters that were in float32 meanwhile.
            raise RecipeError(
                f"the model has weights of 16 bits inside {type(model).__name__}. Give model.module, and wrap it anew "
                "afterwards."
            )
        model = model.module
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
    checked = check_dense(model, "it cannot be trained" if name == "model" else "it is no dense teacher")
    if any(is_sharded(parameter) for parameter in checked.parameters()):
        raise RecipeError(
            f"the {name} is sharded over processes (fully_shard), which recover_ does not do. Give every process the "
            "whole model; batches are shared out among them."
        )
    if any(tensor.is_meta for tensor in checked.parameters()):
        raise RecipeError(f"the {name} has parameters on the meta device, without values. Load its weights first.")
    quantized = [entry for entry, p in checked.named_parameters() if not p.is_floating_point() or p.element_size() < 2]
    if quantized:
        raise RecipeError(
            f"the {name} is quantized: {quantized[0]} has no weights of 16 or more bits. Recover first, and quantize "
            "afterwards."
        )
    return checked


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    if student is teacher:
        raise RecipeError("model and teacher are the same object. Load the dense model once more, or copy it first.")
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if shared:
        raise RecipeError(
            f"model and teacher share {len(shared)} parameters ({shared[0]} is one), so that the teacher would "
            "change.\nCopy the model before pruning: copy.deepcopy(model)."
        )
