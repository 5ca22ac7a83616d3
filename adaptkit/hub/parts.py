"""The parts of an artifact that can be pulled separately."""

PARTS = {
    "adapter": ("adapter_config.json", "adapter_model*.safetensors", "adaptkit-compensation.safetensors"),
    "config": ("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    "tokenizer": (
        *("tokeniz*", "special_tokens_map*", "added_tokens*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
        *("tekken.json", "chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
    ),
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "card": ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
}
"""Name of a part -> patterns of its files, relative to the artifact's folder; ``*`` does not match ``/``."""
