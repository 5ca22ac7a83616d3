"""Comparison of everything in an adapter besides its low-rank changes, as plain tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.checkpoint.adapter import Adapter, TokenRows
from adaptkit.numerics import lora
from adaptkit.numerics.comparison import difference_norm
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.operations._diff.groups import relative
from adaptkit.operations._diff.tensors import Source, TensorDifference, differ_in_files, differ_in_memory


@dataclass(frozen=True)
class Held:
    """One item of an adapter that is not a low-rank change of a module.

    Attributes:
        role: what it is, as the report shows it.
        value: the item in memory, or its location in the file.
        digest: fingerprint of the tensor if ``value`` is its location in the file; otherwise empty.
    """

    role: str
    value: Tensor | Source | TokenRows | LowRank
    digest: str = ""


def changes_of(adapter: Adapter) -> dict[str, LowRank]:
    """Return the low-rank changes by dotted path; expert ``i`` of a stacked parameter is ``<parameter>.i``."""
    found = dict(adapter.modules)
    for parameter, terms in adapter.experts.items():
        found |= {f"{parameter}.{number}": term for number, term in enumerate(terms)}
    return found


def held_by(adapter: Adapter) -> dict[str, Held]:
    """Return everything that ``changes_of`` does not, by name."""
    found = {f"{module}.lora_magnitude_vector": Held("DoRA magnitude", m) for module, m in adapter.magnitudes.items()}
    found |= {f"{module}.lora_B.bias": Held("bias", bias) for module, bias in adapter.biases.items()}
    kinds = (("replaced tensor", "", adapter.replaced), ("begins with", " of the base", adapter.base_copies))
    for role, of, keys in kinds:
        found |= {
            f"{n}{of}": Held(role, Source(adapter.files, key), adapter.digests[key][0]) for n, key in keys.items()
        }
    found |= {f"{module} (trained tokens)": Held("token rows", rows) for module, rows in adapter.tokens.items()}
    began = adapter.compensation.items()
    return found | {f"{module} (compensation)": Held("compensation", term) for module, term in began}


def differ_in_part(name: str, first: Held, second: Held) -> TensorDifference | None:
    """Compare two items of the same name; None if they are the same."""
    one, two, role = first.value, second.value, first.role
    if isinstance(one, Source) and isinstance(two, Source):
        alike = (one.spec.dtype, one.spec.shape, first.digest) == (two.spec.dtype, two.spec.shape, second.digest)
        return None if alike else differ_in_files(name, one, two, role)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return None if _equal(one, two) else differ_in_memory(name, role, one, two)
    if isinstance(one, TokenRows) and isinstance(two, TokenRows):
        return _differ_in_rows(name, role, one, two)
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return None if is_equal(one, two) else _differ_in_change(name, role, one, two)
    raise TypeError(f"{name}: {type(one).__name__} cannot be compared with {type(two).__name__}")


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _differ_in_rows(name: str, role: str, first: TokenRows, second: TokenRows) -> TensorDifference | None:
    if first.indices == second.indices:
        return None if _equal(first.rows, second.rows) else differ_in_memory(name, role, first.rows, second.rows)
    common = sorted(set(first.indices) & set(second.indices))
    one, two = (part.rows[[part.indices.index(token) for token in common]] for part in (first, second))
    remark = f"{len(first.indices):,} and {len(second.indices):,} tokens, {len(common):,} in both"
    return differ_in_memory(name, role, one, two, remark)


def _differ_in_change(name: str, role: str, first: LowRank, second: LowRank) -> TensorDifference:
    """Compare two compensation terms by norm only: they are initial values, not part of what an adapter changes."""
    alike = first.shape == second.shape
    norms = (lora.norm(first), lora.norm(second))
    distance = difference_norm(first, second) if alike else None
    return TensorDifference(
        name=name,
        role=role,
        dtypes=("F32", "F32"),
        shapes=(first.shape, second.shape),
        changed=0,
        compared=0,
        norms=norms,
        difference=distance,
        relative=None if distance is None else relative(distance, norms),
        remark="" if alike else "shapes differ",
    )
