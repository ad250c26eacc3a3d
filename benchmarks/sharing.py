"""Measure how much views share at two sizes of latents: the same pictures at 128² and enlarged to 512².

`python -m benchmarks.sharing --json FILE`

The first views of the shipped scene, encoded by the shipped VAE to 4×16×16 and 4×64×64. A figure is the share of a row
of the kernel matrix that goes to other views, as CSD-Edit has it at a noise level with noise that all views share; 0 is
none, 7/8 is equal sharing among eight views.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from csd3d.canvas.latents import resize
from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.edit_loop import inner_edit
from csd3d.distillation.kernel import SVGDConfig, kernel_matrix
from csd3d.distillation.schedule import timestep
from csd3d.distillation.suits import suited
from csd3d.engine.environment import environment
from csd3d.priors import Prior, PriorConfig, load_prior

VIEWS, TIMES, SIDES = 8, (0.8, 0.6, 0.4), (128, 512)


def shared_weight(z: Tensor, alpha_bar: float, config: SVGDConfig) -> float:
    """Mean share of a row's kernel weight that goes to other particles than its own, of latents z [N, ...]."""
    K, _ = kernel_matrix(alpha_bar**0.5 * z, config)
    return (1 - K.diagonal() / K.sum(1)).mean().item()


@torch.no_grad()
def measure(prior: Prior, photos: Tensor, side: int) -> dict[str, float]:
    """{noise level: shared weight} of photos [N, 3, H, W] in [0, 1] enlarged to `side` pixels."""
    z = prior.encode(resize(photos, (side, side)))
    svgd = suited(inner_edit(), prior.defaults).svgd
    at = {t: prior.alphas_cumprod[timestep(t, prior.num_train_timesteps)].item() for t in TIMES}
    return {str(t): round(shared_weight(z, alpha_bar, svgd), 4) for t, alpha_bar in at.items()}


def shipped(views: int = VIEWS) -> tuple[Prior, Tensor]:
    """The shipped editing model, and the first training photos of the shipped scene."""
    capture = load_capture(SceneConfig(path="csd3d/assets/scene"))
    photos = capture.images[capture.train[:views]].permute(0, 3, 1, 2)
    return load_prior(PriorConfig("csd3d/assets/ip2p", device="cpu")), photos


def main() -> None:
    """Write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    path = parser.parse_args().json
    prior, photos = shipped()
    found = {f"4x{side // 8}x{side // 8}": measure(prior, photos, side) for side in SIDES}
    for name, shares in found.items():
        print(name, *(f"t = {t}: {share:.3f}" for t, share in shares.items()), sep="   ")
    record = {"views": VIEWS, "shared_weight": found, "environment": environment()}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
