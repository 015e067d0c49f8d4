"""Models that answer with packed weights."""
