"""Whole folders of pictures: which go together, what was done, and the run over them."""
