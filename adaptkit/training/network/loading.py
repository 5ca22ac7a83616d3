"""Load an adapter that was read from files into a model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.adapter_config import is_parameter
from adaptkit.errors import AdapterError, AdaptkitError, BaseMismatchError
from adaptkit.models.addressing import OTHER_MODEL
from adaptkit.models.naming import TensorPlace, places
from adaptkit.numerics.lora import LowRank, transposed
from adaptkit.numerics.tensors import as_tensor
from adaptkit.training.network.adapt import (
    is_transposed,
    parameter_places,
    put_stack,
    stack_shape,
    train_rows,
    train_whole,
)
from adaptkit.training.network.model import Model


def load_adapter(model: Model, adapter: Adapter, dropout: float = 0.0) -> None:
    """Install all parts of an adapter in a model, to evaluate it or train it further.

    Args:
        model: without an adapter; modified in place.
        adapter: the adapter as it was read.
        dropout: dropout probability of the LoRA input, in training mode.

    Raises:
        AdapterError: the adapter has a part that is not supported; names it.
        BaseMismatchError: the adapter does not fit the model.
    """
    older = _older_names(model, adapter)
    if model.stores_transposed:
        adapter = replace(adapter, modules=_of_linear_layers(adapter))
    adapter = _with_current_names(adapter, older)
    _check_supported(model, adapter, older)
    attach_adapter(model, adapter.modules, str(adapter.root), dropout)
    for name, magnitude in adapter.magnitudes.items():
        model.linears[name].attach_magnitude(as_tensor(magnitude))
    for name, bias in adapter.biases.items():
        model.linears[name].attach_bias(as_tensor(bias) / model.linears[name].scaling)
    values = {name: as_tensor(adapter.files.read(key)) for name, key in adapter.replaced.items()}
    head = model.network.get_output_embeddings()
    try:
        train_whole(model, values, values, together=adapter.ties_weights)
        for path, chosen in adapter.tokens.items():
            # As in peft: a tied head uses the embedding's rows unless it has its own, but never the other way round.
            is_head = model.network.get_submodule(path) is head
            alone = len(adapter.tokens) == 1 and not is_head
            train_rows(model, path, chosen.indices, as_tensor(chosen.rows), together=alone)
    except AdaptkitError as error:
        raise BaseMismatchError(f"{adapter.root}: {error.message}", hint=error.hint) from error
    stacks = model.stacks()
    for name in adapter.experts:
        count, *matrix = stack_shape(stacks[name], name) if name in stacks else (0, 0, 0)
        changes = adapter.experts_for(name, tuple(matrix), name in stacks and is_transposed(stacks[name]))
        if len(changes) != count or list(changes[0].shape) != matrix:
            raise BaseMismatchError(
                f"{adapter.root}: changes {name}, which {model.checkpoint.root} does not have in this shape",
                hint=OTHER_MODEL,
            )
        a, b = (torch.stack([getattr(change, half).float() for change in changes]) for half in ("lora_a", "lora_b"))
        put_stack(model, name, a, b, changes[0].scaling)


def attach_adapter(model: Model, changes: Mapping[str, LowRank], where: str, dropout: float = 0.0) -> None:
    """Attach existing LoRA updates to a model's linear layers.

    Args:
        model: modified in place.
        changes: the updates, by module.
        where: name of the adapter, for error messages.
        dropout: dropout probability of their input, in training mode.

    Raises:
        BaseMismatchError: the model lacks a module, or its weight has another shape.
    """
    for name, change in changes.items():
        if name not in model.linears:
            raise BaseMismatchError(
                f"{where}: changes {name}, which {model.checkpoint.root} does not have", hint=OTHER_MODEL
            )
        try:
            model.linears[name].attach(change, dropout)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{where}: {name}: {error.message}", hint=error.hint or OTHER_MODEL) from error


def _of_linear_layers(adapter: Adapter) -> dict[str, LowRank]:
    """Return the changes of an adapter for Conv1D layers as (out, in); those of ``target_parameters`` are (in, out)."""
    return {n: transposed(t) if is_parameter(adapter.config, n) else t for n, t in adapter.modules.items()}


def _older_names(model: Model, adapter: Adapter) -> dict[str, TensorPlace]:
    """Map the adapter's modules that the model lacks to their places, where an older transformers used that name."""
    known = parameter_places(model)
    weights = {f"{module}.weight" for module in (*adapter.modules, *adapter.tokens)}
    weights |= {f"{name.rpartition('.')[0]}.weight" for name in (*adapter.replaced, *adapter.base_copies)}
    found = places(model.network, sorted(weights - known.keys()), known)
    return {name.removesuffix(".weight"): place for name, place in found.items()}


def _with_current_names(adapter: Adapter, older: Mapping[str, TensorPlace]) -> Adapter:
    moved = {n: p.parameters[0].removesuffix(".weight") for n, p in older.items() if not p.pattern}

    def current(name: str) -> str:
        module, _, kind = name.rpartition(".")
        return moved[name] if name in moved else f"{moved[module]}.{kind}" if module in moved else name

    renamed: dict[str, Any] = {}
    for part in ("modules", "magnitudes", "biases", "tokens", "replaced", "base_copies") if moved else ():
        before = getattr(adapter, part)
        renamed[part] = {current(name): value for name, value in before.items()}
        if len(renamed[part]) < len(before):
            raise AdapterError(
                f"{adapter.root}: changes one module under names of several releases of transformers",
                hint="save each adapter on its own; to combine several, give them to one merge",
            )
    return replace(adapter, embeddings=set(map(current, adapter.embeddings)), **renamed)


def _check_supported(model: Model, adapter: Adapter, older: Mapping[str, TensorPlace]) -> None:
    """Refuse adapters with parts that cannot be loaded into a model.

    Raises:
        AdapterError: a part is not supported; names it.
        BaseMismatchError: the adapter changes a weight that is not a linear layer in the model, such as one matrix of
            an expert stack; names it.
    """
    head = next((name for name in adapter.modules if name not in model.linears and name.endswith("head")), None)
    others = {
        "a low-rank change of an embedding": next(iter(sorted(adapter.embeddings)), None),
        "a low-rank change of the output layer": head,
        "a change of a weight that differs from the base's": next(
            (
                n
                for n, key in adapter.base_copies.items()
                if not _equals_base(model, n, as_tensor(adapter.files.read(key)))
            ),
            None,
        ),
    }
    for what, name in others.items():
        if name is not None:
            raise AdapterError(
                f"{adapter.root}: has {what} ({name}), which train and evaluate cannot use",
                hint="merge it into its base instead",
            )
    known, kind = parameter_places(model), type(model.network).__name__
    for name in sorted(adapter.modules.keys() - model.linears.keys()):
        if name in older or f"{name}.weight" in known:
            raise BaseMismatchError(
                f"{adapter.root}: changes {name}, for which {kind} has no linear layer of its own",
                hint="merge it into its base instead",
            )


def _equals_base(model: Model, name: str, value: Tensor) -> bool:
    if model.assembly.is_quantized(name) or name not in model.assembly.sources:
        return False
    return torch.equal(model.assembly.read(name).to(value.dtype), value)
