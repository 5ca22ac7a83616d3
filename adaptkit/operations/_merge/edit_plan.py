"""Plan what adapters do to the tensors of a checkpoint; every part of every adapter finds its tensor or is refused.

Compensation, the change that an adapter was initialized with to offset its base's quantization error, is subtracted
unless that base's values are merged into.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from adaptkit.checkpoint.adapter import Adapter, TokenRows
from adaptkit.checkpoint.adapter_config import is_parameter, is_saved
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import AdapterError, BaseMismatchError, UsageError, install_hint
from adaptkit.models.addressing import OTHER_MODEL, Slice
from adaptkit.models.architecture import empty_network, why_unsupported
from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import FLOATS, TensorSpec
from adaptkit.operations._merge.edits import Edit, Edits, Stored, check_sums, is_same
from adaptkit.operations._merge.unlike_peft import trained_differently
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._terms import training_of
from adaptkit.operations._tying import VocabularyChange, vocabulary_changes
from adaptkit.operations._vocabulary import Vocabulary, find_vocabulary, require_head
from adaptkit.wording import counted


def plan_edits(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    untie: bool,
    begun: Collection[str] | None = None,
    is_trained_on: bool = False,
) -> Edits:
    """Plan what adapters do to each tensor of a checkpoint.

    Args:
        checkpoint: the base.
        adapters: in order.
        weights: one per adapter.
        untie: store a tied head as a separate tensor if it would differ from the embedding.
        begun: the base's tensors that an adapter's own copy of the same shape replaces; None to compare the values.
        is_trained_on: whether the checkpoint has the quantized values that the adapters compensate for.

    Raises:
        BaseMismatchError: an adapter changes a tensor that the checkpoint lacks or has in another shape; or a tied head
            would differ from the embedding and ``untie`` is not set.
        UsageError: an adapter only offsets what quantization loses, or cannot be merged with this weight, or with the
            other adapters.
        AdapterError: parts of an adapter contradict each other.
    """
    vocabulary = find_vocabulary(checkpoint)
    changes = [vocabulary_changes(checkpoint, vocabulary, adapter, untie) for adapter in adapters]
    edits = Edits(addresses=[change.addresses for change in changes])
    separate = any(change.separate for change in changes)
    if separate:
        vocabulary = require_head(checkpoint, vocabulary)
        edits.config["tie_word_embeddings"] = False
        edits.notes.append(f"untied: {vocabulary.head} is now a separate tensor")
    for number, (adapter, weight, change) in enumerate(zip(adapters, weights, changes, strict=True)):
        if is_trained_on:
            adapter = replace(adapter, compensation={})
        elif adapter.only_compensates:
            raise UsageError(
                f"{adapter.root}: an untrained companion adapter only offsets what quantization loses, which "
                f"{checkpoint.root} has not lost",
                hint=f"train it first: {training_of(adapter)}",
            )
        edits.notes += [f"{adapter.root}: {change.mapping_note}"] if change.mapping_note else []
        _Planner(checkpoint, vocabulary, edits, change, adapter, number, weight, separate, begun).plan()
    if separate and vocabulary.head not in edits.of:  # it keeps the embedding's values
        spec = checkpoint.spec(vocabulary.stored(vocabulary.head))
        edits.of[vocabulary.head] = Edit(replace(spec, name=vocabulary.head), spec.name, spec.shape)
    if separate and vocabulary.bias is not None:  # the bias was tied along with the weight
        own, outer = vocabulary.bias
        spec = checkpoint.spec(outer)
        edit = edits.of.get(outer) or Edit(spec, outer, spec.shape)
        edits.of[own] = replace(edit, spec=replace(edit.spec, name=own))
    edits.added = [name for name in edits.of if name not in checkpoint.tensors]
    check_sums(checkpoint, vocabulary, edits)
    return edits


@dataclass(frozen=True)
class _Planner:
    """Adds the changes of one adapter to the edits; see ``plan_edits``, and ``AdapterStep`` for ``number``."""

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    edits: Edits
    change: VocabularyChange
    adapter: Adapter
    number: int
    weight: float
    separate: bool
    begun: Collection[str] | None

    def plan(self) -> None:
        adapter, addresses, repeated = self.adapter, self.change.addresses, self.change.repeated
        for module, term in adapter.modules.items():
            if f"{module}.weight" not in repeated:
                self._plan_module(module, term, addresses[f"{module}.weight"][0])
        for module, bias in adapter.biases.items():
            name = addresses[f"{module}.bias"][0].name
            self._check(name, (bias.shape[0],))
            self._extend(name, bias=bias)
        for parameter in adapter.experts:
            self._plan_stack(parameter, addresses[parameter])
        for module, tokens in adapter.tokens.items():
            if f"{module}.weight" not in repeated:
                self._plan_tokens(module, tokens, addresses[f"{module}.weight"][0].name)
        for parameter, key in adapter.replaced.items():
            if parameter not in repeated:
                self._plan_replaced(parameter, key, addresses[parameter])
        steps = [(name, step) for name, edit in self.edits.of.items() for step in edit.steps]
        replaced = {name for name, step in steps if step.adapter == self.number and step.whole}
        for name in self.checkpoint.tensors:
            if name not in replaced and is_saved(adapter.config, name.rpartition(".")[0]):
                self._refuse(
                    f"modules_to_save is {adapter.config['modules_to_save']}, but the adapter has no tensor for {name}",
                    "download or save the complete adapter again, or give the base that it was trained on",
                )
        self.edits.notes += trained_differently(self.checkpoint, adapter, addresses)

    def _plan_module(self, module: str, term: LowRank, place: Slice) -> None:
        adapter, name = self.adapter, place.name
        if place.of_tensor:
            self._plan_expert(module, term, place)
            return
        self._plan_copies(module, name)
        is_table = module in adapter.embeddings
        flip = not is_table and self._is_transposed(module, term, self._spec(name))
        terms = [term]
        if module in adapter.compensation:
            terms.append(adapter.compensation[module].weighted(-1.0))
        terms = [lora.transposed(t) if flip else t for t in terms]
        self._check(name, terms[0].shape)
        self._extend(name, panels=(tuple(terms),))
        if module in adapter.magnitudes:
            self._extend(name, magnitude=adapter.magnitudes[module], per_column=flip or is_table)

    def _is_transposed(self, module: str, term: LowRank, spec: TensorSpec) -> bool:
        """Return whether the base stores this weight as (in, out).

        Shapes decide, unless the matrix is square; ``fan_in_fan_out`` alone does not, since peft sets it by whichever
        layer came last. A transposed shape in a model without transposed layers belongs to another model.
        """
        turned = stores_transposed(self.checkpoint, module)
        if term.shape[0] == term.shape[1]:
            return turned and not is_parameter(self.adapter.config, module)
        kind = self.checkpoint.config.get("model_type")
        may_be = turned or self.adapter.fan_in_fan_out or not isinstance(kind, str)
        return may_be and spec.shape == term.shape[::-1]

    def _plan_expert(self, module: str, term: LowRank, place: Slice) -> None:
        """Plan the change of one expert's linear layer: that of the rows of a stacked tensor that hold it."""
        shape, (number, count) = self._spec(place.name).shape, place.part
        experts, height, width = (*shape, 0, 0, 0)[:3]
        rows = height // count
        if len(shape) != 3 or (place.expert or 0) >= experts or term.shape != (rows, width):
            self._refuse(f"{module} of shape {list(term.shape)} does not fit {place.name} of shape {list(shape)}")
        whole = np.zeros((height, term.rank), term.b.dtype)
        whole[number * rows : (number + 1) * rows] = term.b
        padded = replace(term, b=whole)
        self._extend(place.name, panels=tuple((padded,) if one == place.expert else () for one in range(experts)))

    def _plan_stack(self, parameter: str, slices: Sequence[Slice]) -> None:
        """Plan the change of a stacked parameter, which the files hold as one tensor or in a tensor for each expert."""
        name, shape, adapter = slices[0].name, self._spec(slices[0].name).shape, self.adapter
        if slices[0].expert is not None:
            (height, width), parts = (*shape, 0, 0)[:2], slices[0].part[1]
            stack = adapter.experts_for(parameter, (height * parts, width), is_transposed=False)
            if len(slices) != len(stack) * parts:
                self._refuse(
                    f"the adapter expects {counted(len(stack), 'expert')} in {parameter}, but {self.checkpoint.root} "
                    f"has {len(slices) // parts}"
                )
            for piece in slices:
                whole = stack[piece.expert or 0]
                rows = whole.shape[0] // parts
                self._check(piece.name, (rows, whole.shape[1]))
                part = whole.b[piece.part[0] * rows : (piece.part[0] + 1) * rows]
                self._extend(piece.name, panels=((replace(whole, b=part),),))
            return
        stack = adapter.experts[parameter]
        out, into = stack[0].shape
        flip = shape == (len(stack), into, out)
        if flip and into == out:  # only the model's code says whether square matrices are stored as (in, out)
            if why := why_unsupported(self.checkpoint):
                what = f"cannot tell whether {parameter} stores its square matrices transposed"
                self._refuse(f"{what}: {why}", install_hint("train"))
            module = empty_network(self.checkpoint).get_submodule(parameter.rpartition(".")[0])
            flip = bool(getattr(module, "is_transposed", False))
            stack = adapter.experts_for(parameter, (out, into), flip)
        one = len(shape) == 2 and len(stack) == 1  # matrix for all experts, such as a bias
        self._check(name, (*(() if one else (len(stack),)), *((into, out) if flip else (out, into))))
        self._extend(name, panels=tuple((lora.transposed(term) if flip else term,) for term in stack))

    def _plan_tokens(self, module: str, tokens: TokenRows, name: str) -> None:
        """Plan trained rows of an embedding or head.

        In peft a tied head follows its embedding unless it has trained tokens of its own, even if the merge unties
        them; the embedding never follows the head.
        """
        self._plan_copies(module, name)
        spec, vocabulary = self._spec(name), self.vocabulary
        if len(spec.shape) != 2 or tokens.rows.shape[1] != spec.shape[1] or max(tokens.indices) >= spec.shape[0]:
            self._refuse(
                f"trained rows of width {tokens.rows.shape[1]} up to index {max(tokens.indices)} do not fit {name} of "
                f"shape {list(spec.shape)}"
            )
        changed = [self.change.addresses[f"{owner}.weight"][0].name for owner in self.adapter.tokens]
        follows = self.separate and name == vocabulary.embedding and vocabulary.head not in changed
        for output in vocabulary.both(name) if follows else self._outputs(name):
            self._put(output, tokens=tokens)

    def _plan_copies(self, module: str, name: str) -> None:
        """Use the adapter's copies of a module's base tensors if they differ, for a tied head or embedding too.

        The running model had them as its base weights; usually they equal the base's.
        """
        base, files, vocabulary = self.checkpoint, self.adapter.files, self.vocabulary
        for kind in ("weight", "bias"):
            if (key := self.adapter.base_copies.get(f"{module}.{kind}")) is None:
                continue
            target = name if kind == "weight" else self.change.addresses[f"{module}.bias"][0].name
            source = vocabulary.stored(target)
            if files.spec(key).shape == base.spec(source).shape:
                if is_same(base, source, files, key) if self.begun is None else source not in self.begun:
                    continue
                self.edits.copies.append((source, files.root))
            for output in vocabulary.both(target) if self.separate else vocabulary.outputs(target, together=True):
                self._replace(output, key)

    def _plan_replaced(self, parameter: str, key: str, slices: Sequence[Slice]) -> None:
        """Plan a tensor of the adapter that replaces one of the base, or one for each expert."""
        if slices[0].expert is None:
            for output in self._outputs(slices[0].name):
                self._replace(output, key)
            return
        shape = self.adapter.files.spec(key).shape
        experts, height, width = (*shape, 0, 0, 0)[:3]
        for piece in slices:
            number, count = piece.part
            rows, found = height // count, self._spec(piece.name).shape
            if len(shape) != 3 or len(slices) != experts * count or found != (rows, width):
                self._refuse(
                    f"the adapter expects shape {list(shape)} for {parameter}, which does not fit {piece.name} of "
                    f"shape {list(found)}"
                )
            self._put(piece.name, whole=Stored(self.adapter.files, key, (piece.expert or 0) * height + number * rows))

    def _replace(self, output: str, key: str) -> None:
        """Replace a tensor of the result by one of the adapter; its number of rows may change if it is a vocabulary."""
        edit, found, module = self._edit(output), self.adapter.files.spec(key), output.rpartition(".")[0]
        if found.shape != edit.spec.shape:
            is_table = self.vocabulary.is_head(f"{module}.weight") or self.vocabulary.is_embedding(f"{module}.weight")
            if not is_table or len(found.shape) != len(edit.spec.shape) or found.shape[1:] != edit.spec.shape[1:]:
                self._check(output, found.shape)  # raises
            if self.weight != 1:
                raise UsageError(
                    f"{self.adapter.root}: resizes the vocabulary to {found.shape[0]}, which needs a weight of 1",
                    hint="leave out its --weight, or give 1",
                )
            self.edits.config["vocab_size"] = found.shape[0]
            self.edits.of[output] = replace(edit, spec=replace(edit.spec, shape=found.shape))
        self._put(output, whole=Stored(self.adapter.files, key))

    def _refuse(self, why: str, hint: str = OTHER_MODEL) -> NoReturn:
        raise BaseMismatchError(f"{self.adapter.root}: {why}", hint=hint)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a change whose shape is not the tensor's."""
        if (spec := self._spec(name)).shape != shape:
            found = f"it is {list(spec.shape)} ({spec.dtype}) in {self.checkpoint.root}"
            self._refuse(f"the adapter expects shape {list(shape)} for {name}, but {found}")

    def _spec(self, name: str) -> TensorSpec:
        return self._edit(self._outputs(name)[0]).spec

    def _outputs(self, name: str) -> list[str]:
        """Return the tensors of the result that a change applies to: embedding and head, if tied.

        If the merge unties them, only if this adapter changes both alike.
        """
        if self.separate and self.change.together and name == self.vocabulary.embedding:
            return [name, self.vocabulary.head]
        return self.vocabulary.outputs(name, together=not self.separate)

    def _edit(self, output: str) -> Edit:
        spec = self.checkpoint.spec(self.vocabulary.stored(output))
        return self.edits.of.get(output) or Edit(replace(spec, name=output), spec.name, spec.shape)

    def _extend(self, name: str, **what: Any) -> None:
        """Add a change to every tensor of the result that it applies to."""
        for output in self._outputs(name):
            self._put(output, **what)

    def _put(self, output: str, **what: Any) -> None:
        """Add a change to one tensor of the result."""
        edit = self._edit(output)
        if edit.spec.dtype not in FLOATS:
            self._refuse(
                f"changes {output}, whose dtype in {self.checkpoint.root} is {edit.spec.dtype}",
                "save the base in float32 or bfloat16 first, and merge into that"
                if edit.spec.dtype == "F64"
                else "merge into the 16-bit checkpoint that it was quantized from",
            )
        before = edit.steps[-1].whole if edit.steps and edit.steps[-1].adapter == self.number else None
        after, digests = what.get("whole"), self.adapter.digests
        if before and after and (before.first_row, digests[before.key]) != (after.first_row, digests[after.key]):
            raise AdapterError(  # two modules may share a tensor, such as a bias
                f"{self.adapter.root}: {before.key!r} and {after.key!r} both replace {output}, but differ",
                hint="save the adapter again with peft",
            )
        self.edits.of[output] = edit.extended(self.number, self.weight, **what)
