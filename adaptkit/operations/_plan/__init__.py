"""What ``plan`` asks: what a training run keeps, without the memory for it."""
