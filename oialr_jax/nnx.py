"""The front door for Flax NNX: a step that changes its model and optimizer in place.

Between the calls of a step its model and optimizer are seen as one pytree, `State`, on
which the layers below work; what an event changes is written back into the same
Variables. Flax is imported when it is used: importing the library costs no NNX.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax.adaptive import AdaptiveStep, Timing, adaptive
from oialr_jax.defaults import Choice, Selection, check_params, scheduled
from oialr_jax.lowrank import (
    Basis,
    PyTree,
    is_low_rank,
    leaves_by_path,
    owner_of,
    path_name,
)
from oialr_jax.matrices import Matrices, Matrix
from oialr_jax.moments import MomentRule
from oialr_jax.rehearsal import line, shown, traced
from oialr_jax.reports import Report
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.sharding import Layout
from oialr_jax.transform import freeze_bases, is_frozen
from oialr_jax.wrapping import found_in

__all__ = ["State", "Step", "state", "update", "wrap"]

_HINT = (
    "write @oialr_jax.factored above the model's __call__, or "
    "nnx.value_and_grad(oialr_jax.factored(loss_fn)) in train_step"
)
_CALL = "oialr_jax.nnx.wrap(train_step, model, optimizer, batch, delay=2500)"


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A model and its optimizer as a pytree of arrays and nodes, for `Checkpoints`.

    Attributes:
        params: of the model, those that the optimizer is for (its `wrt`).
        rest: other Variables of the model: batch statistics, random keys and counters.
        beside: of arguments that follow events, by their names.
    """

    step: Any
    params: Any
    opt_state: Any
    rest: Any = None
    beside: Any = None

    def replace(self, **changes: Any) -> "State":
        """The state with other values of some fields."""
        return dataclasses.replace(self, **changes)


def state(model: Any, optimizer: Any) -> State:
    """Host side: what a model and an `nnx.Optimizer` hold, no copy.

    `Checkpoints.save` takes it; what `restore` gives goes back in by `update`.
    """
    return State(
        optimizer.step.get_raw_value(),
        _values(_params(model, optimizer)),
        _values(optimizer.opt_state),
        _values(_rest(model, optimizer)),
    )


def update(model: Any, optimizer: Any, state: State) -> None:
    """Host side: write a state into a model and its optimizer, in place.

    Raises:   ValueError: it is the state of another model or optimizer.
    """
    _write("params", _params(model, optimizer), state.params)
    _write("opt_state", optimizer.opt_state, state.opt_state)
    if state.rest is not None:
        _write("rest", _rest(model, optimizer), state.rest)
    optimizer.step.set_raw_value(state.step)


def wrap(
    train_step: Callable[..., Any],
    *args: Any,
    delay: int | None = None,
    steps: int | None = None,
    budget: float | int | None = None,
    select: Selection = MappingProxyType({}),
    schedule: Schedule | None = None,
    rule: RankRule | None = None,
    follow: str | Sequence[str] = (),
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    steps_per_call: int = 1,
    layout: Layout | None = None,
    **kwargs: Any,
) -> "Step":
    """Host side: a training step of Flax NNX, made ready for low rank.

        step = oialr_jax.nnx.wrap(train_step, model, optimizer, batch, delay=2500)
        step(model, optimizer, batch)  # in the place of train_step

    The optimizer is made one that leaves bases alone, in place, with the moments that
    it has. From the conversion on, Params of the model hold LowRank nodes: what applies
    the model has to be `factored`, its __call__ or the loss; `materialize(model)` is a
    dense copy. Everything else stays the user's: `nnx.jit` and its options, the loss,
    metrics, batch statistics, random streams.

    Args:     train_step: with or without nnx.jit. Among its arguments is one
              `nnx.Optimizer`; its model is the first module.
              args, kwargs: one call of it; shapes suffice for batches.
              delay, steps, budget, select, schedule, rule: as in `training`.
              follow: arguments by name that hold a copy of the params, such as an
              average, and follow every event.
              moment_rule, steps_per_call: of `adaptive`.
              layout: the sharding of params and optimizer, which are placed here;
              without it what is on a mesh stays there, as its users divided it.
    Raises:   ValueError, TypeError: what `training` raises; a step that fails on the
              example, or applies the model past `factored`; no model or optimizer.
    """
    plan = scheduled(delay, steps, schedule)
    choice = Choice(budget, rule, select, once=schedule is None)
    step = Step(train_step, (follow,) if isinstance(follow, str) else tuple(follow))
    model, optimizer = step.parts(args, kwargs)
    params = _values(_params(model, optimizer))
    check_params(params, only_arrays=True)
    frozen = _frozen(model, optimizer)
    copy = _nnx().clone((_zeros(args), _zeros(kwargs)))
    _freeze(step.parts(*copy)[1], frozen)

    begin, given = step.view(*copy)
    out = traced(step.pure, begin, *given)
    if isinstance(out, Exception):
        said = ", ".join([type(x).__name__ if _is_node(x) else shown(x) for x in args])
        raise ValueError(
            f"train_step({said}) fails: give nnx.wrap the step and what it gets, one "
            f"batch included, {_CALL} ({line(out)})"
        ) from out
    found = Matrices()
    if isinstance(select, Mapping):
        found = found_in(
            lambda params: step.pure(begin.replace(params=params), *given),
            params,
            _HINT,
        )
    step.matrices, step.schedule = choice.matrices(found), plan
    step.rule = choice.rule_for(params, step.matrices)
    step.adaptive = _checked(
        step,
        frozen.tx,
        copy,
        moment_rule=moment_rule,
        steps_per_call=steps_per_call,
        layout=layout,
    )
    _freeze(optimizer, frozen)
    if layout is not None:
        whole = state(model, optimizer)
        update(model, optimizer, jax.device_put(whole, layout(whole)))
    return step


def _checked(
    step: "Step", tx: Any, call: tuple[Any, Any], **options: Any
) -> AdaptiveStep:
    """The events of a step, after raising what would fail at the conversion."""
    follow = step.follow

    def made(names: Sequence[str]) -> AdaptiveStep:
        step.follow = names
        new = adaptive(
            step.pure,
            tx,
            step.matrices,
            step.schedule,
            step.rule,
            follow=("beside",) if names else (),
            jit=step.ahead,
            **options,
        )
        begin, given = step.view(*call)
        new.check(begin, *given)
        return new

    try:
        return made(follow)
    except ValueError as error:
        missing = tuple(x for x in step.copies(*call) if x not in follow)
        try:
            made((*follow, *missing))
        except ValueError:
            raise error from None
        raise ValueError(  # with these it runs
            f"train_step combines params with {', '.join(missing)}, which will stay "
            "dense when matrices are converted to low rank: give nnx.wrap(..., "
            f"follow={missing!r})"
        ) from error


class Step:
    """Host side: what `wrap` returns; call it as the step that it was made from.

    `matrices`, `schedule` and `rule` are what was chosen.
    """

    adaptive: AdaptiveStep
    matrices: tuple[Matrix, ...]
    schedule: Schedule
    rule: RankRule

    def __init__(self, train_step: Callable[..., Any], follow: Sequence[str]) -> None:
        """Use `wrap`, which checks its arguments."""
        nnx = _nnx()
        if not callable(train_step) or _is_node(train_step):
            raise TypeError(
                f"the step comes first, {_CALL}; got {type(train_step).__name__}"
            )
        compiled = hasattr(train_step, "lower")
        self._step: Any = train_step if compiled else nnx.jit(train_step)
        self._signature = inspect.signature(train_step)
        self.follow = follow
        self._objects: list[Any] = []  # of the latest call, all but the optimizer
        self._holders: list[Any] = []  # Variables of them that hold nodes
        for name in follow:
            if name not in self._signature.parameters:
                raise ValueError(
                    f"`follow` names {name!r}, which is no argument of train_step; "
                    f"there are: {', '.join(self._signature.parameters)}"
                )

    @property
    def reports(self) -> list[Report]:
        """What each event of this process did."""
        return self.adaptive.reports

    @property
    def timings(self) -> list[Timing]:
        """What decisions, events and projections cost the host."""
        return self.adaptive.timings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the step returns; model and optimizer are changed in place."""
        model, optimizer = self.parts(args, kwargs)
        number = self._before(model, optimizer, args, kwargs)
        held = [(x, x.get_raw_value()) for x in self._holders]
        held = [(variable, node) for variable, node in held if is_low_rank(node)]
        try:
            for variable, node in held:
                variable.set_raw_value(dataclasses.replace(node, basis=Basis(0)))
            out = self._step(*args, **kwargs)
        finally:  # what the step has put there is in the same bases
            for variable, node in held:
                now = variable.get_raw_value()
                if is_low_rank(now):
                    new = dataclasses.replace(now, basis=node.basis)
                    variable.set_raw_value(new)
        try:
            self.adaptive.after(optimizer.step.get_raw_value(), number)
        except ValueError as error:
            raise ValueError(
                "train_step has to call optimizer.update(model, grads) as often as "
                f"`steps_per_call` says ({error})"
            ) from error
        return out

    def _before(self, model: Any, optimizer: Any, args: Any, kwargs: Any) -> int:
        """Do what is due before a call, and look for what holds nodes in it then.

        Returns:  the number of the step.
        """
        number = self.adaptive.quiet(optimizer.step.get_raw_value())
        others = [x for x in (*args, *kwargs.values()) if _is_node(x)]
        objects = [model, *(x for x in others if x is not optimizer)]
        same = len(self._objects) == len(objects)
        same = same and all(map(operator.is_, self._objects, objects))
        if number is not None and same:
            return number
        if number is None:
            before, given = self.view(args, kwargs)
            after, number = self.adaptive.before(before, *given)
            self._check_bases(after.params, args, kwargs)
            if after is not before:
                self._put(after, args, kwargs)
        else:
            self._check_bases(state(model, optimizer).params, args, kwargs)
        self._objects, self._holders = objects, _holding(objects)
        return number

    def parts(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The model and the optimizer among the arguments of a call.

        Raises:   TypeError: there is none, or there are two optimizers.
        """
        nnx = _nnx()
        given = [*args, *kwargs.values()]
        optimizers = [x for x in given if isinstance(x, nnx.Optimizer)]
        if len(optimizers) != 1:
            names = ", ".join(type(x).__name__ for x in given) or "nothing"
            raise TypeError(
                "train_step has to get one nnx.Optimizer, with its model, as arguments "
                f"of their own: {_CALL}; got {names}"
            )
        (optimizer,) = optimizers
        models = [x for x in given if isinstance(x, nnx.Module)]
        models = [vars(optimizer)["model"]] if "model" in vars(optimizer) else models
        if not models:
            raise TypeError(
                "train_step has to get its model as an argument, for an event changes "
                f"it in place: {_CALL}"
            )
        return models[0], optimizer

    def view(self, args: Any, kwargs: Any) -> tuple[State, tuple[Any, ...]]:
        """The state of a call, and the call itself as a pytree."""
        nnx = _nnx()
        begin = state(*self.parts(args, kwargs))
        if self.follow:
            given = self._named(args, kwargs)
            beside = {name: _values(nnx.state(given[name])) for name in self.follow}
            begin = begin.replace(beside=beside)
        modes = (nnx.set_graph_mode, nnx.set_graph_updates)
        graphdef, given = nnx.split((args, kwargs))
        current = tuple(mode.current_value() for mode in modes)
        return begin, (graphdef, given, current)

    def pure(
        self, state: State, graphdef: Any, rest: PyTree, modes: Any
    ) -> tuple[State, Any]:
        """The step as a function of what `view` gives, which changes nothing."""
        with self._rebuilt(state, graphdef, rest, modes) as (args, kwargs):
            out = self._step(*args, **kwargs)
            return self.view(args, kwargs)[0], out

    def ahead(self, counted: Callable[..., Any]) -> "_Ahead":
        """What `adaptive` takes for the compiled step: it compiles, and never runs."""
        return _Ahead(self)

    @contextlib.contextmanager
    def _rebuilt(
        self, state: State, graphdef: Any, rest: PyTree, modes: Any
    ) -> Iterator[tuple[Any, Any]]:
        """A copy of a call, in another thread or trace, with this state."""
        nnx = _nnx()
        graph, updates = modes
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(updates):
            args, kwargs = nnx.merge(graphdef, rest, copy=True)
            self._put(state, args, kwargs)
            yield args, kwargs

    def _put(self, state: State, args: Any, kwargs: Any) -> None:
        """Write a state into the objects of a call."""
        update(*self.parts(args, kwargs), state.replace(rest=None))
        given = self._named(args, kwargs) if state.beside else {}
        for name in state.beside or ():
            _write(name, _nnx().state(given[name]), state.beside[name])

    def _named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The objects of NNX in a call, by the names of the arguments."""
        bound = self._signature.bind(*args, **kwargs).arguments
        return {name: x for name, x in bound.items() if _is_node(x)}

    def _beside(
        self, params: PyTree, args: Any, kwargs: Any
    ) -> Iterator[tuple[str, Any, Any, Any]]:
        """What the arguments hold beside the model: name, path, leaf, its parameter."""
        owners = leaves_by_path(params)
        own = self.parts(args, kwargs)
        for name, given in self._named(args, kwargs).items():
            if any(given is x for x in own):
                continue
            for path, leaf in leaves_by_path(_values(_nnx().state(given))).items():
                owner = owners.get(owner_of(path, owners))
                if owner is not None and np.shape(leaf) == np.shape(owner):
                    yield name, path, leaf, owner

    def copies(self, args: Any, kwargs: Any) -> tuple[str, ...]:
        """The arguments that hold copies of the params."""
        params = state(*self.parts(args, kwargs)).params
        return tuple(dict.fromkeys(x for x, *_ in self._beside(params, args, kwargs)))

    def _check_bases(self, params: PyTree, args: Any, kwargs: Any) -> None:
        """Raise where an argument holds a copy of the params in other bases."""
        for name, path, leaf, owner in self._beside(params, args, kwargs):
            both = is_low_rank(leaf) and is_low_rank(owner)
            if name not in self.follow and both and leaf.basis != owner.basis:
                raise ValueError(
                    f"{name}.{path_name(path)} is in bases from before an event: give "
                    f"nnx.wrap(..., follow={name!r}), which brings it along"
                )


class _Ahead:
    """The compiled step of `adaptive`, whose calls the user's own step makes."""

    def __init__(self, step: Step) -> None:
        self._of = step

    def __call__(self, *args: Any) -> Any:
        raise RuntimeError("the step of nnx.wrap is called with its own arguments")

    def lower(self, state: State, graphdef: Any, rest: PyTree, modes: Any) -> Any:
        """The step for another state, by shapes."""
        with self._of._rebuilt(state, graphdef, rest, modes) as (args, kwargs):
            return self._of._step.lower(*args, **kwargs)


@functools.cache
def _nnx() -> Any:
    from flax import nnx

    return nnx


def _is_node(x: Any) -> bool:
    """Whether x is an object of NNX: a module, an optimizer, a metric, a stream."""
    return isinstance(x, _nnx().Pytree)


def _is_variable(x: Any) -> bool:
    return isinstance(x, _nnx().Variable)


def _params(model: Any, optimizer: Any) -> Any:
    """The Variables that the optimizer is for."""
    return _nnx().state(model, optimizer.wrt)


def _rest(model: Any, optimizer: Any) -> Any:
    """The other Variables of the model."""
    return _nnx().state(model, _nnx().Not(optimizer.wrt))


def _values(variables: PyTree) -> PyTree:
    """The tree with what its Variables hold."""
    return jax.tree.map(
        lambda x: x.get_raw_value() if _is_variable(x) else x,
        variables,
        is_leaf=_is_variable,
    )


def _write(name: str, variables: PyTree, values: PyTree) -> None:
    """Write values into the Variables of a tree of the same structure."""
    here: Any = jax.tree.structure(variables, is_leaf=_is_variable)
    try:
        new = here.flatten_up_to(values)
    except ValueError as error:
        raise ValueError(
            f"`{name}` is the state of another model or optimizer ({line(error)})"
        ) from error
    for variable, value in zip(
        jax.tree.leaves(variables, is_leaf=_is_variable), new, strict=True
    ):
        if _is_variable(variable):
            variable.set_raw_value(value)


def _holding(objects: list[Any]) -> list[Any]:
    """The Variables that hold a node, each once."""
    leaves = jax.tree.leaves(objects, is_leaf=_is_variable)
    variables = {id(x): x for x in leaves if _is_variable(x)}
    return [x for x in variables.values() if is_low_rank(x.get_raw_value())]


def _frozen(model: Any, optimizer: Any) -> Any:
    """An optimizer that leaves bases alone, with the moments of this one."""
    nnx = _nnx()
    states = jax.tree.leaves(optimizer.opt_state, is_leaf=is_frozen)
    if any(map(is_frozen, states)):
        return optimizer
    new = nnx.Optimizer(model, freeze_bases(optax.identity()), wrt=optimizer.wrt)
    state = new.opt_state._replace(inner_state=optimizer.opt_state)
    new.tx, new.opt_state = freeze_bases(optimizer.tx), nnx.data(state)
    return new


def _freeze(optimizer: Any, frozen: Any) -> None:
    """Make an optimizer, in place, one that leaves bases alone."""
    optimizer.tx, optimizer.opt_state = frozen.tx, frozen.opt_state


def _zeros(tree: PyTree) -> PyTree:
    """The tree with zeros of no memory in the place of shapes."""

    def zeros(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)

    return jax.tree.map(zeros, tree, is_leaf=_is_node)
