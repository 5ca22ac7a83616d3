"""What ``diff`` compares: adapters, checkpoints, and what lies beside them."""
