"""Which methods, schedules and priors make the right assets: see `__main__`."""
