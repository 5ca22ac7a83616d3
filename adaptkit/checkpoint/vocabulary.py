"""The names of embeddings and output layers in transformers, so that these can be found without building the model.

An output layer that is tied to the embedding is not in any file, so its name must be known. It depends on the
architecture; the tables are from transformers 5.24 (``_tied_weights_keys``, ``get_output_embeddings``), and a test
compares them with the installed version.
"""

import re
from collections.abc import Mapping
from typing import Any

_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)$")
_RARE_TABLE = re.compile(r"(^|\.)(embeddings?|word_embedding|tokens_embed|input_embedding|w)$")
_NUMBERED = re.compile(r"(^|\.)\d+\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
_HEADS = {
    "cls.predictions.decoder": """
        bert big_bird deberta deberta-v2 ernie fnet layoutlm megatron-bert mobilebert mra nomic_bert
        nystromformer rembert roc_bert roformer squeezebert tapas visual_bert yoso
    """,
    "decoder": "modernbert modernbert-decoder",
    "decoder.lm_head": "pix2struct",
    "embed_out": "gpt_neox_japanese",
    "generator_lm_head": "convbert electra",
    "head": "rwkv",
    "head.decoder": "ultrabert",
    "language_model.lm_head": "blip-2 instructblip instructblipvideo",
    "lm_head": """
        afmoe apertus apertus1p5 apertus1p5_text arcee aria aria_text audioflamingo3 axk1 axk2
        bailing_hybrid bamba bart beam bigbird_pegasus bitnet blenderbot blenderbot-small bloom
        chameleon codegen cohere cohere2 cohere2_moe cohere2_vision cosmos3_edge cosmos3_omni cpmant ctrl
        cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_hybrid diffllama
        doge dory dots1 dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe ernie4_5_vl_moe eurobert
        evolla exaone exaone4 exaone4_5 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint florence2
        fun_asr_nano funnel fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
        gemma4_unified gemma4_unified_assistant gemma4_unified_text glm glm4 glm46v glm4_moe glm4_moe_lite
        glm4v glm4v_moe glm5_next glm_moe_dsa glm_ocr glmasr glmga got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
        gpt_neox gpt_oss gptj granite granite_docling granite_speech granite_speech_plus granite_swa
        granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
        hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl hyperclovax hyperclovax_vision_v2 idefics idefics2 idefics3
        inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling_mm_model inkling_text internlm3
        internvl iquestcoder jais2 jamba janus jetmoe kimi_k25 kimi_linear kolibri1 kyutai_speech_to_text
        laguna lara_mini led lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr llama llama4_text llava
        llava_next llava_next_video llava_onevision longcat_flash longt5 m2m_100 mamba mamba2 marian mbart
        mellum mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl
        minimax_m3_vl_text ministral ministral3 mistral mistral3 mistral4 mistral_large4 mixtral mllama
        modernvbert molmo2 moshi moss_transcribe_diarize mpt mt5 muse_glimmer muse_spark musicflamingo mvp
        nanochat nemo_speechlm nemotron nemotron_h neomme nllb-moe olmo olmo2 olmo3 olmo_hybrid olmoe
        omniasr openai-gpt opt ovis2 paddleocr_vl paligemma pegasus pegasus_x persimmon phi phi3
        phi4_multimodal phimoe plbart pp_chart2table prophetnet qianfan_ocr qwen2
        qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe
        qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl
        qwen3_vl_moe recurrent_gemma sarvam_mla sarvam_moe seamless_m4t seamless_m4t_v2 seed_oss
        shieldgemma2 smollm3 smolvlm solar_open speech_to_text stablelm starcoder2 step3p7
        switch_transformers t5 udop ultravbert umt5 unlimited_ocr vaultgemma vibevoice vibevoice_asr
        video_llama_3 video_llava vipllava voxtral voxtral_realtime xglm xlstm youtu zamba zamba2 zaya
    """,
    "lm_head.decoder": """
        bert-generation camembert data2vec-text esmc gte ibert jina_embeddings_v3 longformer mpnet
        reformer roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
    """,
    "lm_head.out_proj": "t5gemma t5gemma2",
    "lm_loss": "xlnet",
    "output": "git",
    "output_projection": "biogpt trocr",
    "pred_layer.proj": "flaubert xlm",
    "predictions.decoder": "albert",
    "proj_out": "canary cohere_asr moonshine whisper",
    "text_decoder_postnet.lm_head": "speecht5",
    "text_model.lm_head": "kosmos-2 kosmos-2.5",
    "vocab_projector": "distilbert",
}
"""Maps the path of the output layer to the model types that use it."""
_TIED_BY_DEFAULT = """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip-2 bloom
    camembert canary cohere cohere2 cohere2_moe cohere2_vision convbert ctrl data2vec-text deberta deberta-v2
    deepseek_vl deepseek_vl_hybrid distilbert electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe falcon
    falcon_mamba flaubert florence2 fnet fun_asr_nano funnel gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox_japanese granite_docling granite_speech granite_speech_plus granite_swa gte
    hyperclovax_vision_v2 ibert instructblip instructblipvideo internvl janus jetmoe jina_embeddings_v3 kimi_k25
    kosmos-2 kosmos-2.5 lara_mini layoutlm led lfm2 lfm2_vl lfm3 lfm3_vl lighton_ocr longformer longt5 m2m_100
    mamba marian mbart megatron-bert minicpm3 minicpm_ocr mistral3 mobilebert modernbert modernbert-decoder
    moonshine moss_transcribe_diarize mpnet mpt mra mt5 mvp neomme nllb-moe nomic_bert nystromformer openai-gpt
    opt ovis2 paddleocr_vl paligemma pegasus pegasus_x plbart pp_chart2table prophetnet qwen3_asr
    recurrent_gemma roberta roberta-prelayernorm roc_bert roformer seamless_m4t seamless_m4t_v2 shieldgemma2
    smollm3 speech-encoder-decoder speech_to_text speecht5 squeezebert starcoder2 switch_transformers t5
    t5gemma2 tapas trocr udop umt5 vaultgemma vision-encoder-decoder visual_bert voxtral_realtime whisper xglm
    xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
"""
"""Model types that tie the output layer to the embedding if the configuration does not say."""
_SHARES_MORE = {"luke", "neomme", "prophetnet", "t5gemma2", "zamba", "zamba2"}
"""Model types in which the setting that ties embedding and head also ties layers or other embeddings. Types whose
embedding is called ``shared`` are not listed, since the name identifies them."""
_HEAD_OF = {kind: head for head, kinds in _HEADS.items() for kind in kinds.split()}


def is_embedding_name(module: str) -> bool:
    """Return whether a dotted path has the name of a token embedding, usual or rare."""
    return is_usual_embedding(module) or is_rare_embedding(module)


def is_usual_embedding(module: str) -> bool:
    """Return whether a dotted path ends in a name that only token embeddings have."""
    return bool(_TABLE.search(module))


def is_rare_embedding(module: str) -> bool:
    """Return whether a dotted path ends in an ambiguous name; counts only in checkpoints without a usual name."""
    return bool(_RARE_TABLE.search(module)) and not is_in_layers(module)


def is_in_layers(path: str) -> bool:
    """Return whether a dotted path contains a number before its last segment, as paths inside layers do."""
    return bool(_NUMBERED.search(path))


def is_head(module: str) -> bool:
    """Return whether a dotted path is that of an output layer in any architecture."""
    return is_usual_head(module) or module in _HEADS


def is_usual_head(module: str) -> bool:
    """Return whether a dotted path ends in a name that output layers have in most architectures."""
    return bool(_HEAD.search(module))


def known_head(config: Mapping[str, Any]) -> str:
    """Return the dotted path of the output layer in a model with this configuration; empty if unknown."""
    return _HEAD_OF.get(str(config.get("model_type")), "")


def shares_more(config: Mapping[str, Any]) -> bool:
    """Return whether untying the head of a model with this configuration would also untie other tensors.

    Files hold only one copy of such tensors.
    """
    return str(config.get("model_type")) in _SHARES_MORE


def is_tied_by_default(config: Mapping[str, Any]) -> bool:
    """Return whether the output layer is tied to the embedding if the configuration does not say."""
    return str(config.get("model_type")) in _TIED_BY_DEFAULT.split()
