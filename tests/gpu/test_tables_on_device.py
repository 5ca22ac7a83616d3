"""A GPU reads rows of tables in pinned host memory bit for bit, and holds no copy of a table."""

import pytest
import torch
from adapted import plain_in

from adaptkit.models import tables
from adaptkit.training.fast import gpu_layers
from adaptkit.training.fast.tables import keep_in_host_memory
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter
from adaptkit.training.triton_needs import what_triton_lacks

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

if what_triton_lacks():
    pytest.skip("needs Triton", allow_module_level=True)

GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_from_pinned_host_memory(dtype):
    table = torch.randn(30000, 1500).to(dtype).pin_memory()
    ids = torch.randint(0, 30000, (3, 700))
    before = torch.cuda.memory_allocated()
    found = gpu_layers.look_up(table, ids.to(GPU))
    assert found.is_cuda
    assert torch.equal(found.cpu(), table[ids])
    assert torch.cuda.memory_allocated() - before < 2 * found.nbytes < table.nbytes


@pytest.mark.parametrize("architecture", ["llama", "llama4_text"])
def test_a_model_computes_the_same_with_its_table_in_host_memory(architecture, made, monkeypatch):
    """Llama 4 moves token IDs to the device of its table."""
    monkeypatch.setattr(tables, "LEAST_BYTES", 1)
    folder = plain_in(made, architecture)

    def run(moved):
        model = load_model(folder, torch.bfloat16, GPU)
        new_adapter(model, ("*",), AdapterShape(4, 8.0), "normal", 0.0, 0)
        if moved:
            keep_in_host_memory(model.network, torch.bfloat16)
            assert model.network.get_input_embeddings().weight.is_pinned()
        ids = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(5)).to(GPU)
        logits = model.network.train()(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
        return [logits, *(layer.lora_b.grad for layer in model.adapted().values())]

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)
