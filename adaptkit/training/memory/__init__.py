"""What a run holds in memory: activations, and the optimizer's state in pages."""
