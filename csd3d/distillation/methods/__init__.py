"""The methods of score distillation, one a file: `registry.names("method")` lists them."""

# the old table's names, until its callers have moved to `distillation.named`
from csd3d.distillation.old_methods import (  # noqa: F401
    METHODS,
    check_methods,
    find_method,
    method_config,
    method_names,
)
