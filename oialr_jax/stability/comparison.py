"""How much bases and mixing change in time.

The orthogonal basis of a matrix W is its polar factor P = U Vᵀ; how W mixes the basis
vectors is seen in R of W = Q R. Both are those of the tall view of W (its transpose if
m < n). A low-rank leaf is never materialised: for W = B C, with B orthonormal,
everything is computed from the small C.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oialr_jax.linalg import compute_dtype, singular_values, token_of
from oialr_jax.lowrank import Axes, PyTree, is_low_rank
from oialr_jax.matrices import Matrix
from oialr_jax.orthogonal.polar import or_one, polar
from oialr_jax.stability.singular import leaves_at


class Stability(NamedTuple):
    """How alike a matrix is at two times; one number per matrix of a stack.

    `basis`: tr(P₁ᵀP₂) / n, the mean cosine of the columns of P, in [-1, 1].
    `mixing`: 1 - |R₁ - R₂| / 2 with R of norm 1 and a diagonal not negative, in [0, 1].
    `cosine`: of W₁ and W₂ themselves, the control. `change`: |W₂ - W₁| / |W₁|.
    `null`: the same after a random change of W₁ as large as that to W₂, or None.
    """

    basis: Float[Array, "*l"]
    mixing: Float[Array, "*l"]
    cosine: Float[Array, "*l"]
    change: Float[Array, "*l"]
    null: "Stability | None" = None


class Portrait(NamedTuple):
    """The factors by which a matrix is compared later: W = B C, P = B X.

    Shapes:   b: (*l, a, r) orthonormal columns, or None for I; c, x: (*l, r, k), r = a
              without b; r: (*l, min(r, k), k). a and k are the long and the short side.
    """

    b: Any
    c: Any
    x: Any
    r: Any


Portraits = dict[str, Portrait]


class Tracker(NamedTuple):
    """Two pure functions that follow the matrices of a run, in the manner of Optax.

    `init(params)` gives the state, about three times the size of the matrices (less
    where they are low-rank); `update(state, params, key=None)` gives the new state and,
    by path, the `Stability` since the params before, with a null where there is a key.
    They work under `jax.jit`, in `jax.lax.scan`, and between steps on the host, where
    leaves may become low-rank or lose ranks from one call to the next.
    """

    init: Callable[..., Portraits]
    update: Callable[..., tuple[Portraits, dict[str, Stability]]]


def tracker(matrices: Sequence[Matrix]) -> Tracker:
    """A `Tracker` of some matrices, as `find_matrices` gives them.

    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> axes = Axes(shape=(8, 4), stack=(), inputs=(0,), outputs=(1,))
    >>> track = tracker([Matrix("w", axes, rows=1, kind="dot")])
    >>> state, values = track.update(track.init({"w": x}), {"w": 2 * x})
    >>> round(float(values["w"].basis), 4), round(float(values["w"].change), 4)
    (1.0, 1.0)
    """
    matrices = tuple(matrices)

    def update(
        state: Portraits, params: PyTree, key: Any = None
    ) -> tuple[Portraits, dict[str, Stability]]:
        new = _portraits(params, matrices, _end(state))
        values = _compared(state, new, key)
        nulls = jax.tree.leaves([x.null for x in values.values()])
        return (_waiting(new, nulls) if nulls else new), values

    return Tracker(lambda params: _portraits(params, matrices), update)


def compare(
    before: PyTree, after: PyTree, matrices: Sequence[Matrix], *, key: Any = None
) -> dict[str, Stability]:
    """How alike each matrix is in two params trees, by path in the order of `matrices`.

    Traceable. Leaves may be dense in one tree and low-rank in the other. No number
    changes with the sign or order of singular vectors, nor, but for `change`, when a
    tree is multiplied by a positive number.

    Of a matrix of rank r < n only the r directions that it has make up P, and `basis`
    is tr(P₁ᵀP₂) / √(r₁r₂): a cut from n to r directions by itself gives √(r/n).
    Singular values below `polar.RESOLVED` times the largest count in part, smoothly.
    A matrix of zeros has no basis: `basis` and `cosine` are 0.

    Args:     key: of the random change; without one there is no `Stability.null`.
    Raises:   ValueError: a matrix names no leaf of a tree, or one of another shape.
    Source:   Stability: Coquelin et al. 2024 (arXiv 2401.08505), mean cosine of the
              columns of P between checkpoints. Their similarity of R is not published;
              `mixing` is our own, of R scaled to norm 1, so that weight decay is no
              mixing. A change of given size leaves more of a tall P than of a square
              one, and any change gets small with the learning rate: hence the null.
    """
    matrices = tuple(matrices)
    first = _portraits(before, matrices)
    second = _portraits(after, matrices, _end(first))
    return _compared(first, second, key)


def sigmas(portraits: Portraits, after: PyTree = ()) -> dict[str, Array]:
    """The singular values of each W, descending, which are those of its R: traceable.

    Args:     after: arrays that are computed before LAPACK is called.
    Shapes:   (*l, min(r, k)).
    """
    groups: dict[Any, list[str]] = defaultdict(list)
    for path, one in portraits.items():
        groups[_side(one.r)].append(path)
    token = token_of([*jax.tree.leaves(after), _end(portraits)])
    found: dict[str, Array] = {}
    for paths in groups.values():
        members = [portraits[path].r for path in paths]
        batch = jnp.concatenate([r.reshape(-1, *r.shape[-2:]) for r in members])
        sigma = singular_values(batch + token.astype(batch.dtype))
        token = token_of([sigma])
        stacks = [r.shape[:-2] for r in members]
        for path, stack, x in zip(
            paths, stacks, jnp.split(sigma, _ends(stacks)), strict=True
        ):
            found[path] = x.reshape(*stack, -1)
    return {path: found[path] for path in portraits}


def _portraits(
    params: PyTree, matrices: Sequence[Matrix], token: Any = 0.0
) -> Portraits:
    """Of all matrices, computed by one program for each shape of their cores.

    Args:     token: 0, which is known once no other LAPACK call runs.
    """
    leaves = leaves_at(params, matrices)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (leaf, matrix) in enumerate(zip(leaves, matrices, strict=True)):
        long, short = max(matrix.m, matrix.n), min(matrix.m, matrix.n)
        rows = leaf.s.shape[-1] if is_low_rank(leaf) else long  # of the core
        groups[rows, short, compute_dtype(leaf.dtype)].append(i)
    found: dict[int, Portrait] = {}
    token = jnp.asarray(token)
    for group in groups.values():
        axes = tuple(matrices[i].axes for i in group)
        portraits, token = _portrayed([leaves[i] for i in group], token, axes)
        found |= dict(zip(group, portraits, strict=True))
    return {matrix.path: found[i] for i, matrix in enumerate(matrices)}


@functools.partial(jax.jit, static_argnames="axes")
def _portrayed(
    leaves: list[Any], token: Array, axes: tuple[Axes, ...]
) -> tuple[list[Portrait], Array]:
    views = [_view(leaf, each) for leaf, each in zip(leaves, axes, strict=True)]
    solved, token = _solved([c for _, c in views], token)
    portraits = [
        Portrait(b, c, x, r) for (b, c), (x, r) in zip(views, solved, strict=True)
    ]
    return portraits, token


def _end(portraits: Portraits) -> Array:
    """A token: 0, once all that is in them is computed."""
    return token_of([x for one in portraits.values() for x in (one.x, one.r)])


def _waiting(portraits: Portraits, nulls: list[Array]) -> Portraits:
    """The same portraits, whose next comparison waits for the nulls of this one."""
    path, one = next(iter(portraits.items()))
    token = token_of(nulls).astype(one.r.dtype)
    return portraits | {path: one._replace(r=one.r + token)}


def _view(leaf: Any, axes: Axes) -> tuple[Any, Array]:
    """B and C of the tall view of W = B C, of which a dense matrix has no B.

    Copies: the step that follows may be given the leaf's own buffer to use up.
    """
    tall = axes.m >= axes.n
    dtype = compute_dtype(leaf.dtype)
    if not is_low_rank(leaf):
        w = axes.to_matrix(leaf).astype(dtype)
        return None, jnp.copy(w if tall else jnp.swapaxes(w, -1, -2))
    u, s, vt = (x.astype(dtype) for x in (leaf.u, leaf.s, leaf.vt))
    with jax.default_matmul_precision("highest"):
        if tall:
            return jnp.copy(u), s @ vt
        return jnp.copy(jnp.swapaxes(vt, -1, -2)), jnp.swapaxes(u @ s, -1, -2)


@jax.jit
def _solved(
    cores: list[Array], token: Array
) -> tuple[list[tuple[Array, Array]], Array]:
    """(X, R) of each core C, and a token that makes the next call wait for this one."""
    side = cores[0].shape[-2:]
    batch = jnp.concatenate([c.reshape(-1, *side) for c in cores])
    # `token` is 0: it orders the calls and changes nothing
    ordered = batch + token.astype(batch.dtype)
    if side[0] > side[1]:  # P of Q R is Q times that of R, which is smaller
        q, r = jnp.linalg.qr(ordered)
        token = token_of([q, r])  # polar factors need no LAPACK: the next call goes on
        with jax.default_matmul_precision("highest"):
            x = q @ polar(r)
    else:
        r = jnp.linalg.qr(ordered, mode="r")
        token = token_of([r])
        x = polar(batch)
    r = _upright(r)
    ends = _ends([c.shape[:-2] for c in cores])
    parts = [
        (a.reshape(c.shape), b.reshape(*c.shape[:-2], *b.shape[-2:]))
        for c, a, b in zip(cores, jnp.split(x, ends), jnp.split(r, ends), strict=True)
    ]
    return parts, token


def _upright(r: Array) -> Array:
    """Rows with signs that make the diagonal not negative, which makes R unique."""
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
    return r * sign[..., None].astype(r.dtype)


def _compared(before: Portraits, after: Portraits, key: Any) -> dict[str, Stability]:
    """Of all matrices, by one program for each pair of shapes."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for path in after:
        pair = before[path], after[path]
        groups[tuple(_side(x) for p in pair for x in p)].append(path)
    values: dict[str, Stability] = {}
    token = _end(after)
    for i, paths in enumerate(groups.values()):
        found, token = _alike_group(
            [before[path] for path in paths],
            [after[path] for path in paths],
            None if key is None else jax.random.fold_in(key, i),
            token,
        )
        values |= dict(zip(paths, found, strict=True))
    return {path: values[path] for path in after}


def _side(x: Any) -> Any:
    return None if x is None else (x.shape[-2:], x.dtype)


@jax.jit
def _alike_group(
    before: list[Portrait], after: list[Portrait], key: Any, token: Array
) -> tuple[list[Stability], Array]:
    p, q = _stacked(before), _stacked(after)
    values = _alike(p, q)
    if key is not None:
        c = _randomly(key, p, values.change)
        [(x, r)], token = _solved([c], token)
        values = values._replace(null=_alike(p, Portrait(p.b, c, x, r)))
    stacks = [portrait.c.shape[:-2] for portrait in after]
    parts = [
        [part.reshape(stack) for part, stack in zip(parts, stacks, strict=True)]
        for parts in (jnp.split(v, _ends(stacks)) for v in jax.tree.leaves(values))
    ]
    treedef = jax.tree.structure(values)
    return [jax.tree.unflatten(treedef, x) for x in zip(*parts, strict=True)], token


def _stacked(portraits: list[Portrait]) -> Portrait:
    """Portraits of one shape as that of a stack with a single axis."""
    return jax.tree.map(
        lambda *x: jnp.concatenate([a.reshape(-1, *a.shape[-2:]) for a in x]),
        *portraits,
    )


def _ends(stacks: list[tuple[int, ...]]) -> list[int]:
    """Where to split a batch of matrices into some stacks of them."""
    return list(itertools.accumulate(math.prod(stack) for stack in stacks))[:-1]


def _randomly(key: Any, portrait: Portrait, change: Array) -> Array:
    """C after a random change of the given size, in its span where that is limited."""
    c, x = portrait.c, portrait.x
    noise = jax.random.normal(key, c.shape, c.dtype)
    with jax.default_matmul_precision("highest"):
        if portrait.b is not None:  # XᵀX projects on the span of the rows of C
            noise = (noise @ jnp.swapaxes(x, -1, -2)) @ x
    size = change * _norm(c) / or_one(_norm(noise))
    return c + size[..., None, None] * noise


def _alike(p: Portrait, q: Portrait) -> Stability:
    with jax.default_matmul_precision("highest"):
        overlap = _overlap(p.b, q.b)
        cosine = _inner(p.c, overlap, q.c) / or_one(_norm(p.r) * _norm(q.r))
        basis = _inner(p.x, overlap, q.x) / or_one(_norm(p.x) * _norm(q.x))
        change = _distance(p, q) / or_one(_norm(p.r))  # |R| is |W|
    return Stability(basis, _mixing(p.r, q.r), cosine, change)


def _overlap(b1: Any, b2: Any) -> Any:
    """B₁ᵀB₂, where None stands for the identity."""
    if b1 is None:
        return b2
    return jnp.swapaxes(b1, -1, -2) if b2 is None else jnp.swapaxes(b1, -1, -2) @ b2


def _inner(c1: Array, overlap: Any, c2: Array) -> Array:
    """The sum of the entries of B₁C₁ times those of B₂C₂."""
    other = c2 if overlap is None else overlap @ c2
    return jnp.sum(c1 * other, axis=(-2, -1))


def _distance(p: Portrait, q: Portrait) -> Array:
    """|B₂C₂ - B₁C₁|, without the cancellation that a small one suffers in squares."""
    if q.b is None:
        p, q = q, p
    if q.b is None:
        return _norm(q.c - p.c)
    qt = jnp.swapaxes(q.b, -1, -2)
    if p.b is None:
        inside = qt @ p.c
        return jnp.hypot(_norm(q.c - inside), _norm(p.c - q.b @ inside))
    shared = qt @ p.b
    outside = p.b - q.b @ shared
    gram = jnp.swapaxes(outside, -1, -2) @ outside
    square = jnp.sum(p.c * (gram @ p.c), axis=(-2, -1))
    return jnp.hypot(_norm(q.c - shared @ p.c), jnp.sqrt(jnp.maximum(square, 0)))


def _mixing(r1: Array, r2: Array) -> Array:
    rows = max(r1.shape[-2], r2.shape[-2])
    first, second = (
        jnp.pad(r, [(0, 0)] * (r.ndim - 2) + [(0, rows - r.shape[-2]), (0, 0)])
        / or_one(_norm(r))[..., None, None]
        for r in (r1, r2)
    )
    return 1 - _norm(first - second) / 2


def _norm(x: Array) -> Array:
    """Frobenius norms."""
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))
