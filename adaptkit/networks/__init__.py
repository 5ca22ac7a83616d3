"""What transformers makes of a checkpoint: networks without weights or with them, and what their steps keep."""
