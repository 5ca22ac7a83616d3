"""One way to combine adapters a module, found by its file name; each defines ``METHOD``."""
