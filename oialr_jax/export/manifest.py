"""The manifest of an export: what its arrays are, written and checked."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax.export.program import FIELDS, Leaf, Packed
from oialr_jax.forms import Identity, TwoFactors
from oialr_jax.lowrank import Axes, Counts, LowRank, is_node, path_name

FORMAT = "oialr_jax.export"
VERSION = 1
WEIGHTS, PROGRAM, MANIFEST = "weights.safetensors", "program.stablehlo", "manifest.json"

Spec = tuple[str, Any]


def described(
    packed: Packed,
    counts: Counts,
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    platforms: Sequence[str],
    files: Mapping[str, bytes],
) -> str:
    """The manifest as text."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"jax": jax.__version__},
        "platforms": list(platforms),
        "numbers": {"dense": counts.dense, "stored": counts.stored},
        "inputs": [_spec(name, x) for name, x in inputs],
        "outputs": [_spec(name, x) for name, x in outputs],
        "leaves": [_leaf(x) for x in packed.leaves],
        "arrays": {
            name: {"shape": list(x.shape), "dtype": str(x.dtype)}
            for name, x in packed.arrays.items()
        },
        "files": {
            name: {"bytes": len(data), "sha256": sum_of(data)}
            for name, data in files.items()
        },
    }
    content["sha256"] = sum_of(_canonical(content))
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def sum_of(data: bytes) -> str:
    """The checksum of a file."""
    return hashlib.sha256(data).hexdigest()


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _spec(name: str, x: Any) -> dict[str, Any]:
    shape = [d if isinstance(d, int) else str(d) for d in x.shape]
    return {"path": name, "shape": shape, "dtype": str(x.dtype)}


def _leaf(leaf: Leaf) -> dict[str, Any]:
    keys = [_key(x) for x in leaf.path]
    node = leaf.node
    entry: dict[str, Any] = {
        "path": path_name(leaf.path),
        "keys": keys,
        "form": FIELDS[type(node)][0] if is_node(node) else "dense",
        "shape": list(node.shape),
        "dtype": str(jnp.dtype(node.dtype)),
        "arrays": dict(leaf.names),
    }
    if leaf.order is not None:
        entry["order"] = list(leaf.order)
    if hasattr(node, "rank"):
        entry["rank"] = node.rank
        entry["axes"] = {
            x: list(getattr(node.axes, x)) for x in ("stack", "inputs", "outputs")
        }
    return entry


def _key(entry: Any) -> str | int:
    """What a container is asked for this entry by."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            found = getattr(entry, name)
            return found if isinstance(found, int) else str(found)
    return str(entry)


def read(text: bytes, where: str) -> dict[str, Any]:
    """A manifest that is one of ours and whole.

    Raises:   ValueError: it is not.
    """
    try:
        content = json.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{where} is no manifest of ours: expected the format {FORMAT!r}, found "
            f"{found!r}"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{where} has version {content.get('version')!r}, expected {VERSION}: "
            f"it was made with {content.get('made_with')}"
        )
    stored = content.pop("sha256", None)
    if stored != sum_of(_canonical(content)):
        raise ValueError(
            f"{where} is damaged: its contents do not have the checksum that it names"
        )
    return content


def check(content: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> None:
    """Raise unless the arrays of a file are those of its manifest, and fit each other.

    Raises:   ValueError: an array is missing or of another shape or dtype; the factors
              of a matrix do not fit its axes and rank.
    """

    def wrong(message: str) -> NoReturn:
        raise ValueError(f"{where}: {message}")

    expected = content["arrays"]
    for name in sorted({*expected, *arrays}):
        if name not in arrays:
            wrong(f"{name} is missing")
        if name not in expected:
            wrong(f"{name} is not in the manifest")
        here = f"{arrays[name].dtype}{list(arrays[name].shape)}"
        there = f"{expected[name]['dtype']}{expected[name]['shape']}"
        if here != there:
            wrong(f"expected {name} as {there}, found {here}")
    for leaf in content["leaves"]:
        for field, shape in _shapes(leaf).items():
            name = leaf["arrays"].get(field)
            if name is None:
                wrong(f"{leaf['path']} is {leaf['form']} and names no {field!r}")
            found = list(arrays[name].shape) if name in arrays else None
            if found != shape:
                wrong(
                    f"{leaf['path']} of shape {leaf['shape']} is {leaf['form']} of "
                    f"rank {leaf.get('rank')}: expected {name} of shape {shape}, "
                    f"found {found}"
                )


def _axes(leaf: Mapping[str, Any]) -> Axes:
    return Axes(tuple(leaf["shape"]), **{x: tuple(y) for x, y in leaf["axes"].items()})


def _shapes(leaf: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shape that each array of a leaf must have."""
    if leaf["form"] == "dense":
        order = leaf.get("order", range(len(leaf["shape"])))
        return {"": [leaf["shape"][a] for a in order]}
    axes, r = _axes(leaf), leaf["rank"]
    stack, m, n = list(axes.l), axes.m, axes.n
    left, right = [*stack, m, r], [*stack, r, n]
    return {
        "core": {"u": left, "s": [*stack, r, r], "vt": right},
        "factors": {"a": left, "b": right},
        "identity": {"c": left, "z": [*stack, r, n - r], "order": [*stack, n]},
    }[leaf["form"]]


def params_of(content: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The params as nested dicts, whose matrices are nodes; one leaf alone as it is."""
    tree: dict[Any, Any] = {}
    for leaf in content["leaves"]:
        at, built = tree, _built(leaf, arrays)
        if not leaf["keys"]:
            return built
        for key in leaf["keys"][:-1]:
            at = at.setdefault(key, {})
        at[leaf["keys"][-1]] = built
    return tree


def _built(leaf: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    given = {field: arrays[name] for field, name in leaf["arrays"].items()}
    dtype = jnp.dtype(leaf["dtype"])
    if leaf["form"] == "core":
        return LowRank(**given, axes=_axes(leaf))
    if leaf["form"] in ("factors", "identity"):
        form = TwoFactors if leaf["form"] == "factors" else Identity
        return form(**given, axes=_axes(leaf), dtype=dtype)
    array = given[""]
    if "order" in leaf:
        array = jnp.transpose(array, np.argsort(leaf["order"]).tolist())
    return array.astype(dtype)


def check_input(spec: Mapping[str, Any], found: Any, batch: dict[str, int]) -> None:
    """Raise unless an array is as the program expects; notes the batch size.

    Raises:   ValueError: another shape or dtype, or another batch size than before.
    """
    shape = tuple(getattr(found, "shape", ()))
    dtype = getattr(found, "dtype", type(found).__name__)
    said = f"{dtype}{list(shape)}"
    wanted = f"{spec['dtype']}[{', '.join(map(str, spec['shape']))}]"
    fits = str(dtype) == spec["dtype"] and len(shape) == len(spec["shape"])
    for size, want in zip(shape, spec["shape"], strict=False):
        if isinstance(want, int):
            fits = fits and size == want
        else:
            fits = fits and size >= 1 and batch.setdefault(want, size) == size
    if not fits:
        known = "".join(f", {name} = {size}" for name, size in batch.items())
        raise ValueError(
            f"input {spec['path']}: expected {wanted}{known}, found {said}"
        )
