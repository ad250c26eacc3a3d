"""What a run says of its model at the start: its precision, and how long a large one takes on a processor."""

import torch

from csd3d.priors.prior import Prior

LARGE = 100e6  # parameters of a noise predictor, above which it is slow on a processor
CORE = 34e9  # floating-point operations a second of one core: 0.8 TFLOP of Stable Diffusion 1.5's UNet in 23.4 s
UNET_SHARE = 0.114  # of a UNet's parameters that act on each pixel of its latents, on average: Stable Diffusion 1.5's


def precision(prior: Prior) -> str:
    """The dtypes of the noise predictor, such as "float16 with weights in float32"."""
    weights = next(prior.outline.parameters()).dtype
    computes, stored = (str(dtype).removeprefix("torch.") for dtype in (prior.options.dtype, weights))
    return computes if computes == stored else f"{computes} with weights in {stored}"


def weight_count(prior: Prior) -> int:
    """The number of parameters of the noise predictor."""
    return sum(parameter.numel() for parameter in prior.outline.parameters())


def is_large(prior: Prior | None) -> bool:
    """Whether torch needs several threads for one row of this prior: then their number changes last bits."""
    return prior is not None and weight_count(prior) > LARGE


def slow_rows(prior: Prior) -> list[str]:
    """A line where a large predictor meets a processor: how long a prediction takes there, estimated from its size."""
    count = weight_count(prior)
    if count <= LARGE or prior.device.type != "cpu":
        return []
    seconds = row_seconds(prior, count, torch.get_num_threads())
    return [
        f"the model has {count / 1e6:.0f} million parameters and runs on the processor: about {seconds:.2g} s a row, "
        "which is one picture under one prompt (an estimate from its size)"
    ]


def row_seconds(prior: Prior, count: int, threads: int) -> float:
    """Estimated seconds of one row of a predictor of `count` parameters, at the model's own size.

    2 · parameters · pixels of the latent · share, at `CORE` a thread. A transformer's parameters act on every patch.
    """
    side, codec = prior.defaults.working_size, prior.codec
    _, height, width = prior.latent_shape(side, side)
    share = UNET_SHARE if hasattr(prior.outline, "down_blocks") else (codec.downscale / codec.multiple) ** 2
    return 2 * count * height * width * share / (CORE * threads)
