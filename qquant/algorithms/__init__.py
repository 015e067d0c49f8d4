"""Grids, Gram matrices, and the steps that choose codes on the ones by the others. Nothing here imports torch before it is used."""
