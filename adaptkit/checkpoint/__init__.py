"""Read and write tensors in files, one tensor at a time."""
