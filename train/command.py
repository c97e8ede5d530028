"""From a command line to a run, and to one line on what it came to."""

import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tyro

from train import files, loop, names
from train.settings import S, Settings


def main(
    program: str,
    presets: Mapping[str, tuple[str, S]],
    run: Callable[..., Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Host side: read the command line, run, say the result in one line.

    Args:     program: as it is called, "python -m train.images".
              run: (settings, name=) -> summary.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and not arguments[0].startswith("-"):
            names.find("preset", arguments[0], presets)
        settings = tyro.extras.overridable_config_cli(
            dict(presets), args=arguments, prog=program
        )
        usual = f"{arguments[0]}-{settings.method}-seed{settings.seed}"
        if settings.optimizer != "adamw":
            usual += f"-{settings.optimizer}"
        settings = files.with_paths_expanded(settings)
        name = settings.name or usual
        if settings.distributed:
            jax.distributed.initialize(
                settings.coordinator, settings.processes, settings.process_id
            )
        summary = run(settings, name=name)
    except loop.StoppedError as stopped:
        print(f"{stopped}. Go on with the same command and --resume")
        return
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {out_of_memory(settings, error)}")
    if jax.process_index() == 0:
        results = (
            f"{name[5:]} " + ("not finite" if value is None else f"{value:.4g}")
            for name, value in files.nulled(summary).items()
            if name.startswith("test_")
        )
        print(
            f"{name}: {', '.join(results)} on the test set, "
            f"{summary['stored_fraction']:.1%} of the dense weights stored, "
            f"{summary['trainable_fraction']:.1%} trained, "
            f"{summary['wall_seconds']:.0f} s, {settings.out / name}"
        )


def out_of_memory(settings: Settings, error: Exception) -> str:
    """What was too much: the batch, and the largest arrays that there are."""
    largest = sorted(jax.live_arrays(), key=lambda x: x.nbytes, reverse=True)[:3]
    arrays = ", ".join(
        f"{x.dtype}{list(x.shape)} of {x.nbytes / 2**20:.0f} MiB" for x in largest
    )
    reason = str(error).splitlines()[0]
    return (
        f"out of memory with --batch {settings.batch}: a smaller one, with "
        "--accumulate for the same updates, or --mesh fsdp=-1 need less. The largest "
        f"arrays: {arrays}. {reason}"
    )


def keep_compiled(folder: pathlib.Path) -> None:
    """Host side: JAX keeps compiled programs in `folder`, for this run and the next."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
