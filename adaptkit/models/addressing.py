"""Mapping from the parameter names of a running model to the tensors of a checkpoint's files.

Adapters name the parameters of the running model. Files may use the same names, have or lack the prefix of the
enclosing model, or use other names, such as one matrix per expert where the model has a stack. The first two cases are
recognized by the names; the last one needs transformers.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, install_hint
from adaptkit.models.architecture import empty_network, named_network, why_unsupported
from adaptkit.models.naming import TensorPlace, places

if TYPE_CHECKING:
    from adaptkit.models.assembly import Assembly

_PREFIXES = (
    ("", ""),
    ("", "model."),
    ("model.", ""),
    ("transformer.", ""),
    ("", "transformer."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
)
"""Pairs of name prefixes: in the model, and in the files."""
OTHER_MODEL = "use the model that the adapter was trained on, with the same head (a classifier's differs)"
_NO_BIAS = (
    "if the adapter has lora_bias, load it with peft, or train it again without lora_bias: the layer has no bias to "
    f"merge it into; otherwise {OTHER_MODEL}"
)
"""Hints of error messages."""


@dataclass(frozen=True)
class Slice:
    """A tensor of the files that is a part of a parameter; or, with ``of_tensor``, has the parameter as its part.

    Attributes:
        name: name of the tensor.
        expert: index of the matrix in a stack of experts; None if there is no stack, or for all of it.
        part: (index, count): the part is the run of rows with this index, when that matrix has ``count`` equal runs.
        of_tensor: the parameter is this part of the tensor; if false, the tensor is this part of the parameter.
    """

    name: str
    expert: int | None = None
    part: tuple[int, int] = (0, 1)
    of_tensor: bool = False


@dataclass(frozen=True)
class Addresses:
    """Tensors of the files that hold parameters.

    Attributes:
        of: maps the name of each parameter to the tensors that hold it.
        mapping_note: short note on how the names were mapped, for reports; empty if they are the same.
        uses: parameters that are tied to others and that the files hold only under another parameter's name.
    """

    of: dict[str, tuple[Slice, ...]]
    mapping_note: str = ""
    uses: frozenset[str] = frozenset()


def find_addresses(checkpoint: Checkpoint, names: Iterable[str], subject: str) -> Addresses:
    """Find the tensors of a checkpoint that hold some parameters.

    Args:
        checkpoint: a checkpoint that is not quantized.
        names: names of parameters in the running model.
        subject: what changes the parameters, such as the adapter's folder; begins error messages.

    Raises:
        BaseMismatchError: the checkpoint lacks a parameter, which the message names; two names are the same parameter;
            or transformers assembles one in an unsupported way.
    """
    wanted = sorted(names)
    for in_model, in_files in _PREFIXES:
        moved = {name: in_files + name[len(in_model) :] for name in wanted if name.startswith(in_model)}
        if all(moved.get(name) in checkpoint.tensors for name in wanted):
            mapping_note = (
                f"names begin with {_shown(in_files)} instead of {_shown(in_model)}" if in_model != in_files else ""
            )
            found: dict[str, tuple[Slice, ...]] = {
                name: (Slice(file),) for name, file in moved.items() if file in checkpoint.tensors
            }
            return Addresses(found, mapping_note)
    return _find_by_architecture(checkpoint, wanted, subject)


def _shown(prefix: str) -> str:
    return repr(prefix) if prefix else "no prefix"


def _find_by_architecture(checkpoint: Checkpoint, wanted: list[str], subject: str) -> Addresses:
    missing = next((name for name in wanted if name not in checkpoint.tensors), "")
    if importlib.util.find_spec("transformers") is None:
        raise BaseMismatchError(
            f"{subject}: changes {missing}, which {checkpoint.root} does not have under that name",
            hint=f"check that this is the right base; if its files use other names, {install_hint('train')}",
        )
    from adaptkit.models.assembly import Assembly  # imported here since it imports torch

    absent = missing
    for build in (named_network,) if why_unsupported(checkpoint) else (empty_network, named_network):
        network = build(checkpoint)  # the second may include the vision part when the first has text only (Mllama)
        if network is not None:
            found = _addresses_in(Assembly(network, checkpoint), wanted, subject)
            if isinstance(found, Addresses):
                return found
            absent = found
    lacks_bias = absent.endswith(".bias") and f"{absent.removesuffix('bias')}weight" in checkpoint.tensors
    hint = _NO_BIAS if lacks_bias else OTHER_MODEL
    raise BaseMismatchError(f"{subject}: changes {absent}, which {checkpoint.root} does not have", hint=hint)


def _addresses_in(assembly: Assembly, wanted: list[str], subject: str) -> Addresses | str:
    """Return the addresses of parameters in a model, or the name of the first one that it lacks."""
    prefix = f"{assembly.network.base_model_prefix}."
    found: dict[str, tuple[Slice, ...]] = {}
    uses, taken = set(), dict[str, str]()
    places_found = places(assembly.network, wanted)
    for name in wanted:
        place = places_found.get(name)
        current_names = place.parameters if place is not None and not place.pattern else ()  # current for an older name
        names = (name, prefix + name, name.removeprefix(prefix), *current_names)
        known = next((n for n in names if n in assembly.sources), None)
        held = known is not None or name in assembly.checkpoint.tensors
        inside = None if held else _find_in_stack(assembly, name, place)
        if known is not None and (other := taken.setdefault(known, name)) != name:
            raise BaseMismatchError(
                f"{subject}: changes {other} and {name}, which are the same parameter of "
                f"{type(assembly.network).__name__}",
                hint="save each adapter on its own; to combine several, give them to one merge",
            )
        if known is not None:
            found[name] = _slices(assembly, known, subject)
            uses |= {name} if assembly.is_borrowed(known) else set()
        elif held:  # such as one expert's matrix where the model has a stack of them
            found[name] = (Slice(name),)
        elif inside is not None:
            found[name] = (inside,)
        else:
            return name
    mapping_note = f"names mapped as transformers does for {type(assembly.network).__name__}"
    return Addresses(found, mapping_note, frozenset(uses))


def _find_in_stack(assembly: Assembly, name: str, place: TensorPlace | None) -> Slice | None:
    """Find one expert's matrix, given by its older name, in a stack that the files hold as one tensor."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert is None or place is None or not place.pattern or len(place.parameters) != 1:
        return None
    stack = place.parameters[0]
    if stack not in assembly.sources or assembly.place(stack).operations:
        return None
    part = (place.patterns.index(place.pattern), len(place.patterns))
    return Slice(assembly.sources[stack][0], int(expert[1]), part, of_tensor=True)


def unsupported_steps(assembly: Assembly, name: str) -> str:
    """Return the steps by which transformers assembles a parameter, if no change of it can be merged; else empty."""
    place = assembly.place(name)
    return "" if place.is_stacked else ", ".join(type(step).__name__ for step in place.operations)


def _slices(assembly: Assembly, name: str, subject: str) -> tuple[Slice, ...]:
    if not assembly.place(name).operations:
        return (Slice(assembly.sources[name][0]),)
    if steps := unsupported_steps(assembly, name):
        raise BaseMismatchError(
            f"{subject}: changes {name}, which transformers assembles from several tensors in an unsupported way "
            f"({steps})",
            hint="train a LoRA adapter of it instead" if subject == "training" else "merge it with peft instead",
        )
    pieces = assembly.pieces(name)
    return tuple(
        Slice(file, expert, (number, len(pieces)))
        for number, files in enumerate(pieces.values())
        for expert, file in enumerate(files)
    )
