"""Every optimizer by name, on digits, dense and across a conversion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax.lowrank import is_low_rank
from train import images, optimizers
from train.data import digits
from train.models.mlp import MLP

# Rate and decay with which forty steps suffice.
RATES = {
    "adamw": (3e-3, 0.1),
    "adamw_core": (3e-3, 0.1),
    "adam": (3e-3, 1e-4),
    "sgd": (0.1, 5e-4),
    "orthogonal_sgd": (1e-2, 5e-4),
    "lars": (10.0, 5e-4),
    "orthogonal_lars": (10.0, 5e-4),
    "swan": (3e-3, 0.1),
    "spectral_trust_region": (0.05, 0.1),
    "muon": (3e-3, 0.1),
}
STEPS = 40
CONVERSION = 20


@pytest.fixture(scope="module")
def problem():
    data = digits.load()
    image = jnp.asarray(data.train_image[:512], jnp.float32) / 16
    label = jnp.asarray(data.train_label[:512])
    model = MLP(hidden=(32, 24), classes=10)
    params = model.init(jax.random.key(0), image[:1])["params"]

    def forward(params, image):
        return model.apply({"params": params}, image)

    matrices = oialr.select(oialr.find_matrices(forward, params, image))
    return forward, params, matrices, image, label


def test_the_table_here_is_complete():
    assert RATES.keys() == optimizers.OPTIMIZERS.keys()


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("method", ["dense", "oialr"])
def test_digits_are_learnt(problem, name, method):
    forward, params, matrices, image, label = problem
    assert [x.path for x in matrices] == ["hidden0/kernel", "hidden1/kernel"]
    tx = oialr.freeze_bases(optimizers.build(name, *RATES[name], matrices))
    factored = oialr.factored(forward)

    def loss(params):
        logits = factored(params, image)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.mean(entropy)

    @jax.jit
    def step(state):
        value, grads = oialr.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    state = TrainState.create(apply_fn=factored, params=params, tx=tx)
    losses = []
    for t in range(STEPS):
        if method == "oialr" and t == CONVERSION:
            new, opt_state, _ = oialr.factorize(
                state.params, state.opt_state, matrices, tx=tx, rank=16
            )
            state = state.replace(params=new, opt_state=opt_state)
        state, value = step(state)
        losses.append(float(value))
    half = losses[CONVERSION - 1]
    assert half < 0.95 * losses[0]
    assert losses[-1] < 0.95 * half
    low = method == "oialr"
    assert all(is_low_rank(x["kernel"]) == low for x in hidden(state.params))


def hidden(params):
    return [params["hidden0"], params["hidden1"]]


def test_adamw_is_what_it_was(problem):
    _, params, matrices, *_ = problem
    grads = jax.tree.map(lambda x: normal(3, *x.shape), params)
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 10, 100)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate,
            b2=0.99,
            weight_decay=1.0,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
    actual = optimizers.build("adamw", rate, 1.0, matrices)
    states = [actual.init(params), expected.init(params)]
    for _ in range(3):
        results = []
        for i, tx in enumerate((actual, expected)):
            updates, states[i] = jax.jit(tx.update)(grads, states[i], params)
            results.append(updates)
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(
        SystemExit, match=r"unknown optimizer 'mon', did you mean 'muon'"
    ):
        images.main(["digits", "--optimizer", "mon", "--out", str(tmp_path)])


@pytest.mark.long
def test_the_image_program_takes_the_name(tmp_path):
    arguments = [
        "--steps",
        "4",
        "--batch",
        "16",
        "--eval-every",
        "4",
        "--mesh",
        "data=1",
    ]
    arguments += ["--delay", "0.5", "--stop", "0.75", "--optimizer", "orthogonal_sgd"]
    images.main(["digits", *arguments, "--out", str(tmp_path)])
    folder = tmp_path / "digits-oialr-seed0-orthogonal_sgd"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["optimizer"] == "orthogonal_sgd"
    assert summary["ranks"]
