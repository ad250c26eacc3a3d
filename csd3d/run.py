"""A job from config to report: which task, which folder, which device."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csd3d import __version__, registry
from csd3d.config import load_config, parse_value, read_config, task_name, to_yaml
from csd3d.engine.logs import create_run_folder, logger, logging_to
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.schema import with_paths

PACKAGE_ROOT = Path(__file__).absolute().parent.parent


def start(
    config_file: Path,
    overrides: Sequence[str],
    output: Path | None,
    seed: int | None,
    device: str,
    *,
    stop: StopRequest,
) -> Path:
    """Starts the job of a config file in a new run folder, which it returns."""
    config = with_paths(read(config_file, [*overrides, *([] if seed is None else [f"seed={seed}"])]), settle)
    # opened by the very paths that config.yaml names: a resumed run, from wherever, has the same identity
    job = with_paths(config, shipped).open(choose(device))  # what is wrong is told before a folder is made
    written = to_yaml(config)
    folder = create_run_folder(config.name, written, output=output, argv=sys.argv)
    work(job, folder, stop)
    return folder


def resume(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Continues a run where its checkpoints stand."""
    work(read(config_of(run_folder), overrides).open(choose(device)), run_folder, stop)
    return run_folder


def export(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Writes a run's mesh, video, metrics and report again from its checkpoints, without fitting anything further.

    Raises InputError where it has no checkpoint yet.
    """
    config = read(config_of(run_folder), overrides)
    if not any((run_folder / "checkpoints").glob("*/checkpoint.json")):
        raise InputError(f"{run_folder}: has no checkpoint yet, so nothing to export; start it again with --resume")
    stop.requested = True  # a phase takes no further step then, and one that has no checkpoint is left out
    work(config.open(choose(device)), run_folder, stop)
    stop.requested = False
    return run_folder


def work(job: Any, folder: Path, stop: StopRequest) -> None:
    """Does the job under its log, which begins with what will be done, where and on what."""
    from csd3d.tasks import runner

    job.folder, job.stop, started = folder, stop, time.monotonic()
    with logging_to(folder):
        for line in banner(job):
            logger.info("%s", line)
        runner.run(job)
        logger.info("done after %.0f s; results in %s", time.monotonic() - started, folder)


def banner(job: Any) -> list[str]:
    """A few lines to stand at the top of the log and of the screen."""
    import torch

    config, device = job.config, job.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    return [
        f"csd3d {__version__}, {config.task}: {config.told}",
        f"device {device} ({where}), model {config.prior.model}",
        f"run folder {job.folder}, previews in its images/",
        f"{len(config.phases)} phases: {', '.join(config.phases)}",
    ]


def config_of(run_folder: Path) -> Path:
    """The config a run was started with; InputError where this is no run folder."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_folder}: is no run folder (it has no config.yaml); give the folder that a run printed")
    return path


def read(config_file: Path, overrides: Sequence[str]) -> Any:
    """The task's config, what is shipped found and plugins loaded."""
    plugins = load_plugins(config_file, overrides)
    task = task_name(config_file, overrides, registry.names("task"))
    config = load_config(config_file, overrides, registry.get("task", task).thing)
    if plugins:
        config.plugins = plugins  # so that the run's own config.yaml names them from anywhere
    return with_paths(config, shipped)


def load_plugins(config_file: Path, overrides: Sequence[str]) -> list[str]:
    """Imports what the config's `plugins` names: modules, or files, found from the config's folder too.

    Returns the same names, those of files made absolute.
    """
    plugins = plugin_list(read_config(config_file).get("plugins"), str(config_file))
    given = [plugins_of(text) for text in overrides if text.startswith("plugins=")]
    plugins = given[-1] if given else plugins
    found = [plugin_path(plugin, config_file.parent) if plugin.endswith(".py") else plugin for plugin in plugins]
    registry.load_plugins(found)
    return found


def plugin_path(plugin: str, beside: Path) -> str:
    """The absolute path of a plugin's file, which is looked for from here and from the config's folder."""
    path = Path(os.path.expanduser(plugin))
    return str((path if os.path.exists(path) else beside / path).absolute())


def plugins_of(override: str) -> list[str]:
    """The value of `plugins=…` on the command line, a single name or a list of them."""
    value = override.partition("=")[2]
    return plugin_list(parse_value(value, "plugins") if value.strip() else [], "command line")


def plugin_list(value: Any, place: str) -> list[str]:
    """A list of plugins from the value of the key, which may be a single name, or null; InputError for anything else"""
    plugins = [value] if isinstance(value, str) else [] if value is None else value
    right = isinstance(plugins, Sequence) and all(isinstance(plugin, str) and plugin.strip() for plugin in plugins)
    if not right:
        raise InputError(f"{place}: plugins: expected a list of modules, or of files that end in .py, got {value!r}")
    return list(plugins)


def shipped(path: str) -> str:
    """A path as given if it exists, else the one that ships with csd3d under that name, else as given."""
    if path and not os.path.exists(path) and os.path.exists(PACKAGE_ROOT / path):
        return str(PACKAGE_ROOT / path)
    return path


def settle(path: str) -> str:
    """A path that exists made absolute, but one of what ships with csd3d as `shipped` finds it; else as given."""
    if not path or not os.path.exists(path):
        return path
    absolute = Path(path).absolute()
    in_package = absolute.is_relative_to(PACKAGE_ROOT / "csd3d" / "assets")
    return str(absolute.relative_to(PACKAGE_ROOT) if in_package else absolute)


def choose(device: str):
    """The torch device of `auto`, `cpu` or `cuda`."""
    from csd3d.priors import choose_device

    try:
        return choose_device(device)
    except InputError as error:  # which names the config's key; here the device was asked for by an option
        raise InputError(str(error).replace("prior.device", "--device")) from None
