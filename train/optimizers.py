"""Optimizers by name, for the programs that take --optimizer.

adamw                  decoupled decay of whatever has more than one axis
sgd                    momentum .9, coupled decay
orthogonal_sgd         sgd after orthogonal gradients of the matrices; the paper has
                       rate 1e-2 and decay 5e-4 for batches of 1024
swan                   normalised, whitened gradients, steps as large as Adam's; AdamW
                       on the rest, and so its rate and decay on all
spectral_trust_region  averaged gradients, steps of one spectral norm: the rate is that
                       norm, the decay is decoupled
muon                   Optax's, steps as large as Adam's; AdamW on the rest

The presets of the programs have rates and decays for adamw, which swan and muon share.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import optax

import oialr_jax as oialr
from train import names

RMS = 0.2
"""Of the steps of Adam over its rate, about (Liu et al., 2025)."""


def build(
    name: str,
    rate: optax.ScalarOrSchedule,
    weight_decay: float,
    matrices: Sequence[oialr.Matrix],
) -> optax.GradientTransformation:
    """The optimizer called `name`, gradients clipped to norm one.

    Args:     matrices: what is orthogonalised; the same leaves, dense or low rank.
    Raises:   ValueError: there is none of this name.
    """
    recipe = names.find("optimizer", name, OPTIMIZERS)
    inner = recipe(rate, weight_decay, matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def _adamw(
    rate: optax.ScalarOrSchedule,
    weight_decay: float,
    matrices: Sequence[oialr.Matrix] = (),
) -> optax.GradientTransformation:
    del matrices
    return optax.adamw(
        rate,
        b2=0.99,  # a run is too short for the usual 0.999
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )


OPTIMIZERS: Mapping[
    str,
    Callable[
        [optax.ScalarOrSchedule, float, Sequence[oialr.Matrix]],
        optax.GradientTransformation,
    ],
] = {
    "adamw": _adamw,
    "sgd": lambda rate, decay, _: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)
    ),
    "orthogonal_sgd": lambda rate, decay, matrices: oialr.orthogonal_sgd(
        rate, weight_decay=decay, matrices=matrices
    ),
    "swan": lambda rate, decay, matrices: oialr.swan(
        rate, matrices, rms=RMS, weight_decay=decay, adam=_adamw(rate, decay)
    ),
    "spectral_trust_region": lambda rate, decay, matrices: oialr.spectral_trust_region(
        rate, weight_decay=decay, matrices=matrices
    ),
    "muon": lambda rate, decay, matrices: oialr.core_muon(
        rate, matrices, rms=RMS, weight_decay=decay, adam=_adamw(rate, decay)
    ),
}
