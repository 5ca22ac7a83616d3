"""What only peft 0.21.2 does with adapters: modules that it does not select, and tensors that it drops or misses."""

import re
from collections.abc import Iterator
from dataclasses import replace

from adaptkit.checkpoint.adapter_config import ATTENTION, PREFIX, token_indices
from adaptkit.models.kinds import is_never_called, is_read_by_kernels
from adaptkit.models.linears import is_linear
from adaptkit.models.peft_names import renamed_in_peft
from adaptkit.operations.targets import _adapter_features as features
from adaptkit.operations.targets import _peft_selection as selection
from adaptkit.operations.targets._adapter_files import AdapterFiles, Key, key_of
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._peft_experts import of_experts
from adaptkit.operations.targets._peft_values import of_numbers, of_values
from adaptkit.operations.targets._target import Sighting, seen

_TYPES = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT",
    "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
    "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT", "XLORA",
}  # fmt: skip
_MORE_TENSORS = ("kasa_config", "velora_config", "monteclora_config")
"""Keys of variants that have further tensors, with ``.lora_`` in their names."""
_BY_DEFAULT = {"c_attn", "q", "q_proj", "query", "query_key_value", "v", "v_proj", "value"}
"""Modules that peft targets for most model types if ``target_modules`` is not set."""
_GENERATE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_HEADS = ("score", "classifier")
_SAVED_BY_TASK = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ("qa_outputs",)}
"""Names that peft adds to ``modules_to_save``, by task."""
_NAMED = re.compile(
    r"(\.lora_(?:[AB]|magnitude_vector))\.default(?=\.(?:weight|bias)$)|(\.lora_embedding_[AB])\.default$"
)
"""Names that still contain ``default``, the name that peft gives an adapter."""
_COPY = re.compile(r"(.+)\.(?:modules_to_save(?:\.default)?|original_module)\.(.+)")
_SAVED_WRAPPER = re.compile(r"\.(modules_to_save|original_module)\.")
"""peft's wrappers of modules that are saved whole; it does not load tensors with these in their names."""
_IF_SET = {
    "magnitude": ("use_dora", "magnitudes of DoRA", "the norms of the base's rows"),
    "bias of B": ("lora_bias", "biases of lora_B", "zero"),
    "token rows": ("trainable_token_indices", "trained rows", ""),
}
"""Roles of tensors that peft has only if a key is set, their names, and their initial values."""


def of_adapter(files: AdapterFiles) -> Iterator[Sighting]:
    """Find the features of an adapter, read as peft reads it."""
    yield from features.of_files(files)
    files, kind = _as_read(files), files.config.get("peft_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        yield Sighting("unknown type", f"peft_type is {kind!r} in adapter_config.json")
    if kind != "LORA":
        return
    others = ("no LoRA", "invalid numbers", "changed base", "unknown start")  # that peft takes or names differently
    yield from (seen for seen in features.of_configuration(files) if seen.feature not in others)
    yield from of_values(files)
    yield from of_numbers(files)
    yield from _targets(files)
    yield from _names(files)
    yield from features.of_tensors(files)
    yield from _saved_modules(files)
    yield from _trained_rows(files)
    yield from _whole_tensors(files)
    is_ensured = files.config.get("ensure_weight_tying")
    yield from (s for s in features.beside_base(files) if not (is_ensured and s.feature == "tied head"))
    yield from _modules_of_base(files)
    yield from of_experts(files)


def _as_read(files: AdapterFiles) -> AdapterFiles:
    """Return the files as peft reads them: it accepts ``lora_A.default.weight``, and redundant copies are dropped.

    Copies of modules that are saved whole are redundant if the file also has the tensors under their plain names: peft
    loads both into the same place. The pairs of a ``MultiheadAttention``, whose names no rule fits, are dropped, too:
    peft loads them.
    """
    names = {key.name for key in files.keys}
    copies = {name for name in names if (match := _COPY.fullmatch(name)) and f"{match[1]}.{match[2]}" in names}
    matches = [match for key in files.keys if (match := ATTENTION.fullmatch(key.module))]
    attentions = {module for match in matches for module in (match[0], match[1])}
    kept = (key for key in files.keys if key.name not in copies and key.module not in attentions)
    return replace(files, keys=tuple(key_of(key.name, key.shape, _NAMED.sub(r"\1\2", key.name)) for key in kept))


def _targets(files: AdapterFiles) -> Iterator[Sighting]:
    """Find modules that the configuration does not select, or twice, and names in it that select nothing."""
    config, where = files.config, "in adapter_config.json"
    modules, unstacked = ([p.module for p in files.pairs if full or not p.stacked] for full in (True, False))
    ends = {pair.leaf for pair in files.pairs if not pair.stacked}
    if config.get("target_modules") is None and ends:
        found = f"target_modules is not set {where}"
        yield Sighting("no targets", found, {"ends": sorted(ends)}, doubtful=ends <= _BY_DEFAULT)
    twice = [m for m in modules if selection.is_parameter(config, m) and selection.is_module(config, m)]
    yield from seen("target twice", twice, f"target_modules and target_parameters {where} both name {{}}")
    if config.get("target_modules") not in (None, selection.SHORTHAND) and not config.get("ensure_weight_tying"):
        why = "or exclude_modules, modules_to_save or layers_to_transform excludes it"  # otherwise peft selects
        what = f"target_modules {where} does not match {{}}, {why}"
        yield from seen("no target", selection.untargeted(config, unstacked), what)
    listed, base = config.get("target_parameters"), files.base
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    adapted = {end for module in modules for end in _ends(module.replace(".base_layer", ""))}
    if "weight" in names or modules != unstacked:
        adapted.add("")  # the owner of a name without one
    unused = [name for name in names if name.rpartition(".")[0] not in adapted]
    yield from seen(
        "unused parameter", unused, f"target_parameters {where} names {{}}, but the file has no tensor for it"
    )
    vectors = [name for name, shape in (base.tensors if base else {}).items() if len(shape) not in (2, 3)]
    vectors = [name for name in vectors if not set(names).isdisjoint(_ends(name))]
    what = f"target_parameters {where} names {{}}, which is neither a matrix nor a stack"
    yield from seen("vector parameter", vectors, what)
    task, network = config.get("task_type"), base.network if base else None
    if base and network is not None and task in _GENERATE and not hasattr(network, "prepare_inputs_for_generation"):
        yield Sighting("not generating", f"task_type is {task!r} {where}, but {base.title} does not generate text")


def _ends(path: str) -> Iterator[str]:
    """Iterate over a dotted path and all ends of it."""
    parts = path.split(".")
    return (".".join(parts[number:]) for number in range(len(parts)))


def _names(files: AdapterFiles) -> Iterator[Sighting]:
    """Find tensors that peft does not know by their names, and those that it misses."""
    foreign = [key.name for key in files.keys if not key.name.startswith(PREFIX)]
    yield from seen("foreign names", foreign, f"the name does not begin with {PREFIX}")
    has_more = any(files.config.get(key) for key in _MORE_TENSORS)
    others = [key for key in files.keys if key.role == "other" and key.name.startswith(PREFIX)]
    others = [key for key in others if not (has_more and ".lora_" in key.name) and not _is_saved(files, key)]
    others += [key for key in files.keys if key.role in ("weight", "bias") and _SAVED_WRAPPER.search(key.name)]
    yield from seen("other names", [key.name for key in others])
    plain = [pair.module for pair in files.pairs if not pair.embedding and not pair.stacked]
    for role, (key, what, initial) in _IF_SET.items():
        names, there = files.named(role), {found.module for found in files.keys if found.role == role}
        if not files.config.get(key):
            yield from seen("not asked for", names, key=key, tensors=what)
        elif initial:
            missing = [module for module in plain if module not in there]
            what = f"{key} is set, but the file has no {role} of {{}}"
            yield from seen("asked for", missing, what, initial=initial)


def _is_saved(files: AdapterFiles, key: Key) -> bool:
    """Return whether ``modules_to_save`` names a tensor's module, or one around it."""
    return any(f".{name}." in f".{key.module}." for name in files.saved)


def _saved_modules(files: AdapterFiles) -> Iterator[Sighting]:
    """Find tensors of ``modules_to_save`` that the file lacks."""
    base, network = files.base, files.base.network if files.base else None
    if not files.keys:
        return
    if base is None or network is None:
        whole = [key for key in files.keys if key.role in ("weight", "bias", "other")]
        paths = [f".{key.module}." for key in whole if not _SAVED_WRAPPER.search(f"{key.module}.")]
        names = [name for name in files.saved if name not in _HEADS]
        absent = [name for name in names if not any(f".{name}." in path for path in paths)]
        if absent:
            yield Sighting("not saved", f"modules_to_save names {absent}, but the file has no tensor of it")
        return
    task = files.config.get("task_type")
    ends = (*files.saved, *_SAVED_BY_TASK.get(task if isinstance(task, str) else "", ()))
    modules = [name for name, _ in network.named_modules(remove_duplicate=False) if ends and name.endswith(ends)]
    wanted = [name for name in base.tensors if name.startswith(tuple(f"{module}." for module in modules))]
    lacking = {f"{PREFIX}{name}" for name in wanted} - {key.name for key in files.keys}
    what = "not in the file, although modules_to_save or task_type asks for its module"
    yield from seen("module not saved", lacking if modules else (), what)


def _trained_rows(files: AdapterFiles) -> Iterator[Sighting]:
    """Find trained rows whose number differs from the configuration's, or whose indices the vocabulary lacks.

    The vocabulary is the file's, if it has the table, since the model must then be resized to it.
    """
    base, rows = files.base, [key for key in files.keys if key.role == "token rows"]
    if files.config.get("trainable_token_indices") and files.keys and not rows:
        what = "trainable_token_indices is set in adapter_config.json, but the file has no trained rows"
        yield Sighting("no rows", what)
    given = {key: token_indices(files.config, key.module) for key in rows}
    indices = {key: numbers for key, numbers in given.items() if isinstance(numbers, list)}
    wrong = [key.name for key, numbers in indices.items() if key.shape[:1] != (len(numbers),)]
    what = "the number of rows differs from trainable_token_indices in adapter_config.json"
    yield from seen("other rows", wrong, what)
    for key, numbers in indices.items():
        if base is None:
            break
        tables = (k for k in files.keys if k.role == "wrapped weight" and k.module.startswith(key.module))
        shape = next((k.shape for k in tables if k.shape), None) or base.shape(key.module)
        entries = shape[0] if shape else base.vocabulary
        beyond = [index for index in numbers if isinstance(index, int) and entries and not 0 <= index < entries]
        if beyond:
            what = f"{key.module} has only {entries} entries in {base.root}"
            yield Sighting("rows beyond", f"trainable_token_indices has {max(beyond, key=abs)}, but {what}")


def _whole_tensors(files: AdapterFiles) -> Iterator[Sighting]:
    """Find whole tensors that the model does not have, or has in another shape."""
    roles = ("weight", "bias", "wrapped weight", "token rows", "other")
    whole = [key for key in files.keys if key.role in roles and key.name.startswith(PREFIX)]
    whole = [key for key in whole if not _SAVED_WRAPPER.search(key.name)]
    lora = {pair.module: pair.embedding for pair in files.pairs}
    inner = {*lora, *(f"{key.module}.token_adapter" for key in files.keys if key.role == "token rows")}
    wrapped = [key.name for key in whole if ".base_layer." in key.name and key.module not in inner]
    what = "the base layer of a LoRA module, but the file has no LoRA for it"
    yield from seen("wrapped without LoRA", wrapped, what)
    beside = [key for key in whole if key.role in ("weight", "bias") and ".base_layer." not in key.name]
    for is_copy in (False, True):  # of an embedding it may be a copy of the base's, which older versions wrote
        names = [key.name for key in beside if lora.get(key.module) is is_copy and not _is_saved(files, key)]
        what = "a full tensor of a module that also has a LoRA"
        yield from seen("whole beside LoRA", names, what, doubtful=is_copy)
    base = files.base
    if base is None:
        return
    nowhere = [key.name for key in whole if key.role != "other" and not _has(base, _in_base(key))]
    what = f"no tensor of this name in {base.title}"
    yield from seen("whole of nothing", nowhere, what, doubtful=base.is_composed)
    compared = {key: base.tensors.get(_in_base(key)) for key in whole if key.role not in ("token rows", "other")}
    shapes = {key: shape for key, shape in compared.items() if shape is not None and not _fits(key, shape)}
    if shapes:
        first = next(iter(shapes))
        what = f"expected shape {list(shapes[first])} as in {base.title}, found {list(first.shape)}"
        yield from seen("whole of other shape", [key.name for key in shapes], what)


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


def _fits(key: Key, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has a shape, but for the size of a vocabulary, which is another feature."""
    is_resized = features.is_table(key.module) and (len(shape), shape[1:]) == (len(key.shape), key.shape[1:])
    return shape == key.shape or is_resized


def _modules_of_base(files: AdapterFiles) -> Iterator[Sighting]:
    """Find modules of the base that peft adapts in vain, or not at all, such as the routers of transformers 5."""
    base = files.base
    if base is None:
        return
    kind, modules = base.model_type or "", [pair.module for pair in files.pairs]
    yield from seen("read by kernels", [m for m in modules if is_read_by_kernels(kind, m)], kind=kind)
    yield from seen("never called", [m for m in modules if is_never_called(kind, m)], kind=kind)
    there = [pair for pair in files.pairs if f"{pair.module}.weight" in base.tensors]
    if not there:
        return
    from torch import nn  # here, since it takes long to load, and a check builds few networks

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    by_module = [p for p in there if not p.stacked and not selection.is_parameter(files.config, p.module)]
    layers = {pair.module: base.network.get_submodule(pair.module) for pair in by_module}
    others = {m: type(at).__name__ for m, at in layers.items() if not isinstance(at, kinds) and not is_linear(at)}
    yield from seen("unsupported module", others, kind=next(iter(others.values()), ""))
    renamed = renamed_in_peft(base.network, [pair.module for pair in there])
    yield from seen("renamed", renamed, other=next(iter(renamed.values()), ""))
