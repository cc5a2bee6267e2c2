"""Terminal output; imported when a command runs, so that ``--help`` works without rich."""

from rich.console import Console

out, err = Console(), Console(stderr=True)
