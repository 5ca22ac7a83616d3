"""Adapters of experts in peft 0.21.2: of stacks, and of single experts, which it stacks as transformers 5 stores them.

Gate and up share one stack, ``gate_up_proj``. peft gives each stack the rank and alpha of the whole configuration, and
loads a stack only if every expert has its matrices.
"""

from collections import defaultdict
from collections.abc import Iterator

from adaptkit.checkpoint.adapter_config import writes_transposed_experts
from adaptkit.models.peft_names import DOWNS, GATES, STACKED, UPS, mistaken_for_experts
from adaptkit.operations._roles import expert_count
from adaptkit.operations.targets import _peft_selection
from adaptkit.operations.targets._adapter_features import ONE_EXPERT
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._target import Sighting, error, seen

EXPERTS = {
    "older stacks": error(
        "current peft swaps input and output: it fails, or computes wrong results if the matrices are square"
    ),
    "single with rsLoRA": error(
        "peft doubles alpha and rank when it stacks them, so the scaling is too large by a factor of √2", "{flat}"
    ),
    "single of other models": error("peft does not stack them for {family}: it fails, or silently drops them"),
    "single by a pattern": error(
        "peft looks for the stack under that name, and fails or drops the tensors",
        "name the modules in a list, such as ['down_proj', 'gate_proj', 'up_proj']",
    ),
    "single with own numbers": error(
        "peft gives all experts the same rank and alpha: it fails, or scales them wrongly"
    ),
    "gate or up": error("peft fails, since the model stores both in one matrix"),
    "no down": error("peft silently drops it, so it changes nothing"),
    "some experts": error("peft fails: size mismatch"),
    "mistaken": error("peft stacks everything with such a name, and silently drops it"),
}


def of_experts(files: AdapterFiles) -> Iterator[Sighting]:
    """Find stacks in an older layout, single experts that peft cannot stack, and modules that it takes for experts."""
    config, base = files.config, files.base
    stacked = [pair.module for pair in files.pairs if pair.stacked]
    if stacked:
        modules = dict(base.network.named_modules()) if base and base.network is not None else {}
        there = {name: modules.get(name.replace(".base_layer", "")) for name in stacked}
        turned = {name: at is None or bool(getattr(at, "is_transposed", False)) for name, at in there.items()}
        swapped = [name for name in stacked if writes_transposed_experts(config, turned[name])]
        what = f"stack of experts in the layout of peft {config.get('peft_version') or '0.17'}"
        yield from seen("older stacks", swapped, what)
    family = (base.model_type if base else None) or ""
    others = [pair.module for pair in files.pairs if not pair.stacked and not ONE_EXPERT.fullmatch(pair.module)]
    what = f"not an expert, but named like the experts of {family}"
    yield from seen("mistaken", mistaken_for_experts(family, others), what)
    experts = [(pair, match) for pair in files.pairs if (match := ONE_EXPERT.fullmatch(pair.module))]
    names = [pair.module for pair, _ in experts]
    if not names or (base is not None and any(f"{name}.weight" in base.tensors for name in names)):
        return  # the model stores single experts, too
    if config.get("use_rslora"):
        what = "use_rslora in adapter_config.json, with one pair of matrices per expert: {}"
        yield from seen("single with rsLoRA", names, what)
    elif family and family not in STACKED:
        yield from seen("single of other models", names, "one pair of matrices per expert", family=family)
    pattern = config.get("target_modules")
    if isinstance(pattern, str) and pattern != _peft_selection.SHORTHAND:
        paths = {f"{match['stack']}.{match['part']}" for _, match in experts}
        unnamed = [path for path in paths if not _peft_selection.is_module({"target_modules": pattern}, path)]
        what = "the pattern in target_modules in adapter_config.json does not match {}"
        yield from seen("single by a pattern", unnamed, what)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    uneven = [pair.module for pair, _ in experts if pair.asked != rank or pair.alpha != alpha]
    what = "rank or alpha of {} differs from r or lora_alpha in adapter_config.json"
    yield from seen("single with own numbers", uneven, what)
    numbers: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for _, match in experts:
        numbers[match["stack"]][match["part"]].add(int(match["number"]))
    halves = {stack: [not part.isdisjoint(parts) for part in (GATES, UPS)] for stack, parts in numbers.items()}
    alone = [stack for stack, (gate, up) in halves.items() if gate != up]
    yield from seen("gate or up", alone, "only one of gate and up of the experts")
    if all(DOWNS.isdisjoint(parts) for parts in numbers.values()):
        both = [stack for stack, there in halves.items() if all(there)]
        yield from seen("no down", both, "gate and up of the experts, but no down")
    places = {f"{stack} ({part})": there for stack, parts in numbers.items() for part, there in parts.items()}
    count = (expert_count(base.config) if base else None) or 1 + max(max(there) for there in places.values())
    lacking = [place for place, there in places.items() if len(there) < count]
    yield from seen("some experts", lacking, f"not all of {count} experts have a pair of matrices")
