"""Language models that serve as text encoders."""
