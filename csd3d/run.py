"""Starts, resumes and exports jobs: finds the task, the device and the run folder."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from csd3d import __version__, ranks, registry
from csd3d.config import load_config, task_name, to_yaml
from csd3d.config_files import parse_value, read_config
from csd3d.engine.checkpoint import has_checkpoint
from csd3d.engine.environment import another_version
from csd3d.engine.logs import logger, logging_to
from csd3d.engine.run_folder import check_kinds, check_output, create_run_folder, held
from csd3d.errors import InputError, InputErrors, short
from csd3d.interrupt import StopRequest
from csd3d.paths import paths_of, with_paths
from csd3d.report.used import used

MOST_TOLD = 500  # characters of the prompts in the first line of a log
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
    """Start the job of a config file in a new run folder, and return the folder."""
    check_output(output)
    config = with_paths(read(config_file, [*overrides, *([] if seed is None else [f"seed={seed}"])]), settle)
    # opened by the paths that config.yaml names, so that a run resumed from another folder has the same identity
    # it raises for bad input before a folder is made
    with opening(lambda: opened(with_paths(config, shipped), device)) as job:
        folder = create_run_folder(config.name, to_yaml(config), output=output, argv=sys.argv)
        with held(folder):
            work(job, folder, stop, unused(config, overrides))
    return folder


def resume(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Continue a run from its checkpoints; the places of inputs in `overrides` are kept in its config.yaml."""
    config_file = config_of(run_folder)
    with (
        held(run_folder) as replace_config,
        opening(lambda: reopen(config_file, overrides, device)) as job,
    ):
        keep_places(job, config_file, overrides, replace_config)
        work(job, run_folder, stop)
    return run_folder


def export(run_folder: Path, overrides: Sequence[str], device: str, *, stop: StopRequest) -> Path:
    """Write a run's mesh, video, metrics and report again from its checkpoints, without further steps.

    The places of inputs in `overrides` are kept as by `resume`. Raises InputError if it has no checkpoint yet.
    """
    config_file = config_of(run_folder)
    with held(run_folder) as replace_config:
        places = sorted((run_folder / "checkpoints").glob("[!.]*"))
        if not any(map(has_checkpoint, places)):
            check_kinds(run_folder, [f"checkpoints/{place.name}" for place in places], ())
            raise InputError(f"{run_folder}: has no checkpoint yet, so nothing to export; start it again with --resume")
        with opening(lambda: reopen(config_file, overrides, device)) as job:
            keep_places(job, config_file, overrides, replace_config)
            stop.requested = True  # so phases take no further step, and those without a checkpoint are left out
            work(job, run_folder, stop)
            stop.requested = False
    return run_folder


@contextlib.contextmanager
def opening(open_job: Callable[[], Any]) -> Iterator[Any]:
    """The opened job, computed on any number of threads and processes to the same bytes, see `threads` and `team`."""
    from csd3d import threads
    from csd3d.priors.team import Team, way_of

    with threads.pinned():
        job = open_job()
        give_threads(job)
        if ranks.count() == 1:
            yield job
            return
        job.prior.team = Team(job.content_of(job.config.prior.model), way_of(job.prior))
        try:
            yield job
        finally:
            job.prior.team.end()


def give_threads(job: Any) -> None:
    """Give torch its threads back if the pinned job is on a GPU, or its model too large for one thread."""
    from csd3d import threads
    from csd3d.priors.speed import is_large

    if job.device.type != "cpu" or is_large(job.prior):
        threads.release()


def assist(source: Path, overrides: Sequence[str], seed: int | None, device: str) -> None:
    """Predict for rank 0, which does the job of `source`, a config or a run folder; for the other ranks of torchrun."""
    from csd3d import threads
    from csd3d.priors import team

    with threads.pinned():
        try:
            if source.is_dir():
                job = reopen(config_of(source), overrides, device)
            else:
                given = [*overrides, *([] if seed is None else [f"seed={seed}"])]
                job = opened(with_paths(with_paths(read(source, given), settle), shipped), device)
        except InputError as error:
            with contextlib.suppress(ranks.RankLost):  # rank 0 may have ended of the same, and told it
                team.hello(error=str(error))
            return
        give_threads(job)
        team.hello(job.content_of(job.config.prior.model), team.way_of(job.prior))
        team.serve(job.prior)


def reopen(config_file: Path, overrides: Sequence[str], device: str) -> Any:
    """Open the job of a run folder again; InputError says how to name an input that is not where it was."""
    config = with_paths(read_kept(config_file, overrides), absolute)
    for key, path in paths_of(config).items():
        given = any(text.startswith(f"{key}=") for text in overrides)
        if os.path.isabs(path) and not os.path.exists(path) and not given:
            raise InputError(f"{config_file}: {key}: {path} is not there any more; if it was moved, add {key}=PATH")
    return opened(config, device)


def read_kept(config_file: Path, overrides: Sequence[str]) -> Any:
    """`read` a run's config.yaml; where that has keys which are not known, say if another version of csd3d wrote it."""
    try:
        return read(config_file, overrides)
    except InputErrors:
        raise
    except InputError as error:
        other = another_version(config_file.parent) if str(error).startswith(str(config_file)) else None
        between = "" if str(error).endswith(("?", ".")) else ";"
        raise (InputError(f"{error}{between} the run was made by {other}") if other else error) from None


def opened(config: Any, device: str) -> Any:
    """Open the job of a config on a device; `auto` leaves it to the config's prior.device."""
    from csd3d.backends import check_backends
    from csd3d.devices import choose_device
    from csd3d.early import kept_warnings
    from csd3d.engine.out_of_memory import told_memory
    from csd3d.engine.phase import Job, forget_peak

    asked = config.prior.device if device == "auto" else device
    chosen = choose_device(asked, "prior.device" if device == "auto" else "--device")
    check_backends(config, chosen)
    forget_peak(chosen)
    with told_memory(config, chosen), kept_warnings() as warned:
        job = registry.returned("task", config, "open", config.open(chosen), Job)
    job.asked_device, job.warned = asked, warned
    return job


def keep_places(job: Any, config_file: Path, overrides: Sequence[str], replace_config: Callable[[str], None]) -> None:
    """Put where inputs have moved to into the run's config.yaml, so that they need not be given again.

    Of `overrides` only paths and plugins are kept. Raises InputError, before anything is written, if a checkpoint is of
    other content.
    """
    names = {*paths_of(job.config), "plugins"}
    places = [text for text in overrides if text.partition("=")[0] in names]
    if not places:
        return
    job.folder = config_file.parent
    job.check_checkpoints(job.wanted)
    replace_config(to_yaml(with_paths(read(config_file, places), settle)))


def work(job: Any, folder: Path, stop: StopRequest, warnings: Sequence[str] = ()) -> None:
    """Do the job with its log, which begins with a banner, the warnings of its opening and these."""
    from csd3d.devices import unusable_card
    from csd3d.engine.out_of_memory import told_memory
    from csd3d.tasks import runner
    from csd3d.vocabulary import unknown_words

    job.folder, job.stop, started = folder, stop, time.monotonic()
    told = [*job.warned, *warnings, *unknown_words(job.prior, texts_of(job.config))]
    job.warned = list(dict.fromkeys([*told, *getattr(job.config, "ignored", ())]))
    card = unusable_card() if job.asked_device == "auto" and job.device.type == "cpu" else None
    with logging_to(folder):
        for line in banner(job):
            logger.info("%s", line)
        for line in (*([card] if card else []), *job.warned):
            logger.warning("%s", line)
        with told_memory(job.config, job.device, job):
            runner.run(job)
        logger.info("done after %.0f s; results in %s", time.monotonic() - started, folder)


def texts_of(config: Any) -> list[str]:
    """The prompts or instructions of a job, and what its source shows."""
    return [config.told, getattr(getattr(config, "source", None), "prompt", "")]


def banner(job: Any) -> list[str]:
    """Return the first lines of the log: what will be done, where, and on which device."""
    import torch

    from csd3d.priors.speed import precision, slow_rows
    from custom_kernels import native

    config, device = job.config, job.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {native.num_threads()}"
    if job.prior is not None and getattr(job.prior, "team", None):
        where += f"; {ranks.count()} processes"
    return [
        f"csd3d {__version__}, {config.task}: {short(config.told, MOST_TOLD)}",
        f"device {device} ({where}), {precision(job.prior)}, model {config.prior.model}",
        *slow_rows(job.prior),
        used(job),
        f"run folder {job.folder}, previews in its images/",
        f"{len(config.phases)} phases: {', '.join(config.phases)}",
    ]


def unused(config: Any, overrides: Sequence[str]) -> list[str]:
    """Return a warning for what `overrides` set in vain: an editor or method not used, a key that it does not take."""
    names = getattr(config, "runs", None) or getattr(config, "methods", ())
    used = {"sds" if name == "csd" else name.partition("+")[0] for name in names}
    keys = dict.fromkeys(tuple(text.partition("=")[0].split(".")[:2]) for text in overrides)
    given = [key for key in keys if key[0] in ("editors", "methods") and len(key) == 2 and key[1] not in used]
    told = [f"{section}.{name} is set, but this run does not use {name}" for section, name in given]
    keys = [text.partition("=")[0] for text in overrides]
    if hasattr(config, "runs") and any(key.startswith("distill.") for key in keys):
        from csd3d.guidance.no_effect import overruled

        told += overruled(config.runs, config.distill, [key.removeprefix("distill.") for key in keys])
    return told


def config_of(run_folder: Path) -> Path:
    """Return the config that a run was started with; InputError if this is no run folder."""
    path = run_folder / "config.yaml"
    if not os.path.isfile(path):  # not Path's, which raises for names that are too long
        raise InputError(f"{run_folder}: is no run folder (it has no config.yaml); give the folder that a run printed")
    return path


def read(config_file: Path, overrides: Sequence[str]) -> Any:
    """Load the plugins and return the task's config, with paths of shipped files resolved."""
    plugins = load_plugins(config_file, overrides)
    task = task_name(config_file, overrides, registry.names("task"))
    if plugins:  # as a list of absolute paths, so that the run's config.yaml is valid from anywhere
        overrides = [*overrides, f"plugins={json.dumps(plugins)}"]
    config = load_config(config_file, overrides, registry.get("task", task).thing)
    return with_paths(config, shipped)


def load_plugins(config_file: Path, overrides: Sequence[str]) -> list[str]:
    """Import the plugins of a config: modules, or files, also relative to the config's folder.

    Returns their names, with paths made absolute.
    """
    plugins = plugin_list(read_config(config_file).get("plugins"), str(config_file))
    given = [plugins_of(text) for text in overrides if text.startswith("plugins=")]
    plugins = given[-1] if given else plugins
    found = [plugin_path(plugin, config_file.parent) if plugin.endswith(".py") else plugin for plugin in plugins]
    registry.load_plugins(found)
    return found


def plugin_path(plugin: str, beside: Path) -> str:
    """Return the absolute path of a plugin's file, relative to the current folder or else to the config's."""
    path = Path(os.path.expanduser(plugin))
    return str((path if os.path.exists(path) else beside / path).absolute())


def plugins_of(override: str) -> list[str]:
    """Return the value of `plugins=…` on the command line as a list."""
    value = override.partition("=")[2]
    return plugin_list(parse_value(value, "plugins") if value.strip() else [], "command line")


def plugin_list(value: Any, place: str) -> list[str]:
    """Return the plugins in the value of the key: a list, a single name or null; InputError for anything else."""
    plugins = [value] if isinstance(value, str) else [] if value is None else value
    right = isinstance(plugins, Sequence) and all(isinstance(plugin, str) and plugin.strip() for plugin in plugins)
    if not right:
        raise InputError(f"{place}: plugins: expected a list of modules, or of files that end in .py, got {value!r}")
    return list(plugins)


def shipped(path: str) -> str:
    """Return the path of the shipped file of that name if the path itself does not exist; else the path as given."""
    if path and not os.path.exists(path) and os.path.exists(PACKAGE_ROOT / path):
        return str(PACKAGE_ROOT / path)
    return path


def settle(path: str) -> str:
    """Make an existing path absolute, or relative to csd3d if it is a shipped asset; return others as given."""
    place = os.path.expanduser(path)
    if not path or not os.path.exists(place):
        return path
    absolute = Path(place).absolute()
    in_package = absolute.is_relative_to(PACKAGE_ROOT / "csd3d" / "assets")
    return str(absolute.relative_to(PACKAGE_ROOT) if in_package else absolute)


def absolute(path: str) -> str:
    """Return a path of a run's config.yaml as `settle` meant it: that of an asset is in csd3d, whatever is here."""
    return str(PACKAGE_ROOT / path) if Path(path).is_relative_to("csd3d/assets") else path
