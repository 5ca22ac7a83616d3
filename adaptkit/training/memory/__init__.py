"""A run's memory: activations, and paged optimizer state."""
