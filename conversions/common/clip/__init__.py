"""CLIP: text and image encoders."""
