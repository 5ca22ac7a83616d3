"""Commands, one module each, found by file name; each defines ``command``."""
