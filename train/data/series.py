"""Series in memory: splits, scaling and windows of the forecasting experiments."""

import dataclasses
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Float, Int

from train.data.arrays import ordered

MONTH = 30
"""Days, as the authors of the benchmark count."""
MONTHS = (12, 4, 4)
"""To train on, to validate on and to test on."""


class Window(TypedDict):
    """Some windows, on the host: rows given, rows to come, time marks of both."""

    value: Float[np.ndarray, "b t c"]
    target: Float[np.ndarray, "b h c"]
    mark: Float[np.ndarray, "b t+h f"]


@dataclasses.dataclass(frozen=True)
class Series:
    """Rows at equal distances in time."""

    time: np.ndarray
    value: Float[np.ndarray, "n c"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """All windows of one split: `history` rows given, `horizon` rows to come.

    Window i begins at row i of `value`, which is scaled.
    """

    value: Float[np.ndarray, "n c"]
    mark: Float[np.ndarray, "n f"]
    history: int
    horizon: int

    def __len__(self) -> int:
        return max(0, len(self.value) - self.history - self.horizon + 1)

    def first(self, count: int) -> "Windows":
        """Only so many of them."""
        rows = count + self.history + self.horizon - 1
        return dataclasses.replace(self, value=self.value[:rows], mark=self.mark[:rows])

    def take(self, index: Int[np.ndarray, " b"]) -> Window:
        """The windows of these numbers.

        Raises:   IndexError: there is no such window.
        """
        if len(index) and not (np.min(index) >= 0 and np.max(index) < len(self)):
            raise IndexError(f"windows go from 0 to {len(self) - 1}, got {index}")
        rows = index[:, None] + np.arange(self.history + self.horizon)
        value = self.value[rows]
        return {
            "value": value[:, : self.history],
            "target": value[:, self.history :],
            "mark": self.mark[rows],
        }


def drawn(rows: int) -> Series:
    """Random waves, so many rows a day, to show that a program works, no more."""
    count = sum(MONTHS) * MONTH * rows
    day = np.arange(count)[:, None] / rows
    rng = np.random.default_rng(0)
    waves = np.sin(2 * np.pi * day * np.array([1, 2, 3]) + rng.uniform(size=3))
    value = waves + 0.3 * rng.normal(size=waves.shape)
    time = np.datetime64("2016-07-01T00", "s") + np.arange(count) * np.timedelta64(
        86_400 // rows, "s"
    )
    return Series(time, value.astype(np.float32))


def splits(series: Series, *, history: int, horizon: int) -> dict[str, Windows]:
    """Windows by split: train, validation and test.

    Twelve, four and four months of 30 days; the rest is not used. Values are scaled by
    mean and deviation of the training rows. The first windows of validation and test
    reach back into the split before for what is given.

    Raises:   ValueError: fewer rows than that, or a split without a window.
    Source:   Zhou et al. 2021 and their code.
    """
    hour, minute = np.timedelta64(1, "h"), np.timedelta64(1, "m")
    step = series.time[1] - series.time[0]
    if np.any(np.diff(series.time) != step):
        gap = int(np.argmax(np.diff(series.time) != step))
        raise ValueError(f"rows {gap} and {gap + 1} are not {step} apart")
    month = MONTH * 24 * int(hour / step)
    ends = np.cumsum(MONTHS) * month
    if len(series.value) < ends[-1]:
        raise ValueError(
            f"{sum(MONTHS)} months are {ends[-1]} rows, got {len(series.value)}"
        )
    train = series.value[: ends[0]].astype(np.float64)
    scaled = ((series.value - train.mean(axis=0)) / train.std(axis=0)).astype(
        np.float32
    )
    mark = marks(series.time, minutes=step < 60 * minute)
    starts = (0, ends[0] - history, ends[1] - history)
    found = {
        name: Windows(scaled[start:stop], mark[start:stop], history, horizon)
        for name, start, stop in zip(
            ("train", "validation", "test"), starts, ends, strict=True
        )
    }
    for name, windows in found.items():
        if len(windows) == 0:
            raise ValueError(
                f"{name} has {len(windows.value)} rows, too few for windows of "
                f"{history} and {horizon}"
            )
    return found


def marks(time: np.ndarray, *, minutes: bool) -> Float[np.ndarray, "n f"]:
    """Place in the hour, day, week, month and year, each from -1/2 to 1/2.

    Args:     minutes: with the place in the hour, which hourly rows do not have.
    """
    day = time.astype("datetime64[D]")
    seconds = (time - day).astype(np.int64)
    month_day = (day - day.astype("datetime64[M]")).astype(np.int64)
    year_day = (day - day.astype("datetime64[Y]")).astype(np.int64)
    weekday = (day.astype(np.int64) + 3) % 7  # 1970 began on a Thursday, Monday is 0
    columns = [seconds // 60 % 60 / 59] if minutes else []
    columns += [seconds // 3600 / 23, weekday / 6, month_day / 30, year_day / 365]
    return np.stack(columns, axis=-1).astype(np.float32) - np.float32(0.5)


def batches(
    windows: Windows, *, batch: int, seed: int, part: slice = slice(None)
) -> grain.MapDataset[Window]:
    """A sequence without end whose item t is the batch of step t, or `part` of it.

    Every epoch is a new permutation of all windows; see `arrays.batches`.
    """
    order = ordered(len(windows), batch=batch, seed=seed)
    return order.map(lambda index: windows.take(index[part]))
