"""Which tensors of a checkpoint are quantized, which stay as they are, and why.

What is quantized are the weights of linear layers; what stays are embeddings, norms, routers, biases, the head and
(unless asked for) experts. ``operations._roles`` says what each tensor is; this module says what follows from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from adaptkit.checkpoint.header import FLOATS, TensorSpec
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.operations._inquiry import find_roles
from adaptkit.operations._roles import Role, Roles

MOE = ("keep", "quantize")
"""What can be done with experts."""

_REASONS = {"linear": "", "conv1d": "", "expert": "expert: bitsandbytes cannot load it quantized"}
"""Why a tensor stays, by its kind; the other kinds are their own reasons."""


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor.

    Attributes:
        spec: the tensor in the source.
        kept_because: why it stays as it is, in a few words; empty if it is quantized.
        transposed: whether the module keeps its weight as (in, out), so that it is transposed before it is quantized.
        is_linear: whether readers take it for the weight of a linear layer.
        paths: dotted paths by which the readers of the file know its module.
    """

    spec: TensorSpec
    kept_because: str
    transposed: bool = False
    is_linear: bool = False
    paths: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Dotted path, in the file, of the module whose weight this is; a stack of experts is one by itself."""
        return self.spec.name.removesuffix(".weight")


@dataclass(frozen=True)
class Selection:
    """What happens to a checkpoint.

    Attributes:
        choices: one for every tensor, in file order.
        read_from: how it was found out which tensors are linear.
        head: the readers' path of the output layer, in the file or tied to the embedding.
        head_is_quantized: whether it was asked for.
    """

    choices: tuple[Choice, ...]
    read_from: str
    head: str = "lm_head"
    head_is_quantized: bool = False


def select(
    checkpoint: Checkpoint,
    *,
    skip: Sequence[str] = (),
    include_head: bool = False,
    moe: str = "keep",
    block_size: int = 64,
    roles: Roles | None = None,
) -> Selection:
    """Decide for every tensor of a checkpoint that is not quantized yet.

    Args:
        checkpoint: unquantized.
        skip: shell patterns of module paths that stay as they are; see ``matches_any``.
        include_head: quantize the output layer too.
        moe: ``keep`` leaves experts as they are, since bitsandbytes cannot load them; ``quantize`` quantizes them for
            adaptkit's own trainer.
        block_size: weights sharing one constant; no block may straddle two experts.
        roles: what the tensors are, if that is known already.

    The layout of a stack of experts, (experts, rows, columns), is that of a matrix: the same parts under the name of
    the parameter, with three numbers for the shape in the state. Codes are in row-major order over (expert, row,
    column) and a stack is chosen only if rows · columns is a multiple of ``block_size``, so that expert e has the
    bytes [e · s / 2, (e + 1) · s / 2) and the constants [e · s / block_size, (e + 1) · s / block_size), s being
    rows · columns. The groups of 256 constants of double quantization and their offset are the whole stack's.

    Raises:
        UsageError: the head is asked for but is the embedding, or is not there.
        CheckpointError: ``config.json`` describes no model that could be this one.
    """
    if moe not in MOE:
        raise UsageError(f"moe: must be one of {', '.join(MOE)}, found {moe!r}")
    roles = roles or find_roles(checkpoint)
    if include_head:
        _check_head(checkpoint, roles)
    choices = [
        Choice(
            spec=located.spec,
            kept_because=_kept_because(located.spec, roles.of[name], skip, include_head, moe, block_size),
            transposed=roles.of[name].kind == "conv1d",
            is_linear=roles.of[name].is_linear,
            paths=roles.of[name].paths,
        )
        for name, located in checkpoint.tensors.items()
    ]
    return _without_namesakes(Selection(tuple(choices), roles.read_from, roles.head, include_head), roles)


def skip_modules(selection: Selection) -> list[str]:
    """The value of ``llm_int8_skip_modules``: readers quantize every linear layer that it does not name.

    Full dotted paths, sorted. The head is named even if it is tied and in no file, since the list replaces the one
    that readers would make. Experts that stay are named once a layer, by the path that they have in common: readers
    take a path for a prefix, and compare every module with every entry.
    """
    kept = {path for choice in selection.choices if choice.kept_because and choice.is_linear for path in choice.paths}
    return sorted(kept | (set() if selection.head_is_quantized else {selection.head}))


def matches_any(selection: Selection, pattern: str) -> bool:
    """Whether a ``skip`` pattern means any module, by its path in the file or in the model."""
    return any(_matches(choice.module, choice.paths, pattern) for choice in selection.choices)


def _matches(module: str, paths: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in (module, *paths))


def of_type(spec: TensorSpec) -> str:
    """Why a tensor stays whose numbers are of a type that is not quantized."""
    return f"dtype {spec.dtype}"


def _kept_because(
    spec: TensorSpec, role: Role, skip: Sequence[str], include_head: bool, moe: str, block_size: int
) -> str:
    reason = _REASONS.get(role.kind, role.kind)
    if role.kind == "head" and include_head:
        reason = ""
    elif role.kind == "expert" and moe == "quantize":
        reason = _expert_kept_because(spec, block_size)
    if not reason and spec.dtype not in FLOATS:
        return of_type(spec)
    asked = any(_matches(spec.name.removesuffix(".weight"), role.paths, pattern) for pattern in skip)
    return "skipped by --skip" if asked and not reason else reason


def _without_namesakes(selection: Selection, roles: Roles) -> Selection:
    """Keep what readers would keep because its path begins or ends like that of something else that is kept.

    transformers takes every entry of the list for the beginning of a path and for its end: ``lm_head`` is also
    ``model.patcher.lm_head``. Experts are no linear layers to it.
    """
    listed = skip_modules(selection)
    begins, ends = tuple(f"{entry}." for entry in listed), tuple(listed)

    def is_namesake(choice: Choice) -> bool:
        is_open = not choice.kept_because and roles.of[choice.spec.name].kind != "expert"
        return is_open and any(f"{path}.".startswith(begins) or path.endswith(ends) for path in choice.paths)

    reason = "loaders would confuse it with another that stays"
    choices = tuple(replace(c, kept_because=reason) if is_namesake(c) else c for c in selection.choices)
    if choices == selection.choices:
        return selection
    return _without_namesakes(replace(selection, choices=choices), roles)


def _expert_kept_because(spec: TensorSpec, block_size: int) -> str:
    if len(spec.shape) == 2 and spec.name.endswith(".weight"):
        return ""
    if len(spec.shape) != 3:
        return "expert: neither a matrix nor a stack of matrices"
    straddles = spec.shape[1] * spec.shape[2] % block_size != 0
    return "expert: size is not a multiple of the block size" if straddles else ""


def _check_head(checkpoint: Checkpoint, roles: Roles) -> None:
    if roles.tied:
        raise UsageError(
            f"{checkpoint.root}: the head is tied to the embedding, which cannot be quantized",
            hint="leave out --include-head; a tied head stays in 16 bits",
        )
    if not any(role.kind == "head" for role in roles.of.values()):
        raise UsageError(f"{checkpoint.root}: no head found to include", hint="leave out --include-head")
