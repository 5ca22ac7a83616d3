"""On a GPU, joined layers give the results of separate ones, and their weights decode to the same bits."""

import pytest
import torch
from adapted import load_adapted

from adaptkit.operations.quantize import quantize
from adaptkit.training.network.frozen import PackedWeight
from adaptkit.training.network.fused import fuse_layers
from adaptkit.training.network.joined_gpu import JoinedWeight, join_on_gpu
from adaptkit.training.network.model import load_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GPU = torch.device("cuda")
ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest relative error, by norm; a GPU may multiply float32 with fewer digits."""


def step(network):
    """Logits, and the gradients of the adapter."""
    torch.manual_seed(3)
    ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(5)).to(GPU)
    logits = network.train()(input_ids=ids, use_cache=False).logits.float()
    return [
        logits.detach(),
        *torch.autograd.grad(logits.square().mean(), [p for p in network.parameters() if p.requires_grad]),
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ERROR)
def test_joining_does_not_change_results_or_gradients(made, llama, dtype, dropout):
    if not (made / "joined-on-gpu").exists():
        quantize(llama, made / "joined-on-gpu")
    model = load_adapted(made / "joined-on-gpu", dtype, dropout=dropout, device=GPU, rank_pattern={"q_proj": 3})
    fuse_layers(model.network, on_gpu=True)
    before, decoded = step(model.network), decoded_weights(model)
    join_on_gpu(model.network)
    assert sum("multiply" in vars(layer) for layer in model.linears.values()) == 10
    assert all(torch.equal(one, two) for one, two in zip(decoded_weights(model), decoded, strict=True))
    for one, two in zip(step(model.network), before, strict=True):
        assert float((one - two).norm()) <= ERROR[dtype] * float(two.norm())


def decoded_weights(model):
    return [layer.base.dequantize(torch.bfloat16) for layer in model.linears.values()]


def test_joined_weights_decode_to_the_bits_of_separate_ones(made, llama):
    if not (made / "joined-on-gpu").exists():
        quantize(llama, made / "joined-on-gpu")
    model = load_model(made / "joined-on-gpu", torch.bfloat16, GPU)
    bases = [model.linears[f"model.layers.0.self_attn.{name}_proj"].base for name in "qkv"]
    assert all(isinstance(base, PackedWeight) for base in bases)
    for dtype in (torch.bfloat16, torch.float32):
        expected = torch.cat([base.dequantize(dtype) for base in bases])
        assert torch.equal(JoinedWeight(bases).dequantize(dtype), expected)
