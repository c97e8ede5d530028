"""RankRule and Schedule against the authors' rule written out, and published runs."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from oialr_jax.schedule import RankRule, Schedule

# ---------------------------------------------------------------- the authors' rule


def reference_rank(sigma, small_side, cutoff=0.1, floor=0.01):
    """One update of one layer as the authors' code does it, from its description."""
    k = len(sigma)
    floor_rank = int(floor * small_side)
    r = None
    for i in range(k):
        if sigma[i] < cutoff * sigma[0]:
            r = i
            break
    if r is None:
        return k
    if r < k / 2 and k / 2 > floor_rank:
        return int(k / 2)
    if r < floor_rank:
        return floor_rank
    return r


def reference_events(delay, every, steps):
    """Steps of the updates when a counter is compared with the next one at each."""
    due, events = delay, []
    for step in range(steps):
        if step == due:
            events.append(step)
            due += every
    return tuple(events)


def descending(values):
    return np.sort(np.asarray(values, np.float64))[::-1]


lengths = st.integers(1, 60)
spectra = st.one_of(
    st.builds(np.full, lengths, st.floats(1e-3, 1e3)).map(descending),
    lengths.map(np.zeros),
    lengths.map(lambda k: descending([1.0] + [1e-9] * (k - 1))),
    lengths.map(lambda k: descending([2.0] + [0.0] * (k - 1))),
    st.builds(
        lambda k, p: descending(np.arange(1.0, k + 1) ** -p), lengths, st.floats(0, 4)
    ),
    st.lists(st.sampled_from([1.0, 0.5, 0.1, 0.05, 0.0]), min_size=1).map(descending),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60).map(descending),
)
room = st.integers(0, 5000)  # how far the small side is above the rank
from_device = spectra.map(lambda sigma: sigma.astype(np.float32))


@given(sigma=spectra, extra=room)
@example(sigma=np.ones(1), extra=0)
@example(sigma=descending([1.0, 0.1, 0.1]), extra=0)  # equal to the cutoff stays
@settings(deadline=None)
def test_defaults_are_the_authors_rule(sigma, extra):
    small_side = len(sigma) + extra
    expected = reference_rank(sigma, small_side)
    expected = min(expected, len(sigma))  # their floor may be above the rank
    assert RankRule().choose(sigma, small_side) == expected


@given(
    sigma=from_device,
    extra=room,
    cutoff=st.floats(0, 1),
    floor=st.floats(0, 1),
)
@settings(deadline=None)
def test_other_cutoffs_and_floors_too(sigma, extra, cutoff, floor):
    small_side = len(sigma) + extra
    expected = reference_rank(sigma.astype(np.float64), small_side, cutoff, floor)
    rule = RankRule(cutoff=cutoff, min_rank_share=floor)
    assert rule.choose(sigma, small_side) == min(expected, len(sigma))


rules = st.builds(
    RankRule,
    cutoff=st.floats(0, 1),
    min_rank_share=st.floats(0, 1),
    max_drop=st.floats(0, 1, exclude_min=True),
    multiple=st.integers(1, 70),
)


@given(sigma=spectra, extra=room, rule=rules)
@settings(deadline=None)
def test_choice_is_a_rank_between_1_and_the_present_one(sigma, extra, rule):
    r = rule.choose(sigma, len(sigma) + extra)
    assert isinstance(r, int)
    assert 1 <= r <= len(sigma)


@given(sigma=spectra, extra=room, rule=rules)
@settings(deadline=None)
def test_multiple_rounds_up_and_stays_below_the_present_rank(sigma, extra, rule):
    k = len(sigma)
    exact = dataclasses.replace(rule, multiple=1).choose(sigma, k + extra)
    r = rule.choose(sigma, k + extra)
    assert r == k or (r % rule.multiple == 0 and exact <= r < exact + rule.multiple)
    assert r >= exact


@given(sigma=spectra, extra=room, rule=rules)
@settings(deadline=None)
def test_no_update_drops_more_than_allowed_or_goes_below_the_floor(sigma, extra, rule):
    k = len(sigma)
    kept = rule.choose(sigma, k + extra)
    assert kept >= int(k - k * rule.max_drop)
    assert kept >= min(k, rule.min_rank(k + extra))


@given(sigmas=st.lists(spectra, min_size=1, max_size=4), extra=room, rule=rules)
@settings(deadline=None)
def test_a_stack_gets_the_largest_choice_of_its_members(sigmas, extra, rule):
    k = min(len(sigma) for sigma in sigmas)
    sigmas = [sigma[:k] for sigma in sigmas]
    alone = [rule.choose(sigma, k + extra) for sigma in sigmas]
    assert rule.choose(np.stack(sigmas), k + extra) == max(alone)


def test_a_stack_of_unlike_members():
    sigma = np.array(
        [[5.0, 1e-3, 0.0, 0.0], [1.0, 0.9, 0.8, 0.0], [9.0, 1.0, 0.8, 0.0]]
    )
    rule = RankRule()
    assert [rule.choose(member, 4) for member in sigma] == [2, 3, 2]
    assert rule.choose(sigma, 4) == 3


def chain_of(rule, k, small_side):
    """Ranks of a layer that is numerically of rank 1 until nothing changes."""
    ranks = [k]
    while True:
        sigma = np.full(ranks[-1], 1e-12)
        sigma[0] = 1.0
        r = rule.choose(sigma, small_side)
        if r == ranks[-1]:
            return ranks
        ranks.append(r)


@pytest.mark.parametrize(
    "ranks",
    [(400, 200, 100, 50, 25, 12, 6, 4), (50, 25, 12, 6, 3, 1)],
    ids=lambda ranks: f"from-{ranks[0]}",
)
def test_published_chains_of_a_rank_1_layer(ranks):
    assert chain_of(RankRule(), ranks[0], ranks[0]) == list(ranks)


@pytest.mark.parametrize(
    ("rule", "k", "ranks"),
    [
        (RankRule(multiple=8), 400, [400, 200, 104, 56, 32, 16, 8]),
        (RankRule(multiple=64), 100, [100, 64]),
        (RankRule(min_rank_share=0.1), 400, [400, 200, 100, 50, 40]),
        (RankRule(max_drop=1.0), 400, [400, 4]),
        (RankRule(max_drop=1.0, min_rank_share=0.0), 400, [400, 1]),
        (RankRule(max_drop=0.9), 400, [400, 40, 4]),  # 40 * (1 - 0.9) is below 4
        (RankRule(max_drop=0.8, min_rank_share=0.0), 125, [125, 25, 5, 1]),
        (RankRule(cutoff=0.0), 400, [400]),
    ],
    ids=str,
)
def test_chains_of_other_rules(rule, k, ranks):
    assert chain_of(rule, k, k) == ranks


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_of_the_core_does_not_matter(scale):
    sigma = np.array([1.0, 0.7, 0.3, 0.11, 0.09, 0.01])
    assert RankRule().choose(scale * sigma, 6) == 4


def test_a_rank_below_the_floor_is_kept():
    sigma = np.array([1.0, 1e-9])
    assert reference_rank(sigma, 400) == 4  # two directions that do not exist
    assert RankRule().choose(sigma, 400) == 2


@pytest.mark.parametrize("shape", [(7,), (3, 7)], ids=str)
def test_a_core_of_zeros_keeps_its_rank(shape):
    assert RankRule().choose(np.zeros(shape), 7) == 7


@pytest.mark.parametrize(("small_side", "rank"), [(1, 1), (99, 1), (100, 1), (768, 7)])
def test_min_rank(small_side, rank):
    assert RankRule().min_rank(small_side) == rank


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ([], r"^`sigma` must have shape \(k,\) or \(l, k\), none 0; got \(0,\)$"),
        (np.ones((2, 0)), r"none 0; got \(2, 0\)$"),
        (np.ones((2, 2, 2)), r"none 0; got \(2, 2, 2\)$"),
        ([1.0, np.nan], r"^`sigma` must be finite, got \[ 1. nan\]$"),
        ([np.inf, 1.0], r"^`sigma` must be finite, got \[inf  1.\]$"),
        ([[2.0, 1.0], [np.nan, 1.0]], r"^`sigma` must be finite, got \[nan  1.\]$"),
        ([1.0, 2.0], r"must be descending and not negative, got \[1. 2.\]$"),
        ([[2.0, 1.0], [1.0, 2.0]], r"must be descending and .*, got \[1. 2.\]$"),
        ([1.0, -1.0], r"must be descending and not negative, got \[ 1. -1.\]$"),
        (np.ones(9), r"^`small_side` must be at least the rank 9, got 8$"),
    ],
)
def test_bad_spectra_are_named(sigma, message):
    with pytest.raises(ValueError, match=message):
        RankRule().choose(np.asarray(sigma, np.float64), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff": -0.1}, r"^`cutoff` must be in \[0, 1\], got -0.1$"),
        ({"cutoff": 1.1}, r"^`cutoff` must be in \[0, 1\], got 1.1$"),
        ({"cutoff": float("nan")}, r"^`cutoff` must be in \[0, 1\], got nan$"),
        ({"min_rank_share": 1.5}, r"^`min_rank_share` must be in \[0, 1\], got 1.5$"),
        ({"max_drop": 0.0}, r"^`max_drop` must be in \(0, 1\], got 0.0$"),
        ({"max_drop": 1.5}, r"^`max_drop` must be in \(0, 1\], got 1.5$"),
        ({"multiple": 0}, r"^`multiple` must be at least 1, got 0$"),
        ({"budget": 0}, r"^`budget` must be at least 1, got 0$"),
    ],
)
def test_bad_rules_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RankRule(**settings)


# ------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("layers", "per_update", "updates"),
    [
        (24, 2, 12),  # mini-ViT
        (49, 4, 13),  # ViT-B/16
        (173, 17, 11),  # ResNet-RS 101
        (5, 1, 5),  # the authors' code treats all five at every update
        (1, 1, 1),
    ],
)
def test_published_growth_of_the_treated_layers(layers, per_update, updates):
    schedule = Schedule(delay=0, every=1)
    treated = [schedule.treated(j, layers) for j in range(updates + 2)]
    expected = [min(layers, per_update * (j + 1)) for j in range(updates + 2)]
    assert treated == expected
    assert treated.index(layers) == updates - 1


@pytest.mark.parametrize(
    ("layer_step", "treated"),
    [(0.0, [1, 2, 3]), (0.5, [4, 8, 10]), (1.0, [9, 10, 10])],
)
def test_layer_step(layer_step, treated):
    schedule = Schedule(delay=0, every=1, layer_step=layer_step)
    assert [schedule.treated(j, 10) for j in range(3)] == treated


schedules = st.builds(
    Schedule,
    delay=st.integers(0, 50),
    every=st.integers(1, 20),
    stop=st.none(),
)


@given(schedule=schedules, steps=st.integers(1, 300))
@settings(deadline=None)
def test_events_are_the_authors(schedule, steps):
    assume(schedule.delay < steps)
    expected = reference_events(schedule.delay, schedule.every, steps)
    assert schedule.events(steps) == expected
    due = [(t, schedule.due(t)) for t in range(steps)]
    assert [(t, j) for t, j in due if j is not None] == list(
        zip(expected, itertools.count(), strict=False)
    )


@given(schedule=schedules, length=st.integers(1, 100), steps=st.integers(1, 300))
@settings(deadline=None)
def test_stop_cuts_the_events_and_nothing_else(schedule, length, steps):
    assume(schedule.delay < steps)
    stop = schedule.delay + length
    stopped = dataclasses.replace(schedule, stop=stop)
    kept = tuple(t for t in schedule.events(steps) if t < stop)
    assert stopped.events(steps) == kept
    assert tuple(t for t in range(steps) if stopped.due(t) is not None) == kept


@given(
    schedule=schedules,
    stop=st.none() | st.integers(51, 200),
    strides=st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_a_counter_that_jumps_misses_no_update(schedule, stop, strides):
    schedule = dataclasses.replace(schedule, stop=stop)
    previous, found = -1, []
    for step in itertools.accumulate(strides, initial=0):
        updates = [schedule.due(t) for t in range(previous + 1, step + 1)]
        newest = max((j for j in updates if j is not None), default=None)
        assert schedule.due(step, previous) == newest
        if newest is not None:
            found.append(newest)
        previous = step
    assert found == sorted(set(found))
    last = previous if stop is None else min(previous, stop - 1)
    if last >= schedule.delay:
        assert found[-1] == (last - schedule.delay) // schedule.every


def test_overshoot():
    schedule = Schedule(delay=100, every=50)
    assert schedule.due(104) is None
    assert schedule.due(104, previous=94) == 0
    assert schedule.due(104, previous=99) == 0
    assert schedule.due(104, previous=100) is None
    assert schedule.due(100, previous=100) is None
    assert schedule.due(1000, previous=94) == 18  # several at once: the newest
    assert schedule.due(1000) == 18


def test_an_update_jumped_over_together_with_the_stop_still_happens():
    schedule = Schedule(delay=100, every=50, stop=151)
    assert schedule.due(170, previous=140) == 1
    assert schedule.due(170, previous=150) is None
    assert schedule.due(200) is None


def test_delay_0_converts_and_updates_before_the_first_batch():
    schedule = Schedule(delay=0, every=10)
    assert schedule.converted(0)
    assert schedule.events(25) == (0, 10, 20)
    assert [schedule.due(t) for t in (0, 1, 10)] == [0, None, 1]


def test_converted_from_the_delay_on():
    schedule = Schedule(delay=3, every=10, stop=4)
    assert [schedule.converted(t) for t in range(6)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("steps", [300, 500])
def test_a_run_that_ends_before_the_conversion_is_an_error(steps):
    message = rf"^the conversion at delay=500 is never reached in {steps} steps$"
    with pytest.raises(ValueError, match=message):
        Schedule(delay=500, every=100).events(steps)
    assert Schedule(delay=500, every=100).events(501) == (500,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delay": -1}, r"^`delay` must be at least 0, got -1$"),
        ({"every": 0}, r"^`every` must be at least 1, got 0$"),
        ({"layer_step": 1.5}, r"^`layer_step` must be in \[0, 1\], got 1.5$"),
        ({"layer_step": -0.5}, r"^`layer_step` must be in \[0, 1\], got -0.5$"),
        ({"lag": 50}, r"^`lag` must be in \[0, every=50\), got 50$"),
        ({"lag": -1}, r"^`lag` must be in \[0, every=50\), got -1$"),
        ({"stop": 100}, r"^`stop` must be after delay=100, got 100$"),
        ({"stop": 0}, r"^`stop` must be after delay=100, got 0$"),
        (
            {"projections": (-1, 5)},
            r"^`projections` must ascend within \[0, delay=100\), as range\(first, "
            r"100, every\); got \(-1, 5\)$",
        ),
        ({"projections": range(0, 200, 5)}, r"got range\(0, 200, 5\)$"),
        ({"projections": [3, 3]}, r"got \[3, 3\]$"),
    ],
)
def test_bad_schedules_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"delay": 100, "every": 50} | settings))


def test_bad_updates_are_named():
    schedule = Schedule(delay=0, every=1)
    with pytest.raises(ValueError, match=r"^`j` must be at least 0, got -1$"):
        schedule.treated(-1, 5)
    with pytest.raises(ValueError, match=r"^`layers` must be at least 1, got 0$"):
        schedule.treated(0, 0)


@given(schedule=schedules, data=st.data(), steps=st.integers(1, 300))
@settings(deadline=None)
def test_a_lag_moves_events_and_leaves_decisions(schedule, data, steps):
    lag = data.draw(st.integers(0, schedule.every - 1))
    stop = data.draw(st.none() | st.integers(schedule.delay + 1, 200))
    schedule = dataclasses.replace(schedule, stop=stop)
    lagged = dataclasses.replace(schedule, lag=lag)
    for t in range(steps):
        assert lagged.decided(t) == schedule.due(t) == schedule.decided(t)
        assert lagged.due(t) == (schedule.due(t - lag) if t >= lag else None)
        assert lagged.converted(t) == schedule.converted(t - lag)
    if schedule.delay + lag < steps:
        expected = tuple(t for t in range(steps) if lagged.due(t) is not None)
        assert lagged.events(steps) == expected
        assert lagged.converted(lagged.events(steps)[0])


@given(schedule=schedules, data=st.data())
@settings(deadline=None)
def test_a_counter_that_jumps_misses_no_lagged_event(schedule, data):
    lag = data.draw(st.integers(0, schedule.every - 1))
    schedule = dataclasses.replace(schedule, lag=lag)
    start = data.draw(st.integers(0, 100))
    stride = data.draw(st.integers(1, 30))
    updates = [schedule.due(t) for t in range(start + 1, start + stride + 1)]
    newest = max((j for j in updates if j is not None), default=None)
    assert schedule.due(start + stride, start) == newest


@given(
    rule=st.builds(
        RankRule,
        cutoff=st.floats(0, 1),
        max_drop=st.floats(0.1, 1),
        multiple=st.integers(1, 20),
    ),
    sides=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    steps=st.integers(2, 60),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_no_run_of_the_rule_has_more_shapes_than_the_bound(rule, sides, steps, seed):
    """Random spectra at every event: count the distinct sets of ranks."""
    schedule = Schedule(delay=1, every=2, layer_step=1.0)
    random = np.random.default_rng(seed)
    ranks, shapes = list(sides), {("dense",)}
    for _ in schedule.events(steps):
        spectra = [np.sort(random.random(r) ** 3)[::-1] for r in ranks]
        ranks = [rule.choose(s, side) for s, side in zip(spectra, sides, strict=True)]
        shapes.add(tuple(ranks))
    assert len(shapes) <= schedule.compilations(steps, rule, sides)
    assert schedule.compilations(steps, rule, sides) <= schedule.compilations(steps)
    assert schedule.compilations(steps) == 1 + len(schedule.events(steps))


def test_a_lag_delays_the_conversion():
    schedule = Schedule(delay=3, every=10, lag=2)
    assert [schedule.converted(t) for t in range(7)] == [False] * 5 + [True] * 2
    message = r"^the conversion at delay=3 \+ lag=2 is never reached in 5 steps$"
    with pytest.raises(ValueError, match=message):
        schedule.events(5)
    assert schedule.events(6) == (5,)


def test_layers_that_are_stable_at_other_times_compile_more_often():
    """Three matrices in multiples of 16: 4 + 4 + 2 ranks, each reached by itself."""
    schedule = Schedule(delay=100, every=10)
    rule, sides = RankRule(multiple=16), [64, 64, 32]
    assert schedule.compilations(1000, rule, sides) == 1 + 1 + 3 + 3 + 1
    most = schedule.compilations(1000, rule, sides, one_by_one=True)
    assert most == 1 + 4 + 4 + 2


# ------------------------------------------------------------------------- a budget


def weights(shape, side, rank):
    """Of bases and cores of a stack of low-rank matrices."""
    stack = np.prod(shape[:-1], dtype=int)
    return int(stack) * rank * (sum(side) + rank)


def part(sigma):
    """Of the largest value."""
    return sigma / (sigma[0] or 1)


layers = st.lists(
    st.tuples(spectra, st.integers(0, 40), st.integers(0, 80)), min_size=1, max_size=5
)


def sized(parts):
    """Spectra, and sides of matrices that can have them."""
    sigmas = [sigma for sigma, _, _ in parts]
    sides = [(len(s) + m, len(s) + m + n) for s, m, n in parts]
    return sigmas, sides


@given(
    layers,
    st.floats(0, 1),
    st.integers(1, 5),
    st.sampled_from([0.01, 0.2]),
)
def test_a_budget_is_kept_and_used_by_the_largest_values(parts, share, multiple, floor):
    """What is out is no larger than what is in, or does not fit any more."""
    sigmas, sides = sized(parts)
    rule = RankRule(budget=1, multiple=multiple, min_rank_share=floor)
    bounds = []
    for sigma, (m, n) in zip(sigmas, sides, strict=True):
        first = most = min(len(sigma), rule.min_rank(min(m, n)))
        while (more := min(len(sigma), most + multiple)) > most:
            if more * (m + n + more) >= m * n:  # no fewer weights than dense
                break
            most = more
        bounds.append((sigma, (m, n), first, most))
    least = sum(weights(s.shape, side, first) for s, side, first, _ in bounds)
    whole = sum(weights(s.shape, side, most) for s, side, _, most in bounds)
    rule = dataclasses.replace(rule, budget=int(least + share * (whole - least)))
    ranks = rule.choose_all(sigmas, sides)
    spent = [
        weights(s.shape, side, rank)
        for (s, side, _, _), rank in zip(bounds, ranks, strict=True)
    ]
    assert sum(spent) <= rule.budget
    smallest = [
        np.mean(part(s)[max(first, rank - multiple) : rank])
        for (s, _, first, _), rank in zip(bounds, ranks, strict=True)
        if rank > first
    ]
    for (sigma, side, first, most), rank, cost in zip(
        bounds, ranks, spent, strict=True
    ):
        assert first <= rank <= most
        assert rank == len(sigma) or (rank - first) % multiple == 0
        if rank < most:
            block = min(len(sigma), rank + multiple)
            fits = weights(sigma.shape, side, block) - cost + sum(spent) <= rule.budget
            out = np.mean(part(sigma)[rank:block])
            assert not fits or all(x >= out * (1 - 1e-9) for x in smallest)
    if share == 1:
        assert ranks == [most for _, _, _, most in bounds]


def test_a_stack_costs_as_many_times_and_counts_by_its_mean():
    steep, flat = np.array([1.0, 0.2, 0.1]), np.array([1.0, 0.9, 0.8])
    sides = [(9, 9), (9, 9)]
    rule = RankRule(budget=2 * 2 * (18 + 2) + 19)
    assert rule.choose_all([np.stack([steep, flat]), steep], sides) == [2, 1]
    assert rule.choose_all([np.stack([steep, steep]), flat], sides) == [1, 2]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_budget_does_not_see_the_scale_of_a_matrix(scale):
    flat, steep = np.array([1.0, 0.9, 0.8]), np.array([1.0, 0.5, 0.1])
    rule = RankRule(budget=2 * (18 + 2) + 2 * (18 + 2))
    sides = [(9, 9), (9, 9)]
    assert rule.choose_all([flat, scale * steep], sides) == [2, 2]
    smaller = RankRule(budget=3 * (18 + 3) + 18 + 1)
    assert smaller.choose_all([flat, scale * steep], sides) == [3, 1]


def test_without_a_budget_all_are_chosen_one_by_one():
    sigmas = [np.array([4.0, 2.0, 1.0, 0.3]), np.array([3.0, 0.1])]
    rule = RankRule(cutoff=0.2)
    assert rule.choose_all(sigmas, [(9, 4), (2, 9)]) == [
        rule.choose(sigmas[0], 4),
        rule.choose(sigmas[1], 2),
    ]


def test_a_budget_below_the_floors_says_what_it_would_take():
    sigmas, sides = [np.ones(8), np.ones(4)], [(8, 9), (4, 4)]
    message = r"`budget` is 46 weights: the matrices have 47 .* least ranks, \[2, 1\]"
    rule = RankRule(budget=47, min_rank_share=0.25)
    assert rule.choose_all(sigmas, sides) == [2, 1]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rule, budget=46).choose_all(sigmas, sides)


def test_one_rank_alone_cannot_be_chosen_with_a_budget():
    with pytest.raises(ValueError, match="`choose_all`"):
        RankRule(budget=100).choose(np.ones(3), 3)


# --------------------------------------------------------------------- projections


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_projections_begin_at_their_step_and_end_with_the_dense_warm_up(
    delay, between, data
):
    start = data.draw(st.integers(0, delay - 1))
    steps = range(start, delay, between)
    steps = data.draw(st.sampled_from([steps, [*steps]]))
    schedule = Schedule(delay=delay, every=5, projections=steps)
    wanted = list(steps)
    assert [t for t in range(80) if schedule.projected(t)] == wanted
    assert all(schedule.acts(t) for t in wanted)
    stride = data.draw(st.integers(1, 12))
    seen = [
        t for t in range(0, 80, stride) if schedule.projected(t, previous=t - stride)
    ]
    met = {-(-t // stride) * stride for t in wanted}
    assert seen == sorted(t for t in met if t < 80)


def test_a_number_is_no_projections():
    with pytest.raises(TypeError, match=r"as range\(first, 10, every\); got 2$"):
        Schedule(delay=10, every=5, projections=2)


def test_no_projections_by_default():
    schedule = Schedule(delay=10, every=5)
    assert not any(schedule.projected(t) for t in range(30))


@pytest.mark.parametrize(
    ("sigma", "options", "rank"),
    [
        ([3, 2, 1], {}, 5),
        ([3, 2, 1], {"multiple": 4}, 8),
        ([[3, 2, 1], [3, 2, 0.1]], {}, 5),  # one matrix of the stack is full
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], {}, 10),  # the small side
        ([3, 2, 0.1], {}, 2),
        ([0, 0, 0], {}, 3),
    ],
    ids=["full", "multiple", "stack", "small_side", "cut", "zeros"],
)
def test_a_full_core_gets_more_directions(sigma, options, rank):
    rule = RankRule(cutoff=0.1, raise_by=2, **options)
    assert rule.choose(np.array(sigma, np.float64), small_side=10) == rank


def test_a_rule_that_raises_has_no_bound_of_shapes():
    schedule = Schedule(delay=100, every=50)
    rule = RankRule(multiple=16, raise_by=2)
    assert schedule.compilations(1000, rule, sides=[64, 64]) == 19


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"raise_by": -1}, "`raise_by` must be at least 0, got -1"),
        ({"raise_by": 1, "budget": 10}, "`raise_by` is for a rule by `cutoff`"),
    ],
    ids=["below", "budget"],
)
def test_bad_raises_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        RankRule(**options)
