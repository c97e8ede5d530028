"""The one walk: evaluate a jaxpr in which some values are views of a matrix leaf.

Discovery (matrices.py) and evaluation (contract.py) both run this walk and differ only
in what they do where a view meets an array, so what finds a matrix and what contracts
it cannot disagree. What happens to a view before that is in rewrites.py.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from oialr_jax.rewrites import RULES, cast, cut, reshape, transpose
from oialr_jax.views import (
    LAZY,
    Handler,
    Squares,
    Use,
    View,
    as_array,
    bind,
    is_same,
    scan_sizes,
    whole_axis,
)


def evaluate(
    jaxpr: Any, args: Sequence[Any], handler: Handler, fixed: Sequence[bool] = ()
) -> list[Any]:
    """The outputs of a closed jaxpr on arrays and views; outputs may be views.

    `jaxpr` is what `jax.make_jaxpr` returns, or a jaxpr found in a primitive's
    parameters. Equations that meet no view are bound again as they are. `fixed` marks
    the args that are data, which get no gradient; without it none is, and in the body
    of a branch or a loop none is.
    """
    body = getattr(jaxpr, "jaxpr", jaxpr)
    env = _environment(jaxpr, args, handler, fixed)
    return [
        jnp.asarray(x.val) if isinstance(x, jex.Literal) else env[x]
        for x in body.outvars
    ]


def _of_jax(x: Any) -> Any:
    """An array of NumPy as `jax.jit` takes it, float64 as float32 unless x64 is on."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _environment(
    jaxpr: Any, args: Sequence[Any], handler: Handler, fixed: Sequence[bool] = ()
) -> dict[Any, Any]:
    """The values of all variables of a jaxpr."""
    env: dict[Any, Any] = {}
    body = getattr(jaxpr, "jaxpr", jaxpr)
    data = {var for var, is_data in zip(body.invars, fixed, strict=False) if is_data}
    env.update(zip(body.constvars, getattr(jaxpr, "consts", ()), strict=True))
    env.update(zip(body.invars, map(_of_jax, args), strict=True))
    for eqn in body.eqns:
        known = [isinstance(x, jex.Literal) or x in data for x in eqn.invars]
        outputs = _apply(eqn, [_read(env, var) for var in eqn.invars], handler, known)
        env.update(zip(eqn.outvars, outputs, strict=True))
        if all(known):
            data.update(eqn.outvars)
    return env


def _read(env: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, jex.Literal) else env[var]


def _apply(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    if not any(isinstance(value, LAZY) for value in values):
        return bind(eqn, values)
    name = eqn.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, values, handler, fixed)
    if name in RULES:
        out = RULES[name](eqn, values, handler)
        if out is not None:
            return out if isinstance(out, list) else [out]
    place = _place_of_weight(name, values)
    if place is not None:
        return [_contraction(eqn, values, place, handler, fixed)]
    return bind(eqn, [as_array(value, handler, name) for value in values])


# Contractions


def _place_of_weight(name: str, values: Sequence[Any]) -> int | None:
    """Which operand of a contraction is the weight, or None if none can be."""
    if name == "dot_general":
        return 1 if isinstance(values[1], LAZY) else 0
    if name not in ("conv_general_dilated", "ragged_dot_general"):
        return None
    others = any(isinstance(x, LAZY) for x in values[2:])
    return 1 if isinstance(values[1], LAZY) and not others else None


def _contraction(
    eqn: Any, values: list[Any], place: int, handler: Handler, fixed: Sequence[bool]
) -> Any:
    name = eqn.primitive.name
    if name == "dot_general" and is_same(values[0], values[1]):
        total = _own_product(eqn, values[0], handler)
        if total is not None:
            return total
    # Of two views only the weight side is contracted: the other becomes an array.
    given = [
        x if i == place else as_array(x, handler, name) for i, x in enumerate(values)
    ]
    return _product(eqn, given, place, handler, fixed[1 - place], ())


def _own_product(eqn: Any, view: View, handler: Handler) -> Any:
    """The product of a weight with itself that sums its squares, as a norm's is."""
    (left, right), (batch, other) = eqn.params["dimension_numbers"]
    dims = range(len(view.dims))
    same = (*left,) == (*right,) and (*batch,) == (*other,)
    if not same or [*batch] != [d for d in dims if d not in left]:
        return None
    total = handler.sum_squares(view, tuple(left))
    return None if total is None else total.astype(eqn.outvars[0].aval.dtype)


def _product(
    eqn: Any,
    values: list[Any],
    place: int,
    handler: Handler,
    x_fixed: bool,
    part: tuple[int, ...],
) -> Any:
    """One contraction of the weight at `place`, or of each weight joined there."""
    weight, x = values[place], values[1 - place]
    if not isinstance(weight, LAZY):
        return bind(eqn, values)[0]
    use = None if isinstance(weight, Squares) else _use(eqn, weight, x, place)
    out = None
    if use is not None and isinstance(weight, View):
        use = use._replace(x_fixed=x_fixed, place=(id(eqn), *part))
        spread = [d for d in use.free if _is_spread(weight, d, handler)]
        if spread and use.kind == "dot":
            out = _spread_product(eqn, weight, x, use, spread, handler)
        else:
            out = handler.contract(weight, x, use, eqn, values[2:])
    elif use is not None:
        out = _of_parts(eqn, values, place, use, handler, x_fixed, part)
    if out is not None:
        return out
    given = list(values)
    given[place] = as_array(weight, handler, eqn.primitive.name)
    return bind(eqn, given)[0]


def _of_parts(
    eqn: Any,
    values: list[Any],
    place: int,
    use: Use,
    handler: Handler,
    x_fixed: bool,
    part: tuple[int, ...],
) -> Any:
    """A contraction of joined weights: with each of them, then joined or summed."""
    joined, x = values[place], values[1 - place]
    dim, partner, result = joined.dim, None, None
    spec = eqn.params["dimension_numbers"] if use.kind == "conv" else None
    if use.groups > 1:
        return None
    if dim in use.free:
        result = _place_in_result(eqn, use, x, dim)
    elif dim in use.batch and use.kind == "dot":
        partner, result = use.x_batch[use.batch.index(dim)], use.batch.index(dim)
    elif spec is not None and dim == spec.rhs_spec[1]:
        partner = spec.lhs_spec[1]
    elif dim in use.contracted and use.kind != "conv":
        partner = use.x_contracted[use.contracted.index(dim)]
    else:
        return None
    outputs, start = [], 0
    for i, weight in enumerate(joined.parts):
        end = start + weight.shape[dim]
        given = list(values)
        given[place] = weight
        if partner is not None:
            given[1 - place] = jax.lax.slice_in_dim(x, start, end, axis=partner)
        outputs.append(_product(eqn, given, place, handler, x_fixed, (*part, i)))
        start = end
    if result is None:
        return functools.reduce(operator.add, outputs)
    return jnp.concatenate(outputs, result)


def _is_spread(view: View, dim: int, handler: Handler) -> bool:
    """Whether a dimension runs over matrices: of a stack, or that indices took."""
    return any(
        a.axis in view.indexed or handler.is_stack(view, a.axis)
        for a in view.dims[dim]
        if a.size > 1
    )


def _spread_product(
    eqn: Any, view: View, x: Any, use: Use, spread: list[int], handler: Handler
) -> Any:
    """A product with several matrices for each row of x, which gets a copy for each."""
    count, batch = len(spread), len(use.batch)
    wide = jax.lax.broadcast(x, [view.shape[d] for d in spread])
    numbers = (
        (tuple(count + d for d in use.x_contracted), use.contracted),
        (
            (*(count + d for d in use.x_batch), *range(count)),
            (*use.batch, *spread),
        ),
    )
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=numbers,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    shape = jax.ShapeDtypeStruct(view.shape, view.dtype)
    (new,) = jax.make_jaxpr(product)(wide, shape).jaxpr.eqns
    batched = _use(new, view, wide, 1)
    if batched is None:
        return None
    batched = batched._replace(x_fixed=use.x_fixed, place=use.place)
    out = handler.contract(view, wide, batched, new)
    if out is None:
        return None
    now: list[int | None] = [*use.batch, *spread]  # the view's dimensions in `out`
    rows = range(len(now), out.ndim - len(use.free) + count)
    now += [None] * len(rows) + [d for d in use.free if d not in spread]
    ours = [now.index(d) for d in use.free]
    sides = ([*ours, *rows], [*rows, *ours])
    return jnp.transpose(out, (*range(batch), *sides[use.position]))


def _place_in_result(eqn: Any, use: Use, x: Any, dim: int) -> int:
    """The dimension of a contraction's result that a free one of the weight becomes."""
    if use.kind == "conv":
        return int(eqn.params["dimension_numbers"].out_spec[1])
    rows = x.ndim - len(use.x_contracted) - len(use.x_batch)
    before = len(use.x_batch) + rows * use.position
    return before + use.free.index(dim)


def _use(eqn: Any, weight: Any, x: Any, place: int) -> Use | None:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        out, *contracted = numbers.rhs_spec
        shape = eqn.outvars[0].aval.shape
        return Use(
            kind="conv",
            position=1,
            contracted=tuple(sorted(contracted)),
            batch=(),
            free=(out,),
            x_contracted=tuple(numbers.lhs_spec[1:]),
            x_batch=(),
            rows=math.prod(
                shape[d] for d in (numbers.out_spec[0], *numbers.out_spec[2:])
            ),
            groups=max(
                eqn.params["feature_group_count"], eqn.params["batch_group_count"]
            ),
        )
    ours, theirs, stack = place, 1 - place, ()
    if name == "dot_general":
        contracting, batch = eqn.params["dimension_numbers"]
    else:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        contracting, batch = numbers.dot_dimension_numbers
        stack = tuple(numbers.rhs_group_dimensions)
        ragged = numbers.lhs_ragged_dimensions
        if batch[0] or len(stack) != 1 or {*ragged} & {*contracting[0]}:
            return None
    used = {*contracting[ours], *batch[ours], *stack}
    gone = {*contracting[theirs], *batch[theirs]}
    rows = math.prod(n for d, n in enumerate(x.shape) if d not in gone)
    return Use(
        kind="ragged" if stack else "dot",
        position=place,
        contracted=tuple(contracting[ours]),
        batch=(*batch[ours], *stack),
        free=tuple(d for d in range(len(weight.shape)) if d not in used),
        x_contracted=tuple(contracting[theirs]),
        x_batch=tuple(batch[theirs]),
        rows=rows // weight.shape[stack[0]] if stack else rows,
    )


# Control flow: views are pytrees, so they cross into the body of any transformation


def _inline(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    return evaluate(eqn.params["jaxpr"], values, handler, fixed)


def _arrays(
    jaxpr: Any,
    values: Sequence[Any],
    handler: Handler,
    at: str,
    fixed: Sequence[bool] = (),
) -> list[Any]:
    outputs = evaluate(jaxpr, values, handler, fixed)
    return [as_array(out, handler, f"output of {at}") for out in outputs]


def _remat(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    given = dict(zip(body.invars, values, strict=True))
    through = {  # views that the body hands on as they are
        i: given[var]
        for i, var in enumerate(body.outvars)
        if not isinstance(var, jex.Literal) and isinstance(given.get(var), LAZY)
    }

    def run(values: list[Any]) -> list[Any]:
        outputs = evaluate(eqn.params["jaxpr"], values, handler, fixed)
        return [
            None if i in through else as_array(out, handler, "output of remat")
            for i, out in enumerate(outputs)
        ]

    prevent_cse, policy = eqn.params["prevent_cse"], eqn.params["policy"]
    outputs = jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)(values)
    return [through.get(i, out) for i, out in enumerate(outputs)]


def _cond(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    index, *operands = values
    branches = [
        functools.partial(_arrays, branch, handler=handler, at="cond")
        for branch in eqn.params["branches"]
    ]
    return jax.lax.switch(index, branches, operands)


def _while(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    cond_count, body_count = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts = values[:cond_count]
    body_consts = values[cond_count : cond_count + body_count]
    init = [
        as_array(value, handler, "carry of while")
        for value in values[cond_count + body_count :]
    ]
    return jax.lax.while_loop(
        lambda carry: _arrays(
            eqn.params["cond_jaxpr"], [*cond_consts, *carry], handler, "while"
        )[0],
        lambda carry: _arrays(
            eqn.params["body_jaxpr"], [*body_consts, *carry], handler, "while"
        ),
        init,
    )


def _scan(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    params = eqn.params
    consts_count, carry_count = scan_sizes(params)
    consts = values[:consts_count]
    carry = values[consts_count : consts_count + carry_count]
    carry = [as_array(value, handler, "carry of scan") for value in carry]
    scanned = [
        _scanned(value, handler) for value in values[consts_count + carry_count :]
    ]

    through: dict[int, Any] = {}  # slices that the body hands on: the whole of them

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [
            item.replace(data=data) if isinstance(item, View) else data
            for (item, _), data in zip(scanned, slices, strict=True)
        ]
        out = evaluate(params["jaxpr"], [*consts, *carry, *xs], handler)
        for x, value in zip(xs, values[consts_count + carry_count :], strict=True):
            for i, y in enumerate(out[carry_count:]):
                if isinstance(x, View) and is_same(y, x):
                    through[i], out[carry_count + i] = value, None
        out = [as_array(x, handler, "output of scan") for x in out]
        return out[:carry_count], out[carry_count:]

    carry, ys = jax.lax.scan(
        body,
        carry,
        [data for _, data in scanned],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    return [*carry, *(through.get(i, y) for i, y in enumerate(ys))]


def _scanned(value: Any, handler: Handler) -> tuple[View | None, Any]:
    """What one step of a scan sees of a value, and the arrays to scan over."""
    if not isinstance(value, LAZY):
        return None, value
    axis = whole_axis(value, 0) if isinstance(value, View) else None
    if axis is None or not isinstance(value, View) or not handler.stacks(value, axis):
        return None, as_array(value, handler, "scan")
    data = handler.along(value, axis, lambda array, at: jnp.moveaxis(array, at, 0))
    return value.replace(dims=value.dims[1:], taken=(*value.taken, axis)), data


def _shard_map(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    """Factors go whole to every device, which cuts its own part of them."""
    params, mesh = eqn.params, eqn.params["mesh"]
    specs, given = list(params["in_specs"]), list(values)
    divided: dict[int, Any] = {}
    for i, (value, spec) in enumerate(zip(values, specs, strict=True)):
        if not isinstance(value, LAZY):
            continue
        names = {d: x for d, x in enumerate(spec) if x is not None}
        if isinstance(value, View) and all(
            sum(a.size > 1 for a in value.dims[d]) == 1 for d in names
        ):
            divided[i], specs[i] = names, jax.sharding.PartitionSpec()
        else:
            given[i] = as_array(value, handler, "shard_map")

    def local(value: Any, names: dict[int, Any]) -> Any:
        for dim, name in names.items():
            along = (name,) if isinstance(name, str) else tuple(name)
            count = math.prod(mesh.shape[x] for x in along)
            size = value.shape[dim] // count
            value = cut(value, dim, jax.lax.axis_index(along) * size, size, handler)
        return value

    def body(*given: Any) -> tuple[Any, ...]:
        local_values = [
            local(x, divided[i]) if i in divided else x for i, x in enumerate(given)
        ]
        return tuple(
            _arrays(params["jaxpr"], local_values, handler, "shard_map", fixed)
        )

    names = params.get("manual_axes", params.get("newly_manual_axes"))
    return list(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=tuple(params["out_specs"]),
            check_vma=params["check_vma"],
            axis_names=names,
        )(*given)
    )


def _custom_vjp(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    """A function with its own rule: rule and function are walked like any program.

    The gradient that the rule gives to the dense weight is projected; where it is a
    product of two arrays, without ever being computed.
    """
    name = eqn.primitive.name
    values = [x if isinstance(x, View) else as_array(x, handler, name) for x in values]
    if not all(map(_is_real, eqn.outvars)):
        return bind(eqn, [as_array(value, handler, name) for value in values])
    forward, backward, count = _rule(eqn)

    @jax.custom_vjp
    def run(values: list[Any]) -> list[Any]:
        return _arrays(eqn.params["call_jaxpr"], values, handler, name, fixed)

    def run_forward(values: list[Any]) -> tuple[list[Any], Any]:
        outputs = evaluate(forward, values, handler, fixed)
        arrays = [as_array(x, handler, f"output of {name}") for x in outputs[:count]]
        views = [x if isinstance(x, View) else None for x in values]
        return arrays, (views, outputs[count:])

    def run_backward(saved: Any, gradients: list[Any]) -> tuple[list[Any]]:
        views, residuals = saved
        env = _environment(backward, [*residuals, *gradients], handler)
        made = {var: x for x in backward.jaxpr.eqns for var in x.outvars}
        given = iter(backward.jaxpr.outvars)
        new: list[Any] = []
        for x, view in zip(eqn.invars, views, strict=True):
            if not _is_real(x):
                new.append(None)
            elif view is None:
                found = _read(env, next(given))
                new.append(as_array(found, handler, f"output of {name}"))
            else:
                data = _projected(view, next(given), env, made, handler)
                new.append(view.replace(data=data))
        return (new,)

    run.defvjp(run_forward, run_backward)
    return run(values)


def _rule(eqn: Any) -> tuple[Any, Any, int]:
    """The jaxprs of a custom rule: to outputs and residuals, and from these back.

    Back come the gradients of the real inputs.
    """
    real = [*map(_is_real, eqn.invars)]

    def call(*arrays: Any) -> Any:
        def of_real(*given: Any) -> Any:
            left = iter(given)
            each = zip(arrays, real, strict=True)
            return tuple(bind(eqn, [next(left) if is_in else x for x, is_in in each]))

        return jax.vjp(of_real, *(x for x, i in zip(arrays, real, strict=True) if i))

    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
    forward, (outputs, pull) = jax.make_jaxpr(call, return_shape=True)(*shapes)
    residuals, tree = jax.tree.flatten(pull)

    def back(residuals: list[Any], gradients: Any) -> Any:
        return jax.tree.unflatten(tree, residuals)(gradients)

    return forward, jax.make_jaxpr(back)(residuals, outputs), len(outputs)


def _is_real(var: Any) -> bool:
    return bool(jnp.issubdtype(var.aval.dtype, jnp.floating))


def _projected(
    view: View, var: Any, env: dict[Any, Any], made: dict[Any, Any], handler: Handler
) -> tuple[Any, ...]:
    """The gradient of a view's data from that of its present value, which is `var`.

    The gradient's inner product with the value is <b, a W> where it is a product of a
    and b: the gradient of that is what the data get.
    """
    steps: list[Callable[[Any], Any]] = []  # from the view to what `var` is paired with
    first = var

    def now(data: Any) -> Any:
        value: Any = view.replace(data=data)
        for step in steps:
            value = None if value is None else step(value)
        return value

    eqn = made.get(var)
    while eqn is not None and eqn.primitive.name in _LINEAR:
        steps.append(_LINEAR[eqn.primitive.name](eqn))
        var, eqn = eqn.invars[0], made.get(eqn.invars[0])
    value = now(view.data)
    if eqn is not None and eqn.primitive.name == "dot_general" and value is not None:
        a, b = (_read(env, x) for x in eqn.invars)
        if not isinstance(a, LAZY) and not isinstance(b, LAZY):
            product, b = _transposed_product(eqn, a, b, value)
            out, pull = jax.vjp(
                lambda data: evaluate(product, [a, now(data)], handler)[0], view.data
            )
            (gradient,) = pull(b.astype(out.dtype))
            return tuple(gradient)
    handler.unknown(view, "custom_vjp_call")
    steps.clear()
    out, pull = jax.vjp(lambda x: handler.materialize(now(x)), view.data)
    dense = as_array(_read(env, first), handler, "custom_vjp_call")
    (gradient,) = pull(dense.astype(out.dtype))
    return tuple(gradient)


def _transposed_product(eqn: Any, a: Any, b: Any, value: Any) -> tuple[Any, Any]:
    """The jaxpr of a W, where a b is W's gradient; and b as the result's gradient."""
    (left, right), (batch, other) = eqn.params["dimension_numbers"]
    free = [d for d in range(a.ndim) if d not in (*left, *batch)]
    count = len(batch)
    numbers = (
        (tuple(free), tuple(range(count, count + len(free)))),
        (tuple(batch), tuple(range(count))),
    )
    shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
    product = jax.make_jaxpr(lambda x, w: jax.lax.dot_general(x, w, numbers))(a, shape)
    rows = [right[left.index(d)] for d in sorted(left)]
    columns = [d for d in range(b.ndim) if d not in (*right, *other)]
    return product, jnp.transpose(b, (*other, *rows, *columns))


def _untransposed(eqn: Any) -> Callable[[Any], Any]:
    order = eqn.params["permutation"]
    inverse = [order.index(d) for d in range(len(order))]
    return lambda value: transpose(value, inverse)


_LINEAR: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "transpose": _untransposed,
    "reshape": lambda eqn: lambda x: reshape(x, eqn.invars[0].aval.shape),
    "convert_element_type": lambda eqn: lambda x: cast(x, eqn.invars[0].aval.dtype),
}
"""What W is paired with a value by, in the place of what a primitive made of it."""

_CONTROL_FLOW: dict[
    str, Callable[[Any, list[Any], Handler, Sequence[bool]], list[Any]]
] = {
    "jit": _inline,
    "remat2": _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "shard_map": _shard_map,
    "custom_vjp_call": _custom_vjp,
}
