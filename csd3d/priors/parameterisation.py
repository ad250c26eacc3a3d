"""The outputs of noise predictors, and the noise ε that they imply.

Symbols as in `prior`; x_s and v of flow matching as in `flow`.
"""

from torch import Tensor

from csd3d.priors.flow import flow_input


def to_epsilon(output: Tensor, z_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise ε implied by a network's output.

        v_prediction: v = √ᾱ ε − σ z    =>  ε = √ᾱ v + σ z_t           (arXiv 2202.00512, appendix D)
        sample:       z_t = √ᾱ z + σ ε  =>  ε = (z_t − √ᾱ z) / σ
        flow:         v = ε − z         =>  ε = x_s + (1 − s) v        (derived in `flow`)

    `output`, `z_t` [B, C, h, w]; `alpha_bar` [B]. Raises ValueError for another prediction type.
    """
    if prediction_type == "flow":
        x_s, s = flow_input(z_t, alpha_bar)
        return x_s + (1 - s.view(-1, 1, 1, 1)) * output
    a, sigma = (value.sqrt().reshape(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return a * output + sigma * z_t
    if prediction_type == "sample":
        return (z_t - a * output) / sigma
    raise ValueError(f"prediction_type must be epsilon, v_prediction, sample or flow, got {prediction_type!r}")


def network_target(z: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The training target of a network of `prediction_type` for z noised by ε: the inverse of `to_epsilon`.

    `z`, `noise` [B, C, h, w]; `alpha_bar` [B]. Raises ValueError for another prediction type.
    """
    a, sigma = (value.sqrt().reshape(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))
    targets = {"epsilon": noise, "v_prediction": a * noise - sigma * z, "sample": z, "flow": noise - z}
    if prediction_type not in targets:
        raise ValueError(f"prediction_type must be one of {', '.join(targets)}, got {prediction_type!r}")
    return targets[prediction_type]
