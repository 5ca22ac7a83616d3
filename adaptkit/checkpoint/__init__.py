"""Files to tensors and back, one tensor at a time."""
