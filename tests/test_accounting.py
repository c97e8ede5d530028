"""The published Autoformer run, reproduced to the weight from shapes alone."""

import jax
import jax.numpy as jnp

import oialr_jax as oialr
from oialr_jax.lowrank import Axes
from oialr_jax.matrices import Matrix

# Autoformer on ETTm2 (7 variables, 5 time features), model width 512, in the order in
# which the network executes; (name, input side, output side).
ATTENTION = [
    ("query", 512, 512),
    ("key", 512, 512),
    ("value", 512, 512),
    ("out", 512, 512),
]
FEED_FORWARD = [("conv1", 512, 2048), ("conv2", 2048, 512)]
EMBEDDING = [("token", 3 * 7, 512), ("time", 5, 512)]


def layers():
    named = [(f"encoder_embedding/{n}", a, b) for n, a, b in EMBEDDING]
    for i in range(2):
        named += [(f"encoder_{i}/{n}", a, b) for n, a, b in ATTENTION + FEED_FORWARD]
    named += [(f"decoder_embedding/{n}", a, b) for n, a, b in EMBEDDING]
    named += [(f"decoder/self_{n}", a, b) for n, a, b in ATTENTION]
    named += [(f"decoder/cross_{n}", a, b) for n, a, b in ATTENTION]
    named += [(f"decoder/{n}", a, b) for n, a, b in FEED_FORWARD]
    return [*named, ("decoder/trend", 3 * 512, 7), ("projection", 512, 7)]


def matrices():
    return [
        Matrix(name, Axes((m, n), (), (0,), (1,)), rows=1, kind="dot")
        for name, m, n in layers()
    ]


def test_the_floor_ranks_of_the_published_run():
    eligible = oialr.select(matrices(), dense_last=0, min_aspect=0.1)
    assert len(eligible) == 22
    # dense_first counted among the eligible ones, as the authors' code: the first query
    authors = {"min_aspect": 0.1, "among_eligible": True}
    chosen = oialr.select(matrices(), dense_first=1, dense_last=0, **authors)
    assert len(chosen) == 21
    assert "encoder_0/query" not in {x.path for x in chosen}

    rule = oialr.RankRule()
    floors = {x.path: rule.min_rank(min(x.m, x.n)) for x in chosen}
    assert set(floors.values()) == {5}

    def node(x):
        r = floors[x.path]
        shapes = ((x.m, r), (r, r), (r, x.n))
        return oialr.LowRank(
            *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes), x.axes
        )

    total = 10_536_967
    params = {
        x.path: node(x)
        if x.path in floors
        else jax.ShapeDtypeStruct((x.m, x.n), jnp.float32)
        for x in matrices()
    }
    in_matrices = sum(x.m * x.n for x in matrices())
    params["biases and norms"] = jax.ShapeDtypeStruct(
        (total - in_matrices,), jnp.float32
    )
    counted = oialr.counts(params)
    assert counted.dense == total
    assert counted.trainable == 313_876
    assert f"{counted.trainable / counted.dense:.6%}" == "2.978808%"
    in_low_rank = sum(x.m * x.n for x in chosen)
    factors = sum(5 * (x.m + 5 + x.n) for x in chosen)
    assert counted.stored == total - in_low_rank + factors
