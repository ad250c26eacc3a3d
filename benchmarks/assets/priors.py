"""The prior that bounds what any method can reach, for rows with `plugins: [benchmarks.assets.priors]`.

world_truth:exact    the true picture at each camera, of one right object: no method can have a better prior
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.distillation.method import Network, Query
from csd3d.errors import InputError
from csd3d.priors.options import Options
from csd3d.priors.queries import NO_NETWORKS
from csd3d.registry import register
from csd3d.world.exact_prior import SIZE, ExactPrior, open_exact
from csd3d.world.language import write_prompt
from csd3d.world.objects import WorldObjects
from csd3d.world.pairs import FOV_DEG
from csd3d.world.prompts import read_prompt
from csd3d.world.scene import BACKDROPS

DRAWN = 64  # right objects, among which those of several assets are chosen so that they differ


class TruePictures(ExactPrior):
    """ε(z_t) = (z_t − √ᾱ_t z_0)/σ_t, z_0 the latent of the true picture at the particle's own camera.

    It shows one right object alone, before the backdrop that the prompt names. Of several assets each has its own
    object, different ones as far as the prompt allows. The unconditional prediction is the same, so guidance does
    nothing. Queries must have poses; those without words need one with words beside them.
    """

    def predict(self, queries: Mapping[str, Query], networks: Mapping[str, Network] = NO_NETWORKS) -> dict[str, Tensor]:
        told = next((query for query in queries.values() if all(query.prompts) and query.pose is not None), None)
        if told is None:
            raise InputError("prior.model: world_truth:exact needs the prompt and the pose of every particle")
        clean, answers = self.true_latents(told), {}
        for key, query in {query.key: query for query in queries.values()}.items():
            if query.network != "prior":
                answers[key] = networks[query.network].answer(query)
                continue
            self.unet_evaluations += len(query.z_t)
            alpha_bar = self.alphas_cumprod[query.t]
            answers[key] = (query.z_t - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return {name: answers[query.key] for name, query in queries.items()}

    @torch.no_grad()
    def true_latents(self, query: Query) -> Tensor:
        """Latents [N, C, h, w] of the true pictures at the cameras of N particles, which are asset-major."""
        poses = query.pose.view(-1, 3, 4).cpu().float()
        views = len({tuple(pose) for pose in poses.flatten(1).tolist()})
        said = read_prompt(query.prompts[0])
        kept = {key: value for key, value in said.items() if key not in ("view", "facing", "backdrop")}
        things = different(WorldObjects(write_prompt(kept)), len(poses) // views)
        backdrop = torch.tensor(BACKDROPS[said.get("backdrop", "grey")])
        pictures = []
        for asset, thing in enumerate(things):
            own = poses[asset * views : (asset + 1) * views]
            focal = torch.full((views,), 0.5 * SIZE) / torch.deg2rad(torch.tensor(FOV_DEG / 2)).tan()
            middle = torch.full((views,), SIZE / 2)
            cameras = Cameras(own, focal, focal, middle, middle, SIZE, SIZE)
            pictures.append(WorldObjects(query.prompts[0]).views(thing, cameras, backdrop).rgb)
        return self.encode(torch.cat(pictures).permute(0, 3, 1, 2).to(self.device))


def different(objects: WorldObjects, count: int) -> list[Any]:
    """`count` right objects, different ones as far as there are any among `DRAWN`; always the same."""
    first: dict[tuple, Any] = {}
    for thing in objects.draw(DRAWN, 0):
        first.setdefault(tuple(objects.open_values(thing).items()), thing)
    apart = list(first.values())
    return [apart[i % len(apart)] for i in range(count)]


@register("prior", "world_truth", title="true pictures of the procedural world")
def open_truth(options: Options, require: Literal["edit", "text"] | None) -> ExactPrior:
    """The prior of true pictures; InputError for edits."""
    if require == "edit":
        raise InputError("prior.model: world_truth:exact makes assets from words only")
    prior = open_exact(options, "text", TruePictures)
    prior.family = "true pictures of the procedural world"
    return prior
