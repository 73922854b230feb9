"""Alternatives timed in turn, by a clock that the tests move."""

import pytest

from secateur.timing import _in_turn, time_in_turn


class Clock:
    """Time that stands still but for what tells it to move."""

    now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def call():
            self.now += seconds

        return call


def test_each_is_timed_in_turn_and_the_hopeless_are_dropped():
    clock = Clock()
    calls = {"dense": clock.takes(1.0), "prepacked": clock.takes(3.0), "a": clock.takes(0.25), "b": clock.takes(0.75)}
    seconds = time_in_turn(calls, "dense", clock, keep=["prepacked"])
    assert seconds["dense"] == [1.0] * len(seconds["dense"])
    assert len(seconds["dense"]) == len(seconds["prepacked"]) == len(seconds["a"]) == _in_turn._FEWEST
    assert seconds["b"] == [0.75, 0.75]


def test_what_is_a_little_slower_is_dropped_later():
    clock = Clock()
    calls = {"dense": clock.takes(1.0), "a": clock.takes(0.5), "b": clock.takes(0.6), "c": clock.takes(0.7)}
    seconds = time_in_turn(calls, "dense", clock)
    assert {name: len(times) for name, times in seconds.items()} == {"dense": 7, "a": 7, "b": 7, "c": 3}


def test_what_makes_a_call_ready_is_not_timed_and_fewer_rounds_can_do():
    clock, called = Clock(), []
    ready = {"a": lambda: called.append("ready") or clock.takes(9.0)()}
    calls = {"dense": clock.takes(1.0), "a": lambda: called.append("a") or clock.takes(2.0)()}
    seconds = time_in_turn(calls, "dense", clock, keep=["a"], ready=ready, fewest=3)
    assert seconds == {"dense": [1.0] * 3, "a": [2.0] * 3}
    assert called == ["ready", "a", "a", *["ready", "a"] * 3]


def test_timing_repeats_short_calls_and_stops_after_the_most_rounds():
    clock = Clock()
    seconds = time_in_turn({"dense": clock.takes(1e-4), "a": clock.takes(2e-3)}, "dense", clock)
    assert len(seconds["dense"]) == _in_turn._MOST
    assert seconds["dense"] == pytest.approx([1e-4] * _in_turn._MOST)
    assert clock.now > 2 * _in_turn._MOST * 1e-4


def test_timing_takes_longer_while_the_machine_is_busy():
    clock = Clock()
    turns = iter([1.0, 1.0, *(0.04 + 0.02 * (i % 2) for i in range(99))])

    def dense():
        clock.now += next(turns)

    seconds = time_in_turn({"dense": dense}, "dense", clock)
    assert _in_turn._BUDGET < sum(seconds["dense"]) < 2 * _in_turn._PATIENCE * _in_turn._BUDGET
    assert _in_turn._FEWEST < len(seconds["dense"]) < _in_turn._MOST


def test_timing_leaves_out_what_runs_before():
    clock = Clock()
    seconds = time_in_turn({"dense": clock.takes(1.0)}, "dense", clock, before=clock.takes(50.0))
    assert seconds["dense"] == [1.0] * _in_turn._FEWEST


def test_what_is_timed_as_if_it_were_alone_rests_and_is_called_once_more_before_it(monkeypatch):
    clock, called = Clock(), []
    monkeypatch.setattr(_in_turn.time, "sleep", lambda seconds: called.append("rest"))

    def call(name, seconds):
        called.append(name)
        clock.now += seconds

    calls = {"dense": lambda: call("dense", 1.0), "a": lambda: call("a", 2.0)}
    seconds = time_in_turn(calls, "dense", clock, keep=["a"], alone=True)
    assert seconds == {"dense": [1.0] * _in_turn._FEWEST, "a": [2.0] * _in_turn._FEWEST}
    assert called[4:10] == ["rest", "dense", "dense", "rest", "a", "a"]
