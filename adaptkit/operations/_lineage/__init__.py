"""The ancestors of an artifact: finding, comparing and recomputing them."""
