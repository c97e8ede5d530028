"""Which matrices read what another one gives: the last of them are the heads.

The walk that finds matrices marks what each of them reads and gives; the program that
it leaves tells what reaches what.
"""

from collections.abc import Sequence
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jaxtyping import Array

_READS, _GIVES = "oialr reads ", "oialr gives "
Names = frozenset[str]


def reads(name: str, x: Array) -> Array:
    """x, marked as what the matrix `name` reads."""
    return checkpoint_name(x, _READS + name)


def gives(name: str, x: Array) -> Array:
    """x, marked as what the matrix `name` gives."""
    return checkpoint_name(x, _GIVES + name)


def read_by_others(jaxpr: Any) -> set[str]:
    """The matrices whose result reaches what another matrix reads."""
    found: set[str] = set()
    _through(jaxpr, [frozenset()] * len(jaxpr.jaxpr.invars), found)
    return found


def _through(jaxpr: Any, inputs: Sequence[Names], found: set[str]) -> list[Names]:
    """The matrices that reach each output, given those that reach the inputs."""
    body = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict.fromkeys(body.constvars, frozenset[str]())
    known.update(zip(body.invars, inputs, strict=True))

    def of(atom: Any) -> Names:
        return frozenset() if isinstance(atom, Literal) else known[atom]

    for eqn in body.eqns:
        outputs = _after(eqn, [of(x) for x in eqn.invars], found)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [of(x) for x in body.outvars]


def _after(eqn: Any, inputs: list[Names], found: set[str]) -> list[Names]:
    everything = frozenset[str]().union(*inputs)
    name, params = eqn.primitive.name, eqn.params
    if name == "name" and params["name"].startswith(_GIVES):
        return [frozenset((params["name"].removeprefix(_GIVES),))]
    if name == "name" and params["name"].startswith(_READS):
        found.update(everything - {params["name"].removeprefix(_READS)})
        return [everything]
    if name == "cond":
        branches = [_through(x, inputs[1:], found) for x in params["branches"]]
        return [frozenset.union(*x) for x in zip(*branches, strict=True)]
    if name in ("scan", "while"):  # what one turn gives, the next one gets
        body = params["jaxpr" if name == "scan" else "body_jaxpr"]
        while True:
            count = len(getattr(body, "jaxpr", body).invars)
            turned = _through(body, [everything] * count, found)
            more = everything.union(*turned)
            if more == everything:
                return [everything] * len(eqn.outvars)
            everything = more
    for key in ("jaxpr", "call_jaxpr"):
        body = params.get(key)
        if body is not None and len(getattr(body, "jaxpr", body).invars) == len(inputs):
            return _through(body, inputs, found)
    return [everything] * len(eqn.outvars)
