"""QLoRA training on NF4 shards, and evaluation."""
