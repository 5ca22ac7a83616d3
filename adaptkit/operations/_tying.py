"""What becomes of a checkpoint's embedding and head, which may be one tensor, when an adapter changes one.

In the running model peft wraps modules, not tensors: a change of the embedding leaves a tied head as it was, and the
other way round. Rows of trained tokens, and what ``ensure_weight_tying`` is set for, change both.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.adapter_config import is_saved, release
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.lazy import torch
from adaptkit.networks.addressing import Addresses, Slice, find_addresses
from adaptkit.networks.kinds import is_shared_by_layers
from adaptkit.operations._vocabulary import Vocabulary, says_tied, tells_no_words

_SHARED = re.compile(r"(^|\.)shared\.weight$")
_USES = re.compile(r"(^|\.)(shared|embed_tokens|lm_head)\.weight$")


@dataclass(frozen=True)
class VocabularyChange:
    """What an adapter means for the vocabulary's tensors, and where its parameters are.

    Attributes:
        addresses: of every parameter that it changes, but those in ``repeated``.
        told_by: how they were found, if the names differ.
        together: embedding and head change alike.
        separate: they would no longer be the same tensor.
        repeated: parameters whose change only repeats that of the embedding.
    """

    addresses: Mapping[str, tuple[Slice, ...]]
    told_by: str
    together: bool
    separate: bool
    repeated: frozenset[str]


def vocabulary_changes(
    checkpoint: Checkpoint, vocabulary: Vocabulary, adapter: Adapter, untie: bool
) -> VocabularyChange:
    """Find an adapter's parameters in the files, and what its changes mean for a tied head.

    Raises:
        BaseMismatchError: the checkpoint lacks one; or a tied head would no longer be the embedding, and that is not
            asked for.
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
    plain = VocabularyChange(addresses, found.told_by, True, False, frozenset())
    if not vocabulary.tied:
        return plain
    tables = [name for name, slices in found.of.items() if vocabulary.is_embedding(slices[0].name)]
    heads = [name for name in names if vocabulary.is_head(name)]
    if not tables and not heads:
        return plain
    if _change_alike(adapter, tables, heads, vocabulary, checkpoint):
        return VocabularyChange(addresses, found.told_by, True, False, frozenset(heads) if tables else frozenset())
    if not untie:
        raise BaseMismatchError(
            f"{adapter.root}: changes {(tables + heads)[0]}, but {checkpoint.root} ties its head to its embedding, and "
            "the two would differ",
            hint="add --untie to store the head as a separate tensor",
        )
    return VocabularyChange(addresses, found.told_by, False, True, frozenset())


def is_shared(name: str) -> bool:
    """Whether a tensor is a table that encoder, decoder and maybe head use, as T5's and BART's."""
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
    """Refuse a change of a table that may be the head, too, where it cannot be told which one is."""
    tables = sorted({*adapter.embeddings, *adapter.tokens})
    if tables and not vocabulary.embedding and says_tied(checkpoint.config) and not tells_no_words(checkpoint):
        raise BaseMismatchError(
            f"{adapter.root}: changes {tables[0]}, but {checkpoint.root} ties its head to its embedding, and which "
            "table that is cannot be determined",
            hint="train the adapter without embeddings and head",
        )


def _refuse_uses(checkpoint: Checkpoint, adapter: Adapter, found: Addresses) -> None:
    """Refuse a change of one use of a tensor that a model has for several, other than of its head."""
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
    biases = {f"{module}.bias" for module in adapter.biases} | {n for n in adapter.begins if n.endswith(".bias")}
    return {*weights, *biases, *adapter.experts, *adapter.replaced}


def _change_alike(
    adapter: Adapter, tables: list[str], heads: list[str], vocabulary: Vocabulary, checkpoint: Checkpoint
) -> bool:
    """Whether embedding and head stay the same tensor in the running model."""
    if adapter.ties_weights:
        return _repeats(adapter, tables, heads)
    kinds = [_kinds(adapter, name) for name in (*tables, *heads)]
    if all(kind == {"replaced"} for kind in kinds) and tables:
        values = {adapter.digests[adapter.replaced[name]] for name in (*tables, *heads)}
        shape = adapter.files.spec(adapter.replaced[tables[0]]).shape
        resized = shape != checkpoint.spec(vocabulary.embedding).shape
        apart = is_saved(adapter.config, tables[0].removesuffix(".weight")) and release(adapter.config) < (14, 0)
        # a head that is apart and not there was resized by itself, and lost: peft up to 0.11 did not write it
        return len(values) == 1 and (bool(heads) or (resized and not apart))
    if all(kind == {"tokens"} for kind in kinds) and tables:
        tokens = [adapter.tokens[name.removesuffix(".weight")] for name in (*tables, *heads)]
        return all(t.indices == tokens[0].indices and t.rows.equal(tokens[0].rows) for t in tokens)
    return False


def _repeats(adapter: Adapter, tables: list[str], heads: list[str]) -> bool:
    """Whether the head's change, if there is one beside that of the embedding, is the same.

    With DoRA it is none: A and B are tied, but the embedding's magnitudes are those of its columns, the head's of rows.
    Nor is it where ``alpha_pattern`` scales one of them by another number.

    Raises:
        AdapterError: it is not, though they are said to be tied.
    """
    changed = [name.removesuffix(".weight") for name in (*tables, *heads)]
    scaled = [module for module in changed if module in adapter.magnitudes]
    if scaled and not (tables and heads):
        raise AdapterError(
            f"{adapter.root}: ensure_weight_tying is set, but beside {scaled[0]}.lora_magnitude_vector there is none "
            f"of the {'head' if tables else 'embedding'}",
            hint="save the adapter again with peft",
        )
    repeats = not scaled
    for table, head in ((table, head) for table in tables for head in heads):
        one, other = (adapter.modules.get(name.removesuffix(".weight")) for name in (table, head))
        if one and other and not (torch.equal(one.lora_a, other.lora_a) and torch.equal(one.lora_b, other.lora_b)):
            raise AdapterError(
                f"{adapter.root}: ensure_weight_tying is set, but {table} and {head} change differently",
                hint="save the adapter again with peft",
            )
        repeats &= not (one and other and one.scaling != other.scaling)
        for stored in (adapter.begins, adapter.replaced):
            keys = [stored.get(name) for name in (table, head)]
            values = [None if key is None else adapter.digests[key] for key in keys]
            if None not in values and values[0] != values[1]:
                raise AdapterError(
                    f"{adapter.root}: ensure_weight_tying is set, but {keys[0]!r} and {keys[1]!r} differ",
                    hint="save the adapter again with peft",
                )
    return repeats


def _kinds(adapter: Adapter, name: str) -> set[str]:
    module = name.removesuffix(".weight")
    found = {"low rank": module in adapter.modules, "tokens": module in adapter.tokens}
    return {kind for kind, there in (found | {"replaced": name in adapter.replaced}).items() if there}
