"""oialr.nnx: a step of Flax NNX that changes its model in place, as its users do."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import normal
from flax import nnx

import oialr_jax as oialr
from oialr_jax.lowrank import is_low_rank

WIDTH, CLASSES, DELAY, STEPS = 32, 4, 4, 7


def squared(out, y):
    return jnp.mean((out - y) ** 2)


# Models as in Flax's own examples


class CNN(nnx.Module):
    """mnist: convolutions, batch statistics, dropout by a stream of its own."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.conv2 = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(128, 32, rngs=rngs)
        self.linear2 = nnx.Linear(32, CLASSES, rngs=rngs)

    @oialr.factored
    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.conv2(self.dropout(x)))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class Block(nnx.Module):
    """gemma: attention and a gated feed-forward layer, each before a norm."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.gate = nnx.Param(normal(1, 2, WIDTH, 2 * WIDTH) * WIDTH**-0.5)
        self.down = nnx.Einsum("bth,hd->btd", (2 * WIDTH, WIDTH), rngs=rngs)
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        a, b = jnp.einsum("btd,kdh->kbth", self.norm2(x), self.gate[...])
        return x + self.down(nnx.gelu(a) * b)


class Listed(nnx.Module):
    """gemma: a list of blocks between an embedding and the same one transposed."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(CLASSES * 4, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    @oialr.factored
    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)[:, -1, :CLASSES]


class Scanned(nnx.Module):
    """lm1b at scale: one block for all layers, scanned and rematerialised."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Block(rngs)

        self.embed = nnx.Embed(CLASSES * 4, WIDTH, rngs=rngs)
        self.blocks = create(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    @oialr.factored
    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        return self.head(forward(self.embed(tokens), self.blocks)[:, -1])


class Recurrent(nnx.Module):
    """An LSTM over a sequence."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    @oialr.factored
    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


def pixels(t):
    x = normal(100 + t, 8, 4, 4, 1)
    return x, jnp.sin(3 * x[:, 0, :, 0])


def tokens(t):
    x = np.random.default_rng(t).integers(0, 4 * CLASSES, (8, 6))
    return jnp.asarray(x), jnp.asarray(np.eye(CLASSES, dtype=np.float32)[x[:, 0] % 4])


def series(t):
    x = normal(100 + t, 8, 5, WIDTH)
    return x, jnp.tanh(x[:, 0, :CLASSES])


MODELS = {
    "mnist_cnn": (CNN, pixels, 3),
    "gemma_list": (Listed, tokens, 12),
    "lm1b_scan_remat": (Scanned, tokens, 6),
    "lstm": (Recurrent, series, 2),
}


def make(name, tx=None):
    """A model, its optimizer, and a step whose `traces` count how often it is traced.

    The step is in its users' words: nothing in it speaks of low rank.
    """
    model_class, batch, _ = MODELS[name]
    model = model_class(nnx.Rngs(0))
    tx = optax.adamw(5e-3) if tx is None else tx
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def train_step(model, optimizer, metrics, x, y):
        traces.append(x)

        def loss_fn(model):
            return squared(model(x), y)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        metrics.update(loss=loss)
        optimizer.update(model, grads)
        return loss

    return model, optimizer, train_step, batch, traces


def metric():
    return nnx.MultiMetric(loss=nnx.metrics.Average("loss"))


@pytest.mark.parametrize(
    "name",
    [
        "mnist_cnn",
        "lstm",
        pytest.param("gemma_list", marks=pytest.mark.long),
        pytest.param("lm1b_scan_remat", marks=pytest.mark.long),
    ],
)
def test_a_step_in_place_goes_on_in_low_rank(name):
    plain, plain_optimizer, plain_step, batch, _ = make(name)
    model, optimizer, train_step, _, traces = make(name)
    metrics = metric()
    step = oialr.nnx.wrap(
        train_step, model, optimizer, metrics, *batch(0), delay=DELAY, budget=0.6
    )
    before = len(traces)
    for t in range(STEPS):
        loss = step(model, optimizer, metrics, *batch(t))
        if t < DELAY:  # dense: as if nothing had been wrapped
            desired = plain_step(plain, plain_optimizer, metric(), *batch(t))
            np.testing.assert_allclose(loss, desired, rtol=1e-5)
        assert np.isfinite(loss)
        if t == DELAY:
            fixed = oialr.nnx.state(model, optimizer).params
    assert len(traces) - before <= 2  # one for each set of shapes
    assert int(metrics.loss.count[...]) == STEPS
    assert int(optimizer.step[...]) == STEPS
    params = nnx.state(model, nnx.Param)
    assert len(step.matrices) == MODELS[name][2]
    counts = oialr.counts(params)
    assert counts.stored <= 0.6 * counts.dense
    nodes = [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]
    first = [x for x in jax.tree.leaves(fixed, is_leaf=is_node) if is_node(x)]
    for a, b in zip(first, nodes, strict=True):
        np.testing.assert_array_equal(a.u, b.u)
        np.testing.assert_array_equal(a.vt, b.vt)
        assert np.any(np.asarray(a.s) != b.s)
    moments = optimizer.opt_state.inner_state[0].mu
    cores = jax.tree.map(
        jnp.shape, oialr.transform.trainable(oialr.nnx._values(params))
    )
    assert jax.tree.map(jnp.shape, oialr.nnx._values(moments)) == cores


is_node = is_low_rank


def test_the_step_after_an_event_is_compiled_ahead():
    model, optimizer, train_step, batch, traces = make("lstm")
    given = model, optimizer, metric()
    schedule = oialr.Schedule(delay=2, every=4, lag=3, layer_step=1.0)
    rule = oialr.RankRule(cutoff=0.5)
    options = {"schedule": schedule, "rule": rule}
    step = oialr.nnx.wrap(train_step, *given, *batch(0), **options)
    for t in range(11):
        if t in (5, 9):  # the thread has until the event
            while not step.adaptive._ahead.done():
                time.sleep(0.01)
            before = len(traces)
        step(*given, *batch(t))
        if t in (5, 9):
            assert len(traces) == before
    assert [x.step for x in step.reports] == [5, 9]
    assert step.reports[1].layers[0].after < step.reports[0].layers[0].after


@pytest.mark.parametrize("given", [True, False], ids=["layout", "its_users"])
def test_on_a_mesh_it_stays_there(given):
    mesh = oialr.sharding.make_mesh("fsdp=4", jax.devices()[:4])
    layout = oialr.sharding.Layout(mesh, min_size=256)

    def trained(layout):
        model, optimizer, train_step, batch, _ = make("lstm")
        if layout is not None and not given:  # as with a jitted init
            state = oialr.nnx.state(model, optimizer)
            state = jax.device_put(state, layout(state))
            oialr.nnx.update(model, optimizer, state)
        call = model, optimizer, metric()
        options = {"layout": layout if given else None}
        step = oialr.nnx.wrap(
            train_step, *call, *batch(0), delay=2, budget=0.5, **options
        )
        if options["layout"] is not None:  # placed before the first step
            on_mesh(oialr.nnx.state(model, optimizer))
        batches = map(batch, range(5))
        if layout is not None:
            batches = (jax.device_put(x, layout.batch) for x in batches)
        losses = [step(*call, *x) for x in batches]
        return losses, oialr.nnx.state(model, optimizer), step

    def on_mesh(state):
        arrays = jax.tree.leaves((state.params, state.opt_state))
        whole = set(mesh.devices.flat)
        assert all(x.sharding.device_set == whole for x in arrays if x.ndim)

    desired, _, _ = trained(None)
    losses, state, step = trained(layout)
    on_mesh(state)
    np.testing.assert_allclose(losses, desired, rtol=1e-4)
    assert len(step.reports) == 2  # the conversion and its cut
    assert oialr.ranks(state.params)
    bases = [x.u for x in jax.tree.leaves(state.params, is_leaf=is_node) if is_node(x)]
    divided = any(not x.sharding.is_fully_replicated for x in bases)
    assert divided == given  # by default small leaves are not


def test_statistics_and_counters_keep_moving():
    model, optimizer, train_step, batch, _ = make("mnist_cnn")
    step = oialr.nnx.wrap(
        train_step, model, optimizer, metric(), *batch(0), delay=1, budget=0.5
    )
    seen = []
    for t in range(4):
        step(model, optimizer, metric(), *batch(t))
        mean = np.array(model.norm.mean[...])
        seen.append((int(model.dropout.rngs.count[...]), mean.tobytes()))
    assert [count for count, _ in seen] == [1, 2, 3, 4]
    assert len(set(seen)) == 4
    model.eval()
    nnx.jit(lambda model, x: model(x))(model, batch(0)[0])  # its users' evaluation
    assert int(model.dropout.rngs.count[...]) == 4


@pytest.mark.parametrize("name", ["lm1b_scan_remat", "lstm"])
def test_at_full_rank_it_is_dense_training(name):
    """Where kernels are square and the optimizer linear."""
    tx = optax.sgd(0.1, momentum=0.9)
    plain, plain_optimizer, plain_step, batch, _ = make(name, tx)
    model, optimizer, train_step, *_ = make(name, tx)
    schedule = oialr.Schedule(delay=2, every=9, layer_step=1.0)
    step = oialr.nnx.wrap(
        train_step,
        model,
        optimizer,
        metric(),
        *batch(0),
        schedule=schedule,
        rule=oialr.RankRule(cutoff=0.0),
        select={"include": "attention/(query|out)|cell/dense_h"},
    )
    assert all(x.m == x.n or "dense_h" in x.path for x in step.matrices)
    for t in range(5):
        loss = step(model, optimizer, metric(), *batch(t))
        desired = plain_step(plain, plain_optimizer, metric(), *batch(t))
        if name != "lstm" or t <= 2:  # dense_h is 32x128: the span of its rows is fixed
            np.testing.assert_allclose(loss, desired, rtol=1e-4)
    assert len(oialr.ranks(oialr.nnx.state(model, optimizer).params)) > 0


@pytest.mark.parametrize("mode", ["graph", "no_updates", "tree", "tree_by_argument"])
def test_every_mode_of_nnx(mode):
    """The loss over a split model, which is how random counters go in tree mode."""
    options = {"graph": False} if mode == "tree_by_argument" else {}
    with (
        nnx.set_graph_mode(mode != "tree"),
        nnx.set_graph_updates(mode != "no_updates"),
    ):
        model = CNN(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
        traces = []

        @nnx.jit(**options)
        def train_step(model, optimizer, x, y):
            traces.append(x)
            graphdef, params, rest = nnx.split(model, nnx.Param, ..., **options)

            def loss_fn(params, rest):
                return squared(nnx.merge(graphdef, params, rest)(x), y)

            loss, grads = nnx.value_and_grad(loss_fn, **options)(params, rest)
            optimizer.update(model, grads)
            return loss

        step = oialr.nnx.wrap(
            train_step, model, optimizer, *pixels(0), delay=DELAY, budget=0.5
        )
        before = len(traces)
        losses = [step(model, optimizer, *pixels(t)) for t in range(STEPS)]
    assert np.all(np.isfinite(losses))
    assert len(traces) - before <= 2
    assert int(model.dropout.rngs.count[...]) == STEPS
    assert len(oialr.ranks(oialr.nnx.state(model, optimizer).params)) == 3


# What works on the result


@pytest.fixture(scope="module")
def low():
    """A model and its optimizer after the conversion."""
    model, optimizer, train_step, batch, _ = make("lstm")
    metrics = metric()
    step = oialr.nnx.wrap(
        train_step, model, optimizer, metrics, *batch(0), delay=1, budget=0.5
    )
    for t in range(3):
        step(model, optimizer, metrics, *batch(t))
    return model, optimizer


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_split_merge_clone_and_display(low, capsys):
    model, _ = low
    x = series(0)[0]
    desired = model(x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    np.testing.assert_array_equal(nnx.merge(graphdef, params, rest)(x), desired)
    np.testing.assert_array_equal(nnx.clone(model)(x), desired)
    dense = oialr.materialize(model)
    assert oialr.ranks(oialr.nnx._values(nnx.state(dense))) == {}
    np.testing.assert_allclose(dense(x), desired, rtol=1e-4, atol=1e-5)
    nnx.display(model)
    assert "LowRank" in capsys.readouterr().out


def test_orbax_saves_and_restores_it(low, tmp_path):
    model, _ = low
    state = nnx.state(model, nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "model", target)
    copy = nnx.clone(model)
    nnx.update(copy, jax.tree.map(jnp.zeros_like, state))
    nnx.update(copy, restored)
    same(nnx.state(copy, nnx.Param), nnx.state(model, nnx.Param))
    x = series(0)[0]
    np.testing.assert_array_equal(copy(x), model(x))


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param(1, marks=pytest.mark.long),
        3,
        pytest.param(5, marks=pytest.mark.long),
    ],
)
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(middle, tmp_path):
    """Before, between (a lag) and after the conversion at step 4."""
    schedule = oialr.Schedule(delay=2, every=3, lag=2, stop=3)

    def begin():
        model, optimizer, train_step, batch, _ = make("mnist_cnn")
        step = oialr.nnx.wrap(
            train_step, model, optimizer, metric(), *batch(0), schedule=schedule
        )
        return model, optimizer, step, batch

    model, optimizer, step, batch = begin()
    with oialr.Checkpoints(tmp_path) as checkpoints:
        for t in range(7):
            if t == middle:
                checkpoints.save(oialr.nnx.state(model, optimizer))
            step(model, optimizer, metric(), *batch(t))
        other, other_optimizer, step, _ = begin()
        template = oialr.nnx.state(other, other_optimizer)
        restored = checkpoints.restore(template, other_optimizer.tx)
    oialr.nnx.update(other, other_optimizer, restored.state)
    for t in range(middle, 7):
        step(other, other_optimizer, metric(), *batch(t))
    keys = jax.random.key_data
    whole, again = (
        jax.tree.map(
            lambda x: keys(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
            oialr.nnx.state(*pair),
        )
        for pair in ((model, optimizer), (other, other_optimizer))
    )
    same(whole, again)
    assert oialr.ranks(whole.params) != {}


# What follows, and what the optimizer had


def averaged(follow):
    """A model with an average of its weights, through a conversion and truncations."""
    model, optimizer, _, batch, _ = make("lstm", optax.sgd(0.1))
    ema = nnx.clone(model)

    @nnx.jit
    def train_step(model, optimizer, ema, x, y):
        loss, grads = nnx.value_and_grad(lambda model: squared(model(x), y))(model)
        optimizer.update(model, grads)
        params, average = nnx.state(model, nnx.Param), nnx.state(ema, nnx.Param)
        nnx.update(ema, optax.incremental_update(params, average, 0.5))
        return loss

    step = oialr.nnx.wrap(
        train_step,
        model,
        optimizer,
        ema,
        *batch(0),
        schedule=oialr.Schedule(delay=2, every=2, layer_step=1.0),
        rule=oialr.RankRule(cutoff=0.3),
        follow=follow,
    )
    for t in range(6):
        step(model, optimizer, ema, *batch(t))
    return model, ema, step


def test_an_average_follows_every_event():
    model, ema, step = averaged("ema")
    assert [x.step for x in step.reports] == [2, 2, 4]
    ranks = oialr.ranks(oialr.nnx._values(nnx.state(model, nnx.Param)))
    assert ranks != {}
    assert oialr.ranks(oialr.nnx._values(nnx.state(ema, nnx.Param))) == ranks
    x = series(0)[0]
    apart = np.abs(np.asarray(ema(x) - model(x)))
    assert 0 < np.max(apart) < 0.5


def test_a_tree_that_does_not_follow_is_refused():
    match = r"combines params with ema, which .*follow=\('ema',\)"
    with pytest.raises(ValueError, match=match):
        averaged(())


def test_one_that_comes_from_before_an_event_is_refused():
    model, optimizer, _, batch, _ = make("lstm", optax.sgd(0.1))

    @nnx.jit
    def with_target(model, optimizer, target, x, y):
        y = y + 0.1 * jax.lax.stop_gradient(target(x))
        grads = nnx.grad(lambda model: squared(model(x), y))(model)
        optimizer.update(model, grads)

    target = nnx.clone(model)
    step = oialr.nnx.wrap(
        with_target,
        model,
        optimizer,
        target,
        *batch(0),
        schedule=oialr.Schedule(delay=1, every=2, layer_step=1.0),
    )
    for t in range(3):
        step(model, optimizer, target, *batch(t))
    before = oialr.nnx.state(model, optimizer)
    target = nnx.clone(model)  # in the bases that the event at step 3 is going to turn
    with pytest.raises(ValueError, match=r"target\.rnn/cell/.*follow='target'"):
        step(model, optimizer, target, *batch(3))
    same(oialr.nnx.state(model, optimizer).params, before.params)
    step(model, optimizer, oialr.materialize(target), *batch(3))
    with pytest.raises(ValueError, match=r"target\.rnn/cell/.*follow='target'"):
        step(model, optimizer, target, *batch(4))


def test_moments_that_were_there_are_kept():
    model, optimizer, train_step, batch, _ = make("lstm")
    for t in range(3):
        train_step(model, optimizer, metric(), *batch(t))
    moments = jax.tree.map(jnp.copy, oialr.nnx._values(optimizer.opt_state))
    step = oialr.nnx.wrap(
        train_step, model, optimizer, metric(), *batch(0), delay=9, budget=0.5
    )
    same(oialr.nnx._values(optimizer.opt_state.inner_state), moments)
    step(model, optimizer, metric(), *batch(3))
    assert int(optimizer.step[...]) == 4


def test_a_model_and_optimizer_in_one():
    model, _, _, batch, _ = make("lstm")
    both = nnx.ModelAndOptimizer(model, optax.adamw(5e-3))

    def train_step(optimizer, x, y):  # not compiled: wrap does it
        loss, grads = nnx.value_and_grad(lambda model: squared(model(x), y))(
            optimizer.model
        )
        optimizer.update(grads)
        return loss

    step = oialr.nnx.wrap(
        train_step, both, y=batch(0)[1], x=batch(0)[0], delay=1, budget=0.5
    )
    for t in range(3):
        x, y = batch(t)
        step(both, y=y, x=x)
    assert oialr.ranks(oialr.nnx.state(model, both).params) != {}


# What is wrong is said in one sentence, and nothing is changed


class Plain(nnx.Module):
    """Without `factored`."""

    def __init__(self, rngs):
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.b = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def plain(model_class=Plain):
    model = model_class(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def plain_step(model, optimizer, x):
    loss = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))
    optimizer.update(model, loss(model)[1])


def right_step(model, optimizer, x):
    loss = nnx.value_and_grad(oialr.factored(lambda model: jnp.mean(model(x) ** 2)))
    optimizer.update(model, loss(model)[1])


def idle_step(model, optimizer, x):
    nnx.grad(oialr.factored(lambda model: jnp.mean(model(x) ** 2)))(model)


X = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
wrap = oialr.nnx.wrap
MISTAKES = {
    "not_factored": (
        lambda: wrap(plain_step, *plain(), X, delay=2),
        ValueError,
        r"could not run in low rank: write @oialr_jax\.factored above",
    ),
    "no_step": (
        lambda: wrap(*plain(), right_step, X, delay=2),
        TypeError,
        "the step comes first, .*got Plain",
    ),
    "partial": (
        lambda: wrap(nnx.cached_partial(nnx.jit(right_step), *plain()), X, delay=2),
        TypeError,
        "one nnx.Optimizer, with its model, as arguments of their own",
    ),
    "no_optimizer": (
        lambda: wrap(right_step, plain()[0], X, delay=2),
        TypeError,
        "has to get one nnx.Optimizer.*got Plain, ShapeDtypeStruct",
    ),
    "no_model": (
        lambda: wrap(right_step, plain()[1], X, delay=2),
        TypeError,
        "has to get its model as an argument",
    ),
    "no_batch": (
        lambda: wrap(right_step, *plain(), delay=2),
        ValueError,
        r"train_step\(Plain, Optimizer\) fails.*one batch.*missing 1 required",
    ),
    "another_batch": (
        lambda: wrap(right_step, *plain(), jnp.ones((8, 3)), delay=2),
        ValueError,
        r"train_step\(Plain, Optimizer, float32\[8, 3\]\) fails",
    ),
    "option": (
        lambda: wrap(right_step, *plain(), X, delay=2, budgt=0.3),
        ValueError,
        "fails.*unexpected keyword argument 'budgt'",
    ),
    "no_delay": (
        lambda: wrap(right_step, *plain(), X),
        ValueError,
        "give steps=, the length of the run.*or delay=",
    ),
    "budget": (
        lambda: wrap(right_step, *plain(), X, delay=2, budget=0.001),
        ValueError,
        "the least is budget=",
    ),
    "follow": (
        lambda: wrap(right_step, *plain(), X, delay=2, follow="ema"),
        ValueError,
        "`follow` names 'ema', which is no argument of train_step.*model, optimizer, x",
    ),
    "no_update": (
        lambda: wrap(idle_step, *plain(), X, delay=2)(*plain(), jnp.ones((8, WIDTH))),
        ValueError,
        r"has to call optimizer\.update\(model, grads\) as often",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_to_change(mistake):
    call, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


def test_a_refused_optimizer_is_as_it_was():
    model, optimizer = plain()
    tx, before = optimizer.tx, jax.tree.structure(optimizer.opt_state)
    with pytest.raises(ValueError, match="factored"):
        wrap(plain_step, model, optimizer, X, delay=2)
    assert optimizer.tx is tx
    assert jax.tree.structure(optimizer.opt_state) == before


def test_the_state_of_another_model_is_refused(low):
    model, optimizer = plain()
    with pytest.raises(ValueError, match="`params` is the state of another model"):
        oialr.nnx.update(model, optimizer, oialr.nnx.state(*low))
