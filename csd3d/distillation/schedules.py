"""The old name of `schedule`, until its last callers have moved."""

from csd3d.distillation.schedule import (  # noqa: F401
    SCHEDULES,
    WEIGHTS,
    annealed_fraction,
    check_timesteps,
    scheduled_timestep,
    stage,
    step_weight,
    timestep,
    uniform_timestep,
)
