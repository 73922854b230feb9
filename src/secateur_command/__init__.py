"""What the ``secateur`` script calls: outside of the package, whose import takes seconds, and so there before it."""

import sys


def main() -> int:
    """Run the command, and return its exit status. An interrupt while it is still being imported ends with 130, too."""
    try:
        from secateur.cli import main as run
    except KeyboardInterrupt:
        print("secateur: interrupted; nothing was written.", file=sys.stderr)
        return 130
    run()
    return 0
