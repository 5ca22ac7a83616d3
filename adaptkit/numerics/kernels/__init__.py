"""The inner loops of quantizing and merging: ``reference`` defines them, ``cpu`` (numba) gives the same bits."""
