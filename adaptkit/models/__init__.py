"""transformers' networks for checkpoints, with or without weights, and the memory that their training steps need."""
