"""An export on disk: written whole or not at all, and read by what is in it."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax
import numpy as np
from jax import export as jax_export

from oialr_jax import cost
from oialr_jax.export import manifest
from oialr_jax.export.merge import merge
from oialr_jax.export.program import Names, lowered, pack
from oialr_jax.lowrank import PyTree, counts, is_node
from oialr_jax.matrices import find_matrices

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    *example: Any,
    form: str = "auto",
    dtype: str | None = None,
    batch_axes: int | tuple[int | None, ...] | None = 0,
    names: Names | None = None,
    platforms: Sequence[str] = PLATFORMS,
    rates: cost.Rates | None = None,
) -> "Exported":
    """Host side: write fn(params, *inputs) into a folder that runs without us.

        export("model", forward, state.params, images)
        load("model")(images)  # or without oialr_jax, Flax and the model:
        program = jax.export.deserialize(open("model/program.stablehlo", "rb").read())
        weights = safetensors.numpy.load_file("model/weights.safetensors")
        program.call(weights, images)

    weights.safetensors has the arrays: "PATH.a" and "PATH.b" of two factors, ".c",
    ".z" and ".order" of the identity form, ".u", ".s" and ".vt" of a core, and "PATH"
    of a dense leaf. program.stablehlo takes them and inputs of any batch size, as
    `jax.export` serialises it, in StableHLO. manifest.json has ranks, axes, dtypes and
    checksums. Nothing is pickled. The folder appears when it is whole. ONNX is not
    written; what converts `factored(fn)` is in train/results/README.md.

    Args:     params: dense, in low rank, on a frozen base, merged or mixed.
              example: the inputs, shapes suffice. By their batch it is decided which
              matrices stay dense and in which order cores are contracted.
              form, dtype, rates: as for `merge`. In `dtype` dense leaves are stored
              too, unless it is int8; the program widens them.
              batch_axes: the axis of the batch in each input, as in_axes of `jax.vmap`;
              None for an input without one.
              names: other names by path, as {"Dense_0/kernel": "fc.weight"}; for dense
              leaves also with the order of the axes, ("fc.weight", (1, 0)). With
              form="dense" the file is then one that another library loads.
              platforms: for which the program is lowered.
    Raises:   FileExistsError: the folder is there. ValueError, TypeError: what `merge`
              raises; fn needs the number of the batch size; inputs or outputs in
              containers of another kind than tuple, list and dict; names that do not
              fit. ImportError: safetensors or flatbuffers is not installed.
    """
    _readers()
    target = pathlib.Path(folder).expanduser().absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists: name a new folder, or remove it")
    matrices = find_matrices(fn, _dense_shapes(params), *example)
    merged = merge(
        params,
        form=form,
        dtype=None if form == "dense" and dtype != "int8" else dtype,
        matrices=matrices,
        rates=rates,
    )
    packed = pack(merged, dtype, names)
    program, specs, outputs = lowered(fn, packed, example, batch_axes, platforms)
    from safetensors.numpy import save

    files = {
        manifest.WEIGHTS: save(packed.arrays, metadata={"format": "pt"}),
        manifest.PROGRAM: bytes(program.serialize()),
    }
    text = manifest.described(
        packed, counts(merged), specs.flat, outputs, platforms, files
    )
    _written(target, files | {manifest.MANIFEST: text.encode()})
    return load(target)


def _dense_shapes(params: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_node(x) else x,
        params,
        is_leaf=is_node,
    )


def _written(target: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Files in a folder that gets its name when all of them are on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, data in files.items():
            with (new / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        new.chmod(0o755)
        os.rename(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _readers() -> None:
    """Raise unless what reads and writes the files is installed.

    Raises:   ImportError: it is not; what to install.
    """
    try:
        import flatbuffers
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: pip install safetensors flatbuffers, or "
            "oialr_jax[export]"
        ) from error
    del flatbuffers, safetensors


def load(folder: str | os.PathLike[str]) -> "Exported":
    """Host side: what `export` wrote, checked, as a function of the inputs.

    Raises:   FileNotFoundError: the folder, or a file of it, is missing. ValueError: a
              file is damaged; the manifest is another program's; an array is missing,
              or of another shape or dtype than the manifest says; a rank does not fit;
              the program is of a version that this JAX does not read.
    """
    _readers()
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    place = pathlib.Path(folder).expanduser().absolute()
    data = {}
    for name in (manifest.MANIFEST, manifest.WEIGHTS, manifest.PROGRAM):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place} is no export: it has no {name}")
        data[name] = (place / name).read_bytes()
    content = manifest.read(data[manifest.MANIFEST], str(place / manifest.MANIFEST))
    weights = place / manifest.WEIGHTS
    try:
        arrays = load_file(weights)
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
    manifest.check(content, arrays, str(weights))
    for name, entry in content["files"].items():
        found = {"bytes": len(data[name]), "sha256": manifest.sum_of(data[name])}
        if found != entry:
            raise ValueError(
                f"{place / name} is damaged: expected {entry['bytes']} bytes with "
                f"checksum {entry['sha256'][:12]}, found {found['bytes']} with "
                f"{str(found['sha256'])[:12]}"
            )
    try:
        program = jax_export.deserialize(bytearray(data[manifest.PROGRAM]))
    except Exception as error:  # of any kind: it reads another version's bytes
        raise ValueError(
            f"{place / manifest.PROGRAM}: expected a program that jax "
            f"{jax.__version__} reads, found one of jax {content['made_with']['jax']} "
            f"({type(error).__name__}: {error})"
        ) from error
    return Exported(place, content, arrays, program)


@final
class Exported:
    """An exported function: called with the inputs, it gives the outputs.

    `manifest` is what manifest.json says, `arrays` has the weights by name.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        content: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        program: jax_export.Exported,
    ) -> None:
        """Use `load`, which checks the files."""
        self.folder = folder
        self.manifest = content
        self.arrays = dict(arrays)
        (args, _) = jax.tree.unflatten(program.in_tree, program.in_avals)
        self._inputs: Any = jax.tree.structure(args[1:])
        self._run = jax.jit(program.call)
        self._placed: dict[str, Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The outputs, for inputs like those of the example, of any batch size.

        Raises:   ValueError: an input is missing, or of another shape or dtype.
        """
        specs = self.manifest["inputs"]
        flat = jax.tree.leaves(inputs)
        names = [x["path"] for x in specs]
        if jax.tree.structure(inputs) != self._inputs:
            found = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, _ in jax.tree_util.tree_leaves_with_path(inputs)
            ]
            raise ValueError(
                f"expected the inputs {', '.join(names)}, found {', '.join(found)}"
            )
        batch: dict[str, int] = {}
        for spec, x in zip(specs, flat, strict=True):
            manifest.check_input(spec, x, batch)
        return self._run(self.weights, *inputs)

    @property
    def weights(self) -> dict[str, Any]:
        """The arrays on JAX's default device."""
        if self._placed is None:
            with jax.ensure_compile_time_eval():  # also where a caller is traced
                self._placed = jax.device_put(self.arrays)
        return self._placed

    def compiled(self, *inputs: Any) -> Any:
        """The program compiled for inputs of these shapes: called with `weights` first.

        It has `memory_analysis()` and `cost_analysis()`, as JAX's own.
        """
        return self._run.lower(self.weights, *inputs).compile()

    def arranged(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Arrays in the order of the manifest's inputs, as the function takes them."""
        return jax.tree.unflatten(self._inputs, arrays)

    @property
    def params(self) -> Any:
        """The params in nested dicts, matrices as nodes: factored(fn) runs them."""
        arrays = {name: jax.numpy.asarray(x) for name, x in self.arrays.items()}
        return manifest.params_of(self.manifest, arrays)
