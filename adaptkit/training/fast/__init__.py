"""Accelerations of the network that are not needed for a right result: compiled loops of a layer for CPUs."""
