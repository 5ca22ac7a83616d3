"""The model: packed weights, what is trained in it, and its forward and backward pass."""
