"""Which tokens make the next pass. Ids only: no tensors, no torch."""
