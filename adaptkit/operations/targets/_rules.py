"""Rules about adapters that several programs share; each program supplies the effects."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

from adaptkit.checkpoint.adapter_config import KNOWN_KEYS, RANK_ZERO, changes_base, without_changed_base
from adaptkit.checkpoint.vocabulary import is_usual_head
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair, is_positive
from adaptkit.operations.targets._base_shapes import BaseShapes, is_single_expert
from adaptkit.operations.targets._target import Finding, error_about, some
from adaptkit.wording import counted

ONE_SAVE = "save the adapter again with peft, so that adapter_config.json and adapter_model.safetensors match"
_TABLE = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|wte|embed_in|word_embeddings)(\.token_adapter)?$")
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
}
"""Configuration keys that make an adapter something other than s · B A, and the names of these variants."""


def weights(files: AdapterFiles, reader: str) -> Iterator[Finding]:
    """Find a missing or empty weight file, or a pickled one, which is not read."""
    if files.pickle:
        yield Finding(
            "warning",
            f"{files.pickle} is a pickle file",
            f"{reader} loads it with torch.load(weights_only=True); adaptkit does not load pickles, so the names in it "
            "are not checked",
            f"run adaptkit inspect {files.root}, which prints a command that converts it to safetensors",
        )
    elif not files.keys:
        yield Finding(
            "error",
            "adapter_model.safetensors is missing or holds no tensors",
            f"{reader} finds nothing to load",
            "save the adapter again with peft's save_pretrained",
        )


def is_lora(files: AdapterFiles) -> bool:
    """Return whether ``peft_type`` is LoRA, in upper or lower case."""
    return str(files.config.get("peft_type", "")).upper() == "LORA"


def kind(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find an adapter that is not a LoRA."""
    if not is_lora(files):
        found = f"peft_type is {files.config.get('peft_type')!r} in adapter_config.json"
        yield Finding("error", found, effect, files.merge_elsewhere())


def variants(files: AdapterFiles, keys: Collection[str], effect: str, change: str) -> Iterator[Finding]:
    """Find keys of ``VARIANTS`` that are set.

    Args:
        files: the adapter's files.
        keys: the keys to check.
        effect: what the program does, with {what} for the name of the variant.
        change: what to do about it.
    """
    for key in sorted(keys):
        if files.config.get(key):
            yield Finding("error", f"{key} in adapter_config.json", effect.format(what=VARIANTS[key]), change)


def begun(files: AdapterFiles, effect: str, refusal: str = "") -> Iterator[Finding]:
    """Find an initialization that changes the base, or an unknown one, an error for programs with a ``refusal``."""
    how: Any = files.config.get("init_lora_weights")
    if changes_base(how):
        yield Finding(
            "error",
            f"init_lora_weights is {how!r} in adapter_config.json",
            effect,
            without_changed_base(files.root, how),
        )
    elif changes_base(how) is None:
        yield Finding(
            "error" if refusal else "warning",
            f"init_lora_weights is {how!r} in adapter_config.json, which adaptkit does not know",
            refusal or "if it changed the base's weights, the adapter does not fit the original base",
            "find out what it means; set it to true if it left the base's weights unchanged",
        )


def unknown_keys(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find configuration keys that adaptkit does not know from peft."""
    unknown = {key for key, value in files.config.items() if value} - KNOWN_KEYS
    if unknown and is_lora(files):
        yield Finding(
            "warning",
            f"unknown key {some(unknown)} in adapter_config.json",
            effect,
            "find out what it means, or remove it",
        )


def numbers(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find ranks and alphas that are not positive numbers, and invalid patterns."""
    wrong = [pair for pair in files.pairs if pair.scaling is None]
    config = files.config
    plain = is_rank(config.get("r")) and is_positive(config.get("lora_alpha"))
    if wrong or not plain:
        where = f" (for {some([pair.module for pair in wrong])})" if wrong and plain else ""
        yield Finding(
            "error",
            f"r, lora_alpha, rank_pattern or alpha_pattern in adapter_config.json is not a positive number{where}: "
            f"r is {config.get('r')!r}, lora_alpha {config.get('lora_alpha')!r}",
            effect,
            way_to_ranks(wrong),
        )


def way_to_ranks(wrong: Iterable[Pair]) -> str:
    """Return what to do about pairs with an invalid rank or alpha."""
    return RANK_ZERO if any(pair.asked == 0 for pair in wrong) else ONE_SAVE


def halves(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find A without B, or B without A."""
    alone = [half.name for pair in files.pairs for half in (pair.a, pair.b) if half and not (pair.a and pair.b)]
    yield from error_about(alone, "the other half of its lora_A/lora_B pair is missing", effect, ONE_SAVE)


def other_layers(files: AdapterFiles, program: str) -> Iterator[Finding]:
    """Find LoRA of convolutions and of ``torch.nn.MultiheadAttention``."""
    for what, found in (
        ("convolutions", [pair.module for pair in files.pairs if pair.is_convolution]),
        ("torch.nn.MultiheadAttention", [pair.module for pair in files.pairs if pair.is_in_attention]),
    ):
        if found:
            effect = f"{program} supports LoRA only for linear layers"
            yield Finding("error", f"LoRA of {what}: {some(found)}", effect, files.merge_elsewhere())


def wrapped(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find names changed by ``torch.compile``, data parallelism, sharding, or a second peft wrapper."""
    yield from error_about(
        files.wrapped,
        "the name contains that of a wrapper around the model",
        effect,
        f"run adaptkit resize {files.root} -o OUT --rank R, which writes peft's names if it recognizes these",
    )


def ranks(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Find pairs whose shapes do not match the configuration's rank, or that are not matrices."""
    wrong = [pair for pair in files.pairs if is_rank(pair.asked) and pair.a and pair.b and not _fits(pair)]
    if wrong:
        first = min(wrong, key=lambda pair: pair.module)
        a, b = first.a, first.b
        more = f", likewise in {counted(len(wrong) - 1, 'more module')}" if len(wrong) > 1 else ""
        yield Finding(
            "error",
            f"{first.module}: rank {first.asked} in adapter_config.json, but A is {_shape(a)} and B {_shape(b)}{more}",
            effect,
            ONE_SAVE,
        )


def on_base(files: AdapterFiles, base: BaseShapes | None, missing: str, other: str) -> Iterator[Finding]:
    """Find modules that the base lacks, or has in another shape; ``tables`` compares the vocabulary size.

    Args:
        files: the adapter's files.
        base: nothing is found without it.
        missing: what the program does with tensors of a missing module.
        other: what the program does with matrices that do not fit.
    """
    if base is None:
        return
    pairs = [pair for pair in files.pairs if _is_comparable(pair, base)]
    absent = [pair.module for pair in pairs if base.shape(pair.module) is None]
    absent += [pair.module for pair in files.pairs if pair.stacked and not base.may_have_stack(pair.module)]
    if absent:
        yield Finding(
            "warning" if base.is_composed else "error",
            f"{some(absent)}: no tensor of this name in {base.title}",
            missing,
            f"give the base that it was trained on, or rename the tensors; {_trained_on(files)}",
        )
    sizes = {module for module, _ in _tables(files, base)}
    unlike = [pair for pair in pairs if pair.module not in sizes and not _fits_base(files, base, pair)]
    if unlike:
        first = min(unlike, key=lambda pair: pair.module)
        more = f", likewise in {counted(len(unlike) - 1, 'more module')}" if len(unlike) > 1 else ""
        yield Finding(
            "error",
            f"{first.module} is {list(base.shape(first.module) or ())} in {base.root}, but B · A is "
            f"{_shape(first.b, 0)} × {_shape(first.a, 1)}{more}",
            other,
            f"give the base that it was trained on; {_trained_on(files)}",
        )


def tables(
    files: AdapterFiles, base: BaseShapes | None, level: Literal["error", "warning"], effect: str, change: str
) -> Iterator[Finding]:
    """Find embeddings and heads whose number of entries differs from the base's: the vocabulary was resized.

    Args:
        files: the adapter's files.
        base: nothing is found without it.
        level: level of the finding.
        effect: what the program does.
        change: what to do about it, with {entries} for the adapter's number of entries.
    """
    found = _tables(files, base) if base else []
    if found and base is not None:
        module, entries = min(found)
        has = (base.shape(module) or (base.vocabulary,))[0]
        what = f"{module} has {entries} entries, but {has} in {base.root}"
        yield Finding(level, what, effect, change.format(entries=entries))


def tied_head(files: AdapterFiles, base: BaseShapes | None) -> str | None:
    """Return the name of the head if the adapter changes it and the base ties it to the embedding; otherwise None."""
    heads = [pair.module for pair in files.pairs if _is_head(pair)]
    return min(heads) if heads and base is not None and base.is_tied else None


def experts(files: AdapterFiles) -> list[str]:
    """Return the names of tensors that change stacks of experts."""
    return [half.name for pair in files.pairs if pair.stacked for half in (pair.a, pair.b) if half]


def single_experts(files: AdapterFiles) -> list[str]:
    """Return the modules that belong to one of several experts."""
    return [pair.module for pair in files.pairs if is_single_expert(pair.module)]


def is_table(module: str) -> bool:
    """Return whether a module's name is that of an embedding or head of the vocabulary."""
    return bool(_TABLE.search(module))


def _trained_on(files: AdapterFiles) -> str:
    return f"base_model_name_or_path is {files.config.get('base_model_name_or_path')!r}"


def _fits(pair: Pair) -> bool:
    if not pair.a or not pair.b or not (pair.is_convolution or len(pair.a.shape) == len(pair.b.shape) == 2):
        return False
    rows, columns = pair.a.shape[0], pair.b.shape[1]
    if pair.stacked:
        return bool(rows == columns and rows and rows % pair.asked == 0)
    return bool(rows == columns == pair.asked)


def _fits_base(files: AdapterFiles, base: BaseShapes, pair: Pair) -> bool:
    expected = base.shape(pair.module)
    if expected is None or not pair.a or not pair.b or len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return True  # reported by another rule
    made = (pair.b.shape[0], pair.a.shape[1])
    if pair.embedding:
        return expected == made[::-1]
    turned = bool(files.config.get("fan_in_fan_out")) or base.is_transposed
    return expected == made or (turned and expected == made[::-1])


def _is_comparable(pair: Pair, base: BaseShapes) -> bool:
    """Return False for stacks, for single experts if the base stores stacks, and for a tied head."""
    if pair.stacked or (_is_head(pair) and base.is_tied):
        return False
    return base.has_numbered_experts or not is_single_expert(pair.module)


def _tables(files: AdapterFiles, base: BaseShapes) -> list[tuple[str, int]]:
    """Return embeddings and heads whose vocabulary size differs from the base's, with the adapter's size."""
    found = []
    for pair in files.pairs:
        if pair.embedding and pair.a and len(pair.a.shape) == 2:
            found.append((pair.module, pair.a.shape[1]))
        elif _is_head(pair) and pair.b and len(pair.b.shape) == 2:
            found.append((pair.module, pair.b.shape[0]))
    for key in files.keys:
        if key.role in ("weight", "wrapped weight") and len(key.shape) == 2 and is_table(key.module):
            found.append((key.module.removesuffix(".token_adapter"), key.shape[0]))
    return [(module, size) for module, size in found if base.vocabulary and _entries(base, module) != size]


def _entries(base: BaseShapes, module: str) -> int | None:
    shape = base.shape(module)
    return shape[0] if shape else base.vocabulary


def _is_head(pair: Pair) -> bool:
    return is_usual_head(pair.module) and not pair.embedding


def is_rank(value: Any) -> bool:
    """Return whether a value is an integer above zero."""
    return isinstance(value, int) and is_positive(value)


def _shape(key: Any, axis: int | None = None) -> str:
    shape = list(key.shape) if key else []
    return str(shape) if axis is None or len(shape) != 2 else str(shape[axis])
