"""What ``quantize`` does: which tensors, how, in which shards, and its report."""
