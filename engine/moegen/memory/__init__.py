"""Where bytes live and how they come there: weights, keys and values."""
