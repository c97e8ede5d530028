"""What an optimizer does to its leaves, read from its jaxpr: nothing is computed.

Facts of every value: whether it is a known constant throughout (an update that is
known to be zero moves nothing), how it depends on chosen inputs (Adamax keeps the
largest entries in a state of Adam's class), and of which it is a multiple (an average
decays by its factor).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from oialr_jax.compiling import dtype_of
from oialr_jax.views import scan_sizes

# How a value depends on a source, by what lies between, worst last.
AVERAGED, LARGEST, OTHERWISE = 1, 2, 3


class Fact(NamedTuple):
    """What is known of a value.

    `constant`: the value of all entries, where it is known. `sources`: how the value
    depends on each. `entry`: the input, a scalar, that all entries are. `multiple`: a
    source and a factor, the value being their product and what does not depend on the
    source, entries in some order; the factor is a number or an input.
    """

    constant: float | None = None
    sources: Mapping[Any, int] = {}
    entry: Any = None
    multiple: "Multiple" = None


Multiple = tuple[Any, Any] | None


_MOVED = frozenset(  # entries are moved about, copied or cast
    (
        *("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "rev"),
        *("slice", "dynamic_slice", "gather", "split", "copy", "copy_p", "device_put"),
        *("convert_element_type", "reduce_precision", "stop_gradient", "reshard"),
        *("sharding_constraint", "pvary", "mesh_cast", "reduce_max", "reduce_min"),
    )
)
_ODD = frozenset(  # zero of zero
    (
        *("abs", "neg", "sign", "sqrt", "cbrt", "sin", "tan", "asin", "sinh", "tanh"),
        *("square", "integer_pow", "real", "imag", "conj", "expm1", "log1p", "erf"),
        *("reduce_sum", "cumsum", "psum", "psum_invariant", "all_gather"),
        *("round", "floor", "ceil"),
    )
)
_LINEAR_IN_ALL = frozenset(("add", "sub", "add_any"))
_ZERO_IF_ONE_IS = frozenset(("mul", "dot_general", "conv_general_dilated", "and"))
_ZERO_IF_ALL_ARE = frozenset(
    ("concatenate", "pad", "dynamic_update_slice", "scatter", "scatter-add")
)


def facts(jaxpr: Any, inputs: Sequence[Fact]) -> list[Fact]:
    """The facts of a closed jaxpr's outputs, given those of its inputs."""
    known: dict[Any, Fact] = {}

    def read(atom: Any) -> Fact:
        return _of_value(atom.val) if isinstance(atom, Literal) else known[atom]

    known.update(zip(jaxpr.jaxpr.constvars, map(_of_value, jaxpr.consts), strict=True))
    known.update(zip(jaxpr.jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        found = _through(eqn, [read(x) for x in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in jaxpr.jaxpr.outvars]


def _of_value(value: Any) -> Fact:
    if isinstance(value, jax.Array):  # on a device, where it stays
        return Fact()
    if not hasattr(value, "dtype"):
        numeric = isinstance(value, int | float)
        return Fact(float(value)) if numeric else Fact()
    real = jnp.issubdtype(value.dtype, jnp.floating)
    real = real or value.dtype.kind in "biu"
    if not real or not np.size(value):
        return Fact()
    first = np.ravel(np.asarray(value))
    return Fact(float(first[0])) if (first == first[0]).all() else Fact()


def _through(eqn: Any, inputs: list[Fact]) -> list[Fact]:
    name = eqn.primitive.name
    try:
        found = _nested(name, eqn.params, inputs)
    except (KeyError, TypeError, ValueError):  # not as this version of JAX has it
        found = None
    if found is not None and len(found) == len(eqn.outvars):
        return found
    value = _constant(name, eqn.params, inputs)
    if value is not None:
        return [Fact(value) for _ in eqn.outvars]
    fact = Fact(None, _sources(name, inputs), *_origin(name, inputs))
    return [fact for _ in eqn.outvars]


def _nested(name: str, params: Any, inputs: list[Fact]) -> list[Fact] | None:
    """The facts after a primitive that holds jaxprs; None of any other."""
    if name == "cond":  # which branch is no dependence
        branches = [facts(x, inputs[1:]) for x in params["branches"]]
        return [_either(x) for x in zip(*branches, strict=True)]
    if name == "while":
        first, count = params["cond_nconsts"], params["body_nconsts"]
        consts, carry = inputs[first : first + count], inputs[first + count :]
        return _repeated(params["body_jaxpr"], consts, carry)
    if name == "scan":
        first, count = scan_sizes(params)
        split = first + count
        carry = _repeated(
            params["jaxpr"], inputs[:first], inputs[first:split], inputs[split:]
        )
        body = facts(params["jaxpr"], [*inputs[:first], *carry, *inputs[split:]])
        return [*carry, *body[count:]]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if inner is None:
            continue
        if not hasattr(inner, "consts"):
            inner = ClosedJaxpr(inner, ())
        if len(inner.jaxpr.invars) == len(inputs):
            return facts(inner, inputs)
    return inputs if name == "optimization_barrier" else None


def _repeated(
    body: Any, consts: list[Fact], carry: list[Fact], rest: Sequence[Fact] = ()
) -> list[Fact]:
    """The facts of a carry that hold before and after every turn."""
    while True:
        turned = facts(body, [*consts, *carry, *rest])[: len(carry)]
        both = [_either(x) for x in zip(carry, turned, strict=True)]
        if both == carry:
            return carry
        carry = both


def _either(found: tuple[Fact, ...]) -> Fact:
    values = {x.constant for x in found}
    value = values.pop() if len(values) == 1 else None
    return Fact(value, _worst([x.sources for x in found]), *_one_of(found))


def _worst(found: Sequence[Mapping[Any, int]]) -> dict[Any, int]:
    result: dict[Any, int] = {}
    for sources in found:
        for key, how in sources.items():
            result[key] = max(how, result.get(key, 0))
    return result


def _constant(name: str, params: Any, inputs: list[Fact]) -> float | None:
    if not inputs:
        return None
    values = [x.constant for x in inputs]
    if name in _MOVED:
        return values[0]
    if name in _ODD:
        positive = name != "integer_pow" or params["y"] > 0
        return 0.0 if values[0] == 0 and positive else None
    if name in ("div", "rem"):
        return 0.0 if values[0] == 0 else None
    if name in _ZERO_IF_ONE_IS:
        return 0.0 if 0 in values else None
    if name == "select_n":
        return values[1] if len(set(values[1:])) == 1 else None
    if any(x is None for x in values):
        return None
    known: list[Any] = values
    if name in ("add", "add_any"):
        return known[0] + known[1]
    if name == "sub":
        return known[0] - known[1]
    if name in ("max", "min"):
        return (max if name == "max" else min)(known)
    if name == "clamp":
        return min(max(known[1], known[0]), known[2])
    if name in _ZERO_IF_ALL_ARE:
        return 0.0 if not any(known) else None
    return None


def _sources(name: str, inputs: list[Fact]) -> dict[Any, int]:
    if name == "select_n":
        return _worst([x.sources for x in inputs[1:]])
    dependent = [x.sources for x in inputs if x.sources]
    if not dependent:
        return {}
    found = _worst(dependent)
    if name in _MOVED | _LINEAR_IN_ALL | {"neg"}:
        return found
    if name == "max":
        return {key: max(how, LARGEST) for key, how in found.items()}
    if name == "mul" and len(dependent) == 1:
        return found
    if name == "div" and not inputs[1].sources:
        return found
    return dict.fromkeys(found, OTHERWISE)


def _origin(name: str, inputs: list[Fact]) -> tuple[Any, Multiple]:
    """The `entry` and the `multiple` of a primitive's result, from those before it."""
    if name == "select_n":
        return _one_of(tuple(inputs[1:]))
    if name in _MOVED:
        return inputs[0].entry, inputs[0].multiple
    if name in ("mul", "div"):
        one, two = inputs
        if name == "mul" and one.multiple is None and one.entry is None:
            one, two = two, one
        if two.constant == 1:
            return one.entry, one.multiple
        product = _product(one.multiple, two) if name == "mul" else None
        if name == "mul" and product is None:
            product = _product(two.multiple, one)
        return None, product
    if name in ("add", "add_any", "sub"):
        one, two = inputs
        if two.constant == 0:
            return one.entry, one.multiple
        if one.constant == 0 and name != "sub":
            return two.entry, two.multiple
        return None, _sum(one, two, -1.0 if name == "sub" else 1.0)
    return None, None


def _product(multiple: Multiple, by: Fact) -> Multiple:
    """A multiple times a constant, or times an entry where it is a plain copy."""
    source, factor = multiple or (None, None)
    if isinstance(factor, float) and by.constant is not None:
        return source, factor * by.constant
    return (source, by.entry) if factor == 1 and by.entry is not None else None


def _sum(one: Fact, two: Fact, sign: float) -> Multiple:
    """The multiple in a sum or difference, if there is one."""
    source = (one.multiple or two.multiple or (None,))[0]
    total: Any = 0.0
    for x, by in ((one, 1.0), (two, sign)):
        if source not in x.sources:
            continue
        at, factor = x.multiple or (None, None)
        if at != source:
            return None
        if isinstance(factor, float):
            factor *= by
        elif by < 0:
            return None
        if total and not (isinstance(total, float) and isinstance(factor, float)):
            return None
        total = total + factor if total else factor
    return None if source is None else (source, total)


def _one_of(found: tuple[Fact, ...]) -> tuple[Any, Multiple]:
    """The `entry` and `multiple` of one of several; a plain copy says nothing.

    A step that only gathers gradients, or skips one that is not finite, leaves an
    average as it was; how it decays is said by the other branch.
    """
    entries, multiples = {x.entry for x in found}, {x.multiple for x in found}
    changed = {x for x in multiples if x is None or x[1] != 1} or multiples
    return (
        entries.pop() if len(entries) == 1 else None,
        changed.pop() if len(changed) == 1 else None,
    )


# An optimizer's update


@dataclasses.dataclass(frozen=True)
class Known:
    """An abstract tree as a key of a cache, which compares `key` alone."""

    key: Any
    tree: Any = dataclasses.field(compare=False)


def by_shapes(tree: Any) -> Known:
    """A tree of arrays, known by its structure, shapes and dtypes."""
    tree = jax.tree.map(abstract, tree)
    leaves, treedef = jax.tree.flatten(tree)
    return Known((treedef, *((x.shape, x.dtype) for x in leaves)), tree)


def abstract(x: Any) -> Any:
    """The shape of an array, and its dtype under `jax.jit`."""
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x))


class Update(NamedTuple):
    """The jaxpr of `tx.update(grads, state, params)`, with the paths of its leaves."""

    jaxpr: Any
    inputs: list[tuple[Any, ...]]  # (0, ...) gradients, (1, ...) state, (2, ...) params
    outputs: list[tuple[Any, ...]]  # (0, ...) updates, (1, ...) state


def trace_update(tx: Any, params: Any, state: Any = None) -> Update | Exception:
    """The update of an optimizer of abstract params, or why it cannot be traced.

    An optimizer that needs more than gradients is given what line searches, SAM and
    the like ask for, by name.

    Args:     state: abstract; by default that of `tx.init`.
    """
    failure: Exception = TypeError("no extra arguments that it takes are known")

    def tree(*_: Any, **__: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)

    def scalar(weights: Any, *_: Any, **__: Any) -> Any:
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(weights))

    one = functools.partial(jnp.ones, ())
    extras: tuple[dict[str, Callable[..., Any]], ...] = (
        {},
        {"value": one},
        {"value": one, "grad": tree, "value_fn": lambda: scalar},
        {"grad_fn": lambda: tree},
        {"obj_fn": lambda: scalar},
    )
    for extra in (*extras, functools.reduce(lambda a, b: a | b, extras)):

        def update(grads: Any, state: Any, params: Any, extra: Any = extra) -> Any:
            more = {name: make() for name, make in extra.items()}
            return tx.update(grads, state, params, **more)

        try:
            given = jax.eval_shape(tx.init, params) if state is None else state
            arguments = (params, given, params)
            jaxpr, shape = jax.make_jaxpr(update, return_shape=True)(*arguments)
        except Exception as error:  # whatever the user's code raises
            failure = error if not extra else failure
            continue
        inputs, outputs = (
            [(int(path[0].idx), *path[1:]) for path, _ in flat]
            for flat in map(jax.tree_util.tree_leaves_with_path, (arguments, shape))
        )
        return Update(jaxpr, inputs, outputs)
    return failure
