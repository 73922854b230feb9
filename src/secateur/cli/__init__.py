"""The ``secateur`` command: one file for each of its verbs."""

from secateur.cli import (
    _bench,
    _compare,
    _demo,
    _evaluate,
    _export,
    _inspect,
    _pack,
    _plan,
    _prune,
    _recover,
    _run,
    _shrink,
)
from secateur.cli._app import app as app
from secateur.cli._app import main as main

# In the order of the help.
for _command in (
    _prune.prune,
    _shrink.shrink,
    _recover.recover,
    _evaluate.evaluate,
    _run.run,
    _plan.plan,
    _plan.optimize,
    _inspect.inspect,
    _pack.pack,
    _export.export,
    _compare.compare,
    _bench.bench,
    _demo.demo,
):
    app.command()(_command)
