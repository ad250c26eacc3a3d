"""The networks of the shipped text-to-image model: the editor's without its picture, and told the camera."""

import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from csd3d.priors.camera_embedding import CAMERA_WIDTH, MAP_CHANNELS


def text_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """An editing UNet (8 channels) without its image channels; it was also trained on captions without a source
    picture. Another UNet is returned as it is."""
    if unet.config.in_channels != 8:
        return unet
    alone = UNet2DConditionModel.from_config({**unet.config, "in_channels": 4})
    state = unet.state_dict()
    state["conv_in.weight"] = state["conv_in.weight"][:, :4]
    alone.load_state_dict(state)
    return alone


def camera_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let it see the camera as a vector and a map; the new weights are zero: predictions equal those of `unet`."""
    if unet.config.in_channels == 4 + MAP_CHANNELS:
        return unet
    vector = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_WIDTH}
    aware = UNet2DConditionModel.from_config({**unet.config, **vector, "in_channels": 4 + MAP_CHANNELS})
    state = unet.state_dict()
    state["conv_in.weight"] = F.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, MAP_CHANNELS))
    if unet.config.class_embed_type is None:
        state |= {name: value for name, value in aware.state_dict().items() if name.startswith("class_embedding.")}
        for part in ("weight", "bias"):
            state[f"class_embedding.linear_2.{part}"].zero_()
    aware.load_state_dict(state)
    return aware
