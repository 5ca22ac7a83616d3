"""Parameters and buffers assembled from the files are those that transformers loads."""

import os
import re
from pathlib import Path

import pytest
import tiny
import torch
from folders import rewritten
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adaptkit.checkpoint.reader import Checkpoint, MappedCheckpoint
from adaptkit.errors import CheckpointError, UsageError
from adaptkit.models.architecture import empty_network
from adaptkit.models.assembly import Assembly, find_stack
from adaptkit.numerics.tensors import as_tensor
from adaptkit.training.network.model import load_model

CPU = torch.device("cpu")
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def family(made):
    """Write a tiny float32 checkpoint of a family, once."""

    def write(name):
        folder = made / f"assembly-{name}"
        if not folder.exists():
            sizes = {"num_local_experts": 12} if name == "mixtral" else {"query_pre_attn_scalar": 16, "head_dim": 16}
            config = AutoConfig.for_model(name, vocab_size=90, pad_token_id=0, **tiny._DECODER | sizes)
            tiny._save(folder, lambda: AutoModelForCausalLM.from_config(config), "float32", 1, 0)
        return folder

    return write


def assembled(folder):
    checkpoint = Checkpoint(folder)
    return Assembly(empty_network(checkpoint, torch.float32), checkpoint)


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_parameters_and_buffers_are_those_that_transformers_loads(name, family):
    """Twelve experts, since ``experts.10`` must not come before ``experts.2``; Gemma scales its embeddings."""
    expected = AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32)
    assembly = assembled(family(name))
    for path, parameter in expected.named_parameters():
        assert torch.equal(assembly.read(path), parameter), path
    assembly.load_buffers(CPU)
    buffers = dict(assembly.network.named_buffers())
    assert set(buffers) == {path for path, _ in expected.named_buffers()}
    for path, buffer in expected.named_buffers():
        assert torch.allclose(buffers[path], buffer), path


def test_a_model_that_scales_its_embeddings_gives_the_logits_of_transformers(family):
    """The scale is a buffer of the embedding; computing it must not initialize the embedding again."""
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(family("gemma3_text"), dtype=torch.float32)(ids).logits
        found = load_model(family("gemma3_text"), torch.float32, CPU).network(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_parameters_are_resident_under_all_their_names_while_the_block_runs(llama):
    assembly = assembled(llama)
    embedding, head = assembly.network.get_input_embeddings(), assembly.network.get_output_embeddings()
    other = "model.layers.0.mlp.up_proj.weight"
    with assembly.resident(["model.embed_tokens.weight"], torch.float32, CPU):
        assert torch.equal(embedding.weight, as_tensor(Checkpoint(llama).read("model.embed_tokens.weight")).float())
        assert head.weight is embedding.weight
        assert assembly.network.get_parameter(other).is_meta
    assert embedding.weight.is_meta
    assert head.weight is embedding.weight


def test_a_missing_or_misshapen_parameter_is_refused_and_nothing_stays_resident(llama, copy_of):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name] = tensors[name][:-1].clone()
        del tensors["model.norm.weight"]

    assembly = assembled(rewritten(copy_of(llama), spoil))
    first = "model.layers.0.mlp.up_proj.weight"
    for wrong, message in (
        (name, r"expected shape \[128, 64\], found \[127, 64\]"),
        ("model.norm.weight", "has no model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message), assembly.resident([first, wrong], torch.float32, CPU):
            pass
        assert all(parameter.is_meta for parameter in assembly.network.parameters())


def test_the_stack_is_the_outermost_list_with_the_most_weights():
    layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))}) for _ in "ab")
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)]), "inner": nn.ModuleDict({"layers": layers})})
    assert find_stack(model) == ("inner.layers", layers)
    with pytest.raises(UsageError, match="has no list of layers"):
        find_stack(nn.ModuleDict({"empty": nn.ModuleList()}))


def test_the_stack_is_found_if_its_weights_are_packed():
    """Packed weights are buffers. A longer list inside a layer is not the stack."""
    few, many = nn.ModuleList([nn.Linear(9, 9)]), nn.ModuleList(nn.Module() for _ in "abc")
    for layer in many:
        layer.experts = nn.ModuleList(nn.Module() for _ in range(9))
        layer.register_buffer("codes", torch.zeros(100, dtype=torch.uint8))
    assert find_stack(nn.ModuleDict({"few": few, "many": many})) == ("many", many)


@pytest.fixture(scope="module")
def deepseek(made):
    """A DeepSeek whose routers have a bias, in a buffer that the files contain."""
    sizes = {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 64, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
    }
    config = AutoConfig.for_model("deepseek_v3", vocab_size=90, pad_token_id=0, **tiny._DECODER | sizes)
    folder = tiny._save(made / "deepseek", lambda: AutoModelForCausalLM.from_config(config), "float32", 1, 0)
    return rewritten(folder, lambda tensors: tensors.update({ROUTER_BIAS: torch.tensor([0.3, -0.2, 0.1, -0.4])}))


ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("packed", [False, True])
def test_the_trainer_loads_buffers_that_the_files_contain(deepseek, packed, tmp_path):
    from adaptkit.operations.quantize import quantize

    ids, folder = torch.arange(1, 60)[None], deepseek
    if packed:
        folder = tmp_path / "nf4"
        quantize(deepseek, folder)
    model = load_model(folder, torch.float32, CPU)
    assert model.network.get_buffer(ROUTER_BIAS).tolist() == pytest.approx([0.3, -0.2, 0.1, -0.4])
    if not packed:
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(deepseek, dtype=torch.float32)(ids).logits
            assert torch.allclose(model.network(ids).logits, expected, atol=1e-5)


def test_two_tensors_for_one_parameter_are_refused(gpt2, copy_of):
    name = "transformer.h.0.ln_1.bias"
    folder = rewritten(copy_of(gpt2), lambda t: t.update({name.removeprefix("transformer."): t[name] + 1}))
    with pytest.raises(CheckpointError, match=rf"h\.0\.ln_1\.bias and {name} are both {name}"):
        assembled(folder)


def test_in_a_network_with_a_vision_part_the_stack_is_that_of_the_text_part():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = self
            self.eyes = nn.ModuleList([nn.Linear(50, 50)])
            self.language_model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})

        def get_decoder(self):
            return self.language_model

        def __setattr__(self, name, value):  # do not register the model as a module of itself
            object.__setattr__(self, name, value) if name == "base_model" else super().__setattr__(name, value)

    network = Sees()
    assert find_stack(network) == ("language_model.layers", network.language_model["layers"])


def test_a_parametrization_is_not_a_stack_of_layers():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    network = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "embedding": nn.Embedding(90, 9)})
    nn.utils.parametrize.register_parametrization(network["embedding"], "weight", Twice())
    assert find_stack(network) == ("layers", network["layers"])


def test_layers_stored_in_one_tensor_are_read_after_some_were_replaced(tmp_path):
    """LARA-mini's files have two linear layers in one matrix; transformers takes their shapes from the network."""
    tiny.need_architecture("lara_mini")
    tokenizer = tiny.write_tokenizer(tmp_path)
    values = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = AutoConfig.for_model("lara_mini", vocab_size=len(tokenizer), **tiny._DECODER | values)
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    expected.save_pretrained(tmp_path)
    found = load_model(tmp_path, torch.float32, CPU)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        pair = [model(input_ids=ids, use_cache=False).logits for model in (found.network, expected)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def wide_experts(made):
    """A float32 Mixtral of one layer with 50 MB of experts and an embedding of 17 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "num_local_experts": 8}
    config = AutoConfig.for_model("mixtral", vocab_size=8192, pad_token_id=0, **tiny._DECODER | sizes)
    return tiny._save(made / "wide-experts", lambda: AutoModelForCausalLM.from_config(config), "float32", 1, 0)


def peak_while(compute):
    """Return what a function returns, and the bytes by which this process grew at most meanwhile."""

    def kib(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = kib("VmRSS:")
    result = compute()
    return result, 1024 * (kib("VmHWM:") - before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(EXPERTS, None), (EXPERTS, torch.bfloat16), ("model.embed_tokens.weight", torch.bfloat16)],
)
def test_reading_takes_little_more_memory_than_the_result(name, dtype, wide_experts):
    """Neither the matrices of a stack nor a value in another dtype stay in memory beside it."""
    checkpoint = MappedCheckpoint(wide_experts)
    assembly = Assembly(empty_network(checkpoint, torch.float32), checkpoint)
    small = assembly.read("model.norm.weight", torch.float64)  # the first call imports and allocates
    assert small.dtype == torch.float64
    value, growth = peak_while(lambda: assembly.read(name, dtype))
    assert value.dtype == (dtype or torch.float32)
    assert growth < 1.3 * value.nbytes + (8 << 20)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda matrix: matrix[:, :1], [128, 1]),  # would otherwise be repeated to the width of the others
        (lambda matrix: matrix[:-8], [120, 64]),
        (lambda matrix: matrix[0, 0], []),
    ],
)
def test_experts_whose_matrices_do_not_fit_together_are_refused(change, found, family, copy_of):
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(12)]
    folder = rewritten(copy_of(family("mixtral")), lambda t: t.update({n: change(t[n]).clone() for n in names}))
    message = rf"experts\.0\.w3\.weight: expected shape \[128, 64\], found {re.escape(str(found))}"
    with pytest.raises(CheckpointError, match=message):
        assembled(folder).read(EXPERTS)


@pytest.mark.parametrize("kinds", [("w2",), ("w1", "w3")])
def test_experts_that_are_scalars_are_refused(kinds, family, copy_of):
    def spoil(tensors):
        names = [name for name in tensors if name.endswith(tuple(f"{kind}.weight" for kind in kinds))]
        tensors.update({name: tensors[name][0, 0].clone() for name in names})

    with pytest.raises(CheckpointError, match=r"experts\.\w+: expected shape \[12, "):
        load_model(rewritten(copy_of(family("mixtral")), spoil), torch.float32, CPU)
