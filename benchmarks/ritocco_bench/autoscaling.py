"""How many painters there should be: Ray Serve's rule, on whatever clock."""

from __future__ import annotations

import math
from collections import deque


class Autoscaler:
    """Ongoing requests over `target`, rounded up; once that is over what there is for `up_s`, or under it for
    `down_s`, each time it is looked. The ongoing requests are the mean of the last `look_back_s`.
    down_factor: what part of the way down is gone at once.
    [docs.ray.io, serve.config.AutoscalingConfig, whose defaults these are]
    """

    def __init__(
        self,
        *,
        target: float = 2.0,
        least: int = 1,
        most: int = 1,
        up_s: float = 30.0,
        down_s: float = 600.0,
        down_factor: float = 1.0,
        look_back_s: float = 30.0,
        interval_s: float = 10.0,
    ) -> None:
        self.target, self.least, self.most, self.interval_s = target, least, most, interval_s
        self._down_factor = down_factor
        self._up, self._down = max(1, round(up_s / interval_s)), max(1, round(down_s / interval_s))
        self._seen: deque[float] = deque(maxlen=max(1, round(look_back_s / interval_s)))
        self._over = self._under = 0

    def decide(self, ongoing: float, there: int) -> int:
        """How many there should be from now on. To be asked every `interval_s`. there: cold ones too."""
        self._seen.append(ongoing)
        mean = sum(self._seen) / len(self._seen)
        wanted = mean / self.target
        if wanted < there:
            wanted = there - self._down_factor * (there - wanted)
        wanted = min(max(math.ceil(wanted), self.least), self.most)
        self._over = self._over + 1 if wanted > there else 0
        self._under = self._under + 1 if wanted < there else 0
        if self._over >= self._up or self._under >= self._down:
            self._over = self._under = 0
            return wanted
        return there
