"""LMC-SDS's network b_ψ: the prior's expected one-step reconstruction of a picture, at every noise level.

Symbols as in `prior`; ẑ_0(z_t; y) = (z_t − σ_t ε(z_t; y))/√ᾱ_t. We follow the abstract of arXiv 2401.05293 and
secondary sources; the network's architecture is our own. Trained by `tools.train_shipped.lmc`.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csd3d.errors import InputError
from csd3d.files import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LIMITS = {"channels": 64, "width": 1024, "blocks": 64}  # the largest values that a folder's config may have


class ExpectedReconstruction(nn.Module):
    """b_ψ(z, t) = z + correction(z, t) ≈ E[ẑ_0(z_t; y) | z], for z [B, C, h, w] of any size.

    The correction is a few residual blocks of 3x3 convolutions, modulated by the time and dilated by 1, 2, 4, 1, ...,
    so that four blocks see all of a 16² latent. There is no normalisation, because it would remove the distance of z
    from the mean. The last layer starts at 0: then b_ψ(z, t) = z, and LMC-SDS equals SDS.
    """

    def __init__(self, channels: int = 4, width: int = 64, blocks: int = 4):
        super().__init__()
        if width % 2:
            raise ValueError(f"width must be even (half sines, half cosines of the time), got {width}")
        self.config = {"channels": channels, "width": width, "blocks": blocks}
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, 2 ** (i % 3)) for i in range(blocks))
        self.modulation = _zeroed(nn.Linear(width, 2 * width))
        self.conv_out = _zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, z: Tensor, t: int | Tensor) -> Tensor:
        """b_ψ(z, t) [B, C, h, w] float32; t an int, or [B]. Raises ValueError for another number of channels."""
        from diffusers.models.embeddings import get_timestep_embedding

        if z.ndim != 4 or z.shape[1] != self.config["channels"]:
            raise ValueError(f"z must be [B, {self.config['channels']}, h, w], got {tuple(z.shape)}")
        steps = torch.as_tensor(t, device=z.device).expand(len(z))
        time = self.time(get_timestep_embedding(steps, self.config["width"]))
        x = self.conv_in(z.float())
        for block in self.blocks:
            x = block(x, time)
        return z.float() + self.conv_out(_modulated(x, self.modulation(time))).float()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps({"_class_name": type(self).__name__, **self.config}, indent=2) + "\n")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, str(folder / WEIGHTS))


def load_expected(folder: Path | str, device: torch.device | str = "cpu") -> ExpectedReconstruction:
    """Open a folder written by `save_pretrained`, frozen, on `device`; InputError naming a missing or broken file."""
    folder = Path(folder)
    model = ExpectedReconstruction(**_read_config(folder / CONFIG))
    try:
        model.load_state_dict(load_file(str(folder / WEIGHTS)))
    except FileNotFoundError:
        raise InputError(f"{folder / WEIGHTS}: not found; train it with python -m tools.train_shipped lmc") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: does not fit ({' '.join(str(error).split())[:200]})") from None
    return model.to(device).eval().requires_grad_(False)


def _read_config(path: Path) -> dict[str, int]:
    config = read_json(path, "what python -m tools.train_shipped lmc writes")
    if config.get("_class_name") != ExpectedReconstruction.__name__:
        raise InputError(f"{path}: is not the config of an {ExpectedReconstruction.__name__}, LMC-SDS's b_ψ")
    for key, limit in LIMITS.items():
        value = config.get(key)
        if type(value) is not int or not 1 <= value <= limit or (key == "width" and value % 2):
            kind = "an even" if key == "width" else "a"
            raise InputError(f"{path}: {key}: {value!r} is not {kind} whole number in 1..{limit}")
    return {key: config[key] for key in LIMITS}


class _Block(nn.Module):
    """x + conv(silu(modulated(conv(x)))), both convolutions 3x3 with `dilation`, modulated by the time."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        same = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        self.first, self.second = nn.Conv2d(width, width, **same), _zeroed(nn.Conv2d(width, width, **same))
        self.modulation = _zeroed(nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.second(F.silu(_modulated(self.first(x), self.modulation(time))))


def _modulated(x: Tensor, parameters: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, W, h, w], parameters [B, 2W]."""
    scale, shift = parameters[..., None, None].chunk(2, dim=1)
    return x * (1 + scale) + shift


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
