"""The tables of embeddings and output layers agree with transformers."""

import pytest
from peft_adapters import quiet
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSpeechSeq2Seq
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adaptkit.checkpoint.vocabulary import is_embedding_name, is_tied_by_default, known_head
from adaptkit.models.architecture import head_path

BEFORE = {"gpt_neox": "embed_out"}
"""Names of heads in earlier versions of transformers."""
AUTO = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSpeechSeq2Seq)


def classes(kind):
    """Return the classes of a model type that predict tokens."""
    config = CONFIG_MAPPING[kind]
    found = [auto._model_mapping[config] for auto in AUTO if config in auto._model_mapping]
    return [one for classes in found for one in (classes if isinstance(classes, tuple) else (classes,))]


def test_a_known_head_is_the_one_that_transformers_ties():
    for kind in CONFIG_MAPPING:
        head = known_head({"model_type": kind})
        for model in classes(kind) if head else ():
            tied = model._tied_weights_keys or {}
            names = [name.removesuffix(".weight") for name in tied if name.endswith(".weight")]
            if names == [BEFORE.get(kind)]:
                continue
            assert head in names or not names, model.__name__
            if head in names:
                source = tied[f"{head}.weight"].removesuffix("$").removesuffix(".weight")
                assert is_embedding_name(source) or source.endswith("shared"), f"{model.__name__}: {source}"


BUILT = {
    "bert": {}, "roberta": {}, "distilbert": {"n_layers": 1}, "modernbert-decoder": {"num_hidden_layers": 2},
    "biogpt": {}, "albert": {},
    "electra": {}, "deberta-v2": {}, "mamba": {}, "mamba2": {}, "falcon_mamba": {}, "openai-gpt": {"n_layer": 1},
    "gpt2": {"n_layer": 1}, "ctrl": {"n_layer": 1}, "rwkv": {}, "xlnet": {"n_layer": 1}, "llama": {}, "gemma": {},
    "qwen2": {}, "phi": {}, "opt": {}, "bloom": {"n_layer": 1}, "gpt_neox": {}, "gptj": {"n_layer": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1}, "mpnet": {}, "flaubert": {"n_layers": 1}, "git": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", BUILT)
def test_the_tables_are_right_for_every_model_class_of_a_type(kind):
    import torch

    values = BUILT[kind] or {"num_hidden_layers": 1}
    for model in classes(kind):
        with quiet(), torch.device("meta"):
            network = model(model.config_class(**values))
        assert head_path(network) in (known_head({"model_type": kind}), BEFORE.get(kind))
        tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
        assert tied == is_tied_by_default({"model_type": kind})
        table = network.get_input_embeddings()
        assert is_embedding_name(next(path for path, module in network.named_modules() if module is table))


def test_unknown_model_types_have_no_known_head():
    assert known_head({"model_type": "of_my_own"}) == known_head({}) == ""
