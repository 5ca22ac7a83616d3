"""T5: encoder, decoder and head share an embedding, and transformers leaves some layers in float32."""

import pytest
import torch
from folders import edited_tensors
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from adaptkit.errors import AdapterError, UsageError
from adaptkit.operations.extract import ExtractOptions, extract
from adaptkit.operations.merge import MergeOptions, merge
from adaptkit.operations.quantize import quantize

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    folder = tmp_path_factory.mktemp("t5") / "base"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def adapted(base, folder, targets, saved=None):
    """Write a peft adapter without zero tensors; return the logits of its unmerged model."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(T5ForConditionalGeneration.from_pretrained(base), lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits


def test_transformers_loads_a_quantized_t5_with_its_float32_layers(t5, tmp_path):
    import bitsandbytes

    report = quantize(t5, tmp_path / "nf4")
    assert report.kept["float32 by its architecture"] == 4
    feed_forward = T5ForConditionalGeneration.from_pretrained(tmp_path / "nf4").encoder.block[0].layer[1].DenseReluDense
    assert isinstance(feed_forward.wi, bitsandbytes.nn.Linear4bit)
    assert not isinstance(feed_forward.wo, bitsandbytes.nn.Linear4bit)
    kept = load_file(t5 / "model.safetensors")["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert torch.equal(feed_forward.wo.weight.float(), kept)


def test_an_adapter_that_leaves_the_embedding_unchanged_merges_to_what_peft_computes(t5, tmp_path):
    expected = adapted(t5, tmp_path / "lora", ["q", "v", "wi"])
    merge(t5, [tmp_path / "lora"], tmp_path / "merged")
    found = logits(T5ForConditionalGeneration.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("targets", "saved", "name"),
    [(["q", "shared"], None, "shared"), (["q"], ["shared"], "shared"), (["q", "lm_head"], None, "lm_head")],
)
def test_an_adapter_of_a_single_use_of_the_shared_embedding_is_refused(t5, targets, saved, name, tmp_path):
    adapted(t5, tmp_path / "lora", targets, saved)
    for untie in (False, True):
        with pytest.raises(AdapterError, match=rf"changes {name}\.weight, but encoder, decoder or head"):
            merge(t5, [tmp_path / "lora"], tmp_path / "merged", MergeOptions(untie=untie))
    assert not (tmp_path / "merged").exists()


def test_an_extracted_adapter_has_the_task_type_of_an_encoder_decoder(t5, tmp_path):
    """peft's class for decoder-only language models would not accept the decoder's input."""
    from peft import PeftModelForSeq2SeqLM

    adapted(t5, tmp_path / "lora", ["q"])
    merge(t5, [tmp_path / "lora"], tmp_path / "tuned")
    extract(tmp_path / "tuned", t5, tmp_path / "out", ExtractOptions(rank=4))
    model = PeftModelForSeq2SeqLM.from_pretrained(T5ForConditionalGeneration.from_pretrained(t5), tmp_path / "out")
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    wanted = logits(T5ForConditionalGeneration.from_pretrained(tmp_path / "tuned"))
    assert (logits(model) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_extract_refuses_or_leaves_out_a_shared_embedding_that_differs(t5, tmp_path):
    T5ForConditionalGeneration.from_pretrained(t5).save_pretrained(tmp_path / "tuned")
    weights = tmp_path / "tuned" / "model.safetensors"
    with edited_tensors(weights) as tensors:
        tensors["shared.weight"][3] += 1
        tensors["encoder.block.0.layer.0.SelfAttention.q.weight"] += 0.1
    with pytest.raises(UsageError, match=r"shared\.weight"):
        extract(tmp_path / "tuned", t5, tmp_path / "lora", ExtractOptions(rank=2))
    report = extract(tmp_path / "tuned", t5, tmp_path / "lora", ExtractOptions(rank=2, only_linear=True))
    assert [tensor.name for tensor in report.left_out] == ["shared.weight"]
