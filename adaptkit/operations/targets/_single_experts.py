"""Experts adapted one by one, for programs that join the experts of a layer."""

from collections import defaultdict
from collections.abc import Iterator

from adaptkit.models.peft_names import DOWNS, GATES, UPS
from adaptkit.operations._roles import expert_count
from adaptkit.operations.targets._adapter_files import AdapterFiles, Pair
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._peft_experts import ONE_EXPERT
from adaptkit.operations.targets._target import Finding, error_about


def all_or_none(files: AdapterFiles, base: BaseShapes | None, effect: str) -> Iterator[Finding]:
    """Find layers in which only some experts, or some of their matrices, have pairs, or in which ranks differ.

    Args:
        files: the adapter's files.
        base: without it the number of experts, and whether they have gates, is taken from the files.
        effect: what the program does.
    """
    stacks: defaultdict[str, dict[tuple[int, int], Pair]] = defaultdict(dict)
    for pair in files.pairs:
        match = ONE_EXPERT.fullmatch(pair.module)
        for kind, names in enumerate((GATES, UPS, DOWNS)):
            if match and match["part"] in names:
                stacks[match["stack"]][int(match["number"]), kind] = pair
    said = expert_count(base.config) if base else None
    lacking, uneven = [], []
    for stack, pairs in stacks.items():
        count = said or 1 + max(number for number, _ in pairs)
        has_gate = base is not None and any(base.shape(f"{stack}.0.{name}") for name in GATES)
        kinds = {kind for _, kind in pairs}
        if len(pairs) < count * len(kinds | {1, 2} | ({0} if has_gate else set())):  # some models have no gate
            lacking.append(stack)
        if len({(kind, pair.rank) for (_, kind), pair in pairs.items()}) > len(kinds):
            uneven.append(stack)
    for found, what in (
        (lacking, "only some of the experts, or of their gate, up and down projections, have pairs"),
        (uneven, "experts with different ranks"),
    ):
        yield from error_about(found, what, effect, files.merge())
