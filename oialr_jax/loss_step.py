"""The pure step that `training` compiles: gradient of a loss, update, trees beside."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax.adapters import attached, on_base
from oialr_jax.factored import factored
from oialr_jax.lowrank import PyTree, arrays_only, materialize
from oialr_jax.rehearsal import shown
from oialr_jax.transform import FrozenBases, trainable, value_and_grad, with_trainable

Follow = Mapping[str, Callable[[PyTree, PyTree], PyTree]]
"""Copies of the params, by name, and what updates each: (params, copy) -> copy."""


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The state of a run: a pytree that `Checkpoints` can save.

    Attributes:
        extra: what the model keeps beside its params, such as batch statistics.
        key: of the run; the loss gets it folded with the step.
        beside: copies of the params, by name, that `training(follow=...)` updates.
        curvature: sums of the batches before a cut, with `training(weighing=...)`.
    """

    step: Any
    params: Any
    opt_state: Any
    extra: Any = None
    key: Any = None
    beside: Any = None
    curvature: Any = None

    def replace(self, **changes: Any) -> "TrainingState":
        """The state with other values of some fields."""
        return dataclasses.replace(self, **changes)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class LossStep:
    """A loss and its optimizer as functions of a `TrainingState` and a batch.

    Args:     as in `training`.
              has_base: the params are cores on a frozen base, which comes last in a
              batch.
    """

    loss: Callable[..., Any]
    tx: FrozenBases
    follow: Follow
    has_aux: bool
    has_base: bool

    def create(self, params: PyTree, extra: Any, key: Any) -> TrainingState:
        """The state of step 0, of copies."""
        return TrainingState(
            step=jnp.zeros((), jnp.int32),
            params=_copy(params),
            opt_state=_copy(self.tx.init(params)),
            extra=_copy(extra),
            key=_copy(key),
            beside={name: _copy(params) for name in self.follow},
        )

    def step(self, state: TrainingState, *batch: Any) -> tuple[TrainingState, Any]:
        """The next state, and the result of the loss without `extra`."""
        forward, given = self._forward(batch)
        args, kwargs = self.arguments(state, given)
        has_aux = self.has_aux or state.extra is not None
        gradient = value_and_grad(forward, has_aux=has_aux)
        out, grads = gradient(state.params, *args, **kwargs)
        value, extra, aux = self.parts(out, state.extra)

        def value_fn(params: PyTree) -> Any:  # for a line search
            return self.value(state.replace(params=params), *batch)

        arrays = arrays_only(state.params)
        updates, opt_state = self.tx.update(
            grads, state.opt_state, arrays, value=value, grad=grads, value_fn=value_fn
        )
        arrays = optax.apply_updates(arrays, updates)
        beside = {}
        for name, update in self.follow.items():
            copy = state.beside[name]
            new = update(trainable(arrays), trainable(copy))
            beside[name] = with_trainable(copy, new)
        state = state.replace(
            step=state.step + 1,
            params=merged(arrays, state.params),
            opt_state=opt_state,
            extra=extra,
            beside=beside,
        )
        return state, (value, aux) if self.has_aux else value

    def value(self, state: TrainingState, *batch: Any) -> Any:
        """The loss of a batch, alone."""
        forward, batch = self._forward(batch)
        args, kwargs = self.arguments(state, batch)
        return self.parts(forward(state.params, *args, **kwargs), state.extra)[0]

    def dense_gradient(self, state: TrainingState, *batch: Any) -> PyTree:
        """That of the dense params, for directions of ranks that go up."""
        params = state.params
        if self.has_base:
            params, batch = attached(params, batch[-1]), batch[:-1]
        args, kwargs = self.arguments(state, batch)

        def value(params: PyTree) -> Any:
            out = factored(self.loss)(params, *args, **kwargs)
            return self.parts(out, state.extra)[0]

        return value_and_grad(value)(materialize(params))[1]

    @functools.cached_property
    def _factored(self) -> Callable[..., Any]:
        return (on_base if self.has_base else factored)(self.loss)

    def _forward(
        self, batch: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The loss of params and batch, and the batch without the frozen base."""
        if not self.has_base:
            return self._factored, batch
        base = batch[-1]

        def of_cores(cores: PyTree, *args: Any, **kwargs: Any) -> Any:
            return self._factored(cores, base, *args, **kwargs)

        return of_cores, batch[:-1]

    def arguments(
        self, state: TrainingState, batch: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the loss gets after the params."""
        args = batch if state.extra is None else (state.extra, *batch)
        kwargs = {
            name: state.beside[name]
            for name in self.follow
            if name in inspect.signature(self.loss).parameters
        }
        if state.key is not None:
            kwargs["key"] = jax.random.fold_in(state.key, state.step)
        return args, kwargs

    def parts(self, out: Any, extra: Any) -> tuple[Any, Any, Any]:
        """Value, extra and aux, of which the loss returned some.

        Raises:   TypeError: it returned something else.
        """
        form = "(value, extra)" if extra is not None else "value"
        if self.has_aux:
            form = "(value, aux)" if extra is None else "(value, (extra, aux))"
        value, new, aux = out, None, None
        fits = form == "value" or _is_pair(out)
        if fits and form != "value":
            value, new = out
            if form == "(value, aux)":
                new, aux = None, new
            elif self.has_aux:
                fits = _is_pair(new)
                new, aux = new if fits else (None, None)
        is_float = jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)
        if not fits or np.shape(value) != () or not is_float:
            hint = "the value is a float, say jnp.mean(...)"
            if isinstance(value, tuple):
                hint = "for aux say training(..., has_aux=True)"
            raise TypeError(f"loss must return {form}, got {shown(out)}: {hint}")
        if _form(new) != _form(extra):
            raise TypeError(
                "loss must return `extra` as run.init got it, "
                f"{shown(extra)}; got {shown(new)}"
            )
        return value, new, aux


def merged(arrays: PyTree, whole: PyTree) -> PyTree:
    """`arrays`, with what is no array of `whole` in the place of None."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, arrays, whole, is_leaf=lambda x: x is None
    )


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _form(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
