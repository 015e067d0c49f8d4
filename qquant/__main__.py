"""`python -m qquant`: the command line, where no script was installed."""

from qquant.cli import main

if __name__ == "__main__":
    main()
