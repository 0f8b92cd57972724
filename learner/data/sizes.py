"Sizes: progressive resizing, the side of the pictures as a function of progress."

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from learner.errors import UsageError, shown

LIMIT = 4096  # pixels: larger pictures than a model of these is given, small enough that a typing error says so


@dataclass(frozen=True)
class Sizes:
    "Stages of a run: `sides` in pixels, and the fraction of all steps at which each ends (the last at 1)."

    sides: tuple[int, ...]
    ends: tuple[float, ...]

    def at(self, progress: float) -> int:
        "The side at that fraction of all steps, in [0, 1]."
        return self.sides[min(bisect_right(self.ends, progress), len(self.sides) - 1)]

    @property
    def last(self) -> int:
        "The side at the end, which is validation's throughout."
        return self.sides[-1]

    @property
    def largest(self) -> int:
        "The side that stored pictures must have at least."
        return max(self.sides)


def parse_sizes(spec: str | int) -> Sizes:
    """Read `128`, `128:160` (half of the run each) or `128@0.3:144:160` (0.3 of the run, then the rest evenly).

    Sizes with and without a fraction may be mixed. UsageError for anything else.
    """
    stages = [re.fullmatch(r"([1-9]\d{,3})(?:@(0?\.\d+))?", stage) for stage in str(spec).split(":")]
    sides, given = zip(*[(int(stage[1]), stage[2]) if stage else (LIMIT + 1, None) for stage in stages])
    if max(sides) > LIMIT:
        raise UsageError(
            f"size {shown(repr(spec))} is not possible: it must be pixels, or stages of them such as 128@0.3:144:160, "
            f"of {LIMIT} at most"
        )
    rest, open_stages = 1 - sum(float(one) for one in given if one), given.count(None)
    fractions = [float(one) if one else rest / max(open_stages, 1) for one in given]
    if min(fractions) <= 0 or (not open_stages and abs(rest) > 1e-6):
        raise UsageError(f"the fractions of size {spec!r} must be above 0 and make 1; leave one out for the rest")
    return Sizes(sides, (*list(accumulate(fractions))[:-1], 1.0))
