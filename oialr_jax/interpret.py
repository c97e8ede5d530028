"""The one walk: evaluate a jaxpr in which some values are views of a matrix leaf.

Discovery (matrices.py) and evaluation (contract.py) both run this walk and differ only
in what they do where a view meets an array, so what finds a matrix and what contracts
it cannot disagree. A view is lazy: casts, transposes, reshapes and slices of a stack
change its description and never its data.
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from oialr_jax import effects


class Atom(NamedTuple):
    """A factor of one axis of the leaf: `size` entries, `stride` apart along it."""

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A leaf as the traced function sees it after casts, transposes, reshapes, slices.

    `data` holds the leaf's arrays in the leaf's own layout, without the axes in
    `taken`; `dims` names, for each dimension of the present value, the atoms of the
    leaf's axes that it runs over, slowest first. A dimension of size one may be empty.
    """

    data: Any  # arrays, or what JAX puts in their place when it rebuilds the node
    path: str = dataclasses.field(metadata={"static": True})
    leaf_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    taken: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, data: tuple[Array, ...], path: str, shape: Any, dtype: Any) -> "View":
        """The view of a whole leaf."""
        dims = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
        return cls(data, path, tuple(shape), dims, (), jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the present value."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    def replace(self, **changes: Any) -> "View":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class Use(NamedTuple):
    """How a contraction uses a view: its dimensions, and those of the array it meets.

    `contracted`, `batch` and `free` are dimensions of the view, `x_contracted` and
    `x_batch` the partners of the first two in the array. `position` is the operand
    that the view is. `groups` is above one for a grouped convolution. `x_fixed` says
    that the array comes from data alone, so that no gradient goes to it.
    """

    kind: str
    position: int
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    x_contracted: tuple[int, ...]
    x_batch: tuple[int, ...]
    groups: int = 1
    x_fixed: bool = False


@runtime_checkable
class Handler(Protocol):
    """What a walk does with views; `data` is the handler's own."""

    def materialize(self, view: View) -> Array:
        """The present value as an array."""
        ...

    def scale(self, view: View, times: Callable[[Array], Array]) -> View:
        """The view times a scalar, which `times` multiplies an array by."""
        ...

    def unstack(self, view: View, axis: int) -> tuple[Array, ...] | None:
        """`data` with a stack axis of the leaf moved to the front, or None."""
        ...

    def contract(self, view: View, x: Array, use: Use, eqn: Any) -> Array | None:
        """The result of a contraction, or None to have the view materialised."""
        ...

    def unknown(self, view: View, primitive: str) -> None:
        """A view is about to be materialised for a primitive that has no rule."""
        ...


def evaluate(
    jaxpr: Any, args: Sequence[Any], handler: Handler, fixed: Sequence[bool] = ()
) -> list[Any]:
    """The outputs of a closed jaxpr on arrays and views; outputs may be views.

    `jaxpr` is what `jax.make_jaxpr` returns, or a jaxpr found in a primitive's
    parameters. Equations that meet no view are bound again as they are. `fixed` marks
    the args that are data, which get no gradient; without it none is, and in the body
    of a branch or a loop none is.
    """
    env: dict[Any, Any] = {}
    body = getattr(jaxpr, "jaxpr", jaxpr)
    data = {var for var, is_data in zip(body.invars, fixed, strict=False) if is_data}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    env.update(zip(body.constvars, getattr(jaxpr, "consts", ()), strict=True))
    env.update(zip(body.invars, args, strict=True))
    for eqn in body.eqns:
        known = [isinstance(x, jex.Literal) or x in data for x in eqn.invars]
        outputs = _apply(eqn, [read(var) for var in eqn.invars], handler, known)
        env.update(zip(eqn.outvars, outputs, strict=True))
        if all(known):
            data.update(eqn.outvars)
    return [read(var) for var in body.outvars]


def is_same(value: Any, view: Any) -> bool:
    """Whether a value is a view that was not changed."""
    if not isinstance(value, View):
        return False
    return (
        (value.path, value.dims, value.dtype) == (view.path, view.dims, view.dtype)
        and value.taken == view.taken
        and all(map(operator.is_, value.data, view.data))
    )


def as_array(value: Any, handler: Handler, primitive: str) -> Any:
    """The value itself, or a view materialised and reported under `primitive`."""
    if not isinstance(value, View):
        return value
    handler.unknown(value, primitive)
    return handler.materialize(value)


def atoms(view: View, dims: Sequence[int]) -> tuple[Atom, ...]:
    """Atoms of some dimensions, in order, without those of size one."""
    return tuple(a for d in dims for a in view.dims[d] if a.size > 1)


def split(view: View, axes: Sequence[int]) -> list[Atom]:
    """All atoms of some axes of the leaf, axis by axis, slowest first."""
    present = {atom for dim in view.dims for atom in dim if atom.size > 1}
    return [
        atom
        for axis in axes
        for atom in sorted(
            (a for a in present if a.axis == axis), key=lambda a: -a.stride
        )
    ]


def arrange(view: View, array: Array) -> Array:
    """The present value, from the dense leaf in its own layout without taken axes."""
    axes = [a for a in range(len(view.leaf_shape)) if a not in view.taken]
    order = split(view, axes)
    wanted = atoms(view, range(len(view.dims)))
    array = array.reshape([atom.size for atom in order])
    array = jnp.transpose(array, [order.index(atom) for atom in wanted])
    return array.reshape(view.shape).astype(view.dtype)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with context(eqn):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(eqn: Any) -> Iterator[None]:
    """The settings under which an equation was traced, and its name for profilers."""
    name = str(eqn.source_info.name_stack)
    scope = jax.named_scope(name) if name else contextlib.nullcontext()
    with eqn.ctx.manager, scope:
        yield


def _apply(
    eqn: Any, values: list[Any], handler: Handler, fixed: Sequence[bool]
) -> list[Any]:
    if not any(isinstance(value, View) for value in values):
        return bind(eqn, values)
    name = eqn.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](eqn, values, handler, fixed)
    if name in _LAYOUT:
        view = _LAYOUT[name](eqn, values, handler)
        if view is not None:
            return [view]
    use = _use(eqn, values)
    if use is not None:
        # Of two views only the weight side is contracted: the other becomes an array.
        view = values[use.position]
        x = as_array(values[1 - use.position], handler, name)
        use = use._replace(x_fixed=fixed[1 - use.position])
        out = handler.contract(view, x, use, eqn)
        if out is not None:
            return [out]
        values[1 - use.position] = x
    return bind(eqn, [as_array(value, handler, name) for value in values])


# Contractions


def _use(eqn: Any, values: Sequence[Any]) -> Use | None:
    name = eqn.primitive.name
    if name == "dot_general":
        position = 1 if isinstance(values[1], View) else 0
        contracting, batch = eqn.params["dimension_numbers"]
        ours, theirs = position, 1 - position
        used = {*contracting[ours], *batch[ours]}
        free = tuple(d for d in range(len(values[ours].dims)) if d not in used)
        return Use(
            kind="dot",
            position=position,
            contracted=tuple(contracting[ours]),
            batch=tuple(batch[ours]),
            free=free,
            x_contracted=tuple(contracting[theirs]),
            x_batch=tuple(batch[theirs]),
        )
    if name == "conv_general_dilated" and isinstance(values[1], View):
        numbers = eqn.params["dimension_numbers"]
        out, *contracted = numbers.rhs_spec
        groups = max(eqn.params["feature_group_count"], eqn.params["batch_group_count"])
        return Use(
            kind="conv",
            position=1,
            contracted=tuple(sorted(contracted)),
            batch=(),
            free=(out,),
            x_contracted=tuple(numbers.lhs_spec[1:]),
            x_batch=(),
            groups=groups,
        )
    return None


# Layout: what changes the description of a view and not its data


def _convert(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return values[0].replace(dtype=dtype)


def _transpose(eqn: Any, values: list[Any], handler: Handler) -> View:
    (view,) = values
    return view.replace(dims=tuple(view.dims[d] for d in eqn.params["permutation"]))


def _reshape(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    if eqn.params["dimensions"] is not None or len(values) > 1:
        return None
    return _regroup(values[0], eqn.params["new_sizes"])


def _regroup(view: View, shape: Sequence[int]) -> View | None:
    """The view in a new shape, or None when a dimension would straddle an axis."""
    queue = [atom for dim in view.dims for atom in dim]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        dim: list[Atom] = []
        if size == 1 and queue and queue[0].size == 1:
            dim.append(queue.pop(0))
        while size > 1:
            if not queue:
                return None
            axis, stride, extent = queue.pop(0)
            if size % extent == 0:
                dim.append(Atom(axis, stride, extent))
                size //= extent
            elif extent % size == 0:
                rest = extent // size
                dim.append(Atom(axis, stride * rest, size))
                queue.insert(0, Atom(axis, stride, rest))
                size = 1
            else:
                return None
        dims.append(tuple(dim))
    return view.replace(dims=tuple(dims)) if all(a.size == 1 for a in queue) else None


def _squeeze(eqn: Any, values: list[Any], handler: Handler) -> View:
    (view,) = values
    gone = eqn.params["dimensions"]
    return view.replace(dims=tuple(d for i, d in enumerate(view.dims) if i not in gone))


def _broadcast_in_dim(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    view, shape = values[0], eqn.params["shape"]
    kept = eqn.params["broadcast_dimensions"]
    if len(values) > 1 or math.prod(shape) != math.prod(view.shape):
        return None
    dims: list[tuple[Atom, ...]] = [()] * len(shape)
    for position, dim in zip(kept, view.dims, strict=True):
        dims[position] = dim
    return view.replace(dims=tuple(dims))


def _same(eqn: Any, values: list[Any], handler: Handler) -> View:
    return values[0]


def _each(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    if len(values) > 1:
        return None
    (view,) = values
    return view.replace(data=tuple(bind(eqn, [array])[0] for array in view.data))


def _scale(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    name = eqn.primitive.name
    if name == "neg":
        return handler.scale(values[0], jnp.negative)
    position = 0 if isinstance(values[0], View) else 1
    factor = values[1 - position]
    if (
        isinstance(factor, View)
        or np.shape(factor) != ()
        or values[position].dims == ()
    ):
        return None
    if name == "div":
        if position == 1:
            return None
        factor = 1 / factor
    return handler.scale(
        values[position], lambda array: array * jnp.asarray(factor, array.dtype)
    )


def _slice(eqn: Any, values: list[Any], handler: Handler) -> View | None:
    """One entry of a stack axis: what `w[i]` is for a leaf that stacks matrices."""
    view, *starts = values
    if eqn.primitive.name == "slice":
        if eqn.params["strides"] is not None:
            return None
        starts = list(eqn.params["start_indices"])
        sizes = np.subtract(eqn.params["limit_indices"], starts)
    else:
        sizes = np.asarray(eqn.params["slice_sizes"])
    cut = [d for d, size in enumerate(view.shape) if sizes[d] != size]
    if len(cut) != 1 or sizes[cut[0]] != 1:
        return None
    axis = _whole_axis(view, cut[0])
    moved = None if axis is None else handler.unstack(view, axis)
    if moved is None or axis is None:
        return None
    index = starts[cut[0]]
    data = tuple(
        jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in moved
    )
    dims = tuple(() if d == cut[0] else dim for d, dim in enumerate(view.dims))
    return view.replace(data=data, dims=dims, taken=(*view.taken, axis))


def _whole_axis(view: View, dim: int) -> int | None:
    """The axis of the leaf that a dimension is, when it is exactly one whole axis."""
    if len(view.dims[dim]) != 1:
        return None
    axis, _, size = view.dims[dim][0]
    return axis if size == view.leaf_shape[axis] else None


_LAYOUT: dict[str, Callable[[Any, list[Any], Handler], View | None]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _slice,
    "mul": _scale,
    "div": _scale,
    "neg": _scale,
    "copy": _same,
    "name": _same,
    "sharding_constraint": _same,  # speaks of the dense array, which does not exist
    "stop_gradient": _each,
    "optimization_barrier": _each,
    "pvary": _each,
}


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
        if not isinstance(var, jex.Literal) and isinstance(given.get(var), View)
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
    if "num_consts" in params:
        consts_count, carry_count = params["num_consts"], params["num_carry"]
    else:  # jax >= 0.12 keeps the three groups of inputs as one flat tree
        consts_count, carry_count = map(len, params["ft_in"].unpack()[:2])
    consts = values[:consts_count]
    carry = values[consts_count : consts_count + carry_count]
    carry = [as_array(value, handler, "carry of scan") for value in carry]
    scanned = [
        _scanned(value, handler) for value in values[consts_count + carry_count :]
    ]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [
            item.replace(data=data) if isinstance(item, View) else data
            for (item, _), data in zip(scanned, slices, strict=True)
        ]
        out = _arrays(params["jaxpr"], [*consts, *carry, *xs], handler, "scan")
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
    return [*carry, *ys]


def _scanned(value: Any, handler: Handler) -> tuple[View | None, Any]:
    """What one step of a scan sees of a value, and the arrays to scan over."""
    if not isinstance(value, View):
        return None, value
    axis = _whole_axis(value, 0)
    data = None if axis is None else handler.unstack(value, axis)
    if data is None or axis is None:
        return None, as_array(value, handler, "scan")
    return value.replace(dims=value.dims[1:], taken=(*value.taken, axis)), data


_CONTROL_FLOW: dict[
    str, Callable[[Any, list[Any], Handler, Sequence[bool]], list[Any]]
] = {
    "jit": _inline,
    "remat2": _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}


# Tracing a user's function


class Traced(NamedTuple):
    """A function as a closed jaxpr over its array arguments.

    `leaves` are the array arguments in order, LowRank-like nodes as they came, each
    with its path in (args, kwargs); `rebuild` gives the function's result from the
    jaxpr's outputs. Where the function changes its arguments in place, `arguments`
    gives (args, kwargs) as they are afterwards, from the same outputs; else it is None.
    `replaced` tells which of these outputs, by position, stand in the place of which
    leaf. Nothing is written into the arguments themselves.
    """

    jaxpr: Any
    leaves: tuple[tuple[tuple[Any, ...], Any], ...]
    rebuild: Callable[[Sequence[Any]], Any]
    arguments: Callable[[Sequence[Any]], Any] | None
    replaced: dict[int, int]


def trace(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_node: Callable[[Any], bool],
    *,
    share: bool = False,
    axis_env: Sequence[tuple[str, int]] = (),
) -> Traced:
    """The jaxpr of fn(*args, **kwargs) with dense abstract values in place of nodes.

    Arrays, tracers and `jax.ShapeDtypeStruct` are traced; every other argument (flags,
    strings, functions, None) is closed over, as a static argument of `jax.jit` is. With
    `share`, an object that is in the arguments twice is one object for the function.
    `axis_env` has mapped axes, names and sizes, beside those that are bound already.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        (args, kwargs), is_leaf=is_node
    )
    is_traced = [is_node(leaf) or _is_array(leaf) for _, leaf in flat]
    leaves = tuple(item for item, keep in zip(flat, is_traced, strict=True) if keep)
    traced: list[effects.Template] = []
    changed: list[tuple[Any, ...]] = []

    def on_arrays(*arrays: Any) -> list[Any]:
        remaining = iter(arrays)
        full = [
            next(remaining) if keep else leaf
            for (_, leaf), keep in zip(flat, is_traced, strict=True)
        ]
        copies = jax.tree.unflatten(treedef, full)
        if share:
            effects.share((args, kwargs), copies)
        before = jax.tree.structure(copies)
        out = fn(*copies[0], **copies[1])
        result, outputs = effects.Template.of(out, (*_ARRAYS, *_SCALARS))
        origin = {id(x): leaf for x, (_, leaf) in zip(full, flat, strict=True)}
        after, changes = effects.Template.of(copies, _ARRAYS, origin, len(outputs))
        now = jax.tree.leaves(copies)
        traced[:] = [result, after]
        if after.tree == before and all(map(operator.is_, now, full)):
            return outputs  # nothing was changed in place
        changed[:] = [path for path, _ in jax.tree_util.tree_leaves_with_path(copies)]
        return [*outputs, *changes]

    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_node(leaf) else leaf
        for _, leaf in leaves
    ]
    jaxpr = jax.make_jaxpr(on_arrays, axis_env=axis_env)(*abstract)
    result, after = traced
    places = {path: i for i, (path, _) in enumerate(leaves)}
    aligned = (changed, after.leaves, after.is_output) if changed else ((), (), ())
    replaced = {
        output: places[path]
        for path, output, keep in zip(*aligned, strict=True)
        if keep and path in places
    }
    return Traced(jaxpr, leaves, result.fill, after.fill if changed else None, replaced)


@contextlib.contextmanager
def axis_names(axis_env: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Names `axis_env` in the error of a function that uses an axis not in it."""
    try:
        yield
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"the function uses a mapped axis that is not in axis_env={[*axis_env]}: "
            f'pass axis_env=[(name, size)], say axis_env=[("batch", 8)] ({error})'
        ) from error


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_SCALARS = (bool, int, float, complex, np.generic)


def _is_array(x: Any) -> bool:
    return isinstance(x, _ARRAYS)
