"""One command a module, found by its file name; each defines ``command``."""
