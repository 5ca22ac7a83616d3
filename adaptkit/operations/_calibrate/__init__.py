"""What ``quantize --calibrate`` does besides: what goes through a model's layers, and what is made of it."""
