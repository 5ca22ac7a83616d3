"""Training data: samples from files, and which of them a step trains on."""
