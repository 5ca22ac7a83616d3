"""Verdicts on checkpoints are compared with what transformers does, and with rules of the other programs."""

import json
import shutil
import warnings

import pytest
import tiny
import torch
from folders import edit_json, edited_tensors
from released import write_fp8, write_mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from verdicts import levels, taken, verdicts, words

from adaptkit.errors import CheckpointError
from adaptkit.operations.check import check
from adaptkit.operations.dequantize import dequantize
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import QuantizeOptions, quantize


def test_a_merged_checkpoint_gets_no_findings_with_or_without_an_undo_record(llama, llama_sharded, adapter, tmp_path):
    merge(llama, [adapter], tmp_path / "merged")
    merge(llama_sharded, [adapter], tmp_path / "sharded")
    merge(llama, [adapter], tmp_path / "without", MergeOptions(undo=False))
    for folder in (llama, tmp_path / "merged", tmp_path / "sharded", tmp_path / "without"):
        report = check(folder)
        assert (report.kind, report.taken) == ("checkpoint", True)
        assert all(verdict.findings == () for verdict in report.verdicts)


def test_without_an_index_vllm_and_sglang_reject_an_extra_safetensors_file(llama, llama_sharded, adapter, copy_of):
    """They load all ``*.safetensors``, unless an index lists the files; transformers and llama.cpp do not."""
    from transformers import AutoModelForCausalLM

    for base, takers in ((llama, {"gguf", "peft"}), (llama_sharded, {"gguf", "peft", "sglang", "vllm"})):
        folder = copy_of(base)
        shutil.copy(adapter / "adapter_model.safetensors", folder / "extra.safetensors")
        assert taken(folder) == takers
        assert ("extra.safetensors" in words(verdicts(folder)["vllm"])) == (len(takers) == 2)
        AutoModelForCausalLM.from_pretrained(folder)


PARTS = {
    "fp8": (
        write_fp8,
        {
            "model.layers.0.mlp.gate_proj.weight_scale_inv": lambda tensor: tensor[:1],
            "model.layers.0.mlp.up_proj.weight_scale_inv": lambda tensor: None,
            "model.layers.0.mlp.down_proj.weight": lambda tensor: tensor[:32],
        },
    ),
    "mxfp4": (
        write_mxfp4,
        {
            "model.layers.0.mlp.experts.down_proj_scales": lambda tensor: tensor[:, :, :1],
            "model.layers.0.mlp.experts.gate_up_proj_blocks": lambda tensor: None,
        },
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_released_weights_that_do_not_fit_are_an_error_as_they_are_for_dequantize(kind, tmp_path, copy_of):
    write, changes = PARTS[kind]
    sound = write(tmp_path / "sound")
    assert all(f.level != "error" for verdict in verdicts(sound).values() for f in verdict.findings)
    for number, (name, change) in enumerate(changes.items()):
        folder = copy_of(sound, str(number))
        with edited_tensors(folder / "model.safetensors") as tensors:
            new = change(tensors.pop(name))
            tensors |= {} if new is None else {name: new.contiguous()}
        with pytest.raises(CheckpointError) as caught:
            dequantize(folder, tmp_path / "out")
        assert taken(folder) == set()
        assert f"error: {caught.value.message}" in words(verdicts(folder)["vllm"])


def test_other_layouts_of_fp8_are_left_to_the_programs_that_know_them(tmp_path):
    """llm-compressor calls the scale of a whole matrix weight_scale."""
    folder = write_fp8(tmp_path / "fp8", block=None)
    with edited_tensors(folder / "model.safetensors") as tensors:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)
    assert "vllm" in taken(folder)


def test_weights_of_integers_are_an_error_and_buffers_of_integers_are_not(llama, copy_of):
    folder = copy_of(llama)
    with edited_tensors(folder / "model.safetensors") as tensors:
        tensors["model.position_ids"] = torch.arange(4)
    before = {name: verdict.taken for name, verdict in verdicts(folder).items()}
    assert all(before.values())
    with edited_tensors(folder / "model.safetensors") as tensors:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = (tensors[name].float() * 100).to(torch.int8)
    assert taken(folder) == set()
    assert f"error: {name}: weight of integers, although config.json names no quantization." in words(
        verdicts(folder)["vllm"]
    )


@pytest.mark.parametrize("metadata", [{}, {"metadata": {}}, {"metadata": {"total_size": "7", "by": "hand"}}])
def test_transformers_needs_metadata_in_an_index(metadata, llama_sharded, copy_of):
    folder = copy_of(llama_sharded)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]} | metadata))
    assert taken(folder) == ({"gguf", "peft", "sglang", "vllm"} if metadata else {"gguf", "sglang", "vllm"})
    assert transformers_loads(folder) == bool(metadata)
    assert ("has no metadata" in words(verdicts(folder)["peft"])) != bool(metadata)


def transformers_loads(folder):
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except (RuntimeError, ValueError, KeyError):
            return False
    return True


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        ({}, {"peft", "sglang", "vllm"}),
        ({"format": "fp4"}, {"peft", "sglang", "vllm"}),
    ],
)
def test_all_programs_but_llama_cpp_accept_what_bitsandbytes_reads(options, takers, llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    assert check(tmp_path / "out").kind == "quantized"
    assert taken(tmp_path / "out") == takers
    assert transformers_loads(tmp_path / "out") == bool(takers)
    assert ("vllm-bnb-plugin" in words(verdicts(tmp_path / "out")["vllm"])) == bool(takers)
    if takers:  # they differ in which dtypes of the codes they accept
        block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        edit_json(tmp_path / "out" / "config.json", quantization_config=block | {"bnb_4bit_quant_storage": "bfloat16"})
        assert taken(tmp_path / "out") == {"peft"}


@pytest.mark.parametrize(("block_size", "first"), [(32, None), (64, "up_proj"), (128, "down_proj")])
def test_a_weight_whose_row_length_is_not_a_multiple_of_the_block_size_is_named(block_size, first, tmp_path):
    """bitsandbytes' CPU decoder is wrong for these; its encoder and ours ignore row boundaries."""
    source = tiny.write_llama(tmp_path / "source", hidden=96)
    quantize(source, tmp_path / "out", QuantizeOptions(block_size=block_size, skip=("*self_attn*", "*gate_proj")))
    verdict = verdicts(tmp_path / "out")["peft"]
    found = [finding.found for finding in verdict.findings if "not a multiple of the block size" in finding.found]
    assert [first in name for name in found] == ([True] if first else [])
    assert verdict.taken


@pytest.mark.parametrize("fused", [True, False])
def test_only_vllm_and_sglang_accept_quantized_experts_and_only_unfused_ones(fused, tmp_path):
    source = tiny.write_family(tmp_path / "source", "mixtral", fused_experts=fused)
    quantize(source, tmp_path / "out", QuantizeOptions(moe="quantize"))
    assert taken(tmp_path / "out") == (set() if fused else {"sglang", "vllm"})
    assert not transformers_loads(tmp_path / "out")
    quantize(source, tmp_path / "kept", QuantizeOptions(moe="keep"))
    assert taken(tmp_path / "kept") == {"peft", "sglang", "vllm"}


@pytest.mark.parametrize("stated", [{}, {"quant_method": None}, {"quant_method": None, "load_in_4bit": True}])
def test_a_quantization_config_without_a_method_is_an_error_where_transformers_fails(llama, tmp_path, stated):
    """It takes load_in_4bit for bitsandbytes; vLLM and SGLang do not."""
    quantize(llama, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", quantization_config=stated)
    assert taken(tmp_path / "out") == ({"peft"} if len(stated) > 1 else set())
    assert transformers_loads(tmp_path / "out") == (len(stated) > 1)
    assert levels(verdicts(tmp_path / "out")["vllm"], "names no quant_method") == {"error"}


def test_a_missing_quantization_config_is_an_error_and_a_missing_tokenizer_a_warning(llama, tmp_path):
    quantize(llama, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", quantization_config=None)
    assert taken(tmp_path / "out") == set()
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path / "bare")
    found = verdicts(tmp_path / "bare")
    assert all("warning: no tokenizer found" in words(verdict) for verdict in found.values())
    assert all(verdict.taken for verdict in found.values())


@pytest.mark.parametrize("packed", [False, True])
def test_a_tensor_that_the_files_lack_is_an_error_for_every_program(packed, llama, copy_of, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = copy_of(llama)
    if packed:
        quantize(llama, tmp_path / "nf4")
        folder = tmp_path / "nf4"
    lost = "model.layers.1.input_layernorm.weight"
    with edited_tensors(folder / "model.safetensors") as tensors:
        del tensors[lost]
    found = verdicts(folder)
    assert not any(verdict.taken for verdict in found.values())
    assert all(f"the files lack {lost}, which LlamaForCausalLM has" in words(verdict) for verdict in found.values())
    if not packed:
        _, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert set(told["missing_keys"]) == {lost}  # which it fills with ones


def test_tensors_whose_shapes_differ_from_the_configuration_are_an_error(llama, copy_of):
    from transformers import AutoModelForCausalLM

    folder = copy_of(llama)
    edit_json(folder / "config.json", intermediate_size=96)
    for verdict in verdicts(folder).values():
        assert not verdict.taken
        assert "down_proj.weight (expected [64, 96], found [64, 128]) and 5 more" in words(verdict)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


def compared(base, packed):
    """Quantize a complete base, check both, and return what they were compared with."""
    quantize(base, packed)
    reports = [check(folder, ["peft"]) for folder in (base, packed)]
    for report in reports:
        assert report.taken, words(report.verdicts[0])
    return {report.examined[-1] for report in reports}


@pytest.mark.parametrize("name", tiny.OTHER_CLASSES)
def test_a_checkpoint_is_compared_with_the_class_that_it_was_saved_as(name, tmp_path):
    import transformers

    base = tiny.write_class(tmp_path / "base", name)
    assert compared(base, tmp_path / "nf4") == {f"names and shapes of all tensors of {name}"}
    with edited_tensors(base / "model.safetensors") as tensors:
        lost = next((key for key in tensors if key.startswith(("score", "classifier", "pooler"))), "norm.weight")
        tensors.pop(lost, None)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    _, told = getattr(transformers, name).from_pretrained(base, output_loading_info=True)
    transformers.logging.set_verbosity(verbosity)
    assert set(told["missing_keys"]) == {lost}
    assert f"the files lack {lost}, which {name} has" in words(verdicts(base)["peft"])


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_no_tensor_is_reported_missing_from_what_transformers_wrote(name, tmp_path):
    base = tiny.write_architecture(tmp_path / "base", name)
    (what,) = compared(base, tmp_path / "nf4")
    assert what.startswith("names and shapes of all tensors of ")


FP8 = {"strategy": "channel", "type": "float", "num_bits": 8, "group_size": None}
INT4 = {"strategy": "group", "type": "int", "num_bits": 4, "group_size": 128}
NVFP4 = "nvfp4-pack-quantized"


@pytest.mark.parametrize(
    ("form", "groups", "unread"),
    [
        ("float-quantized", [{"weights": FP8}], ""),
        ("float-quantized", [{"weights": FP8 | {"strategy": "block"}}], ""),
        ("pack-quantized", [{"weights": INT4}], ""),
        ("mixed-precision", [{"format": NVFP4}, {"format": NVFP4}], ""),
        ("float-quantized", [{"weights": FP8 | {"strategy": "tensor"}}], "float-quantized of 8-bit floats by tensor"),
        ("int-quantized", [{"weights": FP8 | {"group_size": 128}}], "int-quantized of 8-bit floats by channel"),
        ("pack-quantized", [{"weights": INT4 | {"strategy": "channel"}}], "pack-quantized of 4-bit ints by channel"),
        ("float-quantized", [{"weights": FP8}] * 2, "float-quantized with 2 config_groups"),
        ("mixed-precision", [{"format": NVFP4}, {"format": "float-quantized"}], "mixed-precision with 2 config_groups"),
        ("mxfp4-pack-quantized", [{"weights": INT4}], "mxfp4-pack-quantized of 4-bit ints by group"),
    ],
)
def test_llama_cpp_reads_some_formats_of_compressed_tensors(form, groups, unread, llama, adapter, copy_of):
    """Compared with what conversion/base.py of llama-cpp-python 0.3.36 raises, for all combinations of these values."""
    base = copy_of(llama)
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": named}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(config))
    for found in (check(base, "gguf"), check(adapter, "gguf", base)):
        said = words(found.verdicts[0])
        assert ("compressed-tensors' " in said) == bool(unread)
        assert unread in said
    config |= {"architectures": ["KimiK3ForConditionalGeneration"]}
    (base / "config.json").write_text(json.dumps(config))
    is_kimis = form == "mxfp4-pack-quantized"
    assert ("compressed-tensors' " in words(check(base, "gguf").verdicts[0])) == (bool(unread) and not is_kimis)


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "needs"),
    [
        ("GemmaForCausalLM", "TokenizersBackend", True),
        ("Gemma3ForCausalLM", "TokenizersBackend", False),
        ("Phi3ForCausalLM", "TokenizersBackend", True),
        ("PhiMoEForCausalLM", "TokenizersBackend", True),
        ("Phi3ForCausalLM", "GPT2Tokenizer", False),  # Phi-4, as it is published
    ],
)
def test_llama_cpp_needs_tokenizer_model_for_some_architectures(architecture, tokenizer, needs, llama, copy_of):
    """After tuning such a model and saving its fast tokenizer, that file is missing."""
    base = copy_of(llama)
    for name, change in (
        ("config", {"architectures": [architecture]}),
        ("tokenizer_config", {"tokenizer_class": tokenizer}),
    ):
        edit_json(base / f"{name}.json", **change)
    assert ("no tokenizer.model" in words(check(base, "gguf").verdicts[0])) == needs
    (base / "tokenizer.model").write_bytes(b"x")
    assert "no tokenizer.model" not in words(check(base, "gguf").verdicts[0])
    for path in base.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer.model" not in words(check(base, "gguf").verdicts[0])  # all files are missing


EVERYONE = {"gguf", "peft", "sglang", "vllm"}


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        ({"format": "fp8"}, EVERYONE),
        ({"format": "fp8", "block_size": 128}, EVERYONE - {"vllm"}),  # 64 rows of q are no whole number of blocks
        ({"format": "int8"}, EVERYONE),
        ({"format": "w4a16", "block_size": 32}, EVERYONE),
        ({"format": "w4a16", "block_size": 32, "zero_points": True}, EVERYONE),
        ({"format": "nvfp4"}, EVERYONE),
        ({"format": "mxfp4"}, {"peft", "vllm"}),
        ({"format": "fp8", "skip": ("*.q_proj",)}, EVERYONE - {"sglang", "vllm"}),
    ],
)
def test_formats_that_servers_run(options, takers, llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeOptions(**options))
    assert taken(tmp_path / "out") == takers
    assert transformers_loads(tmp_path / "out") != bool(options.get("zero_points"))
    assert ("CompressedTensorsConfig(dequantize=True)" in words(verdicts(tmp_path / "out")["peft"])) == bool(
        options.get("zero_points")
    )


def test_factors_of_nvfp4_that_servers_would_join_must_be_equal(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeOptions("nvfp4"))
    name = "model.layers.1.self_attn.v_proj.weight_global_scale"
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] * 2}, path, {"format": "pt"})
    assert taken(tmp_path / "out") == {"gguf", "peft"}
    assert f"{name}: not equal" in words(verdicts(tmp_path / "out")["vllm"])


@pytest.mark.parametrize(
    ("stated", "word", "refusing"),
    [
        ({"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": True}, "desc_act is true", {"vllm"}),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "sym is false", {"vllm", "sglang"}),
        ({"quant_method": "gptq", "bits": 3, "sym": True}, "bits is 3", {"vllm", "sglang"}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_method is modelopt", {"peft"}),
    ],
)
def test_methods_of_others_are_known_by_what_config_json_says(stated, word, refusing, llama, copy_of):
    folder = copy_of(llama)
    edit_json(folder / "config.json", quantization_config=stated)
    for program, verdict in verdicts(folder).items():
        found = [finding for finding in verdict.findings if word in finding.found]
        assert [finding.level for finding in found].count("error") == (program in refusing), program


@pytest.mark.parametrize(("block", "are_whole"), [((32, 32), True), ((48, 48), False), ((40, 32), False)])
def test_edges_of_fp8_blocks_are_decoded_wrongly_by_transformers(block, are_whole, tmp_path):
    folder = write_fp8(tmp_path / "fp8", block=block)
    dequantize(folder, tmp_path / "plain")
    right = load_file(tmp_path / "plain" / "model.safetensors")
    assert ("peft" in taken(folder)) == are_whole
    try:
        config = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        found = model.state_dict()
        is_right = all(torch.equal(found[name], right[name]) for name in right if name.endswith("_proj.weight"))
    except (RuntimeError, ValueError):
        is_right = False
    assert is_right == are_whole
