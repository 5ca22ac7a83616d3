"""What several programs trip over; each says itself what it then does."""

import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from adaptkit.checkpoint.adapter_config import KNOWN_KEYS, changes_base, without_changed_base
from adaptkit.checkpoint.progress import counted
from adaptkit.checkpoint.vocabulary import is_usual_head
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair, is_positive
from adaptkit.operations.targets._base_shapes import BaseShapes, is_single_expert
from adaptkit.operations.targets._target import Finding, some

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
"""Keys of the configuration that make something else of an adapter than s · B A, and what that is called."""


def weights(files: AdapterFiles, reader: str) -> Iterator[Finding]:
    """No file of weights, or one that nothing is known of."""
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
    """Whether the configuration says LoRA, in whatever case."""
    return str(files.config.get("peft_type", "")).upper() == "LORA"


def kind(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """A kind of adapter that is none of LoRA's."""
    if not is_lora(files):
        found = f"peft_type is {files.config.get('peft_type')!r} in adapter_config.json"
        yield Finding("error", found, effect, files.merge_elsewhere())


def variants(files: AdapterFiles, keys: Collection[str], effect: str, change: str) -> Iterator[Finding]:
    """Keys of ``VARIANTS`` that are set.

    Args:
        files: of the adapter.
        keys: which of them matter.
        effect: with {what} for what the key asks for.
        change: what to do.
    """
    for key in sorted(keys):
        if files.config.get(key):
            yield Finding("error", f"{key} in adapter_config.json", effect.format(what=VARIANTS[key]), change)


def begun(files: AdapterFiles, effect: str, refusal: str = "") -> Iterator[Finding]:
    """An initialization that changes the base, or one that is not known, which a program with a ``refusal`` refuses."""
    how: Any = files.config.get("init_lora_weights")
    if changes_base(how):
        yield Finding(
            "error", f"init_lora_weights is {how!r} in adapter_config.json", effect, without_changed_base(how)
        )
    elif changes_base(how) is None:
        yield Finding(
            "error" if refusal else "warning",
            f"init_lora_weights is {how!r} in adapter_config.json, which adaptkit does not know",
            refusal or "if it changed the base's weights, the adapter does not fit the original base",
            "find out what it means; set it to true if it left the base's weights unchanged",
        )


def unknown_keys(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Keys of the configuration that peft does not have, or did not have when this was written."""
    unknown = {key for key, value in files.config.items() if value} - KNOWN_KEYS
    if unknown and is_lora(files):
        yield Finding(
            "warning",
            f"unknown key {some(unknown)} in adapter_config.json",
            effect,
            "find out what it means, or remove it",
        )


def numbers(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Rank and alpha that are no positive numbers, or patterns that are no patterns."""
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
            ONE_SAVE,
        )


def halves(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """A without B, or B without A."""
    alone = [half.name for pair in files.pairs for half in (pair.a, pair.b) if half and not (pair.a and pair.b)]
    if alone:
        yield Finding("error", f"{some(alone)}: the other half of its lora_A/lora_B pair is missing", effect, ONE_SAVE)


def convolutions(files: AdapterFiles, program: str) -> Iterator[Finding]:
    """Modules whose A and B are those of a convolution."""
    found = [pair.module for pair in files.pairs if pair.is_convolution]
    if found:
        effect = f"{program} supports LoRA only for matrices"
        yield Finding("error", f"LoRA of convolutions: {some(found)}", effect, files.merge_elsewhere())


def wrapped(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Names as ``torch.compile``, data parallelism, sharding, or a second wrapper of peft leave them."""
    if files.wrapped:
        yield Finding(
            "error",
            f"{some(files.wrapped)}: the name contains that of a wrapper around the model",
            effect,
            f"run adaptkit resize {files.root} -o OUT --rank R, which writes peft's names if it recognizes these",
        )


def ranks(files: AdapterFiles, effect: str) -> Iterator[Finding]:
    """Tensors that do not have the rank that the configuration says, or are no matrices."""
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
    """Modules that the base does not have, or has in another shape; ``tables`` looks at the size of the vocabulary.

    Args:
        files: of the adapter.
        base: nothing is found without it.
        missing: what the program does with tensors of a module that is not there.
        other: the same with matrices that do not fit.
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
    """Embeddings and heads with another number of entries than the base's, whose vocabulary was resized in between.

    Args:
        files: of the adapter.
        base: nothing is found without it.
        level: of the finding.
        effect: what the program does.
        change: what to do, with {entries} for the adapter's number.
    """
    found = _tables(files, base) if base else []
    if found and base is not None:
        module, entries = min(found)
        has = (base.shape(module) or (base.vocabulary,))[0]
        what = f"{module} has {entries} entries, but {has} in {base.root}"
        yield Finding(level, what, effect, change.format(entries=entries))


def tied_head(files: AdapterFiles, base: BaseShapes | None) -> str | None:
    """The name of the head if the adapter changes it and the base has it in common with the embedding."""
    heads = [pair.module for pair in files.pairs if _is_head(pair)]
    return min(heads) if heads and base is not None and base.is_tied else None


def experts(files: AdapterFiles) -> list[str]:
    """The names of tensors that change stacks of experts."""
    return [half.name for pair in files.pairs if pair.stacked for half in (pair.a, pair.b) if half]


def single_experts(files: AdapterFiles) -> list[str]:
    """Modules that are one of several experts."""
    return [pair.module for pair in files.pairs if is_single_expert(pair.module)]


def is_table(module: str) -> bool:
    """Whether a module has, by its name, an entry for every word of a vocabulary."""
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
        return True  # found by another rule
    made = (pair.b.shape[0], pair.a.shape[1])
    if pair.embedding:
        return expected == made[::-1]
    turned = bool(files.config.get("fan_in_fan_out")) or base.is_transposed
    return expected == made or (turned and expected == made[::-1])


def _is_comparable(pair: Pair, base: BaseShapes) -> bool:
    """Not stacks, nor one expert of a base that keeps stacks, nor a head that is the embedding."""
    if pair.stacked or (_is_head(pair) and base.is_tied):
        return False
    return base.has_numbered_experts or not is_single_expert(pair.module)


def _tables(files: AdapterFiles, base: BaseShapes) -> list[tuple[str, int]]:
    """Modules whose first dimension is a vocabulary of another size than the base's, and that size."""
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
    """Whether it is a whole number above zero."""
    return isinstance(value, int) and is_positive(value)


def _shape(key: Any, axis: int | None = None) -> str:
    shape = list(key.shape) if key else []
    return str(shape) if axis is None or len(shape) != 2 else str(shape[axis])
