"""Seconds that a test decides, in the place of measurements."""

from secateur.timing import MeasurementCache


def routes_take(monkeypatch, seconds_of, *, call=True):
    """Let each call take what ``seconds_of(name, index)`` says, three times; with kernels or, without a compiler, their
    reference. Without a ``call`` nothing is made ready, and no memory is counted.
    """

    def in_turn(calls, against, timer, before=None, keep=()):
        for function in calls.values() if call else ():
            function()
        return {name: [seconds_of(str(name), index)] * 3 for index, name in enumerate(calls)}

    for module in ("_measure", "_bench"):
        monkeypatch.setattr(f"secateur.packing.{module}.time_in_turn", in_turn)
    monkeypatch.setattr("secateur.kernels._plan.has_kernels", lambda: True)
    monkeypatch.setattr(MeasurementCache, "_memory", {})


def kernels_win(monkeypatch):
    """Let every layer with zeros be packed."""
    routes_take(
        monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25 + 0.01 * index), call=False
    )
