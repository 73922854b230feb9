"""``python -m secateur``: the command ``secateur``, for launchers that start modules, such as ``torchrun -m``."""

import sys

from secateur_command import main

if __name__ == "__main__":
    sys.exit(main())
