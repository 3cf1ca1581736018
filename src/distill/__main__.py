"""``python -m distill <command> [overrides]``; ``train.py`` is the command train."""

import os
import sys

# ``python -m`` puts the current folder first on the Python path, so that a downloaded folder could replace any library.
if sys.path and sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]


def main() -> int:
    """Console entry point."""
    from distill.cli.main import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
