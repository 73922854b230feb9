"""Tiny models with random weights of many families, one table for each kind of model."""

from families._family import Family, first_line, matrices, run
from families._hybrids import HYBRIDS
from families._libraries import LIBRARIES
from families._media import MEDIA
from families._plain import PLAIN
from families._text import TEXT

FAMILIES: tuple[Family, ...] = (*TEXT, *HYBRIDS, *MEDIA, *PLAIN, *LIBRARIES)

__all__ = ["FAMILIES", "Family", "first_line", "matrices", "run"]
