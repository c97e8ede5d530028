"""What a benchmark lets a user set."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from oialr_jax.cost import Rates

Row = dict[str, Any]
"""One line of a table."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    suite: Literal["steps", "events", "layers"] = "steps"
    """Which table."""
    models: tuple[str, ...] = ("mini-vit", "resnet18", "mlp")
    """Of the suite steps; events takes the first."""
    batch: int = 64
    """Inputs in a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; weights are float32."""
    fractions: tuple[float, ...] = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 20)
    """Ranks over the small side of each matrix."""
    orders: tuple[str, ...] = ("auto", "chain", "merged", "rebuilt")
    """Of contraction; "rebuilt" is the authors' way."""
    peers: tuple[str, ...] = ("galore", "lora")
    """Other methods at the same ranks, of galore, lora and, with the extra `peers`, the
    authors' scheme in PyTorch (torch) and its dense model (torch-dense), both for the
    vision transformers only."""
    repeats: int = 7
    """Rounds; each times one sample of every row."""
    lag: int = 8
    """Steps between the decision and the event, in the suite events."""
    rates: pathlib.Path | None = None
    """Rates of this device, from --calibrate, instead of those of the library."""
    calibrate: bool = False
    """In the suite layers: measure the rates and print them as JSON."""
    json: pathlib.Path | None = None
    """Where the rows go, with device, versions and date."""


def read_rates(path: pathlib.Path | None) -> Rates | None:
    """Host side: rates from a file of --calibrate, None for no path.

    Raises:   ValueError: the file has other names or values than `Rates`.
    """
    if path is None:
        return None
    try:
        return Rates(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} does not hold the rates of a device: {error}"
        ) from None
