"""Packed models on disk: one safetensors file, and for transformers models the directory around it."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError, SparsityError
from secateur.files import (
    INDEX,
    SINGLE,
    ModelDirectory,
    check_output,
    check_place,
    copy_all_but_weights,
    find_shards,
    read_header,
    whole_directory,
)
from secateur.formats import VALUE_DTYPES, Format, NMPacked
from secateur.huggingface import Progress, load_model, model_class, transformers_library
from secateur.kernels import Plan, candidates, default_plan
from secateur.layers import kind_of, swap_modules_
from secateur.nn import PackedConv2d, PackedLinear, pack_weight
from secateur.packing import _autotune
from secateur.packing._file import PackedFile, read_compressed_tensors, read_packed, write_packed
from secateur.packing._pack import pack_, packed_layers, unpack_
from secateur.patterns import NM, Block, SparsityPattern
from secateur.reports import PackReport

FILE = "model.sparse.safetensors"
REPORT = "secateur.pack.json"

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*VALUE_DTYPES[:3], torch.float64)}


@dataclass(frozen=True)
class _Layer:
    """What a packed layer is besides its weight."""

    dtype: torch.dtype  # of the dense weight
    transposed: bool = False
    stride: tuple[int, int] | None = None  # of a convolution
    plan: str = ""


@dataclass(frozen=True)
class _Contents:
    """Everything in a model, as a file holds it.

    Args:
        layers: packed weights by name.
        kinds: what each is besides.
        tensors: all others by name, biases of packed layers among them.
        modules: further names of packed layers that hang in several places, and the first name.
        weights: packed layers that share their weight with another, and which.
        tied: further names of tensors, and the first name.
        machine: that the plans were measured on.
        model: name of the class, for transformers models.
        absent: tensors that the checkpoint had no values for.
        sparse: names among ``layers`` that are plain tensors, stored without their zeros, and their shapes. Read from a
            file, a file of a few bytes may claim any shape; they are made whole where the model has one like it.
    """

    layers: Mapping[str, Format]
    kinds: Mapping[str, _Layer]
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    absent: tuple[str, ...] = ()
    sparse: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Return what is not a tensor."""
        kinds = {
            name: {
                "dtype": str(kind.dtype).removeprefix("torch."),
                "transposed": kind.transposed,
                "stride": None if kind.stride is None else list(kind.stride),
                "plan": kind.plan,
            }
            for name, kind in self.kinds.items()
        }
        same = {name: dict(getattr(self, name)) for name in ("modules", "weights", "tied", "machine")}
        sparse = {name: list(shape) for name, shape in self.sparse.items()}
        return {"kinds": kinds, **same, "model": self.model, "absent": list(self.absent), "sparse": sparse}

    @classmethod
    def of(cls, file: PackedFile) -> _Contents:
        """Return what a file holds, after checking what its own reader does not know.

        Raises:
            FormatError: metadata that cannot be.
        """
        table = file.metadata
        layers, tensors = dict(file.layers), dict(file.tensors)
        try:
            sparse = {name: tuple(shape) for name, shape in dict(table.get("sparse", {})).items()}
            for name, shape in sparse.items():
                if name in tensors or any(type(side) is not int or side < 0 for side in shape):
                    raise ValueError(f"a tensor {name} of shape {shape}")
                if len(shape) < 2 or (shape[0], math.prod(shape[1:])) != layers[name].shape:
                    raise ValueError(f"a tensor {name} of shape {shape}, which is stored as {layers[name].shape}")
            texts = {key: dict(table.get(key, {})) for key in ("modules", "weights", "tied", "machine")}
            of = {**{name: name for name in layers if name not in sparse}, **texts["weights"]}
            kinds = {n: _kind(table.get("kinds", {}).get(n), layers[first]) for n, first in of.items()}
            model, absent = table.get("model", ""), table.get("absent", [])
            if not all(isinstance(text, str) for named in texts.values() for text in named.values()):
                raise TypeError("names should be texts")
            if not isinstance(model, str) or not all(isinstance(name, str) for name in absent):
                raise TypeError("names should be texts")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"its metadata is not that of a packed model: {error}") from None
        plain = {**tensors, **sparse}
        for key, known in (("modules", kinds), ("weights", layers.keys() - sparse), ("tied", plain)):
            for name, first in texts[key].items():
                if first not in known or name in known:
                    raise FormatError(f"its metadata says that {name!r} is {first!r}, but one of them is not so.")
        return cls(layers, kinds, tensors, **texts, model=model, absent=tuple(absent), sparse=sparse)


def _dense_dtype(packed: Format) -> torch.dtype:
    return torch.float32 if packed.value_dtype == torch.int8 else packed.value_dtype


def _kind(table: Any, packed: Format) -> _Layer:
    if table is None:  # a file that was written without a model
        return _Layer(_dense_dtype(packed))
    stride, transposed, plan = table["stride"], table["transposed"], table["plan"]
    if stride is not None:
        stride = tuple(stride)
        if len(stride) != 2 or any(type(step) is not int or not 0 < step < 2**31 for step in stride):
            raise ValueError(f"a stride of {stride}")
    if not isinstance(transposed, bool) or not isinstance(plan, str):
        raise TypeError("transposed should be a truth value and plan a text")
    return _Layer(_DTYPES[table["dtype"]], transposed, stride, plan)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a packed model: as small as its zeros allow, in one file that is checked when it is read.

    A transformers model becomes a directory that :func:`load` gives back: ``model.sparse.safetensors``, the config, and
    the tokenizer if there is one. The weights file bears no name that other libraries look for; they would fill in
    random weights. Any other module becomes one ``.safetensors`` file. Nothing is pickled. Tensors that are the same in
    memory are stored once and come back so.

    Args:
        model: pruned, with or without layers that :func:`pack_` replaced. Weights that run dense are stored without
            their zeros too, where that is smaller, and come back dense; zeros lose their sign.
        path: ends in ``.safetensors`` for one file, an existing one is replaced; else a directory to make.
        source: a model directory whose files, weights excepted, are copied along: config, tokenizer and all others.
        tokenizer: anything with ``save_pretrained``; not needed with ``source``.
        dtype: store tensors of packed layers' biases and all that is not packed in this floating-point dtype.
        overwrite: replace an existing directory. It stays in place until the new one is complete.

    Raises:
        FormatError: the place cannot be written, or a name that other libraries would take for a dense model.
        RecipeError: a directory is asked for, but the model is none of transformers.

    Example:
        >>> import os, tempfile, torch, secateur
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "tiny.sparse.safetensors")
        ...     secateur.save(model, path)
        ...     again = secateur.load(path, into=torch.nn.Sequential(torch.nn.Linear(8, 4)))
        >>> x = torch.randn(2, 8)
        >>> type(again[0]).__name__, torch.equal(again(x), model(x))
        ('PackedLinear', True)
    """
    _save(model, path, source=source, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite)


def _save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    absent: Iterable[str] = (),
    extra: Mapping[str, str] | None = None,
) -> None:
    path = Path(path)
    if path.suffix == ".safetensors":
        contents = _contents(model, dtype, absent)
        write_packed(path, contents.layers, contents.tensors, contents.metadata())
        return
    if source is None and not hasattr(model, "save_pretrained"):
        raise RecipeError(
            f"{path}: only a transformers model has the config that a directory needs, not {type(model).__name__}.\n"
            "Give a path that ends in .safetensors."
        )
    contents = _contents(model, dtype, absent)
    size = sum(packed.nbytes for packed in contents.layers.values())
    size += sum(tensor.nbytes for tensor in contents.tensors.values())
    if source is not None:
        check_output(Path(source), path, overwrite, size)
    else:
        _check_directory(path, overwrite)
    with whole_directory(path) as made:
        if source is not None:
            directory = Path(source)
            shards = (FILE,) if (directory / FILE).exists() else find_shards(directory)
            copy_all_but_weights(directory, made, (*shards, INDEX))
        else:
            model.config.save_pretrained(made)  # type: ignore[union-attr, operator]
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(made)  # type: ignore[union-attr, operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        for name, text in (extra or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        write_packed(made / FILE, contents.layers, contents.tensors, contents.metadata())


def _check_directory(path: Path, overwrite: bool) -> None:
    check_place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise FormatError(f"{path} is a file. Give another output directory.")
    if not overwrite:
        raise FormatError(f"{path} already exists. Give another directory, or overwrite=True to replace it.")
    if any(path.iterdir()) and not (path / "config.json").is_file():
        raise FormatError(f"{path} holds something else than a model, which overwrite would delete. Give another one.")


def _contents(model: nn.Module, dtype: torch.dtype | None, absent: Iterable[str] = ()) -> _Contents:
    """Take a model apart."""
    layers: dict[str, Format] = {}
    kinds: dict[str, _Layer] = {}
    tensors: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    weights: dict[str, str] = {}
    by_module: dict[int, str] = {}
    by_weight: dict[int, str] = {}
    own: set[str] = set()  # keys of the model's state that packed layers account for
    for name, module in packed_layers(model).items():
        inner = module.linear if isinstance(module, PackedConv2d) else module
        prefix = f"{name}.linear." if isinstance(module, PackedConv2d) else f"{name}." if name else ""
        own |= {prefix + key for key in (*inner.names, "bias")}
        if (first := by_module.setdefault(id(module), name)) != name:
            modules[name] = first
            continue
        stride = module.stride if isinstance(module, PackedConv2d) else None
        kinds[name] = _Layer(dtype or inner.weight_dtype, inner.transposed, stride, str(inner.plan))
        if inner.bias is not None:
            tensors[f"{name}.bias"] = inner.bias
        if (first := by_weight.setdefault(id(inner.values), name)) != name:
            weights[name] = first
        else:
            layers[name] = inner.packed
    if "" in kinds:
        raise RecipeError("a bare packed layer has no name to be stored under. Put it into a module.")
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if name in own or name in absent:
            continue
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{name}: the module's extra state is no tensor, and cannot be stored. Remove it first.")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if (first := seen.setdefault(place, name)) != name:
            tied[name] = first
        else:
            tensors[name] = tensor
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    sparse = {name: packed for name, tensor in tensors.items() if (packed := _without_zeros(tensor)) is not None}
    shapes = {name: tuple(tensors.pop(name).shape) for name in sparse}
    machine, name = _autotune.machine(), type(model).__name__
    absent = tuple(sorted(absent))
    return _Contents(layers | sparse, kinds, tensors, modules, weights, tied, machine, name, absent, shapes)


def _without_zeros(tensor: Tensor) -> Format | None:
    """A weight that runs dense, packed for the file alone; None where that would not make it smaller."""
    if tensor.ndim < 2 or tensor.dtype not in VALUE_DTYPES[:3] or not tensor.numel():
        return None
    matrix = tensor.detach().cpu().flatten(1)
    if not (matrix == 0).any():
        return None
    packed = pack_weight(matrix)
    return packed if packed.nbytes < matrix.nbytes else None


def load(
    path: str | Path, *, dense: bool = False, into: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a model that :func:`save` or ``secateur pack`` wrote, packed, with its tensors checked.

    A directory gives the transformers model, in evaluation mode; its class comes from transformers' own tables, and no
    code in the directory is run. A file of tensors needs the module to put them ``into``. Kernels run as they were
    measured, if that was on a machine like this; else as each format was made for, until :func:`pack_` measures anew.

    Directories that compressed-tensors (up to 0.14) wrote as ``sparse-bitmask`` or ``sparse-24-bitmask`` load too.

    Args:
        path: a directory, or a ``.safetensors`` file.
        dense: give plain layers with all their zeros instead of packed ones.
        into: the dense module (or the packed one) that was saved; its layers and tensors are replaced, all or none.
        dtype: make all floating-point tensors but packed weights of this dtype; None leaves them as they were stored.

    Raises:
        FormatError: naming what is wrong with the file, or which tensors the module and the file do not share.
        RecipeError: a file, but no module to put it into.
        ImportError: a directory, but no transformers.

    Example:
        See :func:`save`.

        >>> import secateur
        >>> secateur.load("nowhere.safetensors", into=torch.nn.Identity())
        Traceback (most recent call last):
        secateur._errors.FormatError: nowhere.safetensors cannot be read: No such file or directory.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path, dense, into, dtype)[0]
    if into is None:
        if path.suffix != ".safetensors" and not path.exists():
            raise FormatError(f"{path} does not exist. Give a directory or a .safetensors file that save wrote.")
        raise RecipeError(f"{path} holds tensors, not the module they belong to. Give that one with into=.")
    contents = _contents_of(path, read_packed(path))
    _fill(into, contents, dense, dtype, path)
    return into


def _contents_of(path: Path, file: PackedFile) -> _Contents:
    try:
        return _Contents.of(file)
    except FormatError as error:
        raise FormatError(f"{path}: {error}\nThe file is damaged, or was changed: copy it again.") from None


def _load_directory(
    path: Path, dense: bool, into: nn.Module | None, dtype: torch.dtype | None
) -> tuple[nn.Module, _Contents]:
    if (path / FILE).is_file():
        contents = _contents_of(path / FILE, read_packed(path / FILE))
    elif any(name.endswith(".compressed") for shard in find_shards(path) for name in read_header(path / shard)[0]):
        contents = _Contents.of(read_compressed_tensors(path))
    else:
        raise FormatError(
            f"{path} holds a dense model, not a packed one ({FILE}).\nLoad it with transformers, or pack it first: "
            "secateur pack MODEL_DIR --output OUT."
        )
    model = _skeleton(path, contents) if into is None else into
    _fill(model, contents, dense, dtype, path)
    return model if into is not None else model.eval(), contents


def _skeleton(path: Path, contents: _Contents) -> nn.Module:
    """The model of a directory, with whatever values."""
    if not (path / "config.json").is_file():
        raise FormatError(f"{path} is not a model directory: it has no config.json. Load {FILE} into a module instead.")
    transformers = transformers_library()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of compressed-tensors, which what is read now has no longer
        names = [contents.model, *(getattr(config, "architectures", None) or ())]
        made_by = next(filter(None, (model_class(config, name) for name in names)), None)
        if made_by is None:
            raise ValueError(f"transformers has no class {names} for the model type {config.model_type!r}")
        if contents.absent:
            model = made_by(config)  # what the checkpoint lacks gets the values that transformers would give it
        else:
            with importlib.import_module("transformers.initialization").no_init_weights():
                model = made_by(config)
        model.tie_weights()  # type: ignore[operator]
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except ImportError:
        raise  # says what to install
    except Exception as error:  # whatever transformers makes of a config that it does not check
        raise FormatError(f"{path} cannot be made into a model by transformers: {error}") from None
    return model


def _fill(model: nn.Module, contents: _Contents, dense: bool, dtype: torch.dtype | None, path: Path) -> None:
    """Put layers and tensors into a model, after checking that they are its own."""
    # Another number of threads, or version, leaves a measured plan a better guess than none.
    here = _autotune.machine()
    same_machine = all(contents.machine.get(key) == here[key] for key in ("processor", "kernels"))
    tensors = dict(contents.tensors)
    whole: dict[int, tuple[Format, torch.dtype]] = {}  # by the stand-in, which has only the shape

    def stand_in(packed: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="meta")
        whole[id(made)] = packed, dtype
        return made

    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, shape in contents.sparse.items():
        tensors[name] = stand_in(contents.layers[name], shape, dtype or _dense_dtype(contents.layers[name]))
    state = model.state_dict()
    swaps: list[tuple[nn.Module, nn.Module]] = []
    made: dict[str, nn.Module] = {}
    for name, kind in contents.kinds.items():
        packed = contents.layers[contents.weights.get(name, name)]
        module = _module(model, name, path)
        own = _find_kind(module)
        if own is None and f"{name}.weight" in state:  # such as an embedding, which others compress too
            tensors[f"{name}.weight"] = stand_in(packed, packed.shape, dtype or kind.dtype)
            continue
        if own != (packed.shape, kind.transposed, kind.stride):
            raise FormatError(
                f"{path}: layer {name} is a {'convolution' if kind.stride else 'linear layer'} of "
                f"{packed.shape[0]}x{packed.shape[1]}, but the model has there {module!r:.200}.\n"
                "Give the model that was saved."
            )
        bias = tensors.pop(f"{name}.bias", None)
        if (bias is None) != (
            module.bias is None if not isinstance(module, PackedConv2d) else module.linear.bias is None
        ):
            raise FormatError(f"{path}: layer {name} has {'no' if bias is None else 'a'} bias, unlike the model's.")
        plan = _plan(packed, kind.plan) if same_machine else None
        layer = PackedLinear(packed, bias, plan, dtype or kind.dtype)
        layer.transposed = kind.transposed
        made[name] = PackedConv2d(layer, kind.stride) if kind.stride else layer
        if name in contents.weights and (first := made.get(contents.weights[name])) is not None:
            layer.share_(first.linear if isinstance(first, PackedConv2d) else first)  # type: ignore[arg-type]
        swaps.append((module, made[name]))
    swaps += [(_module(model, name, path), made[of]) for name, of in contents.modules.items() if of in made]
    replaced = {id(module) for module, _ in swaps}
    covered = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in replaced
        for key in module.state_dict()
    }
    wanted = {name: tensor for name, tensor in state.items() if name not in covered}
    tensors.update((name, tensors[first]) for name, first in contents.tied.items() if first in tensors)
    _tie(tensors, wanted)
    missing = sorted(wanted.keys() - tensors.keys() - set(contents.absent))
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        what = f"lacks {missing[:5]}" if missing else f"has {extra[:5]}"
        raise FormatError(
            f"{path} {what}, {'which the model needs' if missing else 'for which the model has no place'} "
            f"({len(missing)} missing, {len(extra)} too many).\nGive the model that was saved."
        )
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            raise FormatError(
                f"{path}: {name} has the shape {list(tensors[name].shape)}, in the model {list(wanted[name].shape)}."
            )
    for module, new in swaps:
        held = next(iter(module.state_dict().values()), None)
        new.to("cpu" if held is None else _device(held)).train(module.training)
    swap_modules_(model, swaps)
    put: dict[int, nn.Parameter] = {}
    made_whole: dict[int, Tensor] = {}
    for name in wanted.keys() & tensors.keys():
        tensor = tensors[name]
        if id(tensor) in whole:
            packed, own_dtype = whole[id(tensor)]
            if id(tensor) not in made_whole:
                made_whole[id(tensor)] = packed.to_dense().to(own_dtype).view(tensor.shape)
            tensor = made_whole[id(tensor)]
        _put(model, name, tensor, put)
    if dense:
        unpack_(model)


def _tie(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Give what the model has tied the tensor of whatever it is tied to."""
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name in tensors and tensor.numel():
            first.setdefault(tensor.data_ptr(), name)
    for name, tensor in wanted.items():
        if name not in tensors and tensor.numel() and (other := first.get(tensor.data_ptr())) is not None:
            tensors[name] = tensors[other]


def _put(model: nn.Module, name: str, tensor: Tensor, put: dict[int, nn.Parameter]) -> None:
    """Replace a parameter or buffer; the same tensor twice becomes the same parameter."""
    where, _, key = name.rpartition(".")
    owner = model.get_submodule(where)
    old = owner._parameters.get(key)
    if old is not None:
        new = put.setdefault(id(tensor), nn.Parameter(tensor.to(_device(old)), requires_grad=old.requires_grad))
        owner._parameters[key] = new
    else:
        buffer = owner._buffers[key]
        owner._buffers[key] = tensor if buffer is None else tensor.to(_device(buffer))


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device  # a skeleton without values gets them here


def _module(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"{path} has the layer {name}, but the model has not. Give the model that was saved."
        ) from None


def _find_kind(module: nn.Module) -> tuple[tuple[int, int], bool, tuple[int, int] | None] | None:
    """Shape as a matrix, whether transposed, and the stride of a convolution; None where nothing can be packed."""
    if isinstance(module, PackedConv2d):
        return (module.linear.out_features, module.linear.in_features), False, module.stride
    if isinstance(module, PackedLinear):
        return (module.out_features, module.in_features), module.transposed, None
    kind = kind_of(module)
    if kind is None:
        return None
    rows, columns = kind.to_matrix(module, getattr(module, kind.parameter)).shape
    if isinstance(module, nn.Conv2d):
        return ((rows, columns), False, tuple(module.stride)) if PackedConv2d.fits(module) else None  # type: ignore[return-value]
    return (rows, columns), not isinstance(module, nn.Linear), None


def _plan(packed: Format, text: str) -> Plan:
    """The plan that was measured, if it can be one for this weight; a file is not trusted."""
    try:
        plan = Plan.parse(text)
    except SparsityError:
        return default_plan(packed)
    patterns: list[SparsityPattern] = []
    for way in plan.ways:
        kind, _, sizes = way.partition(":")
        if kind in ("lanes", "strips"):
            first, second = (int(size) for size in sizes.replace("x", ":").split(":"))
            if kind == "strips":
                patterns.append(Block(first, second))
            elif 0 < first <= second and NMPacked.predicted_nbytes(packed.mask(), NM(first, second)) is not None:
                patterns.append(NM(first, second))
    return plan if set(plan.ways) <= set(candidates(packed, patterns)) else default_plan(packed)


def pack_directory(
    source: str | Path,
    output: str | Path,
    *,
    value_dtype: torch.dtype | str | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    memory: float = 1.0,
    cache: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> PackReport:
    """Pack a pruned Hugging Face model directory into another one that :func:`load` reads.

    Args:
        source: model directory with safetensors weights.
        output: directory to write; it appears complete or not at all.
        value_dtype: of packed weights; None for the checkpoint's own.
        batch_sizes: see :func:`pack_`, like all up to ``cache``. Timed in float32, in which processors are fast.
        include: glob patterns on qualified names.
        exclude: glob patterns.
        memory: times the dense bytes.
        cache: a JSON file of measurements.
        overwrite: replace an existing output directory.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: the source is not a safetensors model directory, or the output cannot be written.
        SparsityError: its other children, for layers and dtypes that do not fit.
        ImportError: transformers is missing.
    """
    directory = ModelDirectory.open(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    progress("loading the model", 0, 1)
    model, missing = load_model(directory, "cpu", with_head=True)
    stored = directory.widest_dtype
    if value_dtype is None and stored in VALUE_DTYPES:
        value_dtype = stored
    untrained = [name for name, _ in model.named_modules() if name in missing]
    report = pack_(
        model,
        batch_sizes=batch_sizes,
        value_dtype=value_dtype,
        include=include,
        exclude=(*exclude, *untrained),
        memory=memory,
        cache=cache,
        progress=progress,
    )
    absent = [name for name in model.state_dict() if name.rpartition(".")[0] in missing]
    progress("writing", 0, 1)
    extra = {REPORT: report.to_json() + "\n"}
    _save(model, output, source=source, dtype=stored, overwrite=overwrite, absent=absent, extra=extra)
    return report


def export_directory(source: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Write a packed model directory as a plain dense one, zeros included, that any tool reads.

    Args:
        source: what :func:`save` or :func:`pack_directory` wrote.
        output: directory to write; it appears complete or not at all.
        overwrite: replace an existing output directory.

    Raises:
        FormatError: the source is no packed model directory, or the output cannot be written.
        ImportError: transformers is missing.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        what = "is a file, not a directory" if source.exists() else "does not exist"
        raise FormatError(f"{source} {what}. Give a directory that secateur pack wrote.")
    check_output(source, output, overwrite, 0)
    model, contents = _load_directory(source, dense=True, into=None, dtype=None)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_output(source, output, overwrite, size)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in contents.absent}
    shards = (FILE,) if (source / FILE).exists() else find_shards(source)
    with whole_directory(output) as made:
        weights = made / ".weights"
        try:
            model.save_pretrained(weights, state_dict=state)  # type: ignore[operator]
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # whatever transformers makes of a config that it does not check
            raise FormatError(f"{source} cannot be written by transformers: {error}") from None
        found = [entry for entry in sorted(weights.iterdir()) if entry.name in (SINGLE, INDEX) or "-of-" in entry.name]
        for entry in found:
            entry.rename(made / entry.name)
        shutil.rmtree(weights)
        copy_all_but_weights(source, made, (*shards, INDEX, REPORT))
