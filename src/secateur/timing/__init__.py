"""How long does something take on this machine, compared with its alternatives? Only this room measures time."""

from secateur.timing._cache import MeasurementCache as MeasurementCache
from secateur.timing._in_turn import Timer as Timer
from secateur.timing._in_turn import is_noisy as is_noisy
from secateur.timing._in_turn import ratios as ratios
from secateur.timing._in_turn import time_in_turn as time_in_turn
from secateur.timing._machine import describe_machine as describe_machine
