"""Seconds that a test decides, instead of measurements."""

from secateur.timing import MeasurementCache


def routes_take(monkeypatch, seconds_of, *, call=True, whole=True):
    """Let each call take ``seconds_of(name, index)`` seconds, in three rounds.

    Routes of native kernels are candidates even without a compiler, when the reference runs them. Without a ``call``
    nothing is prepared, so that no memory is counted. With ``whole`` the packed model as a whole takes a quarter of
    the dense model's time; without, it is timed as it is.
    """

    def in_turn(calls, against, timer=None, before=None, keep=(), alone=False, fewest=7):
        for function in calls.values() if call else ():
            function()
        return {name: [seconds_of(str(name), index)] * 3 for index, name in enumerate(calls)}

    def whole_in_turn(calls, against, timer=None, keep=(), ready=None, fewest=7):
        return {name: [1.0 if name == "dense" else 0.25] * 3 for name in calls}

    if whole:
        monkeypatch.setattr("secateur.packing._promise.time_in_turn", whole_in_turn)
    for module in ("packing._measure", "packing._bench", "packing._recurrent", "packing._attention", "comparison._run"):
        monkeypatch.setattr(f"secateur.{module}.time_in_turn", in_turn)
    monkeypatch.setattr("secateur.kernels._plan.has_kernels", lambda: True)
    monkeypatch.setattr(MeasurementCache, "_memory", {})


def kernels_win(monkeypatch):
    """Let every layer with zeros be packed."""
    routes_take(
        monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25 + 0.01 * index), call=False
    )
