"""The model: packed weights, trainable parameters, and the forward and backward passes."""
