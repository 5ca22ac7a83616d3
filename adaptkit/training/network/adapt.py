"""Install in a model the parts of an adapter other than LoRA on linear layers.

experts      LoRA on stacked expert matrices (PEFT's ``target_parameters``)
whole        parameters that replace the base's (``modules_to_save``, biases, full fine-tuning)
rows         rows of the embedding or output layer (``trainable_token_indices``)
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from adaptkit.checkpoint.adapter_config import is_saved
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.addressing import OTHER_MODEL
from adaptkit.models.base_weights import check_shape
from adaptkit.models.casting import hold
from adaptkit.numerics.lora import LowRank
from adaptkit.training.network.experts import PackedModule, pack
from adaptkit.training.network.frozen import PackedWeight, PlainWeight
from adaptkit.training.network.groups import PackedGroups
from adaptkit.training.network.linear import LoraLinear
from adaptkit.training.network.model import Model
from adaptkit.training.network.stack_lora import StackLora
from adaptkit.training.network.whole import TrainedRows, TrainedWeight, Whole, replace_rows, train_table


@dataclass(frozen=True)
class ParameterPlace:
    """Where the model keeps a parameter of the base.

    Attributes:
        module: the module that holds it.
        child: its name in that module.
        is_packed: whether it is quantized.
    """

    module: nn.Module
    child: str
    is_packed: bool = False


def parameter_places(model: Model) -> dict[str, ParameterPlace]:
    """Return the places of the base's parameters, by their names in transformers; tied ones under all their names."""
    return {f"{path}.{place.child}".removeprefix("."): place for path, place in _places(model.network)}


def _places(network: nn.Module) -> Iterator[tuple[str, ParameterPlace]]:
    for path, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLinear):
            yield path, ParameterPlace(module, "weight", isinstance(module.base, PackedWeight | PackedGroups))
            if module.bias is not None:
                yield path, ParameterPlace(module, "bias")
        elif not isinstance(module, TrainedWeight | TrainedRows | StackLora):
            if isinstance(module, PackedModule):
                yield from ((path, ParameterPlace(module, name, True)) for name in module.packed)
            for name in module._parameters:
                if module._parameters[name] is not None:
                    yield path, ParameterPlace(module, name)


def saved_names(model: Model, endings: Sequence[str]) -> set[str]:
    """Return the names of the parameters inside modules whose paths end with an entry of PEFT's ``modules_to_save``.

    Raises:
        UsageError: no module's path ends with one of them.
    """
    found: set[str] = set()
    places = parameter_places(model)
    for ending in endings:
        config = {"modules_to_save": [ending] if ending else []}
        inside = {name for name in places if is_saved(config, name.rpartition(".")[0])}
        if not inside:
            known = sorted({name.split(".")[-2] for name in places if name.count(".")} - {""})
            raise UsageError(f"modules_to_save: no module is called {ending!r}", hint=f"available: {', '.join(known)}")
        found |= inside
    return found


def bias_names(model: Model, which: str) -> set[str]:
    """Return the names of the biases to train: of all modules, or with ``lora_only`` of modules with an adapter.

    Raises:
        UsageError: there are none.
    """
    adapted = model.adapted()
    found = {name for name in parameter_places(model) if name.rpartition(".")[2] == "bias"}
    if which == "lora_only":
        found = {name for name in found if name.removesuffix(".bias") in adapted}
    if not found:
        raise UsageError(f"bias: {which}, but there are no biases to train", hint="use --bias none")
    return found


def train_whole(
    model: Model, names: Collection[str], values: Mapping[str, Tensor] | None = None, together: bool = True
) -> None:
    """Train parameters in full, in float32. Tied parameters stay tied.

    Args:
        model: modified in place.
        names: names of the parameters.
        values: initial values by name; the base's value if missing.
        together: False if a parameter that is tied to one of ``names``, but not in ``names``, keeps the base's value.

    Raises:
        UsageError: a parameter is quantized, has an adapter, or has trained rows already.
        BaseMismatchError: the model lacks a parameter, or has it in another shape.
    """
    values = values or {}
    for name in sorted(names):
        if name in model.whole:
            continue
        places = parameter_places(model)  # each time: a trained table's module is replaced
        if name not in places:
            raise BaseMismatchError(f"{name}: not found in {model.checkpoint.root}", hint=OTHER_MODEL)
        place = places[name]
        if hasattr(place.module, "trained_rows"):
            raise UsageError(f"{name}: some of its rows are already trained", hint="leave it out of --modules-to-save")
        if place.is_packed or model.assembly.is_quantized(name):
            raise UsageError(
                f"{name}: is quantized; only 16- and 32-bit tensors can be trained in full",
                hint=f"quantize the base again with --skip '{name.removesuffix('.weight')}'",
            )
        value = values[name] if name in values else model.assembly.read(name)
        if isinstance(place.module, LoraLinear):
            model.whole[name] = _train_linear(model, name, place, value)
            for other in model.assembly.tied(name):  # as in Zamba, where some layers share their weights
                is_same = torch.equal(values.get(other, value), value)
                if other != name and is_same and (together or other in names):
                    model.whole[other] = _train_linear(model, other, places[other], value, model.whole[name])
            model.checkpoint.release_pages(value)
            continue
        old = place.module._parameters[place.child]
        check_shape(name, value.shape, tuple(old.shape))  # type: ignore[union-attr]
        parameter = nn.Parameter(value.to(model.device, torch.float32))
        for other, at in places.items():
            is_tied = at.module._parameters.get(at.child) is old
            given = values.get(other)
            differs = given is not None and not torch.equal(given, value)
            if other == name or (is_tied and not differs and (together or other in names)):
                model.whole[other] = Whole(parameter)
                if _is_token_embedding(at.module, model.network):
                    # torch gives the row of padding_idx no gradient, but that token may also be the end token of an
                    # answer. Padding positions get no gradient anyway: they carry no loss.
                    at.module.padding_idx = None
                    train_table(model.network, at.module, parameter, model.dtype)
                elif at.child == "weight" and _is_head(at.module, model.network):
                    train_table(model.network, at.module, parameter, model.dtype)
                else:
                    hold(at.module, at.child, parameter, model.dtype)
        model.checkpoint.release_pages(value)  # the values of a 16-bit base were copied, and are not read again


def _train_linear(model: Model, name: str, place: ParameterPlace, value: Tensor, tied: Whole | None = None) -> Whole:
    """Train a weight or bias of a linear layer in full; ``tied`` is an already trained parameter to share."""
    layer = place.module
    if not isinstance(layer, LoraLinear):
        raise TypeError(type(layer))
    value = value.to(model.device, torch.float32)
    if place.child == "bias":
        check_shape(name, value.shape, (layer.base.shape[0],))
        del layer._buffers["bias"]
        layer.bias = nn.Parameter(value) if tied is None else tied.parameter
        return Whole(layer.bias)
    if layer.lora_a is not None:
        raise UsageError(
            f"{name}: is trained in full and has an adapter", hint="--exclude it, or drop it from --modules-to-save"
        )
    transposed = model.stores_transposed and layer is not model.network.get_output_embeddings()
    layer.base = TrainedWeight(value.T.contiguous() if transposed else value)
    if tied is not None:
        layer.base.weight = tied.parameter
    return Whole(layer.base.weight, transposed)


def _is_token_embedding(module: nn.Module, network: Any) -> TypeGuard[nn.Embedding]:
    """Return whether an embedding has one row per token; position embeddings may need their ``padding_idx``."""
    tokens = network.get_input_embeddings()
    are_embeddings = isinstance(module, nn.Embedding) and isinstance(tokens, nn.Embedding)
    return are_embeddings and module.num_embeddings == tokens.num_embeddings


def _is_head(module: nn.Module, network: Any) -> TypeGuard[nn.Linear]:
    """Return whether a module is the output layer, and linear."""
    return module is network.get_output_embeddings() and isinstance(module, nn.Linear)


def train_rows(
    model: Model, path: str, indices: Sequence[int], rows: Tensor | None = None, together: bool = True
) -> None:
    """Train rows of an embedding or output layer.

    Args:
        model: modified in place.
        path: dotted path of the module.
        indices: row indices.
        rows: (n, dim), initial values; None for the base's rows.
        together: whether modules tied to this one use the trained rows too.

    Raises:
        UsageError: a row does not exist, or the table is quantized, trained in full, or has trained rows already.
        BaseMismatchError: the model has no such module, or its rows have another length.
    """
    name, places = f"{path}.weight", parameter_places(model)
    if name not in places and name not in model.whole:  # a parameter that is trained in full is not in ``places``
        raise BaseMismatchError(f"{path}: not found in {model.checkpoint.root}", hint=OTHER_MODEL)
    if path in model.rows:
        raise UsageError(f"{name}: some of its rows are already trained", hint="leave out --trainable-tokens")
    if name in model.whole or places[name].is_packed or model.assembly.is_quantized(name):
        state = "already trained in full" if name in model.whole else "quantized"
        raise UsageError(f"{name}: is {state}, so its rows cannot be trained", hint="leave out --trainable-tokens")
    table = places[name].module._parameters["weight"]
    entries, dim = table.shape  # type: ignore[union-attr]
    outside = [index for index in indices if not 0 <= index < entries]
    if outside:
        raise UsageError(f"{path}: has {entries} rows, but no row {outside[0]}", hint="use tokens of the vocabulary")
    if rows is None:
        rows = model.assembly.read(name)[torch.tensor(indices)]
    check_shape(f"{path}: trained rows", rows.shape, (len(indices), dim))
    trained = TrainedRows(torch.tensor(indices), rows.float(), entries).to(model.device)
    for place in places.values():
        is_tied = place.module._parameters.get(place.child) is table
        if is_tied and (together or place is places[name]):
            replace_rows(model.network, place.module, trained)
    model.rows[path] = trained


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return (experts, out, in) of a stacked parameter.

    Args:
        module: the module that holds it.
        name: its dotted path.
    """
    leaf = name.rpartition(".")[2]
    packed = dict(module.packed.items()) if isinstance(module, PackedModule) else {}
    stack: Any = packed.get(leaf, module._parameters.get(leaf))
    count, rows, columns = stack.shape
    return (count, columns, rows) if is_transposed(module) else (count, rows, columns)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module of experts declares that its stacks are (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def put_stack(model: Model, name: str, lora_a: Tensor, lora_b: Tensor, factor: float) -> None:
    """Attach LoRA to a stacked parameter.

    Args:
        model: the model; the module that holds the parameter is replaced, if it is not packed yet.
        name: dotted path of the parameter.
        lora_a: (experts, rank, in).
        lora_b: (experts, out, rank).
        factor: scaling.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.network.get_submodule(parent)
    plain = module._parameters.get(leaf)
    if plain is not None:
        module = pack(model.network, module, {leaf: PlainWeight(plain.detach())}, model.dtype)
    if not isinstance(module, PackedModule):
        raise TypeError(f"{leaf} is no stack of {type(module).__name__}")
    module.changes[leaf] = StackLora(lora_a, lora_b, factor, is_transposed(module)).to(model.device)


def stack_changes(model: Model) -> dict[str, tuple[LowRank, ...]]:
    """Return the LoRA of every stacked parameter that has one: by path, one ``LowRank`` per expert."""
    found = {}
    for name, module in model.stacks().items():
        change = module.change_of(name.rpartition(".")[2]) if isinstance(module, PackedModule) else None
        if change is not None:
            halves = zip(change.lora_a.detach(), change.lora_b.detach(), strict=True)
            found[name] = tuple(LowRank.of_tensors(a, b, change.scaling) for a, b in halves)
    return found
