"""The networks of the shipped text-to-image model: the editor's without its picture, and told the camera."""

from diffusers import UNet2DConditionModel
from torch import nn

from csd3d.priors.camera_embedding import CAMERA_WIDTH


def text_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """An editing UNet (8 channels) without its image channels; it was also trained on captions without a source
    picture. A UNet of 4 channels is returned as it is."""
    if unet.config.in_channels == 4:
        return unet
    alone = UNet2DConditionModel.from_config({**unet.config, "in_channels": 4})
    state = unet.state_dict()
    state["conv_in.weight"] = state["conv_in.weight"][:, :4]
    alone.load_state_dict(state)
    return alone


def camera_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Add a camera embedding whose last layer is zero: the predictions equal those of `unet` for any camera."""
    if unet.config.class_embed_type == "projection":
        return unet
    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_WIDTH}
    aware = UNet2DConditionModel.from_config({**unet.config, **extra})
    missing, unexpected = aware.load_state_dict(unet.state_dict(), strict=False)
    if unexpected or any(not name.startswith("class_embedding.") for name in missing):
        raise RuntimeError(f"the UNet's weights do not fit: {missing[:3]} {unexpected[:3]}")
    nn.init.zeros_(aware.class_embedding.linear_2.weight)
    nn.init.zeros_(aware.class_embedding.linear_2.bias)
    return aware
