"""Compare an adapter's whole tensors and trained rows with the tensors that the model has under peft 0.21.2.

A module with a LoRA has its original tensors in ``base_layer``. A module in ``modules_to_save`` is replaced with all
its tensors, and peft requires each of them. Any other tensor is loaded by its name, if the model has that name.
"""

import re
from collections.abc import Iterator

from adaptkit.checkpoint.adapter_config import PREFIX, token_indices
from adaptkit.operations.targets import _rules
from adaptkit.operations.targets._adapter_files import AdapterFiles, Key
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._target import Finding, error_about, some

_HEADS = ("score", "classifier")
_BY_TASK = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ("qa_outputs",)}
"""Names that peft adds to ``modules_to_save``, by task."""
SAVED_WRAPPER = re.compile(r"\.(modules_to_save|original_module)\.")
"""peft's wrappers of modules that are saved whole; peft does not load tensors with these in their names."""
_GENERATE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_WHOLE = ("weight", "bias", "wrapped weight", "token rows", "other")
DROPS = "peft silently drops it, so it changes nothing"


def within(name: str, path: str) -> bool:
    """Return whether ``name`` ends a path or the path of a module around it."""
    return f".{path}.".find(f".{name}.") >= 0


def parameters(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find names in ``target_parameters`` that no tensor of the file is for, or that are of vectors of the model."""
    listed = files.config.get("target_parameters")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if not names:
        return
    owners = {name.rpartition(".")[0] for name in names}
    adapted = {end for pair in files.pairs for end in _ends(pair.module.replace(".base_layer", "")) if end in owners}
    if "weight" in names or any(pair.stacked for pair in files.pairs):
        adapted.add("")  # the owner of a name without one
    unused = [name for name in names if name.rpartition(".")[0] not in adapted]
    if unused:
        yield Finding(
            "warning",
            f"target_parameters in adapter_config.json names {some(unused)}, but the file has no tensor for it",
            "peft ignores it if the model has no such parameter, and otherwise adds a LoRA with its initial values",
            "remove it from target_parameters",
        )
    shapes, chosen = base.tensors if base else {}, set(names)
    vectors = [tensor for tensor, shape in shapes.items() if len(shape) not in (2, 3)]
    vectors = [tensor for tensor in vectors if not chosen.isdisjoint(_ends(tensor))]
    if vectors:
        yield Finding(
            "error",
            f"target_parameters in adapter_config.json names {some(vectors)}, which is neither a matrix nor a stack",
            "peft fails with ValueError",
            "remove it, or write a longer name that only the intended parameters end with",
        )


def _ends(path: str) -> Iterator[str]:
    """Iterate over a dotted path and all ends of it."""
    parts = path.split(".")
    return (".".join(parts[number:]) for number in range(len(parts)))


def strays(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find whole tensors that the model does not have, or has in another shape.

    Args:
        files: the adapter's files.
        base: without it only problems visible in the file are found.
    """
    whole = [key for key in files.keys if key.role in _WHOLE and key.name.startswith(PREFIX)]
    whole = [key for key in whole if not SAVED_WRAPPER.search(key.name)]
    lora = {pair.module: pair.embedding for pair in files.pairs}
    rows = {f"{key.module}.token_adapter" for key in files.keys if key.role == "token rows"}
    beside = [key for key in whole if ".base_layer." in key.name and key.module not in {*lora, *rows}]
    yield from error_about(
        [key.name for key in beside],
        "the base layer of a LoRA module, but the file has no LoRA for it",
        DROPS,
        "remove it, or remove .base_layer from its name",
    )
    under = [key for key in whole if key.role in ("weight", "bias") and _is_under(files, key) and key.module in lora]
    for is_table in (False, True):  # for an embedding it may be a copy of the base's, which older versions wrote
        names = [key.name for key in under if lora[key.module] is is_table]
        if names:
            yield Finding(
                "warning" if is_table else "error",
                f"{some(names)}: a full tensor of a module that also has a LoRA",
                DROPS,
                "if it differs from the base's, rename it to .base_layer.weight or .base_layer.bias",
            )
    if base is None:
        return
    nowhere = [key.name for key in whole if key.role != "other" and not _has(base, _in_base(key))]
    if nowhere:
        yield Finding(
            "warning" if base.is_composed else "error",
            f"{some(nowhere)}: no tensor of this name in {base.title}",
            DROPS,
            "remove it, or give the base that it was trained on",
        )
    unlike = [key for key in whole if key.role in ("weight", "bias", "wrapped weight") and _is_unlike(base, key)]
    if unlike:
        first = min(unlike, key=lambda key: key.name)
        yield Finding(
            "error",
            f"{some([key.name for key in unlike])}: expected shape {list(base.tensors[_in_base(first)])} as in "
            f"{base.title}, found {list(first.shape)}",
            "peft fails: size mismatch",
            "give the base that it was trained on",
        )


def _is_under(files: AdapterFiles, key: Key) -> bool:
    return ".base_layer." not in key.name and not any(within(name, key.module) for name in files.saved)


def _in_base(key: Key) -> str:
    """Return the name of a tensor in the model without peft; for trained rows, that of their table."""
    if key.role == "token rows":
        return f"{key.module}.weight"
    return key.name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".token_adapter.", ".")


def _has(base: BaseShapes, name: str) -> bool:
    """Return whether the model has a tensor; assumed for all but weights if transformers does not know the model."""
    if name in base.tensors or (not base.tensors and not name.endswith(".weight")):
        return True
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and base.shape(module) is not None


def _is_unlike(base: BaseShapes, key: Key) -> bool:
    """Return whether the shape differs from the model's; ``_rules.tables`` reports a different vocabulary size."""
    shape = base.tensors.get(_in_base(key))
    if shape is None or shape == key.shape:
        return False
    return not _rules.is_table(key.module) or (len(shape), shape[1:]) != (len(key.shape), key.shape[1:])


def saved_modules(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find tensors of ``modules_to_save`` that the file lacks."""
    if base is not None and base.network is not None:
        yield from _lacking(files, base)
        return
    paths = [key.module for key in files.keys if key.role in ("weight", "bias", "other")]
    paths = [path for path in paths if not SAVED_WRAPPER.search(f"{path}.")]
    absent = [name for name in files.saved if name not in _HEADS and not any(within(name, path) for path in paths)]
    if absent and files.keys:
        yield Finding(
            "error",
            f"modules_to_save names {absent}, but the file has no tensor of it",
            "peft fails with KeyError if the model has such a module",
            "remove it from modules_to_save, or save the adapter again with peft",
        )


def _lacking(files: AdapterFiles, base: BaseShapes) -> Iterator[Finding]:
    task = files.config.get("task_type")
    ends = (*files.saved, *_BY_TASK.get(task if isinstance(task, str) else "", ()))
    if not ends or not files.keys:
        return
    modules = [f"{name}." for name, _ in base.network.named_modules(remove_duplicate=False) if name.endswith(ends)]
    names = {key.name for key in files.keys}
    wanted = [f"{PREFIX}{name}" for name in base.tensors if name.startswith(tuple(modules))]
    lacking = [name for name in wanted if name not in names] if modules else []
    yield from error_about(
        lacking,
        "not in the file, although modules_to_save or task_type asks for its module",
        "peft fails with KeyError",
        "remove the module from modules_to_save, or save the adapter again with peft",
    )


def trained_rows(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find trained rows whose number differs from the configuration's, or whose indices the vocabulary lacks."""
    rows = [key for key in files.keys if key.role == "token rows"]
    if files.config.get("trainable_token_indices") and files.keys and not rows:
        yield Finding(
            "error",
            "trainable_token_indices is set in adapter_config.json, but the file has no trained rows",
            "peft fails with KeyError",
            "remove it, or save the adapter again with peft",
        )
    given = {key: token_indices(files.config, key.module) for key in rows}
    indices = {key: found for key, found in given.items() if isinstance(found, list)}
    wrong = [key.name for key, found in indices.items() if key.shape[:1] != (len(found),)]
    yield from error_about(
        wrong,
        "the number of rows differs from trainable_token_indices in adapter_config.json",
        "peft fails: size mismatch",
        "save the adapter again with peft",
    )
    for key, found in indices.items():
        entries = _entries(files, base, key)
        beyond = [index for index in found if isinstance(index, int) and entries and not 0 <= index < entries]
        if beyond and base is not None:
            yield Finding(
                "error",
                f"trainable_token_indices has {max(beyond, key=abs)}, but {key.module} has only {entries} entries in "
                f"{base.root}",
                "peft fails with IndexError",
                "call model.resize_token_embeddings before the adapter is loaded, or give the base that it was "
                "trained on",
            )


def _entries(files: AdapterFiles, base: BaseShapes | None, key: Key) -> int | None:
    """Return the number of entries in the table of trained rows.

    If the file has the table, it is the file's number, since the model must then be resized to it.
    """
    own = [k.shape[0] for k in files.keys if k.role == "wrapped weight" and k.module.startswith(key.module) and k.shape]
    shape = base.shape(key.module) if base else None
    return own[0] if own else shape[0] if shape else base.vocabulary if base else None


def generates(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find an adapter for text generation on a base that cannot generate text."""
    task, network = files.config.get("task_type"), base.network if base else None
    if task in _GENERATE and network is not None and not hasattr(network, "prepare_inputs_for_generation"):
        yield Finding(
            "error",
            f"task_type is {task!r} in adapter_config.json, but {base.title if base else ''} does not generate text",
            "peft fails with AttributeError",
            "set task_type to FEATURE_EXTRACTION, or to the base's task",
        )
