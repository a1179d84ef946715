"""Whether a process's memory grows from step to step, or an allocator merely took more until its size settled.

A leak repeats itself in every step; an allocator takes a few blocks of megabytes within the first steps and then none.
So the calmest stretch of a series decides, not its ends: a leak has no calm one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# rises between steps that a stretch has: a leak that shows once in so many steps is still one
STRETCH = 6
# bytes a step in the calmest stretch; right trainings were seen to take up to 15 KiB there, and one token's activations
# of a small model, kept in each step, are 256 KiB
MOST = 1 << 17
# an allocator may keep a block beyond the end of a step: the least of so many steps is what it really holds
_HELD = 2


def calm_growth(sizes: Sequence[int]) -> float:
    """Bytes a step in the calmest stretch of `sizes` [steps], resident bytes after each step; inf without a stretch.

    A release counts for at most MOST bytes, so that a single one does not hide the rises around it.
    """
    least = [min(sizes[at : at + _HELD]) for at in range(len(sizes) - _HELD + 1)]
    rises = [max(after - before, -MOST) for before, after in itertools.pairwise(least)]
    stretches = [sum(rises[at : at + STRETCH]) / STRETCH for at in range(len(rises) - STRETCH + 1)]
    return min(stretches, default=float("inf"))
