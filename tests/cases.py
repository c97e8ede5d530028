"""The shared table: functions in which every use of a matrix occurs.

Each case says what discovery must find, and every law of evaluation runs over all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# path, (stack, inputs, outputs), rows, kind, uses
Found = tuple[str, tuple[tuple[int, ...], ...], int, str, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """`build()` gives (fn, params, x); `found` is in execution order.

    `reported` are the leaves and primitives that cost a materialisation when every
    found matrix is held in low rank; a bfloat16 case is compared at its precision.
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, Any]]
    found: tuple[Found, ...]
    reported: tuple[tuple[str, str], ...] = ()
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        return self.name


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / jnp.sqrt(shape[0])


def linen(module: nn.Module, *shape: int) -> Callable[[], Any]:
    def build() -> Any:
        x = normal(1, *shape)
        params = module.init(jax.random.key(0), x)["params"]
        return (lambda p, x: module.apply({"params": p}, x)), params, x

    return build


def plain(
    fn: Callable[..., Any], x_shape: tuple[int, ...], **shapes: tuple[int, ...]
) -> Callable[[], Any]:
    def build() -> Any:
        params = {
            name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())
        }
        return fn, params, normal(9, *x_shape)

    return build


class Scanned(nn.Module):
    """Three residual blocks as one scanned, rematerialised stack."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                y = nn.Dense(16)(nn.gelu(nn.Dense(24)(x)))
                return x + y, None

        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(6)(blocks()(x, None)[0])


class Tied(nn.Module):
    """A tied embedding: gathered at the start, multiplied at the end."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(12, 10)
        x = nn.Dense(10)(embed(tokens))
        return embed.attend(x)


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(12, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


def build_batch_norm() -> Any:
    module, x = BatchNorm(), normal(1, 2, 6, 6, 4)
    variables = module.init(jax.random.key(0), x)
    stats = variables["batch_stats"]

    def fn(params: Any, x: jax.Array) -> Any:
        return module.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )

    return fn, variables["params"], x


def build_tied() -> Any:
    module, tokens = Tied(), jnp.arange(6).reshape(2, 3)
    params = module.init(jax.random.key(0), tokens)["params"]
    return (lambda p, t: module.apply({"params": p}, t)), params, tokens


def build_nnx() -> Any:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1, 8)
            return self.head(self.attention(x).mean(1))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    return (lambda s, x: nnx.merge(graph, s)(x)), state, normal(1, 2, 6, 6, 3)


def build_haiku() -> Any:
    net = hk.without_apply_rng(
        hk.transform(
            lambda x: hk.Sequential(
                [hk.Conv1D(8, 3), jax.nn.relu, hk.Flatten(), hk.nets.MLP([16, 10])]
            )(x)
        )
    )
    x = normal(1, 4, 6, 5)
    return net.apply, net.init(jax.random.key(0), x), x


def build_equinox() -> Any:
    key = jax.random.key(0)
    model = eqx.nn.MLP(6, 4, width_size=16, depth=2, key=key)
    return (lambda m, x: jax.vmap(m)(x)), model, normal(1, 8, 6)


def build_half() -> Any:
    module = nn.Sequential([nn.Dense(16, dtype=jnp.bfloat16), nn.relu, nn.Dense(8)])
    x = normal(1, 8, 12)
    params = module.init(jax.random.key(0), x)["params"]
    return (lambda p, x: module.apply({"params": p}, x)), params, x


def cond(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.cond(
        x.sum() > 0, lambda x: x @ p["a"], lambda x: jnp.tanh(x) @ p["a"] * 2.0, x
    )


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    """A recurrent cell: its matrices are constants of the scan."""

    def cell(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x_t @ p["wx"] + h @ p["wh"])
        return h, h

    return jax.lax.scan(cell, jnp.zeros((x.shape[1], 8)), x)[1]


def powers(p: Any, x: jax.Array) -> jax.Array:
    """A while loop with a matrix among its constants."""
    return jax.lax.fori_loop(0, jnp.asarray(3), lambda _, y: jnp.tanh(y @ p["w"]), x)


def reshaped_first(p: Any, x: jax.Array) -> jax.Array:
    w = p["qkv"].reshape(8, 3, 2, 4)  # fused kernel, split into heads first
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, w), 2, 0)
    return jnp.einsum("bhts,bshk->bthk", jnp.einsum("bthk,bshk->bhts", q, k), v)


def custom_activation(p: Any, x: jax.Array) -> jax.Array:
    @jax.custom_jvp
    def bent(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, 0.1 * x)

    bent.defjvp(lambda primals, tangents: (bent(*primals), tangents[0]))

    @jax.custom_vjp
    def clipped(x: jax.Array) -> jax.Array:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    return clipped(bent(x @ p["a"])) @ p["b"]


def stack_indexed(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def annotated(p: Any, x: jax.Array) -> jax.Array:
    """Everything that marks a weight and does not change it."""
    mesh = jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,))
    w = jax.lax.with_sharding_constraint(p["w"], NamedSharding(mesh, P()))
    return x @ jnp.copy(jax.lax.optimization_barrier(checkpoint_name(w, "weight")))


def half_stopped(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jax.lax.stop_gradient(p["fixed"])) @ p["moving"]


def stack_looped(p: Any, x: jax.Array) -> jax.Array:
    """One entry of a stack at a time, by an index that is only known when it runs."""

    def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ p["w"][i]), None

    return jax.lax.scan(layer, x, jnp.arange(3))[0]


def iterated(p: Any, x: jax.Array) -> jax.Array:
    for w in p["w"]:  # slices whose strides are one
        x = jnp.tanh(x @ w)
    return x


def gates(p: Any, x: jax.Array) -> jax.Array:
    """Four gates' weights joined before their product, as in Flax's LSTM cell."""
    w = jnp.concatenate([p[name] for name in "ifgo"], axis=-1)
    i, f, g, o = jnp.split(x @ w, 4, axis=-1)
    return jnp.tanh(i * f) + g * o


def rows_joined(p: Any, x: jax.Array) -> jax.Array:
    """Weights and an array one below the other: what each contracts is summed."""
    return x @ jnp.concatenate([p["a"], jnp.ones((2, 5)), p["b"]], axis=0)


def stacked(p: Any, x: jax.Array) -> jax.Array:
    w = jnp.stack([p["a"], p["b"]])
    return jnp.einsum("bi,nij->bnj", x, w) + jnp.einsum("nbi,nij->bnj", x[None], w[:1])


def split_apart(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(p["qkv"], 3, axis=1)
    top, bottom = p["wo"][:4], p["wo"][4:]
    y = jnp.tanh(x @ q) * jnp.sin(x @ k) + x @ v
    return y[:, :4] @ top + jnp.tanh(y[:, 4:]) @ bottom


def heads_cut(p: Any, x: jax.Array) -> jax.Array:
    """Heads split off a fused kernel by a reshape, then taken one at a time."""
    w = p["w"].reshape(6, 3, 4)
    return (x @ w[:, 1]) * (x @ w[:, 2, ::2]).sum(-1, keepdims=True)


def conv_cut(p: Any, x: jax.Array) -> jax.Array:
    """A convolution whose kernel is cut along channels, and its middle tap alone."""

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", None, None, numbers)

    w = p["w"]
    low, high = conv(x[..., :2], w[:, :, :2]), conv(x, w[..., 3:])
    return jnp.tanh(low[..., :5]) + high + (x @ w[1, 1])[..., :5]


def conv_joined(p: Any, x: jax.Array) -> jax.Array:
    w = jnp.concatenate([p["a"], p["b"]], axis=-1)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", None, None, numbers)


def weight_normed(p: Any, x: jax.Array) -> jax.Array:
    """Weight normalisation over the fan-in, a gain per column, and one per row."""
    w = p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2, axis=0, keepdims=True) + 1e-6)
    return x @ (w * p["gain"][None] * p["row"][:, None])


def penalised(p: Any, x: jax.Array) -> jax.Array:
    """What the usual penalties make of a weight: the core's own sums."""
    norms = (
        jnp.sum(p["a"] ** 2) + jnp.sum(jnp.square(p["b"].T)) + jnp.vdot(p["a"], p["a"])
    )
    rows = jnp.linalg.norm(p["b"], axis=1).sum() + jnp.sum(0.5 * (p["b"] * p["b"]))
    return jnp.tanh(x @ p["a"]) @ p["b"] + 1e-2 * (norms + rows)


def experts_by_index(p: Any, x: jax.Array) -> jax.Array:
    """Experts for each row, taken by a computed index, in four spellings."""
    best = jax.lax.top_k(x[:, :3], 2)[1]
    index = best[:, 0]
    y = jnp.einsum("bi,bij->bj", x, p["w"][index])
    y += jnp.einsum("bi,bkij->bkj", y, p["w"][best]).sum(1)
    y += jnp.einsum("bi,bij->bj", y, jnp.take(p["w"], index, axis=0))
    return y + jax.vmap(lambda i, x: x @ p["w"][i])(index, y)


def experts_ragged(p: Any, x: jax.Array) -> jax.Array:
    sizes = jnp.array([3, 0, 5])
    y = jax.nn.relu(jax.lax.ragged_dot(x, p["up"], sizes))
    return jax.lax.ragged_dot(y, p["down"], sizes)


def on_devices(p: Any, x: jax.Array) -> jax.Array:
    """Columns of one weight and rows of another on each device of a mesh."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))

    def block(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.tanh(x @ a) @ b, "model")

    specs = (P(), P(None, "model"), P("model", None))
    mapped = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P())
    return mapped(x, p["a"], p["b"])


@jax.custom_vjp
def ruled(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def ruled_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    return x @ w, (x, w)


def ruled_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = jnp.clip(g, -0.5, 0.5)
    return g @ w.T, x.T @ g


ruled.defvjp(ruled_forward, ruled_backward)


def own_rule(p: Any, x: jax.Array) -> jax.Array:
    """A product whose own rule clips what comes back; it needs no dense weight."""
    return ruled(jnp.tanh(ruled(x, p["a"])), p["b"])


ROW_COL = ((), (0,), (1,))

CASES = (
    Case(
        "dense",
        linen(nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(6)]), 4, 8),
        (
            ("layers_0/kernel", ROW_COL, 4, "dot", 1),
            ("layers_2/kernel", ROW_COL, 4, "dot", 1),
        ),
    ),
    Case(
        "dense_general",
        linen(nn.DenseGeneral((3, 4), axis=(-2, -1)), 5, 2, 6),
        (("kernel", ((), (0, 1), (2, 3)), 5, "dot", 1),),
    ),
    Case(
        "dense_general_batched",
        linen(nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), 3, 5, 6),
        (("kernel", ((0,), (1,), (2,)), 5, "dot", 1),),
    ),
    Case(
        "einsum",
        linen(nn.Einsum((4, 6, 5), "bij,ijk->bk", use_bias=False), 7, 4, 6),
        (("kernel", ((), (0, 1), (2,)), 7, "dot", 1),),
    ),
    Case(
        "einsum_experts",
        plain(
            lambda p, x: jnp.einsum("bed,efd->bef", x, p["w"]), (4, 3, 6), w=(3, 5, 6)
        ),
        (("w", ((0,), (2,), (1,)), 4, "dot", 1),),
    ),
    Case(
        "conv1d",
        linen(nn.Conv(10, (5,), padding="CIRCULAR"), 2, 12, 4),
        (("kernel", ((), (0, 1), (2,)), 24, "conv", 1),),
    ),
    Case(
        "conv2d_strided_dilated",
        linen(
            nn.Sequential(
                [
                    nn.Conv(10, (3, 3), strides=2),
                    nn.Conv(9, (3, 3), kernel_dilation=2),
                    nn.Conv(8, (1, 1)),
                ]
            ),
            2,
            8,
            8,
            4,
        ),
        (
            ("layers_0/kernel", ((), (0, 1, 2), (3,)), 32, "conv", 1),
            ("layers_1/kernel", ((), (0, 1, 2), (3,)), 32, "conv", 1),
            ("layers_2/kernel", ((), (0, 1, 2), (3,)), 32, "conv", 1),
        ),
    ),
    Case(
        "conv_transpose",
        linen(nn.ConvTranspose(6, (3, 3), strides=(2, 2)), 2, 4, 4, 5),
        (("kernel", ((), (0, 1, 2), (3,)), 128, "conv", 1),),
    ),
    Case(
        "attention",
        linen(nn.MultiHeadDotProductAttention(2), 3, 5, 8),
        (
            ("query/kernel", ((), (0,), (1, 2)), 15, "dot", 1),
            ("key/kernel", ((), (0,), (1, 2)), 15, "dot", 1),
            ("value/kernel", ((), (0,), (1, 2)), 15, "dot", 1),
            ("out/kernel", ((), (0, 1), (2,)), 15, "dot", 1),
        ),
    ),
    Case(
        "scan_remat",
        linen(Scanned(), 4, 16),
        (
            # Flax names the outer Dense first, execution order begins with the inner
            ("ScanCheckpointBlock_0/Dense_1/kernel", ((0,), (1,), (2,)), 4, "dot", 1),
            ("ScanCheckpointBlock_0/Dense_0/kernel", ((0,), (1,), (2,)), 4, "dot", 1),
            ("Dense_0/kernel", ROW_COL, 4, "dot", 1),
        ),
    ),
    Case(
        "batch_norm",
        build_batch_norm,
        (
            ("Conv_0/kernel", ((), (0, 1, 2), (3,)), 72, "conv", 1),
            ("Dense_0/kernel", ROW_COL, 2, "dot", 1),
        ),
    ),
    Case(
        "tied_embedding",
        build_tied,
        (
            ("Dense_0/kernel", ROW_COL, 6, "dot", 1),
            ("Embed_0/embedding", ((), (1,), (0,)), 6, "dot", 1),
        ),
        reported=(("Embed_0/embedding", "gather"),),
    ),
    Case(
        "weight_on_the_left",
        plain(lambda p, x: p["w"] @ x, (6, 4), w=(5, 6)),
        (("w", ((), (1,), (0,)), 4, "dot", 1),),
    ),
    Case(
        "left_einsum_experts",
        plain(
            lambda p, x: jnp.einsum("efd,bed->efb", p["w"], x), (4, 3, 6), w=(3, 5, 6)
        ),
        (("w", ((0,), (2,), (1,)), 4, "dot", 1),),
    ),
    Case(
        "used_twice_once_transposed",
        plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (4, 6), w=(6, 5)),
        (("w", ROW_COL, 4, "dot", 2),),
    ),
    Case(
        "transposed_first",
        plain(lambda p, x: x @ p["w"].T, (4, 6), w=(5, 6)),
        (("w", ((), (1,), (0,)), 4, "dot", 1),),
    ),
    Case(
        "reshaped_first",
        plain(reshaped_first, (2, 5, 8), qkv=(8, 24)),
        (("qkv", ROW_COL, 10, "dot", 1),),
    ),
    Case(
        "merged_axes_permuted",
        plain(
            lambda p, x: x @ p["w"].transpose(2, 0, 1).reshape(20, 3),
            (7, 20),
            w=(5, 3, 4),
        ),
        (("w", ((), (0, 2), (1,)), 7, "dot", 1),),
    ),
    Case(
        "scaled",
        plain(lambda p, x: x @ (-p["w"] * 3.0 / jnp.sqrt(2.0)), (4, 6), w=(6, 5)),
        (("w", ROW_COL, 4, "dot", 1),),
    ),
    Case(
        "two_weights_multiplied",
        plain(lambda p, x: x @ (p["a"] @ p["b"]), (4, 6), a=(6, 5), b=(5, 7)),
        (("b", ROW_COL, 6, "dot", 1),),
        reported=(),
    ),
    Case(
        "cond",
        plain(cond, (4, 6), a=(6, 5)),
        (("a", ROW_COL, 4, "dot", 2),),
    ),
    Case(
        "recurrent",
        plain(recurrent, (5, 3, 6), wx=(6, 8), wh=(8, 8)),
        (("wx", ROW_COL, 3, "dot", 1), ("wh", ROW_COL, 3, "dot", 1)),
    ),
    Case(
        "custom_rules",
        plain(custom_activation, (4, 6), a=(6, 9), b=(9, 5)),
        (("a", ROW_COL, 4, "dot", 1), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "stack_indexed",
        plain(stack_indexed, (4, 6), w=(3, 6, 6)),
        (("w", ((0,), (1,), (2,)), 4, "dot", 3),),
    ),
    Case(
        "stack_looped",
        plain(stack_looped, (4, 6), w=(3, 6, 6)),
        (("w", ((0,), (1,), (2,)), 4, "dot", 1),),
    ),
    Case(
        "stack_iterated",
        plain(iterated, (4, 6), w=(3, 6, 6)),
        (("w", ((0,), (1,), (2,)), 4, "dot", 3),),
    ),
    Case(
        "gates_joined",
        plain(gates, (4, 6), i=(6, 5), f=(6, 5), g=(6, 5), o=(6, 5)),
        tuple((name, ROW_COL, 4, "dot", 1) for name in "ifgo"),
    ),
    Case(
        "rows_joined",
        plain(rows_joined, (4, 10), a=(4, 5), b=(4, 5)),
        (("a", ROW_COL, 4, "dot", 1), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "weights_stacked",
        plain(stacked, (4, 6), a=(6, 5), b=(6, 5)),
        (("a", ROW_COL, 4, "dot", 2), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "split_apart",
        plain(split_apart, (4, 6), qkv=(6, 24), wo=(8, 5)),
        (("qkv", ROW_COL, 4, "dot", 3), ("wo", ROW_COL, 4, "dot", 2)),
    ),
    Case(
        "heads_cut",
        plain(heads_cut, (4, 6), w=(6, 12)),
        (("w", ROW_COL, 4, "dot", 2),),
    ),
    Case(
        "conv_cut",
        plain(conv_cut, (2, 4, 4, 4), w=(3, 3, 4, 8)),
        (("w", ((), (0, 1, 2), (3,)), 32, "conv", 3),),
    ),
    Case(
        "conv_joined",
        plain(conv_joined, (2, 4, 4, 4), a=(3, 3, 4, 6), b=(3, 3, 4, 5)),
        (
            ("a", ((), (0, 1, 2), (3,)), 8, "conv", 1),
            ("b", ((), (0, 1, 2), (3,)), 8, "conv", 1),
        ),
    ),
    Case(
        "weight_normed",
        plain(weight_normed, (4, 6), w=(6, 5), gain=(5,), row=(6,)),
        (("w", ROW_COL, 4, "dot", 1),),
    ),
    Case(
        "penalised",
        plain(penalised, (4, 6), a=(6, 8), b=(8, 5)),
        (("a", ROW_COL, 4, "dot", 1), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "experts_by_index",
        plain(experts_by_index, (4, 6), w=(3, 6, 6)),
        (("w", ((0,), (1,), (2,)), 1, "dot", 4),),
    ),
    Case(
        "experts_ragged",
        plain(experts_ragged, (8, 6), up=(3, 6, 7), down=(3, 7, 6)),
        (
            ("up", ((0,), (1,), (2,)), 2, "ragged", 1),
            ("down", ((0,), (1,), (2,)), 2, "ragged", 1),
        ),
    ),
    Case(
        "on_devices",
        plain(on_devices, (4, 6), a=(6, 8), b=(8, 5)),
        (("a", ROW_COL, 4, "dot", 1), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "own_rule",
        plain(own_rule, (4, 6), a=(6, 8), b=(8, 5)),
        (("a", ROW_COL, 4, "dot", 1), ("b", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "annotated",
        plain(annotated, (4, 6), w=(6, 5)),
        (("w", ROW_COL, 4, "dot", 1),),
    ),
    Case(
        "half_stopped",
        plain(half_stopped, (4, 6), fixed=(6, 5), moving=(5, 7)),
        (("fixed", ROW_COL, 4, "dot", 1), ("moving", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "head_of_one_column",
        plain(
            lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"], (4, 6), w=(6, 8), head=(8, 1)
        ),
        (("w", ROW_COL, 4, "dot", 1), ("head", ROW_COL, 4, "dot", 1)),
    ),
    Case(
        "bfloat16_compute",
        build_half,
        (
            ("layers_0/kernel", ROW_COL, 8, "dot", 1),
            ("layers_2/kernel", ROW_COL, 8, "dot", 1),
        ),
        dtype=jnp.bfloat16,
    ),
    Case(
        "nnx",
        build_nnx,
        (
            ("conv/kernel/value", ((), (0, 1, 2), (3,)), 18, "conv", 1),
            ("attention/query/kernel/value", ((), (0,), (1, 2)), 18, "dot", 1),
            ("attention/key/kernel/value", ((), (0,), (1, 2)), 18, "dot", 1),
            ("attention/value/kernel/value", ((), (0,), (1, 2)), 18, "dot", 1),
            ("attention/out/kernel/value", ((), (0, 1), (2,)), 18, "dot", 1),
            ("head/kernel/value", ROW_COL, 2, "dot", 1),
        ),
    ),
    Case(
        "haiku",
        build_haiku,
        (
            ("conv1_d/w", ((), (0, 1), (2,)), 24, "conv", 1),
            ("mlp/~/linear_0/w", ROW_COL, 4, "dot", 1),
            ("mlp/~/linear_1/w", ROW_COL, 4, "dot", 1),
        ),
    ),
    Case(
        "equinox",
        build_equinox,
        (
            ("layers/0/weight", ((), (1,), (0,)), 8, "dot", 1),
            ("layers/1/weight", ((), (1,), (0,)), 8, "dot", 1),
            ("layers/2/weight", ((), (1,), (0,)), 8, "dot", 1),
        ),
    ),
)
BY_NAME = {case.name: case for case in CASES}
