"""``python -m equipoise`` is the program ``equipoise``."""

from .cli import main

if __name__ == "__main__":
    main()
