"""Checks: what is measured on an artifact, and what the numbers mean for it."""
