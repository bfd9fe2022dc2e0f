"""The inpainting engine."""
