"""Names that were here until a prior got a file of its own: `prior`, `mixture`."""

from csd3d.priors.mixture import scaled_linear_alphas
from csd3d.priors.prior import Condition, Prior, edit_branches

__all__ = ["Condition", "Prior", "edit_branches", "scaled_linear_alphas"]
