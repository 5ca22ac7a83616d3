"""Parts of ``quantize --calibrate``: measuring a model's layers on text, and quantizing with the measurements."""
