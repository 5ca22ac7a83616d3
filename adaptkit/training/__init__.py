"""Training of adapters and of whole models, and evaluation."""
