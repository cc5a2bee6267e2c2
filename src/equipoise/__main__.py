"""Runs the command line program with ``python -m equipoise``."""

from .cli import main

if __name__ == "__main__":
    main()
