"""How an adapter's changes affect a checkpoint's embedding and head, which may be one tied tensor.

In the running model peft wraps modules, not tensors: changing the embedding leaves a tied head unchanged, and vice
versa. Both change if the adapter trains single token rows or sets ``ensure_weight_tying``.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.adapter_config import release
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.models.addressing import Addresses, Slice, find_addresses
from adaptkit.models.kinds import is_shared_by_layers
from adaptkit.operations._vocabulary import Vocabulary, lacks_head, tying_setting

_SHARED = re.compile(r"(^|\.)shared\.weight$")
_USES = re.compile(r"(^|\.)(shared|embed_tokens|lm_head)\.weight$")


@dataclass(frozen=True)
class VocabularyChange:
    """How an adapter affects embedding and head, and where the files hold the parameters that it changes.

    Attributes:
        addresses: maps every parameter that the adapter changes to the tensors that hold it.
        mapping_note: phrase that says how they were found; empty if the names are the same.
        together: whether embedding and head change in the same way.
        separate: whether a tied head needs a tensor of its own after the change.
        repeated: parameters of a tied head whose change only repeats that of the embedding.
    """

    addresses: Mapping[str, tuple[Slice, ...]]
    mapping_note: str
    together: bool
    separate: bool
    repeated: frozenset[str]


def vocabulary_changes(
    checkpoint: Checkpoint, vocabulary: Vocabulary, adapter: Adapter, untie: bool
) -> VocabularyChange:
    """Find an adapter's parameters in the files, and decide whether a tied head stays tied.

    Raises:
        BaseMismatchError: the checkpoint lacks a parameter; or head and embedding would differ, and ``untie`` is False.
        AdapterError: the adapter changes only one use of a shared tensor, or contradicts ``ensure_weight_tying``.
    """
    names = _parameters(adapter)
    _refuse_shared(checkpoint, adapter, names)
    _refuse_unknown(checkpoint, vocabulary, adapter)
    absent = {n for n in names if vocabulary.is_head(n) and vocabulary.tied and n not in checkpoint.tensors}
    elsewhere = {name: (Slice(vocabulary.head),) for name in absent}
    if vocabulary.bias is not None and vocabulary.bias[0] in names:
        elsewhere[vocabulary.bias[0]] = (Slice(vocabulary.bias[1]),)
    found = find_addresses(checkpoint, names - elsewhere.keys(), str(adapter.root))
    _refuse_uses(checkpoint, adapter, found)
    addresses = dict(found.of) | elsewhere
    tables = [name for name, slices in found.of.items() if vocabulary.is_embedding(slices[0].name)]
    heads = [name for name in names if vocabulary.is_head(name)]
    affected = vocabulary.tied and (tables or heads)
    if not affected or _stay_equal(adapter, tables, heads, vocabulary, checkpoint):
        repeated = frozenset(heads) if affected and tables else frozenset[str]()
        return VocabularyChange(addresses, found.mapping_note, True, False, repeated)
    if not untie:
        raise BaseMismatchError(
            f"{adapter.root}: changes {(tables + heads)[0]}, but {checkpoint.root} ties its head to its embedding, and "
            "the two would differ",
            hint="add --untie to store the head as a separate tensor",
        )
    return VocabularyChange(addresses, found.mapping_note, False, True, frozenset())


def is_shared(name: str) -> bool:
    """Whether a tensor is, by its name, an embedding shared by encoder, decoder and maybe head, as in T5 and BART."""
    return bool(_SHARED.search(name))


def _refuse_shared(checkpoint: Checkpoint, adapter: Adapter, names: Collection[str]) -> None:
    if any(map(is_shared, checkpoint.tensors)):
        for name in sorted(names):
            if _USES.search(name) and (name not in checkpoint.tensors or is_shared(name)):
                raise AdapterError(
                    f"{adapter.root}: changes {name}, but encoder, decoder or head of this model share one table; peft "
                    "changes only one of these uses, which a checkpoint cannot express",
                    hint="train the adapter without embeddings and head",
                )


def _refuse_unknown(checkpoint: Checkpoint, vocabulary: Vocabulary, adapter: Adapter) -> None:
    """Refuse a changed embedding if the head is tied to an embedding but it is unknown to which one."""
    tables = sorted({*adapter.embeddings, *adapter.tokens})
    if tables and not vocabulary.embedding and tying_setting(checkpoint.config) and not lacks_head(checkpoint):
        raise BaseMismatchError(
            f"{adapter.root}: changes {tables[0]}, but {checkpoint.root} ties its head to its embedding, and which "
            "table that is cannot be determined",
            hint="train the adapter without embeddings and head",
        )


def _refuse_uses(checkpoint: Checkpoint, adapter: Adapter, found: Addresses) -> None:
    """Refuse a change to one use of a tensor that the model uses several times, except for the head."""
    for name in sorted(found.of):
        in_layers = is_shared_by_layers(checkpoint.config.get("model_type"), name)
        if in_layers or (name in found.uses and name.endswith(".weight")):
            with_what = "other layers" if found.of[name][0].name == name else found.of[name][0].name
            raise AdapterError(
                f"{adapter.root}: changes {name}, which is shared with {with_what} in {checkpoint.root}; peft "
                "changes only one of these uses, which a checkpoint cannot express",
                hint=f"train the adapter without {'the shared layers' if in_layers else 'embeddings and head'}",
            )


def _parameters(adapter: Adapter) -> set[str]:
    weights = {f"{module}.weight" for module in (*adapter.modules, *adapter.tokens)}
    biases = {f"{module}.bias" for module in adapter.biases} | {n for n in adapter.base_copies if n.endswith(".bias")}
    return {*weights, *biases, *adapter.experts, *adapter.replaced}


def _stay_equal(
    adapter: Adapter, tables: list[str], heads: list[str], vocabulary: Vocabulary, checkpoint: Checkpoint
) -> bool:
    """Whether embedding and head have the same values in the running model after the change."""
    if adapter.ties_weights:
        return _tied_changes_agree(adapter, tables, heads)
    kinds = [_kinds(adapter, name) for name in (*tables, *heads)]
    if all(kind == {"replaced"} for kind in kinds) and tables:
        values = {adapter.digests[adapter.replaced[name]] for name in (*tables, *heads)}
        shape = adapter.files.spec(adapter.replaced[tables[0]]).shape
        resized = shape != checkpoint.spec(vocabulary.embedding).shape
        # Up to 0.13 peft may have resized the head beside a saved embedding separately, without writing it.
        return len(values) == 1 and (bool(heads) or (resized and release(adapter.config) >= (15, 0)))
    if all(kind == {"tokens"} for kind in kinds) and tables:
        tokens = [adapter.tokens[name.removesuffix(".weight")] for name in (*tables, *heads)]
        return all(t.indices == tokens[0].indices and np.array_equal(t.rows, tokens[0].rows) for t in tokens)
    return False


def _tied_changes_agree(adapter: Adapter, tables: list[str], heads: list[str]) -> bool:
    """Whether an adapter with ``ensure_weight_tying`` changes embedding and head in the same way.

    It does not with DoRA, which ties A and B, but has magnitudes of the embedding's columns and of the head's rows; nor
    if ``alpha_pattern`` gives the two different scalings. Stored changes that contradict the setting are refused.
    """
    changed = [name.removesuffix(".weight") for name in (*tables, *heads)]
    scaled = [module for module in changed if module in adapter.magnitudes]
    if scaled and not (tables and heads):
        lacking = "head" if tables else "embedding"
        raise _contradiction(adapter, f"beside {scaled[0]}.lora_magnitude_vector there is none of the {lacking}")
    agree = not scaled
    for table, head in ((table, head) for table in tables for head in heads):
        one, other = (adapter.modules.get(name.removesuffix(".weight")) for name in (table, head))
        if one and other and not (np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)):
            raise _contradiction(adapter, f"{table} and {head} change differently")
        agree &= not (one and other and one.scaling != other.scaling)
        for stored in (adapter.base_copies, adapter.replaced):
            keys = [stored.get(name) for name in (table, head)]
            values = [None if key is None else adapter.digests[key] for key in keys]
            if None not in values and values[0] != values[1]:
                raise _contradiction(adapter, f"{keys[0]!r} and {keys[1]!r} differ")
    return agree


def _contradiction(adapter: Adapter, what: str) -> AdapterError:
    return AdapterError(
        f"{adapter.root}: ensure_weight_tying is set, but {what}", hint="save the adapter again with peft"
    )


def _kinds(adapter: Adapter, name: str) -> set[str]:
    module = name.removesuffix(".weight")
    found = {"low rank": module in adapter.modules, "tokens": module in adapter.tokens}
    return {kind for kind, there in (found | {"replaced": name in adapter.replaced}).items() if there}
