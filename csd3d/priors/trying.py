"""A first prediction of a small picture, so that a model which cannot work is told before any work.

Configs can be wrong in ways that only show when the networks are called, and weights that are not finite would be told
after some steps, as a run that diverged. Weights can be gigabytes: they are searched only if an output is not finite.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.priors.libraries import MISFITS, one_line
from csd3d.priors.opening import PREDICTORS, ModelFolder
from csd3d.priors.prior import Prior
from csd3d.priors.runtimes import Exported
from csd3d.priors.speed import weight_count
from csd3d.priors.weights import tensor_shapes

SIDE = 16  # latent pixels
MOST_WEIGHTS = 3e9  # of a predictor; a larger one would take minutes on a processor


@torch.no_grad()
def try_out(prior: Prior, folder: ModelFolder) -> None:
    """Encode a picture, embed the empty prompt, predict the noise and decode. InputError where a part cannot.

    The predictor is left out where it is opened later, would be compiled for this size alone, or is too large.
    """
    exported = isinstance(prior.exported, Exported)
    side = prior.defaults.working_size
    if not exported:  # which is made for one size
        side = min(side, SIDE * getattr(prior.codec, "downscale", side))
    picture = torch.full((1, 3, side, side), 0.5)
    try:
        z = prior.encode(picture)
        image = prior.encode_condition(picture) if prior.edits else None
        shown = prior.decode(z)
    except (InputError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        raise InputError(f"{folder.part('vae')}/config.json: this VAE takes no picture ({one_line(error)})") from error
    _check_finite(prior, folder, [z, shown], {"vae": getattr(prior.codec, "vae", None)})
    with prior.text.keeping_nothing():
        condition = prior.condition([""], image)
    _check_finite(prior, folder, [condition.text, condition.pooled], prior.text.parts)
    if _is_predictor_left_out(prior, exported):
        return
    part = next(part for part in PREDICTORS if folder.config(part))
    z_t = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    t = torch.tensor([prior.num_train_timesteps // 2], device=z.device)
    try:
        noise = prior.predict_part(z_t, t, condition)
    except InputError as error:
        raise InputError(f"{folder.part(part)}/config.json: this model cannot predict: {error}") from error
    _check_finite(prior, folder, [noise], {part: prior.unet})


def _is_predictor_left_out(prior: Prior, exported: bool) -> bool:
    if prior.opens_later:
        return True
    if exported:
        return prior.exported.folder.is_dir()  # it was tried when it was exported
    return prior.options.compile or (prior.device.type == "cpu" and weight_count(prior) > MOST_WEIGHTS)


def _check_finite(
    prior: Prior, folder: ModelFolder, outputs: list[Tensor | None], networks: Mapping[str, object]
) -> None:
    """Raise InputError, with the tensor and its file, where an output of these networks, by part, is not finite."""
    if all(output is None or output.isfinite().all() for output in outputs):
        return
    networks = {part: network for part, network in networks.items() if isinstance(network, nn.Module)}
    for part, network in networks.items():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                lora = ", with prior.lora added," if prior.options.lora else ""
                files = (path for file, path in prior.files.items() if file.startswith(f"{part}/"))
                weights = (path for path in files if path.suffix == ".safetensors")
                place = next((path for path in weights if name in tensor_shapes(path)), folder.part(part))
                raise InputError(f"{place}: tensor {name}{lora} holds values that are not finite")
    dtype = str(prior.options.dtype).removeprefix("torch.")
    also = "" if dtype == "float32" else f"; prior.dtype is {dtype}, in which large values may overflow"
    raise InputError(f"{folder}: the output of {' and '.join(networks)} is not finite, though all weights are{also}")
