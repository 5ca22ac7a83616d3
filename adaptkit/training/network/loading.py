"""Put an adapter that was read from files into a model, with everything that it is."""

import torch
from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.errors import AdapterError, AdaptkitError, BaseMismatchError
from adaptkit.training.network.adapt import is_transposed, put_stack, stack_shape, train_rows, train_whole
from adaptkit.training.network.model import Model, attach_adapter


def load_adapter(model: Model, adapter: Adapter, dropout: float = 0.0) -> None:
    """Put everything that an adapter is into a model, ready to be measured or trained further.

    Args:
        model: without an adapter.
        adapter: as it was read.
        dropout: of the input of low-rank changes, while training.

    Raises:
        AdapterError: it does something that is not supported; names it.
        BaseMismatchError: it does not fit the model.
    """
    _check_supported(model, adapter)
    attach_adapter(model, adapter.modules, str(adapter.root), dropout)
    for name, magnitude in adapter.magnitudes.items():
        model.linears[name].attach_magnitude(magnitude)
    for name, bias in adapter.biases.items():
        model.linears[name].attach_bias(bias / model.linears[name].scaling)
    values = {name: adapter.files.read(key) for name, key in adapter.replaced.items()}
    head = model.network.get_output_embeddings()
    try:
        train_whole(model, values, values, together=adapter.ties_weights)
        for path, chosen in adapter.tokens.items():
            # As in peft: a tied head has the embedding's rows unless it has its own, and never the other way round.
            is_head = model.network.get_submodule(path) is head
            train_rows(model, path, chosen.indices, chosen.rows, together=len(adapter.tokens) == 1 and not is_head)
    except AdaptkitError as error:
        raise BaseMismatchError(f"{adapter.root}: {error.message}", hint=error.hint) from error
    stacks = model.stacks()
    for name in adapter.experts:
        count, *matrix = stack_shape(stacks[name], name) if name in stacks else (0, 0, 0)
        changes = adapter.experts_for(name, tuple(matrix), name in stacks and is_transposed(stacks[name]))
        if len(changes) != count or list(changes[0].shape) != matrix:
            raise BaseMismatchError(f"{adapter.root}: changes {name}, which {model.checkpoint.root} has not like that")
        a, b = (torch.stack([getattr(change, half).float() for change in changes]) for half in ("lora_a", "lora_b"))
        put_stack(model, stacks[name], name, a, b, changes[0].scaling)


def _check_supported(model: Model, adapter: Adapter) -> None:
    """Refuse what no model here can be given.

    Raises:
        AdapterError: names it.
    """
    head = next((name for name in adapter.modules if name not in model.linears and name.endswith("head")), None)
    others = {
        "a low-rank change of an embedding": next(iter(sorted(adapter.embeddings)), None),
        "a low-rank change of the output layer": head,
        "a change of what is not the base's weight": next(
            (name for name, key in adapter.begins.items() if not _is_the_bases(model, name, adapter.files.read(key))),
            None,
        ),
    }
    for what, name in others.items():
        if name is not None:
            raise AdapterError(
                f"{adapter.root}: has {what} ({name}), which cannot be run here", hint="merge it into its base instead"
            )


def _is_the_bases(model: Model, name: str, value: Tensor) -> bool:
    if model.assembly.is_quantized(name) or name not in model.assembly.sources:
        return False
    return torch.equal(model.assembly.read(name).to(value.dtype), value)
