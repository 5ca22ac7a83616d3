"""One quantization format a module, found by its file name; each defines ``FORMAT``."""
