"""Plan of ``extract``: how the adapter may store each tensor, decided before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptkit.checkpoint.quantization import is_released, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, CheckpointError
from adaptkit.formats._find import quantized_names
from adaptkit.models.matching import matches_any, require_matches
from adaptkit.numerics.spec import FLOATS, TensorSpec
from adaptkit.operations._roles import Role, Roles, find_roles
from adaptkit.operations._tying import is_shared
from adaptkit.operations.options import ExtractOptions
from adaptkit.wording import first_few

LOW_RANK, SAVED, LEFT_OUT, IMPOSSIBLE = "low rank", "saved", "left out", "impossible"
"""Fates of a tensor that differs: stored as A and B, stored whole, not stored, or an error."""

_VOCABULARY = ("embedding", "head")


@dataclass(frozen=True)
class Part:
    """One tensor that both checkpoints hold.

    Attributes:
        spec: its header entry in the base.
        tuned: its header entry in the tuned checkpoint; the shape can differ only in the vocabulary size.
        kind: see ``Role.kind``.
        fate: how the adapter stores it if it differs.
        why: its kind, or why it is left out or cannot be stored.
        paths: dotted paths of its module: in the files first, in the running model last if that is known.
    """

    spec: TensorSpec
    tuned: TensorSpec
    kind: str
    fate: str
    why: str
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name in both checkpoints."""
        return self.spec.name

    @property
    def module(self) -> str:
        """Dotted path of its module in the files."""
        return module_of(self.spec.name)

    @property
    def resized(self) -> bool:
        """Whether the vocabulary size changed."""
        return self.spec.shape != self.tuned.shape


@dataclass(frozen=True)
class ExtractPlan:
    """How the adapter may store each tensor.

    Attributes:
        tuned: the tuned checkpoint.
        base: the checkpoint that it was tuned from.
        parts: all tensors, in the order of the base's files.
        roles: roles of the base's tensors.
    """

    tuned: Checkpoint
    base: Checkpoint
    parts: tuple[Part, ...]
    roles: Roles

    @property
    def transposed(self) -> bool:
        """Whether the files store the weights of linear layers as (in, out)."""
        return any(part.kind == "conv1d" for part in self.parts)


def module_of(name: str) -> str:
    """Return the module of ``<module>.weight`` or ``<module>.bias``; for any other name, the name itself."""
    module, _, kind = name.rpartition(".")
    return module if module and kind in ("weight", "bias") else name


def make_plan(tuned: Checkpoint, base: Checkpoint, options: ExtractOptions) -> ExtractPlan:
    """Plan every tensor from headers alone, and refuse checkpoints that do not belong together.

    Raises:
        CheckpointError: one of them is quantized.
        BaseMismatchError: names or shapes of tensors differ, or dtypes of which one is not a supported float.
        UsageError: a pattern matches no module.
    """
    for checkpoint in (tuned, base):
        method = quantization_found(checkpoint)
        if method is not None:
            can_dequantize = is_released(method) or quantized_names(checkpoint)
            raise CheckpointError(
                f"{checkpoint.root}: quantized with {method}; the difference would mostly be quantization error",
                hint="give the 16-bit checkpoint"
                + (", or dequantize it first if there is no other" if can_dequantize else ""),
            )
    for one, other in ((base, tuned), (tuned, base)):
        missing = [name for name in one.tensors if name not in other.tensors]
        if missing:
            raise BaseMismatchError(
                f"{other.root}: lacks {first_few(missing)}, which {one.root} has",
                hint="give a checkpoint and the base it was tuned from, saved with the same tensor names",
            )
    specs = [(located.spec, tuned.spec(name)) for name, located in base.tensors.items()]
    _refuse(
        tuned,
        base,
        "dtype",
        [(one.name, one.dtype, two.dtype) for one, two in specs if not {one.dtype, two.dtype} <= {*FLOATS}],
        hint=f"save both in one of {', '.join(FLOATS)}, or in the same dtype",
    )
    roles = find_roles(base)
    _refuse(
        tuned,
        base,
        "shape",
        [(one.name, [*one.shape], [*two.shape]) for one, two in specs if not _is_resized(one, two, roles.of)],
        hint="give the base that this model was tuned from",
    )
    transposes = any(role.kind == "conv1d" for role in roles.of.values())
    parts = tuple(
        _part(located.spec, tuned.spec(name), roles.of[name], options, transposes)
        for name, located in base.tensors.items()
    )
    example = next((part for part in parts if part.kind in ("linear", "conv1d")), parts[0])
    require_matches("--target", options.target, [part.paths for part in parts], example.paths[0])
    return ExtractPlan(tuned, base, parts, roles)


def _refuse(tuned: Checkpoint, base: Checkpoint, what: str, found: Sequence[tuple[str, Any, Any]], hint: str) -> None:
    """Raise an error that names the tensors whose two values differ, of those found."""
    differ = [f"{name} (expected {before}, found {after})" for name, before, after in found if before != after]
    if differ:
        raise BaseMismatchError(f"{tuned.root}: {what} differs from {base.root} in {first_few(differ)}", hint=hint)


def _is_resized(before: TensorSpec, after: TensorSpec, roles: Mapping[str, Role]) -> bool:
    """Return whether only the vocabulary size differs: the first dimension of an embedding or head."""
    weight = roles.get(f"{module_of(before.name)}.weight")
    is_table = weight is not None and weight.kind in _VOCABULARY
    return is_table and before.shape[1:] == after.shape[1:] and len(before.shape) > 0


def _part(spec: TensorSpec, tuned: TensorSpec, role: Role, options: ExtractOptions, transposes: bool) -> Part:
    is_weight = spec.name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in FLOATS
    linear = is_weight and spec.shape == tuned.shape and role.kind in ("linear", "conv1d", "expert")
    fits = linear and (role.kind == "conv1d") == transposes  # one fan_in_fan_out flag covers all modules
    paths = tuple(dict.fromkeys([module_of(spec.name), *(module_of(path) for path in role.paths)]))
    if options.target and not any(matches_any(paths, pattern) for pattern in options.target):
        fate, why = LEFT_OUT, "not in --target"
    elif fits:
        fate, why = LOW_RANK, role.kind
    elif options.only_linear:
        fate, why = LEFT_OUT, role.kind
    elif is_shared(spec.name):
        fate, why = IMPOSSIBLE, "table shared by encoder and decoder"
    elif spec.name.endswith((".weight", ".bias")) and spec.dtype in FLOATS:
        fate, why = SAVED, role.kind
    else:
        fate, why = IMPOSSIBLE, role.kind
    return Part(spec, tuned, role.kind, fate, why, paths)
