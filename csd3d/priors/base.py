"""Names that were here until a prior got a file of its own: `condition`, `prior`, `mixture`."""

from csd3d.priors.condition import Condition, edit_branches
from csd3d.priors.mixture import scaled_linear_alphas
from csd3d.priors.prior import Prior

__all__ = ["Condition", "Prior", "edit_branches", "scaled_linear_alphas"]
