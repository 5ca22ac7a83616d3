"""Which tensors of a checkpoint are quantized, which stay as they are, and why.

The weights of linear layers are quantized; embeddings, norms, routers, biases, the head and (unless asked for) experts
stay. ``operations._roles`` determines what each tensor is; this module decides what to do with it.
"""

from dataclasses import dataclass, replace

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.formats._format import Encoding
from adaptkit.models.matching import matches_any
from adaptkit.numerics.spec import FLOATS, TensorSpec
from adaptkit.operations._roles import Role, Roles
from adaptkit.operations.options import QuantizeOptions

_REASONS = {"linear": "", "conv1d": "", "expert": "expert: kept without --moe quantize"}
"""Maps the kind of a tensor to the reason why it stays; the names of all other kinds are the reasons themselves."""


@dataclass(frozen=True)
class TensorChoice:
    """What happens to one tensor.

    Attributes:
        spec: the tensor in the source.
        kept_because: phrase that says why it stays as it is; empty if it is quantized.
        transposed: whether the source stores it as (in, out), so that it is transposed before it is quantized.
        is_linear: whether loaders may use a linear layer for it.
        paths: dotted paths that loaders may use for its module.
    """

    spec: TensorSpec
    kept_because: str
    transposed: bool = False
    is_linear: bool = False
    paths: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Dotted path, in the file, of the module that has this weight; a stack of experts counts as a module."""
        return self.spec.name.removesuffix(".weight")


@dataclass(frozen=True)
class Selection:
    """What happens to the tensors of a checkpoint.

    Attributes:
        choices: one for every tensor, in file order.
        read_from: phrase that says how the linear layers were determined.
        head: path of the output layer in loaders' models, even if it is tied to the embedding and in no file.
        head_is_quantized: whether the output layer is quantized.
    """

    choices: tuple[TensorChoice, ...]
    read_from: str
    head: str = "lm_head"
    head_is_quantized: bool = False


def select(checkpoint: Checkpoint, roles: Roles, options: QuantizeOptions) -> Selection:
    """Decide for every tensor of an unquantized checkpoint whether it is quantized.

    A stack of experts, (experts, rows, columns), is stored like a matrix: the same parts under the name of the
    parameter, with three numbers for the shape in the state. Codes are in row-major order over (expert, row, column)
    and a stack is quantized only if rows · columns is a multiple of ``block_size``, so that expert e has the bytes
    [e · s / 2, (e + 1) · s / 2) of 4-bit codes and the constants [e · s / block_size, (e + 1) · s / block_size), with
    s = rows · columns. Double quantization's groups of 256 constants and its offset span the whole stack.

    Raises:
        UsageError: the head is to be quantized but is tied to the embedding, or absent.
    """
    if options.include_head:
        _check_head(checkpoint, roles)
    choices = [
        TensorChoice(
            spec=located.spec,
            kept_because=_kept_because(located.spec, roles.of[name], options),
            transposed=roles.of[name].kind == "conv1d",
            is_linear=roles.of[name].is_linear,
            paths=roles.of[name].paths,
        )
        for name, located in checkpoint.tensors.items()
    ]
    return _without_namesakes(Selection(tuple(choices), roles.read_from, roles.head, options.include_head), roles)


def skip_modules(selection: Selection) -> list[str]:
    """Return the value of ``llm_int8_skip_modules``: loaders quantize every linear layer that it does not name.

    The entries are full dotted paths, sorted. The head is listed even if it is tied and in no file, since the list
    replaces the loader's default. Experts that stay are listed once per layer, by their common path, since loaders
    match entries as prefixes and compare every module with every entry.
    """
    kept = {path for choice in selection.choices if choice.kept_because and choice.is_linear for path in choice.paths}
    return sorted(kept | (set() if selection.head_is_quantized else {selection.head}))


def of_type(spec: TensorSpec) -> str:
    """Return the reason for keeping a tensor whose dtype is not quantized."""
    return f"dtype {spec.dtype}"


def _kept_because(spec: TensorSpec, role: Role, options: QuantizeOptions) -> str:
    reason = _REASONS.get(role.kind, role.kind)
    if role.kind == "head" and options.include_head:
        reason = ""
    elif role.kind == "expert" and options.moe == "quantize":
        reason = _expert_kept_because(spec, options.encoding)
    elif role.kind == "expert" and options.format in ("nf4", "fp4"):
        reason = "expert: bitsandbytes cannot load it quantized"
    elif role.kind == "conv1d" and not options.encoding.codec.holds_conv1d:
        reason = "Conv1D: servers know it in 16 bits only"
    if not reason and spec.dtype not in FLOATS:
        return of_type(spec)
    asked = any(matches_any((spec.name.removesuffix(".weight"), *role.paths), pattern) for pattern in options.skip)
    return "skipped by --skip" if asked and not reason else reason


def _without_namesakes(selection: Selection, roles: Roles) -> Selection:
    """Also keep tensors that transformers would not quantize because another's entry in the skip list matches them.

    transformers matches each entry as a prefix and as a suffix of paths: ``lm_head`` matches ``model.patcher.lm_head``.
    Experts are exempt, since they are not linear layers in transformers.
    """
    reason, compared = "loaders would confuse it with another that stays", set[str]()
    while entries := tuple(entry for entry in skip_modules(selection) if entry not in compared):
        compared.update(entries)
        prefixes = tuple(f"{entry}." for entry in entries)
        choices = tuple(
            replace(choice, kept_because=reason)
            if not choice.kept_because
            and roles.of[choice.spec.name].kind != "expert"
            and any(f"{path}.".startswith(prefixes) or path.endswith(entries) for path in choice.paths)
            else choice
            for choice in selection.choices
        )
        selection = replace(selection, choices=choices)
    return selection


def _expert_kept_because(spec: TensorSpec, encoding: Encoding) -> str:
    if len(spec.shape) == 2 and spec.name.endswith(".weight"):
        return ""
    if len(spec.shape) != 3:
        return "expert: neither a matrix nor a stack of matrices"
    refusal = encoding.codec.refusal(spec.shape, encoding)
    return f"expert: {refusal}" if refusal else ""


def _check_head(checkpoint: Checkpoint, roles: Roles) -> None:
    if roles.tied:
        raise UsageError(
            f"{checkpoint.root}: the head is tied to the embedding, which cannot be quantized",
            hint="leave out --include-head; a tied head stays in 16 bits",
        )
    if not any(role.kind == "head" for role in roles.of.values()):
        raise UsageError(f"{checkpoint.root}: no head found to include", hint="leave out --include-head")
