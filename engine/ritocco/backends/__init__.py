"""One file per runtime, behind the Runtime seam."""
