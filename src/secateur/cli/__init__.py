"""The ``secateur`` command: one file for each of its verbs."""

from secateur.cli._commands import app as app
from secateur.cli._commands import main as main
