"""Optimizers by name, for the programs that take --optimizer.

adamw                  decoupled decay of whatever has more than one axis
adamw_core             the same, with steps of a core as large as a dense matrix has
adam                   b2 .999, coupled decay of all, as torch's
sgd                    momentum .9, coupled decay
orthogonal_sgd         sgd after orthogonal gradients of the matrices; the paper has
                       rate 1e-2 and decay 5e-4 for batches of 1024
lars                   sgd with steps of each matrix as large as its norm says; no decay
                       of whatever has one axis
orthogonal_lars        the same after orthogonal gradients
swan                   normalised, whitened gradients, steps as large as Adam's; AdamW
                       on the rest, and so its rate and decay on all
spectral_trust_region  averaged gradients, steps of one spectral norm: the rate is that
                       norm, the decay is decoupled
muon                   Optax's, steps as large as Adam's; AdamW on the rest

The presets of the programs have rates and decays for adamw, which swan and muon share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import oialr_jax as oialr
from oialr_jax.matrices import Matrix
from oialr_jax.transform import with_trainable
from train import names

RMS = 0.2
"""Of the steps of Adam over its rate, about (Liu et al., 2025)."""


def build(
    name: str,
    rate: optax.ScalarOrSchedule,
    weight_decay: float,
    matrices: Sequence[Matrix],
    *,
    clip: float | None = 1.0,
    ema: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """The optimizer called `name`.

    Args:     matrices: what is orthogonalised; the same leaves, dense or low rank.
              clip: norm of all gradients together. ema: decay of the running average of
              the weights, for `averaged`. accumulate: gradients averaged per update.
    Raises:   ValueError: there is none of this name.
    """
    recipe = names.find("optimizer", name, OPTIMIZERS)
    chain = [recipe(rate, weight_decay, matrices)]
    if clip is not None:
        chain.insert(0, optax.clip_by_global_norm(clip))
    if ema is not None:
        chain.append(average_weights(ema))
    tx = optax.chain(*chain)
    if accumulate > 1:
        tx = optax.MultiSteps(tx, accumulate).gradient_transformation()
    return tx


class AverageWeightsState(NamedTuple):
    """The running average, which crosses rank events as weights do."""

    ema: Any

    @staticmethod
    def crosses() -> Mapping[str, str]:
        """What the field holds when bases turn."""
        return {"ema": "params"}


def average_weights(decay: float) -> optax.GradientTransformation:
    """Last in a chain: a running average of the weights that its updates lead to.

    Raises:   ValueError: `decay` outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`ema` must be in [0, 1), got {decay}")

    def init(params: Any) -> AverageWeightsState:
        return AverageWeightsState(jax.tree.map(jnp.copy, params))

    def update(
        updates: Any, state: AverageWeightsState, params: Any = None
    ) -> tuple[Any, AverageWeightsState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageWeightsState(
            optax.incremental_update(new, state.ema, 1 - decay)
        )

    return optax.GradientTransformation(init, update)


def averaged(params: Any, opt_state: Any) -> Any:
    """The running average of `params` in an optimizer state, or else `params`."""
    for x in jax.tree.leaves(opt_state, is_leaf=_is_average):
        if _is_average(x):
            return with_trainable(params, x.ema)
    return params


def _is_average(x: object) -> bool:
    return isinstance(x, AverageWeightsState)


def _adamw(
    rate: optax.ScalarOrSchedule,
    weight_decay: float,
    matrices: Sequence[Matrix] = (),
) -> optax.GradientTransformation:
    del matrices
    return optax.adamw(
        rate,
        b2=0.99,  # a run is too short for the usual 0.999
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )


def _adamw_core(
    rate: optax.ScalarOrSchedule, weight_decay: float, matrices: Sequence[Matrix]
) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(b2=0.99),
        oialr.orthogonal.scale_by_core_rank(matrices),
        optax.add_decayed_weights(
            weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
        optax.scale_by_learning_rate(rate),
    )


def _lars(rate: optax.ScalarOrSchedule, weight_decay: float) -> Any:
    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.lars(rate, weight_decay, weight_decay_mask=mask, trust_ratio_mask=mask)


OPTIMIZERS: Mapping[
    str,
    Callable[
        [optax.ScalarOrSchedule, float, Sequence[Matrix]],
        optax.GradientTransformation,
    ],
] = {
    "adamw": _adamw,
    "adamw_core": _adamw_core,
    "adam": lambda rate, decay, _: optax.chain(
        optax.add_decayed_weights(decay), optax.adam(rate)
    ),
    "sgd": lambda rate, decay, _: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)
    ),
    "orthogonal_sgd": lambda rate, decay, matrices: oialr.orthogonal.orthogonal_sgd(
        rate, weight_decay=decay, matrices=matrices
    ),
    "lars": lambda rate, decay, _: _lars(rate, decay),
    "orthogonal_lars": lambda rate, decay, matrices: optax.chain(
        oialr.orthogonal.orthogonalize(matrices=matrices), _lars(rate, decay)
    ),
    "swan": lambda rate, decay, matrices: oialr.orthogonal.swan(
        rate, matrices, rms=RMS, weight_decay=decay, adam=_adamw(rate, decay)
    ),
    "spectral_trust_region": lambda rate, decay, matrices: (
        oialr.orthogonal.spectral_trust_region(
            rate, weight_decay=decay, matrices=matrices
        )
    ),
    "muon": lambda rate, decay, matrices: oialr.orthogonal.core_muon(
        rate, matrices, rms=RMS, weight_decay=decay, adam=_adamw(rate, decay)
    ),
}
