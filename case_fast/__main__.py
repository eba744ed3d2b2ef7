"""`case-fast` and `python -m case_fast`: the command line, or what it lacks in one sentence."""

from __future__ import annotations

import sys

from case_fast.optional import MissingPackage, needed


def main() -> int:
    """Run one command of `case_fast.cli`; its exit status."""
    try:
        for package in ("jsonargparse", "rich"):
            needed(package, "the command line")
    except MissingPackage as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from case_fast.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
