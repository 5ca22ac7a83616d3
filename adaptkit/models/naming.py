"""Mapping from the tensor names of files to the parameters of transformers' models.

A file may lack the prefix of the enclosing model (``h.0.attn.c_attn.weight`` of the Hub's GPT-2), use a name of an
older version, or hold one matrix per expert where the model has a stack of them. transformers' own rules are used.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorPlace:
    """The parameters that one tensor of a file is loaded into.

    Attributes:
        parameters: names in the model; several if the tensor is split.
        pattern: the pattern, in transformers' notation, that the tensor's name matches; empty if it is used as it is.
        patterns: patterns of all tensors that are combined with this one, in order.
        operations: transformers' conversion operations on them, in order.
    """

    parameters: tuple[str, ...]
    pattern: str = ""
    patterns: tuple[str, ...] = ()
    operations: tuple[Any, ...] = ()

    @property
    def is_stacked(self) -> bool:
        """Whether the operations only stack experts' matrices, each one tensor or several concatenated along rows."""
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in self.operations]
        return steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def places(network: Any, names: Iterable[str], known: Mapping[str, Any] | None = None) -> dict[str, TensorPlace]:
    """Map the names of a file's tensors to places; names that the model does not have are left out.

    Args:
        network: transformers' model, on the meta device or not, before its layers are replaced.
        names: names of tensors.
        known: the model's tensors by name; its ``state_dict()`` if None.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = network.state_dict() if known is None else known
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, known)
        if renamed not in known:
            renamed, pattern = rename_source_key(name, [], [], network.base_model_prefix, known)
        if renamed not in known:
            continue
        if pattern is None:
            found[name] = TensorPlace((renamed,))
            continue
        converter = by_pattern[pattern]
        targets = converter.target_patterns
        found[name] = TensorPlace(
            tuple(renamed.replace(targets[0], target) for target in targets),
            pattern,
            tuple(converter.source_patterns),
            tuple(converter.operations),
        )
    return found


def missing_parameters(network: Any, found: Mapping[str, TensorPlace]) -> list[str]:
    """Return the parameters of a model that no tensor of the files is loaded into, under any of their names.

    Args:
        network: as in ``places``.
        found: the places of the files' tensors.
    """
    fed = {id(network.get_parameter_or_buffer(name)) for place in found.values() for name in place.parameters}
    return [name for name, parameter in network.named_parameters() if id(parameter) not in fed]


def shape_in(network: Any, place: TensorPlace) -> tuple[int, ...] | None:
    """Return the shape that a tensor must have for its place in a model; None if transformers converts it."""
    return None if place.pattern else tuple(network.get_parameter_or_buffer(place.parameters[0]).shape)
