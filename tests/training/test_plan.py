"""The memory that plan predicts from a configuration is what the trainer's tensors take."""

import json
import math
import re
import sys
from functools import partial

import pytest
import tiny
import torch
from adapted import plain_in
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.errors import CheckpointError, UsageError
from adaptkit.models.activations import Checkpointing, LayerSize
from adaptkit.models.architecture import Description, empty_network
from adaptkit.models.matching import matching_targets
from adaptkit.models.probing import is_gated, norm_has_offset
from adaptkit.operations.quantize import QuantizeOptions, quantize
from adaptkit.training._plan.network import linear_shapes, measured_layers
from adaptkit.training.config import TrainConfig
from adaptkit.training.device import choose_dtype, name_of
from adaptkit.training.fast import accelerate
from adaptkit.training.memory import activations
from adaptkit.training.memory.activations import Activations, layer_sizes, predicted_memory
from adaptkit.training.memory.moments import PagedState
from adaptkit.training.memory.parameters import Trainable
from adaptkit.training.memory.segments import checkpoint_layers
from adaptkit.training.network.adapt import parameter_places, train_whole
from adaptkit.training.network.model import load_model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter
from adaptkit.training.plan import plan
from adaptkit.training.plan_options import PlanOptions

CPU = torch.device("cpu")
MORE = {
    "diffllama": {},
    "deepseek_v32": {
        "index_topk": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
}  # fmt: skip
"""Further architectures, as in ``tiny.ARCHITECTURES``."""


@pytest.fixture(scope="module")
def models(made, llama, gpt2):
    """Folders of plain models, and of the same ones quantized."""
    found = {"llama": llama, "gpt2": gpt2, "qwen2": tiny.write_family(made / "plan-qwen2", "qwen2")}
    for name, folder in found.items():
        quantize(folder, made / f"plan-{name}-nf4")
    return {name: (folder, made / f"plan-{name}-nf4") for name, folder in found.items()}


def release(package):
    return tuple(int(number) for number in package.__version__.split(".")[:2])


def load_with_adapter(folder, targets=("*",), dtype=torch.bfloat16):
    model = load_model(folder, dtype, CPU)
    new_adapter(model, targets, AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    accelerate(model.network, dtype, CPU)
    return model


def loaded(folder, targets=("*",)):
    model = load_with_adapter(folder, targets)
    return model, Trainable.of(model)


@pytest.mark.parametrize(("tied", "method"), [(False, "qlora"), (True, "qlora"), (False, "full")])
def test_large_untied_embeddings_of_qlora_are_not_counted_in_gpu_memory(models, tmp_path, tied, method):
    """The trainer leaves the same ones on the host; see ``models.tables``."""
    config = json.loads((models["llama"][0] / "config.json").read_text())
    vocabulary = 32 * 2**20 // (2 * config["hidden_size"])
    config |= {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"max_length": 16, "method": method, "checkpointing": "none"} | ({} if method == "full" else {"rank": 4})
    cpu, gpu = (plan(tmp_path, PlanOptions(device=device, **options)) for device in ("cpu", "cuda"))
    copies = 0 if method == "full" else 2 * gpu.trainable_parameters
    less = 32 * 2**20 if not tied and method == "qlora" else 0
    assert gpu.memory["weights"] == cpu.memory["weights"] + copies - less


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpus_use_larger_chunks_of_logits_and_copies_of_adapters(models, dtype, monkeypatch):
    """Compare with the trainer's own estimates; see ``training.memory.activations``."""
    rows, length = 256, 1025
    shape = {"rank": 4, "batch_size": rows, "max_length": length, "compute_dtype": str(dtype).removeprefix("torch.")}
    found = {device: plan(models["llama"][0], PlanOptions(device=device, **shape)) for device in ("cpu", "cuda")}
    model = load_model(models["llama"][1], dtype, CPU)
    new_adapter(model, ("*",), AdapterShape(4, 8.0), "kaiming", 0.0, seed=0)
    config = TrainConfig(base="base", data=("data",), checkpointing="none")
    monkeypatch.setattr(activations, "layer_sizes", lambda network, *_: [LayerSize(0, 0, 0)] * 2)
    monkeypatch.setattr(activations, "has_triton", lambda device_type: True)
    monkeypatch.setattr(activations, "_room", lambda *_: None)
    for device in ("cpu", "cuda"):
        kept = activations.save_activations(model.network, config, (rows, length), torch.device(device))
        assert found[device].memory["logits"] == kept.logits_bytes
    assert found["cuda"].memory["logits"] > 3 * found["cpu"].memory["logits"]
    accelerate(model.network, dtype, torch.device("cuda"))
    count = Trainable.of(model).values.numel()
    expected = predicted_memory(model.network, count, 0, Activations(None, 0, 0))
    assert found["cuda"].memory["weights"] == expected.weights


def test_the_default_device_is_the_gpu_if_there_is_one(models, monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=there: found)
        assert PlanOptions().on_gpu is there
        assert PlanOptions(offload_checkpoints=True).on_gpu
        assert (PlanOptions(device="cpu").on_gpu, PlanOptions(device="cuda").on_gpu) == (False, True)
        assert plan(models["llama"][0], PlanOptions(max_length=16)).device == ("cuda" if there else "cpu")
    with pytest.raises(UsageError, match="has no effect on a CPU"):
        PlanOptions(device="cpu", offload_checkpoints=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_gradients_and_optimizer_are_predicted_to_the_byte(models, name, method):
    plain, packed = models[name]
    model, trainable = loaded(packed if method == "qlora" else plain)
    found = plan(plain, PlanOptions(method=method, rank=4, max_length=32, device="cpu"))
    count = trainable.values.numel()
    checkpoint_layers(model.network, Checkpointing(2, 1))
    expected = predicted_memory(model.network, count, 0, Activations(None, 0, 0))
    assert found.trainable_parameters == count
    assert {part: found.memory[part] for part in ("weights", "trainable", "gradients")} == {
        "weights": expected.weights, "trainable": trainable.values.nbytes, "gradients": trainable.gradients.nbytes,
    }  # fmt: skip
    for optimizer, bits in (("adamw", 32), ("adamw8bit", 8)):
        state = PagedState(count, 1 << 20, None, CPU, bits=bits)
        wanted = plan(plain, PlanOptions(method=method, rank=4, max_length=32, optimizer=optimizer)).memory["optimizer"]
        assert wanted == sum(vector.count * vector.dtype.itemsize for vector in state.vectors().values())


@pytest.mark.parametrize("targets", [("*",), ("q_proj", "v_proj")])
def test_activations_are_what_autograd_saves(models, targets):
    plain, packed = models["llama"]
    model, _ = loaded(packed, targets)
    own = {t.untyped_storage().data_ptr() for t in (*model.network.parameters(), *model.network.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros((4, 128), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.network.train().base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    sizes = planned_layers(plain, targets)
    by_layers = sum(saved.values()) - hidden.nbytes  # which the last norm saves
    assert sum(size.input_bytes + size.kept_bytes for size in sizes) == pytest.approx(by_layers, rel=0.01)


def planned_layers(folder, targets=("*",), full=False, on_gpu=False):
    network = empty_network(Description.read(folder))
    ranks = {} if full else dict.fromkeys(matching_targets(targets, linear_shapes(network)), 4)
    return measured_layers(network, ranks, full, (4, 128), on_gpu=on_gpu)


FAMILIES = ["llama", "qwen3", "gemma", "phi", "phi3", "mixtral", "gpt2"]
"""Norms, gates and attention that the trainer replaces, and those that it does not: gpt2's attention has dropout."""


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_and_need_what_the_trainer_measures(made, gpt2, family, full):
    folder = gpt2 if family == "gpt2" else plain_in(made, family)
    if full:
        model = load_model(folder, torch.bfloat16, CPU)
        train_whole(model, parameter_places(model))
        accelerate(model.network, torch.bfloat16, CPU)
    else:
        model = load_with_adapter(folder)
    measured = layer_sizes(model.network, (4, 128), CPU)
    for found, expected in zip(planned_layers(folder, full=full), measured, strict=True):
        assert found.input_bytes == expected.input_bytes
        assert found.kept_bytes == pytest.approx(expected.kept_bytes, rel=0.02)
        assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.02)


def test_outputs_of_norms_are_saved_on_a_gpu_and_recomputed_on_a_cpu(models):
    plain, _ = models["llama"]
    for cpu, gpu in zip(planned_layers(plain), planned_layers(plain, on_gpu=True), strict=True):
        sums = 4 * 4 * 128  # of each row, in float32: a CPU's two norms keep them, and attention on both
        assert gpu.kept_bytes == cpu.kept_bytes + 2 * cpu.input_bytes - 2 * sums


def test_the_backward_pass_of_attention_on_a_gpu_needs_its_sums(models, tmp_path):
    """FlashAttention's, for a layer that is little else: dQ in float32, and dK and dV for each head of the queries."""
    config = json.loads((models["llama"][0] / "config.json").read_text())
    config |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    queries = 4 * 128 * 16 * 64
    by_head = 2 * queries  # bytes in 16 bits
    for size in planned_layers(tmp_path, on_gpu=True):
        assert size.peak_bytes > 4 * queries + 2 * by_head + by_head  # and dQ


@pytest.mark.parametrize(("width", "is_known"), [(1 << 16, True), (1 << 17, False)])
def test_modules_that_are_wider_than_those_of_any_model_are_not_probed(models, tmp_path, width, is_known):
    """A configuration may give any size, and probes allocate memory."""
    config = json.loads((models["llama"][0] / "config.json").read_text()) | {"hidden_size": width, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = empty_network(Description.read(tmp_path))
    layer = network.model.layers[0]
    with FakeTensorMode():
        norm = type(layer.input_layernorm)(width)
        assert norm_has_offset(norm, norm.weight, 1e-6) is (False if is_known else None)
    assert is_gated(layer.mlp, width, CPU, torch.nn.functional.silu) is is_known


@pytest.mark.parametrize("method", ["full", "lora"])
def test_more_key_heads_than_query_heads_are_refused(models, tmp_path, method):
    config = json.loads((models["llama"][0] / "config.json").read_text())
    config["num_key_value_heads"] = 2 * config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="forward pass cannot be simulated"):
        plan(tmp_path, PlanOptions(method=method, max_length=16, device="cpu"))


@pytest.fixture
def ten_billion(tmp_path):
    """A configuration of 10 billion parameters, without weights."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 41, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_memory_for_ten_billion_parameters_matches_the_usual_estimates(ten_billion):
    """Full: 16 bytes per parameter, about 160 GB. LoRA: 4 bytes per frozen one, about 40 GB; in 16 bits half."""
    full = plan(ten_billion, PlanOptions(method="full", max_length=512))
    assert full.parameters == pytest.approx(10e9, rel=0.02)
    steady = sum(full.memory[part] for part in ("weights", "trainable", "gradients", "optimizer"))
    assert steady == pytest.approx(16 * full.parameters, rel=1e-6)
    values = json.loads((ten_billion / "config.json").read_text())
    lora = plan(ten_billion, PlanOptions(method="lora", rank=8, max_length=512))
    (ten_billion / "config.json").write_text(json.dumps(values | {"torch_dtype": "float32"}))
    lora32 = plan(ten_billion, PlanOptions(method="lora", rank=8, max_length=512, compute_dtype="float32"))
    assert 19e9 < lora.total_bytes < 23e9
    assert 39e9 < lora32.total_bytes < 44e9
    qlora = plan(ten_billion, PlanOptions(rank=8, max_length=512, device="cuda"))  # a CPU's pages come and go
    assert 6e9 < qlora.total_bytes < 9e9
    assert qlora.memory["weights"] < 0.36 * lora.memory["weights"]


def test_trainable_parameters_are_reported_for_several_ranks(models):
    report = plan(models["llama"][0], PlanOptions(targets=("q_proj",), rank=8, max_length=16))
    assert [row.rank for row in report.ranks] == [4, 8, 16, 32, 64]
    assert all(row.parameters == row.rank * 2 * (64 + 64) for row in report.ranks)
    assert report.trainable_parameters == report.ranks[1].parameters
    assert report.ranks[0].one_square == round(8 * math.sqrt(report.parameters))
    assert report.ranks[0].fraction == report.ranks[0].parameters / report.parameters


def test_a_rank_above_the_largest_of_a_target_is_refused_and_not_listed(models):
    with pytest.raises(
        UsageError, match=r"rank: must be at most 32, since model\.layers\.0\.self_attn\.k_proj is 32 x 64; found 33"
    ):
        plan(models["llama"][0], PlanOptions(rank=33, max_length=16))
    assert [row.rank for row in plan(models["llama"][0], PlanOptions(rank=32, max_length=16)).ranks] == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "value", "method"),
    [("rank", 8, "full"), ("targets", ("q_proj",), "full"), ("moe", "quantize", "full"), ("moe", "quantize", "lora")],
)
def test_an_option_that_does_not_apply_to_the_method_is_refused(name, value, method):
    with pytest.raises(UsageError, match=f"{name}: does not apply to method {method}") as caught:
        PlanOptions(method=method, **{name: value})
    assert "--method" in caught.value.hint
    assert getattr(PlanOptions(method="qlora", **{name: value}), name) == value


@pytest.mark.parametrize(("moe", "dtype"), [("keep", "bfloat16"), ("quantize", "bfloat16"), ("keep", "float32")])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_predicted_unquantized_and_in_4_bits(made, tmp_path, family, moe, dtype):
    if (moe, dtype) == ("keep", "bfloat16") and release(torch) < (2, 11):
        pytest.skip("with torch before 2.11, experts not aligned to 16 bytes take a loop that computes their gradients")
    folder, packed = made / f"plan-{family}-stacks", tmp_path / "packed"
    if not folder.is_dir():
        tiny.write_family(folder, family, fused_experts=True)
    quantize(folder, packed, QuantizeOptions(moe=moe))
    model = load_with_adapter(packed, dtype=getattr(torch, dtype))
    needed = Checkpointing(2, 1).bytes_needed(layer_sizes(model.network, (2, 64), CPU))
    checkpoint_layers(model.network, Checkpointing(2, 1))
    found = plan(folder, PlanOptions(rank=4, batch_size=2, max_length=64, moe=moe, compute_dtype=dtype, device="cpu"))
    assert found.memory["weights"] == predicted_memory(model.network, 0, 0, Activations(None, 0, 0)).weights
    assert found.memory["activations"] == pytest.approx(needed, rel=0.1)
    (note,) = found.notes
    assert note.startswith("no adapter for 4 stacks of expert matrices")
    assert ("--moe quantize" in note) == (moe == "keep")
    as_it_is = plan(packed, PlanOptions(rank=4, batch_size=2, max_length=64, compute_dtype=dtype, device="cpu"))
    assert (as_it_is.memory, as_it_is.notes) == (found.memory, found.notes)
    other = {"keep": "quantize", "quantize": "keep"}[moe]
    assert plan(packed, PlanOptions(rank=4, max_length=64, moe=other, compute_dtype=dtype)).memory != found.memory


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"format": "w4a16", "block_size": 32, "zero_points": True}),
        ("llama", {"format": "fp8", "block_size": 128}),
        ("llama", {"format": "nvfp4"}),
        ("llama", {"format": "fp4", "double_quant": False}),
        ("llama", {"skip": ("*.0.*", "*up_proj")}),
        ("llama", {"include_head": True}),
        ("gpt2", {"skip": ("*.0.*",)}),
        ("llava", {"skip": ("*q_proj",)}),
    ],
)
@pytest.mark.parametrize("layers", ["none", "layer"])
def test_a_quantized_base_is_planned_as_it_is(made, tmp_path, name, options, layers):
    folder = made / f"plan-as-it-is-{name}"
    if not folder.is_dir():
        write = {"llama": partial(tiny.write_llama, tied=False), "gpt2": tiny.write_gpt2}
        write.get(name, partial(tiny.write_llava, older=True))(folder)
    quantize(folder, tmp_path / "packed", QuantizeOptions(**options))
    model = load_with_adapter(tmp_path / "packed", dtype=torch.bfloat16)
    if layers == "layer":
        checkpoint_layers(model.network, Checkpointing(2, 1))
    found = plan(tmp_path / "packed", PlanOptions(rank=4, max_length=32, checkpointing=layers, device="cpu"))
    # One table of levels, which all weights share: read for codes of groups, unread without double quantization.
    tables = {"w4a16": 64, "nvfp4": 64, "fp8": 1024, "fp4": 1024}
    unread = tables.get(options.get("format"), 0)
    assert found.memory["weights"] + unread == predicted_memory(model.network, 0, 0, Activations(None, 0, 0)).weights


@pytest.mark.parametrize("left_out", [{"llm_int8_skip_modules": None}, {}])
def test_bitsandbytes_keeps_the_output_layer_unless_modules_are_named(tmp_path, left_out):
    """Most quantized models on the Hub name none, and transformers then quantizes all but the output layer."""
    values = json.loads((tiny.write_llama(tmp_path / "plain", tied=False) / "config.json").read_text())
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stated["bnb_4bit_use_double_quant"] = True
    found = []
    for more in (left_out, {"llm_int8_skip_modules": ["lm_head"]}, {"llm_int8_skip_modules": []}):
        (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": stated | more}))
        found.append(plan(tmp_path, PlanOptions(max_length=16)).memory["weights"])
    assert found[0] == found[1] > found[2]


@pytest.mark.parametrize(
    "stated",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors", "config_groups": ["int8"]},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_a_base_that_cannot_be_trained_as_it_is_is_planned_as_quantize_would_pack_it(models, tmp_path, stated):
    plain = plan(models["llama"][0], PlanOptions(max_length=16))
    values = json.loads((models["llama"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
    assert plan(tmp_path, PlanOptions(max_length=16)).memory == plain.memory


@pytest.mark.parametrize(("device", "unpacked"), [("cuda", 4 * (256 * 64 + 64 * 128)), ("cpu", 256 * 64)])
def test_a_gpu_unpacks_all_experts_of_a_layer_and_a_cpu_one_matrix_at_a_time(tmp_path, device, unpacked):
    tiny.write_family(tmp_path / "base", "mixtral")
    keep, pack = (
        plan(tmp_path / "base", PlanOptions(rank=4, max_length=64, moe=moe, checkpointing="layer", device=device))
        for moe in ("keep", "quantize")
    )
    assert pack.memory["activations"] - keep.memory["activations"] == 2 * unpacked


def test_settings_that_training_would_refuse_are_noted(models, run_cli):
    plain, packed = models["llama"]
    assert not plan(packed, PlanOptions(max_length=16)).notes
    assert not plan(plain, PlanOptions(method="full", max_length=16)).notes
    for method in ("full", "lora"):
        assert f"is quantized, but {method} trains the 16-bit one" in run_cli("plan", packed, "--method", method).stdout
    (note,) = plan(plain, PlanOptions(max_length=1 << 16)).notes
    assert "longer than the model's context" in note


def test_planned_activations_are_within_their_budget_or_it_is_refused(models, tmp_path):
    """The least budget that the refusal names is enough; one MiB less is not."""
    config = json.loads((models["llama"][0] / "config.json").read_text()) | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def activations(checkpointing):
        options = PlanOptions(max_length=512, batch_size=64, checkpointing=checkpointing)
        return plan(tmp_path, options).memory["activations"]

    none = activations("none")
    with pytest.raises(UsageError, match="at least") as caught:
        activations("budget:1")
    least = int(re.search(r"at least ([\d,]+) MiB", caught.value.message)[1].replace(",", ""))
    with pytest.raises(UsageError, match=f"at least {least:,} MiB"):
        activations(f"budget:{least - 1}")
    assert (least - 1) * 2**20 < activations(f"budget:{least}") <= least * 2**20
    budgets = [least + (none // 2**20 - 1 - least) * step // 4 for step in range(5)]
    found = [activations(f"budget:{budget}") for budget in budgets]
    assert all(needed <= budget * 2**20 for needed, budget in zip(found, budgets, strict=True))
    assert found == sorted(found)
    assert found[0] < found[-1] < none
    assert activations(f"budget:{none // 2**20 + 1}") == none


def test_linear_layers_that_quantize_does_not_support_can_be_planned_with_lora(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "falcon", {})
    folder = tiny.write_architecture(tmp_path / "falcon", "falcon")
    with pytest.raises(UsageError, match="does not support any") as caught:
        plan(folder)
    assert "--method lora" in caught.value.hint
    assert plan(folder, PlanOptions(method="lora")).trainable_parameters > 0
    with pytest.raises(CheckpointError, match="nothing to quantize: it has no linear layers of a kind that") as caught:
        quantize(folder, tmp_path / "out")
    assert "--method lora" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--rank", 0], 2, "rank: must be at least 1 and at most 65,536, found 0"),
        (["--targets", "nothing_*"], 2, "matches no linear layer"),
        (["--checkpointing", "layers"], 2, "budget:MIB"),
        (["--checkpointing", "budget:1"], 2, "or a smaller --micro-batch-size or --max-length"),
        (["--method", "dora"], 2, "--method"),
        (["--method", "lora", "--moe", "quantize"], 2, "or use --method qlora"),
    ],
)
def test_invalid_arguments_are_errors_without_a_traceback(run_cli, llama, arguments, code, said):
    done = run_cli("plan", llama, *arguments)
    assert (done.code, said in done.stderr, "Traceback" in done.stderr) == (code, True, False)


def test_empty_targets_are_refused():
    with pytest.raises(UsageError, match="targets"):
        PlanOptions(targets=())


def test_auto_plans_what_train_would_choose(models):
    for folder, method in zip(models["llama"], ("lora", "qlora"), strict=True):
        found = plan(folder, PlanOptions(method="auto", compute_dtype="auto", rank=4, max_length=16, device="cpu"))
        assert (found.method, found.compute_dtype) == (method, name_of(choose_dtype("auto", CPU)))


def test_rows_are_those_of_a_forward_pass(models):
    sizes = [{"batch_size": 4}, {"batch_size": 8, "micro_batch_size": 4}, {"batch_size": 8}]
    found = [
        plan(models["llama"][0], PlanOptions(rank=4, max_length=16, device="cpu", **size)).memory for size in sizes
    ]
    assert found[0] == found[1] != found[2]


def test_folders_without_a_valid_configuration_are_refused(run_cli, tmp_path):
    assert "has no config.json" in run_cli("plan", tmp_path).stderr
    (tmp_path / "other.json").write_text("{}")
    refused = run_cli("plan", tmp_path / "other.json")
    assert (refused.code, "other.json: neither a folder nor a config.json" in refused.stderr) == (2, True)
    assert "give a checkpoint's folder, its config.json, or" in refused.stderr
    for content, code in (
        ("{", 5),
        ('{"model_type": "nothing"}', 2),
        ('{"model_type": "llama", "num_hidden_layers": 1e6}', 2),
    ):
        (tmp_path / "config.json").write_text(content)
        done = run_cli("plan", tmp_path)
        assert (done.code, "Traceback" in done.stderr) == (code, False), done.stderr


def test_the_command_prints_a_table_or_a_json_document(run_cli, llama):
    table = run_cli("plan", llama, "--max-length", 64)
    assert all(word in table.stdout for word in ("device", "activations", "total", "2 r √N"))
    document = json.loads(run_cli("plan", llama, "--max-length", 64, "--json").stdout)
    assert document["total_bytes"] == sum(document["memory"].values())


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *MORE])
def test_a_plan_leaves_the_random_state_and_the_classes_of_transformers_as_they_were(name, tmp_path, monkeypatch):
    """Diffllama draws numbers when it is built; DeepSeek V3.2 masks keys only if its attention is named sdpa."""
    monkeypatch.setitem(tiny.ARCHITECTURES, name, (tiny.ARCHITECTURES | MORE)[name])
    folder = tiny.write_architecture(tmp_path / name, name)
    module = sys.modules[type(empty_network(Description.read(folder))).__module__]

    def functions():
        classes = [found for found in vars(module).values() if isinstance(found, type)]
        return [(owner, name, part) for owner in classes for name, part in vars(owner).items() if callable(part)]

    before, state = functions(), torch.get_rng_state()
    for device in ("cpu", "cuda"):
        plan(folder, PlanOptions(rank=2, max_length=32, device=device))
    assert torch.equal(torch.get_rng_state(), state)
    assert functions() == before
