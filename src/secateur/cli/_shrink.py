"""``secateur shrink``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur._errors import RecipeError
from secateur.cli._app import say, show, show_progress, user_errors, written_or_printed
from secateur.cli._options import (
    AsJson,
    Calibration,
    Device,
    Evaluate,
    Exclude,
    Html,
    Include,
    Overwrite,
    Samples,
    Seed,
    Select,
    SequenceLength,
)

_METHODS = "obs, flap, wanda, magnitude, taylor, fisher; for layers influence, effect"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_MOST_BLOCKS = 100_000


def shrink(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write the smaller model to.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="kind=fraction of its units that stay, such as ffn=0.5 (repeatable).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="params=fraction or macs=fraction of the whole model that stays.")
    ] = None,
    remove_layers: Annotated[
        str | None, typer.Option(help="Blocks that go, counted from 0, such as 2-4,7; or NAME=2-4 of one list of them.")
    ] = None,
    zeros: Annotated[bool, typer.Option("--zeros", help="Remove what is zero already.")] = False,
    removal: Annotated[
        Path | None,
        typer.Option(help="JSON file of the units that go: read, or written beside --keep, --target and others."),
    ] = None,
    analyze: Annotated[bool, typer.Option("--analyze", help="Show what could be removed, and write nothing.")] = False,
    method: Annotated[
        str | None,
        typer.Option(help=f"{_METHODS}; +refit lets the rest take over. Default: obs+refit."),
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="uniform: the same sizes in all blocks; global: each block its own.")
    ] = "uniform",
    round_to: Annotated[int, typer.Option(min=1, help="Round sizes to multiples of it.")] = 1,
    calibration: Calibration = None,
    samples: Samples = 128,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    select: Select = "random",
    include: Include = None,
    exclude: Exclude = None,
    evaluate: Evaluate = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time a forward pass before and after.")
    ] = True,
    html: Html = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Remove whole layers, heads, neurons and experts. The output is a smaller model."""
    with user_errors():
        from secateur.files import check_file
        from secateur.graph import Removal
        from secateur.huggingface import CalibrationText
        from secateur.shrinking import analyze_directory, shrink_directory

        fractions, share, blocks = _fractions(keep), _target(target), _blocks(remove_layers)
        named = {"--keep": keep, "--target": target, "--remove-layers": remove_layers, "--zeros": zeros}
        given = [name for name, value in named.items() if value]
        if html is not None:
            check_file(html, output)
        if analyze:
            if given or removal is not None or output is not None:
                other = [*given, *(["--removal"] if removal else []), *(["--output"] if output else [])]
                raise RecipeError(f"--analyze only looks, and takes no {' and no '.join(other)}. Leave out either.")
            with show_progress() as progress:
                analysis = analyze_directory(model, device=device, progress=progress)
            if not written_or_printed(analysis, html, as_json):
                show(*analysis.tables)
                say(str(analysis))
            return
        if output is None:
            raise RecipeError("--output says where the smaller model goes. Give it, or --analyze to look only.")
        if len(given) > 1 or not (given or removal):
            raise RecipeError(
                "exactly one of --keep, --target, --remove-layers and --zeros, or a file with --removal, says what "
                f"goes; got {' and '.join(given) or 'none'}.\nGive one; --analyze shows what can go."
            )
        listed = Removal.load(removal) if removal is not None and not given else None
        if removal is not None and given:
            _check_new(removal, output, overwrite)
        text = None if calibration is None else CalibrationText(calibration, samples, sequence_length, seed, select)
        with show_progress() as progress:
            report = shrink_directory(
                model,
                output,
                keep=fractions,
                target=share,
                remove=blocks if listed is None else listed,
                zeros=zeros,
                method=method,
                allocation=allocation,
                round_to=round_to,
                include=include,
                exclude=exclude,
                calibration=text,
                evaluate=evaluate,
                latency=latency,
                device=device,
                overwrite=overwrite,
                progress=progress,
            )
        if removal is not None and given:
            Removal(report.removed, report.model_hash, report.model_name).save(removal)
        if written_or_printed(report, html, as_json):
            return
        show(*report.tables)
        say(f"{report}\nwritten to {output}")


def _fractions(keep: Sequence[str] | None) -> dict[str, float] | None:
    """``kind=fraction`` texts as a table; None without any."""
    if not keep:
        return None
    found: dict[str, float] = {}
    for text in keep:
        kind, fraction = _pair("--keep", text, "ffn=0.5")
        if kind in found:
            raise RecipeError(f"--keep names {kind} twice. Give one fraction for each kind.")
        found[kind] = fraction
    return found


def _target(target: str | None) -> dict[str, float] | None:
    return None if target is None else dict([_pair("--target", target, "params=0.5")])


def _pair(option: str, text: str, example: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = None
    if not (name and equals) or number is None:
        raise RecipeError(f"{option} should be a name, = and a fraction, such as {example}; got {text!r}.")
    return name.strip(), number


def _blocks(text: str | None) -> Mapping[str, list[int]] | None:
    """``2-4,7`` as ``{"layers": [2, 3, 4, 7]}``; ``decoder.layers=2-4`` under the name of the list."""
    if text is None:
        return None
    name, _, numbers = text.rpartition("=")
    found: list[int] = []
    for part in numbers.split(","):
        matched = _RANGE.fullmatch(part.strip())
        first, last = (int(matched[1]), int(matched[2] or matched[1])) if matched else (1, 0)
        if not first <= last <= _MOST_BLOCKS:
            raise RecipeError(
                "--remove-layers should be numbers of blocks from 0 on, such as 2-4,7, both ends included; "
                f"got {text!r}."
            )
        found += range(first, last + 1)
    return {name or "layers": sorted(set(found))}


def _check_new(path: Path, output: Path, overwrite: bool) -> None:
    """Raise unless a list of units may be written."""
    from secateur.files import check_file

    check_file(path, output)
    if path.exists() and not overwrite:
        raise RecipeError(
            f"{path} exists. Beside --keep, --target, --remove-layers or --zeros, --removal writes which units went.\n"
            "Give another file or --overwrite; or leave out the others to remove what the file lists."
        )
