"""Several processes for one picture, on torch's own engine."""
