"""One way to combine adapters a module, found by its file name; each defines ``METHOD``.

Every method is that of its paper, applied to the changes that the weights have already been multiplied into. So
weights of λ everywhere are the paper's scaling λ, a weight of 0 takes an adapter out of every vote and mean, and where
signs are elected that happens after weighting.
"""
