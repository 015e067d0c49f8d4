"""`python -m qquant.cli`."""

from qquant.cli import main

main()
