"""Methods that combine adapters, one per module, found by file name; each module defines ``METHOD``.

Every method is that of its paper, applied to changes that are already multiplied by the adapters' weights. So a weight
of λ for every adapter is the paper's scaling λ, a weight of 0 removes an adapter from every vote and mean, and signs
are elected after weighting.
"""
