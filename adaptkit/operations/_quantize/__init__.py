"""Parts of ``quantize``: the choice of tensors, the plan with its encodings and shards, and the report."""
