"""T5 and UMT5: encoders of text with relative position biases."""
