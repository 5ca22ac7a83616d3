"""The parts of an artifact that can be pulled alone."""

PARTS = {
    "adapter": ("adapter_config.json", "adapter_model*.safetensors"),
    "config": ("config.json", "generation_config.json", "adapter_config.json"),
    "tokenizer": (
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
        *("*.tiktoken", "*.jinja"),
    ),
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "card": ("README.md", "LICENSE*", "NOTICE*"),
}
"""Name of a part -> patterns of its files, all of them in the artifact's own folder."""
