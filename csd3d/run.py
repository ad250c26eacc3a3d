"""A job from config to report: which task, which folder, which device."""

import importlib
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from csd3d import __version__
from csd3d.config import load_config, task_name, to_yaml
from csd3d.engine.logs import create_run_folder, logger, logging_to
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest

TASKS = {
    "edit_image": "csd3d.tasks.edit_image:EditImageConfig",
    "edit_panorama": "csd3d.tasks.edit_panorama:EditPanoramaConfig",
    "edit_scene": "csd3d.tasks.edit_scene:EditSceneConfig",
    "edit_video": "csd3d.tasks.edit_video:EditVideoConfig",
    "text_to_image": "csd3d.tasks.text_to_image:TextToImageConfig",
    "text_to_3d": "csd3d.tasks.text_to_3d:TextTo3DConfig",
}
PACKAGE_ROOT = Path(__file__).absolute().parent.parent
# every key that may name a file or a folder
PATHS = (
    *("image", "video", "clip", "evaluate.clip", "regions.mask", "source.image", "scene.path", "guide.expected"),
    *("prior.model", "prior.embedding_cache"),
)


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
    overrides = [*overrides, *([] if seed is None else [f"seed={seed}"])]
    task, config = read(config_file, overrides)
    chosen = choose(device)
    task.prepare(config, Path(), chosen, stop)  # what is wrong with the input is told before a folder is made
    config = settled(config)
    folder = create_run_folder(config.name, to_yaml(config), output=output, argv=sys.argv)
    work(task, with_shipped(config), folder, chosen, stop)
    return folder


def resume(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Continues a run where its checkpoints stand."""
    task, config = read(config_of(run_folder), overrides)
    work(task, config, run_folder, choose(device), stop)
    return run_folder


def export(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Writes a run's mesh, video, metrics and report again from its checkpoints, without fitting anything further.

    Raises InputError where it has no checkpoint yet.
    """
    task, config = read(config_of(run_folder), overrides)
    if not any((run_folder / "checkpoints").glob("*/checkpoint.json")):
        raise InputError(f"{run_folder}: has no checkpoint yet, so nothing to export; start it again with --resume")
    stop.requested = True  # a phase takes no further step then, and one that has no checkpoint is left out
    work(task, config, run_folder, choose(device), stop)
    stop.requested = False
    return run_folder


def work(task, config, folder: Path, device, stop: StopRequest) -> None:
    """Does the job under its log, which begins with what will be done, where and on what."""
    started = time.monotonic()
    with logging_to(folder):
        for line in banner(config, folder, device):
            logger.info("%s", line)
        task.run(config, folder, device, stop)
        logger.info("done after %.0f s; results in %s", time.monotonic() - started, folder)


def banner(config, folder: Path, device) -> list[str]:
    """A few lines to stand at the top of the log and of the screen."""
    import torch

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    what = getattr(config, "instructions", None) or getattr(config, "texts", None) or [config.prompt]
    return [
        f"csd3d {__version__}, {config.task}: {'; '.join(what)}",
        f"device {device} ({where}), model {config.prior.model}",
        f"run folder {folder}, previews in its images/",
        f"{len(config.phases)} phases: {', '.join(config.phases)}",
    ]


def config_of(run_folder: Path) -> Path:
    """The config a run was started with; InputError where this is no run folder."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_folder}: is no run folder (it has no config.yaml); give the folder that a run printed")
    return path


def read(config_file: Path, overrides: Sequence[str]):
    """The task's module and its config, paths resolved."""
    module, schema = TASKS[task_name(config_file, overrides, TASKS)].split(":")
    task = importlib.import_module(module)
    config = load_config(config_file, overrides, getattr(task, schema))
    return task, with_shipped(config)


def with_shipped(config):
    """The config with its paths (scene, prior, LMC-SDS's network) resolved by `shipped`."""
    return with_paths(config, shipped, ("prior.model", "scene.path", "guide.expected"))


def settled(config):
    """The config with its paths as config.yaml has them, so that a run can be resumed and exported from any folder."""
    return with_paths(config, settle, PATHS)


def with_paths(config, change: Callable[[str], str], keys: Collection[str]):
    """The config with `change` of the text at each dotted key that it has; a key of a list's items is that of each."""
    if isinstance(config, list):
        return [with_paths(item, change, keys) for item in config]
    changes = {}
    for name in {key.partition(".")[0] for key in keys}:
        below = [key.partition(".")[2] for key in keys if key.startswith(f"{name}.")]
        if hasattr(config, name):
            value = getattr(config, name)
            changes[name] = with_paths(value, change, below) if below else change(value)
    return replace(config, **changes)


def shipped(path: str) -> str:
    """A path as given if it exists, else the one that ships with csd3d under that name, else as given."""
    if path and not Path(path).exists() and (PACKAGE_ROOT / path).exists():
        return str(PACKAGE_ROOT / path)
    return path


def settle(path: str) -> str:
    """A path that exists made absolute, but one of what ships with csd3d as `shipped` finds it; else as given."""
    if not path or not Path(path).exists():
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
