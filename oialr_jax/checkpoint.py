"""Saves and restores a training state whose shapes have changed, with Orbax.

A checkpoint holds every array of the state by its path, and a table of contents: which
leaves are LowRank and over which axes, the shape and a checksum of every array, and
whatever the program adds (data position, settings). Ranks are the stored shapes, ranks
that wait for their event are in the optimizer state, and the schedule is a function of
the step, so nothing else is needed to go on bit for bit.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, UInt32

from oialr_jax.lowrank import Axes, Basis, LowRank, PyTree, is_low_rank, path_name
from oialr_jax.sharding import Layout, on_auto_axes
from oialr_jax.weighted import Statistics

_FORMAT = 1
_ARRAYS, _CONTENTS = "arrays", "contents"


class Restored(NamedTuple):
    """A restored checkpoint: the state, and the `extra` that `save` was given."""

    state: Any
    extra: dict[str, Any]


class Checkpoints:
    """Host side: the checkpoints of one run, in one folder.

    Saving is asynchronous (it returns when the arrays have left the devices) and atomic
    (an incomplete step has another name). The latest `keep` checkpoints are kept, and
    the one with the best `metric`. Every process of a run calls every method, on a
    folder that all of them share.

    Args:     folder: on a file system of this machine; a leading ~ is expanded.
              best: "max" or "min", which `metric` is best; None keeps the latest only.
    Raises:   ValueError: `keep` below 1, another `best`, or a URL as `folder`.
              NotADirectoryError: `folder`, or what it would be in, is a file.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, best: str | None = None
    ) -> None:
        """Open, or create, the folder."""
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}")
        if best not in (None, "max", "min"):
            raise ValueError(f"`best` must be 'max', 'min' or None, got {best!r}")
        self.folder = _local(folder)
        self._policy = _LatestAndBest(keep, best, {})
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            lightweight_initialize=True,  # of damaged checkpoints too
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        for step in self.steps:
            try:
                metric = self._contents(step)["metric"]
            except Exception:  # damaged, so it cannot be the best
                continue
            self._policy.metrics[step] = metric

    @property
    def steps(self) -> tuple[int, ...]:
        """The saved steps, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def save(
        self,
        state: PyTree,
        extra: Mapping[str, Any] | None = None,
        *,
        metric: Any = None,
    ) -> None:
        """Save `state`, which has a `.step`, and `extra`, which JSON can hold.

        The state may be donated to the next step at once. An error of the previous save
        is raised here, or by `wait`.

        Args:     extra: dicts with strings as keys, lists, strings, numbers, booleans
                  and None. Scalars of JAX and NumPy are numbers, too; numbers that are
                  not finite are an error.
                  metric: a number, or a scalar of JAX or NumPy. One that is not finite
                  is never the best, and stored as None.
        Raises:   ValueError: this step is there already; two arrays of the state have
                  one name, or a name is too long for a file; a number in `extra` is not
                  finite. TypeError: what `extra` has under a key, or `metric`, is of
                  another kind. Nothing is written then.
        """
        step = int(jax.device_get(state.step))
        if step in self.steps:
            raise ValueError(f"step {step} is saved already in {self.folder}")
        leaves = _leaves(state)
        number = None if metric is None else _scalar(metric)
        nodes = {
            name: dataclasses.asdict(leaf.axes) | {"basis": int(leaf.basis)}
            for name, leaf in _leaves(state, is_low_rank).items()
            if is_low_rank(leaf)
        }
        keys = {k: str(jax.random.key_impl(x)) for k, x in leaves.items() if _is_key(x)}
        arrays = {k: _data(x) for k, x in leaves.items()}
        contents: dict[str, Any] = {
            "format": _FORMAT,
            "step": step,
            "metric": number,
            "low_rank": nodes,
            "keys": keys,
            "statistics": {
                name: x.form
                for name, x in _leaves(state, _is_statistics).items()
                if _is_statistics(x)
            },
            "arrays": {
                k: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": total}
                for (k, x), total in zip(arrays.items(), _sums(arrays), strict=True)
            },
            "extra": _plain(dict(extra or {}), "extra"),
        }
        text = json.dumps(contents, allow_nan=False)
        contents = {"crc32": zlib.crc32(text.encode()), "text": text}
        self._policy.metrics[step] = number
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _ARRAYS: ocp.args.StandardSave(
                        {k: x for k, x in arrays.items() if x.size}  # Orbax has none
                    ),
                    _CONTENTS: ocp.args.JsonSave(contents),
                }
            ),
            force=True,
        )

    def restore(
        self,
        template: PyTree,
        tx: optax.GradientTransformation,
        layout: Layout | None = None,
    ) -> Restored | None:
        """The latest complete checkpoint; None if the folder has no checkpoint at all.

        `template` is the initial state of the program, or its shapes: its leaves may be
        dense where the checkpoint has them in low rank. Arrays are sharded by `layout`,
        whatever mesh they were saved from, or put on the first device.

        A checkpoint that cannot be read, or whose arrays do not match their stored
        checksums, is named in a warning and set aside as STEP.damaged, and the previous
        one is used. One that was never finished is named and removed.

        Raises:   ValueError: the checkpoint does not fit the template (every path, with
                  both shapes and dtypes), or there are checkpoints and none is whole.
        """
        self.wait()  # what is being written is not what was never finished
        for path in sorted(self.folder.glob("*.orbax-checkpoint-tmp*")):
            warnings.warn(f"{path} was never finished and is removed", stacklevel=2)
            if jax.process_index() == 0:
                shutil.rmtree(path)
        reasons = []
        for step in reversed(self.steps):
            try:
                contents = self._contents(step)
                problem = None
            except Exception as error:  # whatever damaged files make of readers
                contents, problem = {}, error
            if _all_well(problem):
                abstract = _abstract_state(
                    template, tx, contents, self.folder / f"{step}"
                )
                try:
                    state = self._state(step, abstract, contents, layout)
                except Exception as error:
                    problem = error
                if _all_well(problem):
                    return Restored(state, contents["extra"])
            reasons.append(f"{self.folder / str(step)}: {_sentence(problem)}")
            warnings.warn(
                f"the checkpoint {reasons[-1]}; it is set aside as {step}.damaged",
                stacklevel=2,
            )
            self._set_aside(step)
        if reasons:
            raise ValueError("no checkpoint is whole: " + "; ".join(reasons))
        return None

    def extra(self) -> Mapping[str, Any] | None:
        """What `save` got beside the latest state that can be read; None for none.

        It says which template to `restore` with.
        """
        for step in reversed(self.steps):
            try:
                return self._contents(step)["extra"]
            except Exception:  # damaged: `restore` says so and sets it aside
                continue
        return None

    def wait(self) -> None:
        """Return when everything is flushed to disk; raise errors of the last save."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _contents(self, step: int) -> dict[str, Any]:
        """The table of contents of a checkpoint.

        Raises:   ValueError: it is not what was written; and what files may raise.
        """
        args = ocp.args.Composite(**{_CONTENTS: ocp.args.JsonRestore()})
        stored = self._manager.restore(step, args=args)[_CONTENTS]
        text = stored["text"]
        if zlib.crc32(text.encode()) != stored["crc32"]:
            raise ValueError("its table of contents does not have its checksum")
        return json.loads(text)

    def _state(
        self,
        step: int,
        abstract: PyTree,
        contents: Mapping[str, Any],
        layout: Layout | None,
    ) -> PyTree:
        """The arrays of a checkpoint, checked, in the shape of the abstract state."""
        where = None if layout is None else layout(abstract)
        first: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        places = {} if where is None else _leaves(where)
        wanted = {
            name: jax.ShapeDtypeStruct(
                entry["shape"], entry["dtype"], sharding=places.get(name, first)
            )
            for name, entry in contents["arrays"].items()
        }
        full = {k: x for k, x in wanted.items() if x.size}
        args = ocp.args.Composite(**{_ARRAYS: ocp.args.StandardRestore(full)})
        arrays = dict(self._manager.restore(step, args=args)[_ARRAYS])
        for name in wanted.keys() - full.keys():
            x = wanted[name]
            arrays[name] = jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        sums = dict(zip(arrays, _sums(arrays), strict=True))
        for name, entry in contents["arrays"].items():
            if sums[name] != entry["sum"]:
                raise ValueError(f"{name} does not have its checksum")
        keys = contents["keys"]
        leaves = {
            name: jax.random.wrap_key_data(x, impl=keys[name]) if name in keys else x
            for name, x in arrays.items()
        }
        flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        return jax.tree.unflatten(
            treedef, [leaves[path_name(path)] for path, _ in flat]
        )

    def _set_aside(self, step: int) -> None:
        """A damaged checkpoint under another name, so that its step can be saved."""
        self._policy.metrics.pop(step, None)
        if jax.process_index() == 0:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()


def _local(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a folder.

    Raises:   ValueError: it is a URL. NotADirectoryError: there is a file.
    """
    text = os.fspath(folder)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # a Path has made one / of two
        raise ValueError(
            f"`folder` must be on a file system of this machine, got the URL {text}: "
            "mount it, or save to a local folder and copy that"
        )
    if not text:
        raise ValueError("`folder` is empty: name one, . is the present one")
    path = pathlib.Path(text).expanduser().absolute()
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise NotADirectoryError(f"{place} is a file: name another `folder`")
            break
    return path


@dataclasses.dataclass(frozen=True)
class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints and the one with the best metric."""

    keep: int
    best: str | None
    metrics: dict[int, float | None]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        steps = [x.step for x in checkpoints]
        kept = set(sorted(steps)[-self.keep :])
        known = {k: m for k in steps if (m := self.metrics.get(k)) is not None}
        if self.best is not None and known:
            choose = max if self.best == "max" else min
            kept.add(choose(known, key=lambda k: known[k]))
        return [step in kept for step in steps]


def _abstract_state(
    template: PyTree,
    tx: optax.GradientTransformation,
    contents: Mapping[str, Any],
    where: pathlib.Path,
) -> PyTree:
    """The template with the ranks of a checkpoint, in shapes.

    Raises:   ValueError: the arrays of the checkpoint are others.
    """
    stored = contents["arrays"]
    wrong = []

    def ranked(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        if name not in contents["low_rank"]:
            return leaf
        entry = dict(contents["low_rank"][name])
        basis = Basis(entry.pop("basis", 0))  # older checkpoints have none
        axes = Axes(**{k: tuple(v) for k, v in entry.items()})
        factors = (stored[f"{name}/{part}"] for part in ("u", "s", "vt"))
        u, s, vt = (jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for x in factors)
        if np.shape(leaf) != axes.shape:
            raise ValueError(
                f"{name} has shape {np.shape(leaf)} in the model and {axes.shape} in "
                f"the checkpoint {where}"
            )
        for what, here, there in _dtypes(name, leaf, LowRank(u, s, vt, axes)):
            if here != there:
                wrong.append(
                    f"{what} is {here} in the program and {there} in the checkpoint"
                )
        return LowRank(u, s, vt, axes, basis)

    def summed(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        form = contents.get("statistics", {}).get(name)  # older checkpoints have none
        if form is None:
            return None if _is_statistics(leaf) else leaf
        shapes = {
            k.removeprefix(f"{name}/"): jax.ShapeDtypeStruct(x["shape"], x["dtype"])
            for k, x in stored.items()
            if k.startswith(f"{name}/")
        }
        return Statistics.of_form(form, shapes)

    abstract = jax.eval_shape(lambda: template)
    new = jax.tree_util.tree_map_with_path(ranked, abstract, is_leaf=is_low_rank)
    new = jax.tree_util.tree_map_with_path(
        summed, new, is_leaf=lambda x: x is None or _is_statistics(x)
    )
    new = new.replace(opt_state=jax.eval_shape(tx.init, new.params))
    leaves = _leaves(new)
    found = {
        name: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for name, x in stored.items()
    }
    for name, impl in contents["keys"].items():
        wrap = functools.partial(jax.random.wrap_key_data, impl=impl)
        found[name] = jax.eval_shape(wrap, found[name])
    for name in sorted(leaves.keys() | stored.keys()):
        here, there = (
            f"{x[name].dtype}{tuple(x[name].shape)}" if name in x else "nothing"
            for x in (leaves, found)
        )
        if here != there:
            wrong.append(
                f"{name} is {here} in the program and {there} in the checkpoint"
            )
    if wrong:
        raise ValueError(f"the checkpoint {where} does not fit: {'; '.join(wrong)}")
    return new


def _is_statistics(x: Any) -> bool:
    return isinstance(x, Statistics)


def _dtypes(name: str, leaf: Any, node: LowRank) -> list[tuple[str, Any, Any]]:
    """What has a dtype in the program, and in the checkpoint, of a low-rank leaf.

    Bases may be narrower than their core, which a dense leaf does not tell.
    """
    if not is_low_rank(leaf):
        return [(name, leaf.dtype, node.dtype)]
    return [
        (f"{name}/{part}", getattr(leaf, part).dtype, getattr(node, part).dtype)
        for part in ("u", "s", "vt")
    ]


def _leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Every array by its path, those inside of LowRank nodes too by default.

    Raises:   ValueError: two have the same name, as in {"a/b": x, "a": {"b": y}}.
    """
    found: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf):
        name = path_name(path)
        if name in found:
            first, second = (jax.tree_util.keystr(p) for p in (paths[name], path))
            raise ValueError(
                f"a checkpoint cannot tell {first} from {second}, both are called "
                f"{name!r}: rename one of them"
            )
        found[name], paths[name] = x, path
    return found


def _scalar(metric: Any) -> float | None:
    """A metric as a number; None, which is never the best, where it is not finite.

    Raises:   TypeError: it is no real number.
    """
    value = np.asarray("" if _is_key(metric) else jax.device_get(metric))
    if value.ndim or not _is_real(value.dtype):
        raise TypeError(
            "`metric` must be one real number, a scalar of Python, NumPy or JAX, got "
            f"{_kind(metric)}"
        )
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(x: Any, name: str) -> Any:
    """What JSON can hold, scalars of NumPy and JAX as numbers.

    Raises:   TypeError: it is of another kind. ValueError: a number is not finite.
    """
    if isinstance(x, Mapping):
        for key in x:
            if not isinstance(key, str):
                raise TypeError(
                    f"{name} has the key {key!r}, and those of JSON are strings: "
                    f"write {str(key)!r}"
                )
        return {key: _plain(value, f"{name}[{key!r}]") for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value, f"{name}[{i}]") for i, value in enumerate(x)]
    if isinstance(x, np.ndarray | np.generic | jax.Array) and not _is_key(x):
        value = np.asarray(jax.device_get(x))
        if _is_real(value.dtype):
            if jnp.issubdtype(value.dtype, jnp.floating):
                value = value.astype(np.float64)  # those of ml_dtypes, too
            return _plain(value.tolist(), name)
    if isinstance(x, float) and not math.isfinite(x):
        raise ValueError(f"{name} is {x}, which JSON cannot hold: write None, or a str")
    if x is None or isinstance(x, str | int | float):
        return x
    raise TypeError(
        f"{name} is {_kind(x)}, which JSON cannot hold: give dicts, lists, strings, "
        "numbers, booleans and None"
    )


def _is_real(dtype: Any) -> bool:
    kinds = (jnp.integer, jnp.floating, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _kind(x: Any) -> str:
    """What something is, in an error."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{tuple(x.shape)} of {type(x).__module__}.{type(x).__name__}"
    return f"{x!r:.60} of {type(x).__module__}.{type(x).__name__}"


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: Any) -> Array:
    if _is_key(x):
        return jax.random.key_data(x)
    return x if isinstance(x, jax.Array) else jax.device_put(x)


def _sums(arrays: Mapping[str, Array]) -> list[int]:
    """One checksum for each array, the same wherever its parts lie."""
    groups: dict[Any, list[str]] = defaultdict(list)  # one program for some devices
    for name, x in arrays.items():
        groups[frozenset(x.sharding.device_set), x.committed].append(name)
    sums: dict[str, Any] = {}
    for names in groups.values():
        sums |= zip(names, _all_sums([arrays[k] for k in names]), strict=True)
    return [int(x) for x in jax.device_get([sums[name] for name in arrays])]


@on_auto_axes
@jax.jit
def _all_sums(arrays: list[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(x) for x in arrays]


def _checksum(x: Array) -> UInt32[Array, ""]:
    """Sum of (2 i + 1) times the i-th piece of the bits of x, modulo 2³².

    An odd factor is invertible, so one piece that changes is always noticed; integer
    addition has no order, so the number does not depend on how x is divided.

    >>> int(_checksum(jnp.array([1.0, 2.0]))) == int(_checksum(jnp.array([2.0, 1.0])))
    False
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(jnp.int8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    bits = min(8 * x.dtype.itemsize, 32)
    pieces = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    index = jnp.zeros(pieces.shape, jnp.uint32)
    for axis in range(pieces.ndim):
        stride = np.uint32(math.prod(pieces.shape[axis + 1 :]) % 2**32)
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, pieces.shape, axis)
    odd = np.uint32(2) * index + np.uint32(1)
    return jnp.sum(odd * pieces.astype(jnp.uint32), dtype=jnp.uint32)


def _all_well(problem: Exception | None) -> bool:
    """Whether no process of the run has a problem."""
    if jax.process_count() == 1:
        return problem is None
    mine = np.array(problem is None)
    return bool(np.all(multihost_utils.process_allgather(mine)))


def _sentence(problem: Exception | None) -> str:
    """The first line of an error, or whose it is."""
    if problem is None:
        return "another process cannot read it"
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"
