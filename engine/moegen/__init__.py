"""moegen: module-batched Mixture-of-Experts inference over tables."""

__version__ = "0.1.0"
