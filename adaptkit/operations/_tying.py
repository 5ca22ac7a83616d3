"""Embedding and head of a checkpoint, which may be one tensor, and what becomes of that when an adapter changes one.

In the running model peft wraps modules, not tensors: a change of the embedding leaves a tied head as it was, and the
other way round. Rows of trained tokens, and what ``ensure_weight_tying`` is set for, change both.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptkit.checkpoint.adapter import Adapter
from adaptkit.checkpoint.layout import class_names, text_config
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import (
    is_rare_table,
    is_tied_by_default,
    is_usual_head,
    is_usual_table,
    known_head,
)
from adaptkit.errors import AdapterError, BaseMismatchError
from adaptkit.lazy import torch
from adaptkit.networks.addressing import Addresses, Slice, find_addresses
from adaptkit.networks.head import asked_head

_NUMBERED = re.compile(r"(^|\.)\d+\.")
_SHARED = re.compile(r"(^|\.)shared\.weight$")
_USES = re.compile(r"(^|\.)(shared|embed_tokens|lm_head)\.weight$")
_TELLS_NO_WORDS = re.compile(
    r"(?<!LMHead)(?<!DoubleHeads)(?<!EncoderDecoder)(?<!MarianMT)Model$|For\w*Classification$|ForQuestionAnswering\w*$"
    r"|For(MultipleChoice|NextSentencePrediction)$|^(Electra|Funnel|Splinter)ForPreTraining$"
)
"""Names of transformers' classes that have no output layer for the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """Where a checkpoint keeps what depends on its vocabulary.

    Attributes:
        embedding: name of the tensor; empty if none is known.
        head: name of the output layer's tensor, in the files or not; a guess if not ``is_known``.
        tied: whether the head is the embedding.
        tensors: names in the files.
        is_known: whether that is the head's name.
    """

    embedding: str
    head: str
    tied: bool
    tensors: Collection[str]
    is_known: bool

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor of the files is the embedding."""
        return bool(name) and name == self.embedding

    def is_head(self, name: str) -> bool:
        """Whether a tensor, or a parameter of the model, is the output layer."""
        return name == self.head or is_usual_head(name.removesuffix(".weight"))

    @property
    def bias(self) -> tuple[str, str] | None:
        """The head's bias, and the tensor of the files that it is while embedding and head are one; None if it is none.

        BERT and its kin give the bias to what is around the head, too, and tie the two if they tie the weights.
        """
        module = self.head.removesuffix(".weight")
        own, outer = f"{module}.bias", f"{module.rpartition('.')[0]}.bias"
        return (own, outer) if self.tied and outer in self.tensors and own not in self.tensors else None

    def stored(self, name: str) -> str:
        """The tensor of the files that a tensor of the result begins as."""
        return self.embedding if name == self.head and name not in self.tensors else name

    def both(self, name: str) -> list[str]:
        """Embedding and head if they are one and a tensor is that; else only the tensor."""
        return [self.embedding, self.head] if self.tied and name in (self.embedding, self.head) else [name]

    def outputs(self, name: str, together: bool) -> list[str]:
        """The tensors that a change of one goes to.

        Args:
            name: of the tensor.
            together: whether embedding and head change together.
        """
        if not self.tied or name not in (self.embedding, self.head) or not together:
            return [name]
        return [self.embedding, *([self.head] if self.head in self.tensors else [])]


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


def find_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Find embedding and head, from names, shapes and configuration."""
    weights = {name.removesuffix(".weight"): name for name in checkpoint.tensors if name.endswith(".weight")}
    shortest_first = sorted(weights, key=lambda module: (len(module), module))
    known = known_head(checkpoint.config)
    heads = [module for module in shortest_first if module == known or is_usual_head(module)]
    says = _says_tied(checkpoint.config)
    says = is_tied_by_default(checkpoint.config) if says is None else says
    tables = [module for module in shortest_first if is_usual_table(module)]
    tables = tables or [module for module in shortest_first if is_rare_table(module) and module not in heads]
    if not tables and not heads:
        tables = _only_of_its_height(checkpoint)
    tied = bool(tables) and (says is True if heads else not _tells_no_words(checkpoint))
    return Vocabulary(
        weights[tables[0]] if tables else "",
        weights[heads[0]] if heads else f"{known or 'lm_head'}.weight",
        tied,
        checkpoint.tensors,
        bool(heads or known),
    )


def require_head(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Vocabulary:
    """Make sure of the head's name, where it is to be a tensor of its own; may have to ask transformers.

    Raises:
        BaseMismatchError: it cannot be known.
    """
    if vocabulary.is_known:
        return vocabulary
    head = asked_head(checkpoint)
    if not head:
        raise BaseMismatchError(
            f"{checkpoint.root}: what models of the type {checkpoint.config.get('model_type')!r} call the head that is "
            "tied to their embedding is not known, so that it cannot become a tensor of its own",
            hint="pip install 'adaptkit[train]', if transformers knows them; or leave embedding and head as they are",
        )
    return replace(vocabulary, head=f"{head}.weight", is_known=True)


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
            f"{adapter.root}: changes {(tables + heads)[0]}, but {checkpoint.root} ties its head to its embedding, "
            "which would no longer be the same",
            hint="give the head a tensor of its own: --untie",
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
                    f"{adapter.root}: changes {name}, in a model whose encoder, decoder or head share one table; peft "
                    "changes one of these uses, which no checkpoint of the model can say",
                    hint="train it without embeddings and head",
                )


def _refuse_unknown(checkpoint: Checkpoint, vocabulary: Vocabulary, adapter: Adapter) -> None:
    """Refuse a change of a table that may be the head, too, where it cannot be told which one is."""
    tables = sorted({*adapter.embeddings, *adapter.tokens})
    if tables and not vocabulary.embedding and _says_tied(checkpoint.config) and not _tells_no_words(checkpoint):
        raise BaseMismatchError(
            f"{adapter.root}: changes {tables[0]}, and {checkpoint.root} ties its head to its embedding, which cannot "
            "be told from other tables",
            hint="train it without embeddings and head",
        )


def _refuse_uses(checkpoint: Checkpoint, adapter: Adapter, found: Addresses) -> None:
    """Refuse a change of one use of a tensor that a model has for several, other than of its head."""
    for name in sorted(found.uses):
        if name.endswith(".weight"):
            raise AdapterError(
                f"{adapter.root}: changes {name}, which the model has in common with {found.of[name][0].name} of "
                f"{checkpoint.root}; peft changes one of these uses, which no checkpoint of the model can say",
                hint="train it without embeddings and head",
            )


def _only_of_its_height(checkpoint: Checkpoint) -> list[str]:
    """The module of the only matrix outside the layers with a row for every word, which must be embedding and head."""
    values = [source.get("vocab_size") for source in (checkpoint.config, text_config(checkpoint.config))]
    found = [
        name.removesuffix(".weight")
        for name, located in checkpoint.tensors.items()
        if name.endswith(".weight") and not _NUMBERED.search(name)
        if len(located.spec.shape) == 2 and located.spec.shape[0] in values
    ]
    return found if len(found) == 1 else []


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
        return len(values) == 1 and (bool(heads) or shape != checkpoint.spec(vocabulary.embedding).shape)
    if all(kind == {"tokens"} for kind in kinds) and tables:
        tokens = [adapter.tokens[name.removesuffix(".weight")] for name in (*tables, *heads)]
        return all(t.indices == tokens[0].indices and t.rows.equal(tokens[0].rows) for t in tokens)
    return False


def _repeats(adapter: Adapter, tables: list[str], heads: list[str]) -> bool:
    """Whether the head's change, if there is one beside that of the embedding, is the same.

    With DoRA it is none: A and B are tied, but the embedding's magnitudes are those of its columns, the head's of rows.

    Raises:
        AdapterError: it is not, though they are said to be tied.
    """
    changed = [name.removesuffix(".weight") for name in (*tables, *heads)]
    scaled = [module for module in changed if module in adapter.magnitudes]
    if scaled and not (tables and heads):
        raise AdapterError(
            f"{adapter.root}: ensure_weight_tying is set, but {scaled[0]}.lora_magnitude_vector has none beside it of "
            f"the {'head' if tables else 'embedding'}",
            hint="save it again with peft",
        )
    for table, head in ((table, head) for table in tables for head in heads):
        one, other = (adapter.modules.get(name.removesuffix(".weight")) for name in (table, head))
        if one and other and not (torch.equal(one.lora_a, other.lora_a) and torch.equal(one.lora_b, other.lora_b)):
            raise AdapterError(
                f"{adapter.root}: ensure_weight_tying is set, but {table} and {head} change differently",
                hint="save it again with peft",
            )
        for stored in (adapter.begins, adapter.replaced):
            keys = [stored.get(name) for name in (table, head)]
            values = [None if key is None else adapter.digests[key] for key in keys]
            if None not in values and values[0] != values[1]:
                raise AdapterError(
                    f"{adapter.root}: ensure_weight_tying is set, but {keys[0]!r} and {keys[1]!r} differ",
                    hint="save it again with peft",
                )
    return not scaled


def _kinds(adapter: Adapter, name: str) -> set[str]:
    module = name.removesuffix(".weight")
    found = {"low rank": module in adapter.modules, "tokens": module in adapter.tokens}
    return {kind for kind, there in (found | {"replaced": name in adapter.replaced}).items() if there}


def _tells_no_words(checkpoint: Checkpoint) -> bool:
    """Whether files are of a class without an output layer, which some say they are whose names are a language model's.

    Those have one word before all names (``transformer.h.0.…``), which ``GPT2Model`` by itself does not have.
    """
    name = next(iter(class_names(checkpoint.config)), "")
    outer = {tensor.partition(".")[0] for tensor in checkpoint.tensors}
    return _TELLS_NO_WORDS.search(name) is not None and not (name.endswith("Model") and len(outer) == 1)


def _says_tied(config: Mapping[str, Any]) -> Any:
    return config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
