"""What Optax's optimizers store, by the class of each state.

A field's name alone does not say what it holds: `nu` is an average of squares in Adam,
of gradients in SM3 and a norm of each parameter in Novograd.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

KEEP_LABELS = (
    "A core has two axes, whatever its matrix had: give masks and labels as a tree, "
    "computed once from the dense params; it fits `trainable(params)` at every rank"
)

LINEAR = "linear"
"""Sums, averages and differences of gradients or updates: L M Rᵀ."""
PARAMS = "params"
"""Weights (slow ones, averages, a start point): also L X Rᵀ, exact for what they have
within the bases; the part outside, which no core can reach, goes."""
MEMORY = "memory"
"""A stack of linear ones, along a new first axis."""
FACTORED = "factored"
"""Adafactor's means of squares over one axis each."""
COVER = "cover"
"""SM3's largest sums of squares along every axis."""
STATE = "state"
"""States of inner transformations."""
RESET = "reset"
"""What has no counterpart in other bases: starts fresh for what moved, and is named."""
AFRESH = "afresh"
"""What the optimizer itself computes again, exactly, when it is fresh; nothing is lost,
and the same for all parameters."""


@dataclasses.dataclass(frozen=True)
class Second:
    """An average of squares, and what it is an average about.

    `mean` and `count` are sibling fields: the average of the same gradients, and the
    steps by which Adam's bias is corrected. `corrected`: v is unbiased already, the
    mean is not. `largest`: not v but its root, the largest entries of late (Adamax),
    moved as if they were root mean squares.
    """

    mean: str | None = None
    count: str | None = None
    corrected: bool = False
    largest: bool = False


Kind = str | Second

_ADAM = Second("mu", "count")
_DISTANCE = {"init_params": PARAMS}  # scalars beside it do not depend on the basis
_SEARCH = {"value": AFRESH, "grad": AFRESH}  # of weights that a cut has changed

# Of fields that are not named the value is kept: counts, keys, scales, scalars of a
# parameter. By class name, since other versions of Optax may lack some.
_FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "ScaleByAdamState": {"mu": LINEAR, "nu": _ADAM},
    "ScaleByAmsgradState": {
        "mu": LINEAR,
        "nu": _ADAM,
        "nu_max": Second("mu", "count", corrected=True),
    },
    "ScaleByBeliefState": {"mu": LINEAR, "nu": Second()},  # squares of g - mu
    "ScaleByRmsState": {"nu": Second()},
    "ScaleByRStdDevState": {"mu": LINEAR, "nu": Second("mu")},
    "ScaleByRssState": {"sum_of_squares": Second()},
    "ScaleByAdaDeltaState": {"e_g": Second(), "e_x": Second()},
    "ScaleByAdanState": {"m": LINEAR, "v": LINEAR, "g": LINEAR, "n": Second("m")},
    "ScaleByLionState": {"mu": LINEAR},
    "ScaleByNovogradState": {"mu": LINEAR},  # nu: one squared norm a parameter
    "ScaleBySM3State": {"mu": COVER, "nu": LINEAR},
    "ScaleByRpropState": {"step_sizes": RESET, "prev_updates": RESET},
    "ScaleByLBFGSState": {
        "params": PARAMS,
        "updates": LINEAR,
        "diff_params_memory": MEMORY,
        "diff_updates_memory": MEMORY,
    },
    "ScaleByBacktrackingLinesearchState": _SEARCH,
    "ScaleByZoomLinesearchState": _SEARCH,
    "FactoredState": {"v_row": FACTORED, "v_col": FACTORED, "v": FACTORED},
    "TraceState": {"trace": LINEAR},
    "EmaState": {"ema": LINEAR},
    "MultiStepsState": {"inner_opt_state": STATE, "acc_grads": LINEAR},
    "LookaheadState": {"fast_state": STATE},
    "ApplyIfFiniteState": {"inner_state": STATE},
    "ConditionallyMaskState": {"inner_state": STATE},
    "ConditionallyTransformState": {"inner_state": STATE},
    "InjectHyperparamsState": {"inner_state": STATE},
    "InjectStatefulHyperparamsState": {"inner_state": STATE},
    "MaskedState": {"inner_state": STATE},
    "PartitionState": {"inner_states": STATE},
    "AddNoiseState": {},
    "ScaleByScheduleState": {},
    "ZeroNansState": {},
    # contrib
    "MuonState": {"mu": LINEAR},
    "ScaleByAdemamixState": {
        "m1": LINEAR,
        "m2": LINEAR,
        "nu": Second("m1", "count"),
    },
    "ScaleBySimplifiedAdEMAMixState": {"m": LINEAR, "n": Second()},  # m is a sum
    "COCOBState": dict.fromkeys(
        ("init_particles", "cumulative_gradients", "scale", "subgradients", "reward"),
        RESET,  # weights are a function of it: it starts from where they are
    ),
    "DAdaptAdamWState": {
        "exp_avg": LINEAR,  # of gradients times a rate, so no mean of exp_avg_sq
        "exp_avg_sq": Second(),
        "grad_sum": LINEAR,
    },
    "ProdigyState": {
        "exp_avg": LINEAR,
        "exp_avg_sq": Second("exp_avg", "count"),
        "grad_sum": LINEAR,
        "params0": PARAMS,
    },
    "DoGState": _DISTANCE,
    "DoWGState": _DISTANCE,
    "GaLoreState": {
        "count": AFRESH,  # zero: every projector is computed anew
        "projector": RESET,
        "base_optimizer_state": RESET,
    },
    "MadgradState": {"x0": RESET, "s": RESET, "grad_sum_sq": RESET},  # as in COCOB
    "MechanicState": {"base_optimizer_state": STATE, "x0": PARAMS},
    "MomoState": {"exp_avg": LINEAR},
    "MomoAdamState": {"exp_avg": LINEAR, "exp_avg_sq": Second("exp_avg", "count")},
    "ReduceLROnPlateauState": {},
    "SAMState": {"opt_state": STATE, "adv_state": STATE, "cache": PARAMS},
    "ScheduleFreeState": {"base_optimizer_state": STATE, "z": PARAMS},
    "SophiaState": {"mu": LINEAR, "nu": Second(), "hessian_fn_state": STATE},
    "HutchinsonState": {},
    "SplitRealAndImaginaryState": {"inner_state": STATE},
    "DifferentiallyPrivateAggregateState": {},
}

# Classes without a public name, by what makes one.
_MADE: tuple[tuple[Callable[[], Any], Mapping[str, Kind]], ...] = (
    (lambda: optax.scale_by_rms(bias_correction=True), {"nu": Second()}),
    (
        lambda: optax.scale_by_stddev(bias_correction=True),
        {"mu": LINEAR, "nu": Second("mu", "count")},
    ),
    (lambda: optax.scale_by_optimistic_gradient(), {"previous_gradient": LINEAR}),
    (lambda: optax.scale_by_distance_over_gradients(), _DISTANCE),
)


@functools.cache
def _known() -> dict[type, Mapping[str, Kind]]:
    table: dict[type, Mapping[str, Kind]] = {}
    for name, fields in _FIELDS.items():
        for package in (optax.contrib, optax):
            if name in dir(package):
                table[getattr(package, name)] = fields
                break
    for make, fields in _MADE:
        try:
            made = jax.eval_shape(make().init, {})
        except (AttributeError, TypeError):  # another version of Optax
            continue
        table.setdefault(type(made), fields)
    return table


def fields_of(state: object) -> Mapping[str, Kind] | None:
    """What the fields of a state hold, or None where its class is not known.

    A class of somebody else says it by a static method `crosses()`, a mapping of its
    fields to "linear", "params" or "state"; other fields keep their values.

    Raises:   ValueError: `crosses` names another kind, or no field.
    """
    known = _known().get(type(state))
    if known is not None:
        return known
    says = getattr(type(state), "crosses", None)
    if not callable(says) or not hasattr(state, "_fields"):
        return None
    crosses: Mapping[str, Kind] = says()
    for field, kind in crosses.items():
        if kind not in (LINEAR, PARAMS, STATE) or field not in state._fields:
            raise ValueError(
                f"`crosses` of {type(state).__name__} must map its fields "
                f"{state._fields} to 'linear', 'params' or 'state', got "
                f"{field!r}: {kind!r}"
            )
    return crosses
