"""``python -m distill <verb> [overrides]``; ``train.py`` is the verb train."""

import sys


def main() -> int:
    """Console entry point."""
    from distill.cli.main import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
