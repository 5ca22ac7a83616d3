"""What programs handle differently in adapters: features of their configuration and tensors, and beside the base."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from adaptkit.checkpoint.adapter_config import (
    AS_MEANT,
    KNOWN_KEYS,
    PREFIX,
    RANK_ZERO,
    changes_base,
    has_older_patterns,
    without_changed_base,
)
from adaptkit.models.peft_names import DOWNS, GATES, UPS
from adaptkit.operations._roles import expert_count
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair, factor_of, is_positive, is_rank
from adaptkit.operations.targets._base_shapes import BaseShapes, is_single_expert
from adaptkit.operations.targets._target import Response, Sighting, error, seen, some, warning
from adaptkit.wording import counted

ONE_EXPERT = re.compile(r"(?P<stack>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<part>\w+)")
"""Module path of a single expert's matrix."""
_TABLE = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|wte|embed_in|word_embeddings)(\.token_adapter)?$")
_WRAPPED = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.|^module\."
)
_VARIANTS = {
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

ONE_SAVE = "save the adapter again with peft, so that adapter_config.json and adapter_model.safetensors match"
RENAME = "run adaptkit resize {root} -o OUT --rank R, which writes peft's names if it recognizes these"
TRUE_START = "find out what it means; set it to true if it left the base's weights unchanged"
ANOTHER_BASE = "give the base that it was trained on; {trained_on}"
OTHER_NAMES = "give the base that it was trained on, or rename the tensors; {trained_on}"
REJECTS = "{program} rejects {what}"
PLAIN = "{program} does not support {what} and computes plain LoRA"
LINEAR = error("{program} supports LoRA only for linear layers", "{elsewhere}")
ALL_PROGRAMS: dict[str, Response] = {
    "pickle": warning(
        "{program} loads it with torch.load(weights_only=True); adaptkit does not load pickles, so the names in it are "
        "not checked",
        "run adaptkit inspect {root}, which prints a command that converts it to safetensors",
    ),
    "no tensors": error("{program} finds nothing to load", "save the adapter again with peft's save_pretrained"),
    "older patterns": error(
        "{program} follows the current rule or none: it fails, or scales modules wrongly", AS_MEANT
    ),
    "unknown key": warning("{program} ignores unknown keys", "find out what it means, or remove it"),
    "unknown start": warning(
        "if it changed the base's weights, the adapter does not fit the original base", TRUE_START
    ),
}
"""Answers that programs share."""


def variants(effect: str, *keys: str) -> dict[str, Response]:
    """Return one error for several variants, none of which can be merged."""
    return {key: error(effect, "{elsewhere}") for key in keys}


def of_adapter(files: AdapterFiles, *, own_rank: bool = False, rslora: bool = False) -> Iterator[Sighting]:
    """Find all features that do not depend on the program; see ``of_scaling`` for the arguments."""
    yield from of_files(files)
    yield from of_configuration(files)
    yield from of_scaling(files, own_rank=own_rank, rslora=rslora)
    yield from of_tensors(files)
    yield from beside_base(files)


def of_files(files: AdapterFiles) -> Iterator[Sighting]:
    """Find a pickled weight file, which adaptkit does not read, or a missing or empty one."""
    if files.pickle:
        yield Sighting("pickle", f"{files.pickle} is a pickle file")
    elif not files.keys:
        yield Sighting("no tensors", "adapter_model.safetensors is missing or holds no tensors")


def of_configuration(files: AdapterFiles) -> Iterator[Sighting]:
    """Find the features that ``adapter_config.json`` tells."""
    config, where = files.config, "in adapter_config.json"
    if not files.is_lora:
        yield Sighting("no LoRA", f"peft_type is {config.get('peft_type')!r} {where}")
    for key, what in _VARIANTS.items():
        if config.get(key):
            yield Sighting(key, f"{key} {where}", {"what": what})
    start: Any = config.get("init_lora_weights")
    if changes_base(start):
        feature = "LoRA-GA" if start.lower() == "lora_ga" else "changed base"  # LoRA-GA changes it only in training
        unchanged = without_changed_base(files.root, start)
        yield Sighting(feature, f"init_lora_weights is {start!r} {where}", {"unchanged": unchanged})
    elif changes_base(start) is None:
        yield Sighting("unknown start", f"init_lora_weights is {start!r} {where}, which adaptkit does not know")
    unknown = {key for key, value in config.items() if value} - KNOWN_KEYS
    yield from seen("unknown key", unknown if files.is_lora else (), f"unknown key {{}} {where}")
    if has_older_patterns(config):
        yield Sighting("older patterns", "rank_pattern and alpha_pattern follow the matching rule of peft up to 0.14")
    wrong = [pair for pair in files.pairs if pair.scaling is None]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_plain = is_rank(rank) and is_positive(alpha)
    if wrong or not is_plain:
        of = f" (for {some([pair.module for pair in wrong])})" if wrong and is_plain else ""
        what = f"r, lora_alpha, rank_pattern or alpha_pattern {where} is not a positive number{of}"
        values = {"valid": way_to_ranks(wrong)}
        yield Sighting("invalid numbers", f"{what}: r is {rank!r}, lora_alpha {alpha!r}", values)


def way_to_ranks(wrong: Collection[Pair]) -> str:
    """Return what to do about pairs with an invalid rank or alpha."""
    return RANK_ZERO if any(pair.asked == 0 for pair in wrong) else ONE_SAVE


def of_scaling(files: AdapterFiles, *, own_rank: bool = False, rslora: bool = False) -> Iterator[Sighting]:
    """Find modules that a program without patterns scales by another factor than peft.

    Args:
        files: the adapter's files.
        own_rank: whether the program divides lora_alpha by the rank of the tensors instead of r.
        rslora: whether it knows rsLoRA.
    """
    alpha, is_root = files.config.get("lora_alpha"), bool(files.config.get("use_rslora"))
    factors: dict[str, tuple[float, float]] = {}
    for pair in files.pairs:
        rank = pair.rank if own_rank else files.config.get("r")
        used = factor_of(alpha, rank if is_rank(rank) else None, rslora and is_root)
        if pair.scaling is not None and used is not None and not math.isclose(pair.scaling, used, rel_tol=1e-6):
            factors[pair.module] = (pair.scaling, used)
    for meant, used in list(factors.values())[:1]:
        why = "use_rslora" if is_root and not rslora else "rank_pattern or alpha_pattern"
        what = f"{why} in adapter_config.json scales {{}} by {meant:g}"
        yield from seen("other scaling", factors, what, used=f"{used:g}")


def of_tensors(files: AdapterFiles) -> Iterator[Sighting]:
    """Find the features that names and shapes of tensors tell."""
    pairs = files.pairs
    halves = [half.name for pair in pairs for half in (pair.a, pair.b) if half and not (pair.a and pair.b)]
    yield from seen("half a pair", halves, "the other half of its lora_A/lora_B pair is missing")
    yield from seen("other layers", [p.module for p in pairs if p.is_convolution], "LoRA of convolutions: {}")
    attention = [pair.module for pair in pairs if pair.is_in_attention]
    yield from seen("other layers", attention, "LoRA of torch.nn.MultiheadAttention: {}")
    wrong = [pair for pair in pairs if is_rank(pair.asked) and pair.a and pair.b and not _has_rank(pair)]
    if wrong:
        shapes = f"A is {_shape(wrong[0].a)} and B {_shape(wrong[0].b)}{_likewise(wrong)}"
        found = f"{wrong[0].module}: rank {wrong[0].asked} in adapter_config.json, but {shapes}"
        yield Sighting("other rank", found)
    if files.base is None:
        wrapped = [key.name for key in files.keys if _WRAPPED.search(key.name.removeprefix(PREFIX))]
        yield from seen("wrapper", wrapped, "the name contains that of a wrapper around the model")
    yield from of_stacks(files)
    single = [pair.module for pair in pairs if is_single_expert(pair.module)]
    yield from seen("single experts", single, "one pair of matrices per expert")
    yield from _of_single_experts(files)


def of_stacks(files: AdapterFiles) -> Iterator[Sighting]:
    """Find tensors that change stacks of experts."""
    names = [half.name for pair in files.pairs if pair.stacked for half in (pair.a, pair.b) if half]
    return seen("stacks", names, "stack of experts (target_parameters)")


def _of_single_experts(files: AdapterFiles) -> Iterator[Sighting]:
    """Find layers in which only some experts, or some of their matrices, have pairs, or in which ranks differ.

    Without a base the number of experts, and whether they have gates, is taken from the files.
    """
    layers: defaultdict[str, dict[tuple[int, int], Pair]] = defaultdict(dict)
    for pair in files.pairs:
        match = ONE_EXPERT.fullmatch(pair.module)
        for kind, names in enumerate((GATES, UPS, DOWNS)):
            if match and match["part"] in names:
                layers[match["stack"]][int(match["number"]), kind] = pair
    stated = expert_count(files.base.config) if files.base else None
    lacking, uneven = [], []
    for stack, there in layers.items():
        count = stated or 1 + max(number for number, _ in there)
        has_gate = files.base is not None and any(files.base.shape(f"{stack}.0.{name}") for name in GATES)
        kinds = {kind for _, kind in there}
        if len(there) < count * len(kinds | {1, 2} | ({0} if has_gate else set())):  # some models have no gate
            lacking.append(stack)
        if len({(kind, pair.rank) for (_, kind), pair in there.items()}) > len(kinds):
            uneven.append(stack)
    what = "only some of the experts, or of their gate, up and down projections, have pairs"
    yield from seen("experts in part", lacking, what)
    yield from seen("experts in part", uneven, "experts with different ranks")


def beside_base(files: AdapterFiles) -> Iterator[Sighting]:
    """Find what does not fit the base; nothing without one.

    Stacks, single experts of a base that stores stacks, and a tied head are not compared.
    """
    base = files.base
    if is_transposed(files):
        yield Sighting("transposed", "the base stores its matrices transposed, as GPT-2 does (fan_in_fan_out)")
    if base is None:
        return
    trained_on = f"base_model_name_or_path is {files.config.get('base_model_name_or_path')!r}"
    pairs = [pair for pair in files.pairs if not pair.stacked and not (pair.is_head and base.is_tied)]
    pairs = [pair for pair in pairs if base.has_numbered_experts or not is_single_expert(pair.module)]
    absent = [pair.module for pair in pairs if base.shape(pair.module) is None]
    absent += [pair.module for pair in files.pairs if pair.stacked and not base.may_have_stack(pair.module)]
    more = [module for module in absent if len(absent) < len(files.pairs) and _is_in_first_layer(base, module)]
    for feature, modules in (("layers more", more), ("absent", [module for module in absent if module not in more])):
        what = f"no tensor of this name in {base.title}"  # names in multimodal models differ between programs
        yield from seen(feature, modules, what, doubtful=base.is_composed, trained_on=trained_on)
    tables = _other_tables(files, base)
    wrong = [pair for pair in pairs if pair.module not in dict(tables) and not _fits(files, base, pair)]
    if wrong:
        there, made = list(base.shape(wrong[0].module) or ()), f"{_shape(wrong[0].b, 0)} × {_shape(wrong[0].a, 1)}"
        found = f"{wrong[0].module} is {there} in {base.root}, but B · A is {made}{_likewise(wrong)}"
        yield Sighting("other shape", found, {"trained_on": trained_on})
    for module, entries in sorted(tables)[:1]:  # the vocabulary was resized
        size = (base.shape(module) or (base.vocabulary,))[0]
        found = f"{module} has {entries} entries, but {size} in {base.root}"
        yield Sighting("other vocabulary", found, {"entries": entries})
    if base.is_tied:
        heads = sorted(pair.module for pair in files.pairs if pair.is_head)
        yield from seen("tied head", heads[:1], "{} is changed, but the base ties it to the embedding")


def is_transposed(files: AdapterFiles) -> bool:
    """Return whether the base stores its matrices transposed; without one, the flag and the names of GPT-2 tell."""
    if files.base is not None:
        return files.base.is_transposed
    return bool(files.config.get("fan_in_fan_out")) and any(pair.leaf.startswith("c_") for pair in files.pairs)


def is_table(module: str) -> bool:
    """Return whether a module's name is that of an embedding or head of the vocabulary."""
    return bool(_TABLE.search(module))


def _is_in_first_layer(base: BaseShapes, module: str) -> bool:
    first = re.sub(r"\.\d+\.", ".0.", module, count=1)
    return first != module and base.shape(first) is not None


def _has_rank(pair: Pair) -> bool:
    if not pair.a or not pair.b or not (pair.is_convolution or len(pair.a.shape) == len(pair.b.shape) == 2):
        return False
    rows, columns = pair.a.shape[0], pair.b.shape[1]
    if pair.stacked:
        return bool(rows == columns and rows and rows % pair.asked == 0)
    return bool(rows == columns == pair.asked)


def _fits(files: AdapterFiles, base: BaseShapes, pair: Pair) -> bool:
    expected = base.shape(pair.module)
    if expected is None or not pair.a or not pair.b or not len(pair.a.shape) == len(pair.b.shape) == 2:
        return True  # reported as another feature
    made = (pair.b.shape[0], pair.a.shape[1])
    if pair.embedding:
        return expected == made[::-1]
    is_turned = bool(files.config.get("fan_in_fan_out")) or base.is_transposed
    return expected == made or (is_turned and expected == made[::-1])


def _other_tables(files: AdapterFiles, base: BaseShapes) -> list[tuple[str, int]]:
    """Return embeddings and heads whose vocabulary size differs from the base's, with the adapter's size."""
    tables = []
    for pair in files.pairs:
        if pair.embedding and pair.a and len(pair.a.shape) == 2:
            tables.append((pair.module, pair.a.shape[1]))
        elif pair.is_head and pair.b and len(pair.b.shape) == 2:
            tables.append((pair.module, pair.b.shape[0]))
    for key in files.keys:
        if key.role in ("weight", "wrapped weight") and len(key.shape) == 2 and is_table(key.module):
            tables.append((key.module.removesuffix(".token_adapter"), key.shape[0]))
    known = base.vocabulary
    return [(module, size) for module, size in tables if known and (base.shape(module) or (known,))[0] != size]


def _likewise(wrong: Collection[Pair]) -> str:
    return f", likewise in {counted(len(wrong) - 1, 'more module')}" if len(wrong) > 1 else ""


def _shape(key: Any, axis: int | None = None) -> str:
    shape = list(key.shape) if key else []
    return str(shape) if axis is None or len(shape) != 2 else str(shape[axis])
