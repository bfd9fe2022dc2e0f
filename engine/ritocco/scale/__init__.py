"""More than one process: what puts engines behind other people's servers."""
