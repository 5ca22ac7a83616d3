"""Options out of range or in contradiction are refused, before any operation reads a file."""

import math

import pytest

from adaptkit.errors import UsageError
from adaptkit.operations import options
from adaptkit.operations.stack import StackOptions, stack

REFUSED = {
    "AdoptOptions": [{"threads": 0}],
    "QuantizeOptions": [{"block_size": 48}, {"block_size": 16}, {"max_shard_bytes": 0}, {"moe": "int3"}],
    "DequantizeOptions": [{"dtype": "int8"}, {"max_shard_bytes": 0}],
    "MergeOptions": [
        *({"weights": (weight,)} for weight in (math.nan, math.inf, 10**400)),
        *({"format": "int2"}, {"format": "nf4", "embed_adapter": True}, {"undo": False, "embed_adapter": True}),
    ],
    "ExtractOptions": [
        *({}, {"rank": 2, "energy": 0.9}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"energy": math.nan}),
        *({"energy": 0.9, "max_rank": 0}, {"rank": 2, "max_rank": 8}, {"rank": 2, "oversampling": -1}),
        *({"rank": 2, "iterations": 0}, {"rank": 2, "seed": -1}, {"rank": 2, "seed": 2**63}),
    ],
    "ResizeOptions": [{}, {"rank": 2, "energy": 0.9}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}],
    "StackOptions": [
        *({"rank": 4, "energy": 0.9}, {"rank": 0}, {"energy": 1.1}, {"weights": (1.0, math.inf)}),
        *({"method": "nonsense"}, {"method": "_method"}),
    ],
    "VerifyOptions": [{"threads": 0}, {"manifest_sha256": "ab"}, {"signature": "x.sig"}, {"recompute": True}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_out_of_range_and_contradictions_are_refused(name):
    for given in REFUSED[name]:
        with pytest.raises(UsageError):
            getattr(options, name)(**given)


@pytest.mark.parametrize(("count", "weights"), [(1, ()), (0, ()), (2, (1.0,))])
def test_a_stack_of_less_than_two_adapters_or_with_fewer_weights_is_refused(tmp_path, adapter, count, weights):
    with pytest.raises(UsageError):
        stack([adapter] * count, tmp_path / "out", StackOptions(weights=weights))
    assert not list(tmp_path.glob("out*"))
