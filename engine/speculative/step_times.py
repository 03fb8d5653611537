"""How long a step takes, by its number of rows, as measured in this process."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MIN_OBSERVATIONS = 3  # before a measurement counts: the first steps of a kind may compile
MAX_OBSERVATIONS = 15  # a measurement is made of the last ones
MAX_AGE = 2000  # steps; what has not been seen for so long is measured anew
NUM_SINGLE_ROWS = 4  # row counts up to this are told apart, larger ones share a bucket up to each power of two


def bucket_of(num_rows: int) -> int:
    """0, 1, 2 and 3 for 1, 2, 3 and 4 rows, 4 for 5 to 8, 5 for 9 to 16, and so on."""
    return num_rows - 1 if num_rows <= NUM_SINGLE_ROWS else (num_rows - 1).bit_length() + 1


class _Bucket:
    """The last steps of similar size, and what is typical of them.

    That is the end of the lower third, of times as of rows: the two belong together, since time grows with rows. Steps
    are disturbed towards longer times only, so this stands more of that than the median: all but one of three.
    """

    __slots__ = ("_rows", "_seconds", "last_seen", "typical_rows", "typical_s")

    def __init__(self) -> None:
        self._rows: deque[int] = deque(maxlen=MAX_OBSERVATIONS)
        self._seconds: deque[float] = deque(maxlen=MAX_OBSERVATIONS)
        self.last_seen = 0
        self.typical_rows = 0
        self.typical_s = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        self._rows.append(num_rows)
        self._seconds.append(seconds)
        place = (len(self._rows) - 1) // 3
        self.typical_rows = sorted(self._rows)[place]
        self.typical_s = sorted(self._seconds)[place]

    @property
    def is_known(self) -> bool:
        return len(self._rows) >= MIN_OBSERVATIONS


class StepTimes:
    """Seconds of a step as a function of its rows, never decreasing. Nothing is known until a few steps were observed.

    Buckets of row counts are worth what is typical of their last steps, which a compile or a pause of the garbage
    collector does not move. Between buckets it is a straight line. Where a larger bucket was faster, the smaller one
    counts as no slower than that.

    What is not known is taken for cheap, so that whoever chooses by these times tries it and it is measured: more rows
    than ever seen cost as much as the most that were seen, and fewer than ever seen their share of the fewest.
    Measurements that are old are forgotten for the same reason. Otherwise one that is too high would stay for ever,
    since nobody would take such a step again.

    padded_sizes: ascending row counts that steps are padded to, each step to the next; empty where they are not padded.
    A step beyond the largest counts as it is.
    """

    def __init__(self, padded_sizes: Sequence[int] = ()) -> None:
        self._padded_sizes = np.array(padded_sizes, dtype=np.int64)
        self._buckets: dict[int, _Bucket] = {}
        self._num_observed = 0
        self._curve: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None  # rows, seconds
        self._is_curve_current = True

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        assert num_rows > 0, "a step has rows"
        num_rows = int(self._padded(np.array([num_rows]))[0])
        self._num_observed += 1
        bucket = self._buckets.get(bucket_of(num_rows))
        if bucket is None or self._is_old(bucket):
            bucket = self._buckets[bucket_of(num_rows)] = _Bucket()
        bucket.last_seen = self._num_observed
        bucket.add(num_rows, seconds)
        self._is_curve_current = False

    def __call__(self, num_rows: int) -> float | None:
        """Seconds of a step of so many rows; None while nothing is known."""
        seconds = self.of_each(np.array([num_rows]))
        return None if seconds is None else float(seconds[0])

    def of_each(self, num_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
        """The same for many: seconds [N] for rows [N]."""
        if not self._is_curve_current:
            self._curve = self._make_curve()
            self._is_curve_current = True
        return None if self._curve is None else np.interp(self._padded(num_rows), *self._curve)

    def _padded(self, num_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        sizes = self._padded_sizes
        if not len(sizes):
            return num_rows
        places = np.minimum(np.searchsorted(sizes, num_rows), len(sizes) - 1)
        return np.maximum(sizes[places], num_rows)

    def _make_curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        rows, seconds = [], []
        fastest_s = float("inf")
        for _, bucket in sorted(self._buckets.items(), reverse=True):
            if bucket.is_known and not self._is_old(bucket):
                fastest_s = min(fastest_s, bucket.typical_s)
                rows.append(bucket.typical_rows)
                seconds.append(fastest_s)
        if not rows:
            return None
        return np.array([0, *reversed(rows)], dtype=np.float64), np.array([0.0, *reversed(seconds)])

    def _is_old(self, bucket: _Bucket) -> bool:
        return self._num_observed - bucket.last_seen > MAX_AGE
