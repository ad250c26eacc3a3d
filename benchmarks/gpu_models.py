"""Sections of `benchmarks.gpu_check` on priors alone: half precision of the shipped ones, speed of full-size ones."""

import time
from collections.abc import Callable

import torch

from benchmarks.full_size import write_model
from benchmarks.gpu_tools import (
    GIB,
    ROOT,
    Check,
    counted_waits,
    difference,
    milliseconds,
    peak,
    reset_peak,
    synchronise,
    tried,
)
from csd3d.priors import Prior, PriorConfig, load_prior

ASSETS = ROOT / "csd3d" / "assets"


def precision(check: Check) -> dict:
    """Compare the shipped priors' predictions in half precision with float32, at three timesteps."""
    found = {}
    for name in ("ip2p", "t2i"):
        noises = {}
        for dtype in ("float32", "bfloat16", "float16") if check.device == "cuda" else ("float32", "bfloat16"):
            prior = load_prior(PriorConfig(model=str(ASSETS / name), device=check.device, dtype=dtype))
            noises[dtype] = [predict(prior, 4, 16, t) for t in (50, 500, 950)]
        wanted = torch.stack(noises.pop("float32"))
        for dtype, noise in noises.items():
            error = (torch.stack(noise) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            found[f"{name}_{dtype}_relative_rms"] = error.item()
    return found


def predict(prior: Prior, rows: int, side: int, t: int = 500) -> torch.Tensor:
    """Return the predicted noise of fixed random latents [rows, 4, side, side]."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 4, side, side, generator=generator).to(prior.device)
    image = torch.randn(rows, 4, side, side, generator=generator).to(prior.device) if prior.edits else None
    return prior.predict_noise(z, t, prior.condition(["paint it red"] * rows, image))


def full_size(check: Check) -> dict:
    """Build and open an InstructPix2Pix of Stable Diffusion 1.5's size."""
    found = build_full(check)
    reset_peak(check.device)
    started = time.monotonic()
    prior = open_full(check)
    synchronise(check.device)
    found["load_s"] = time.monotonic() - started
    if check.device == "cuda":
        found["weights_gib"] = torch.cuda.memory_allocated() / GIB
    found["finite"] = bool(torch.isfinite(predict(prior, 1, 8 if check.rehearse else 64)).all())
    return found


def build_full(check: Check) -> dict:
    """Write the full-size editing model."""
    started, folder = time.monotonic(), check.work / "full-size-ip2p"
    parameters = write_model(folder, True, check.device, 8 if check.rehearse else 1)
    check.model = folder
    return {"unet_parameters": parameters, "build_s": time.monotonic() - started}


def open_full(check: Check, **options) -> Prior:
    """Open the full-size model as a job opens `prior.model`, building it if needed."""
    if check.model is None:
        build_full(check)
    return load_prior(PriorConfig(model=str(check.model), device=check.device, **options), require="edit")


def unet_rows(check: Check) -> dict:
    """Measure the full-size UNet at 64×64 latents: milliseconds a row by batch size, dtype and dtype of the weights."""
    found, side, batches = {}, 8 if check.rehearse else 64, (1, 4) if check.rehearse else (1, 4, 16, 48)
    for dtype in ("float16", "bfloat16", "float32") if check.device == "cuda" else ("float32",):
        prior = open_full(check, dtype=dtype, weights="float32", micro_batch=max(batches))
        found[dtype] = rows_of(check, prior, batches if dtype == "float16" else batches[1:3], side)
        if dtype == "float16":
            with counted_waits(check.device) as waits:
                predict(prior, 4, side)
            found["waits_a_call"] = dict(waits)
            prior.unet.half()
            found["float16 weights too"] = rows_of(check, prior, batches, side)
        del prior
    return found


def rows_of(check: Check, prior: Prior, batches: tuple[int, ...], side: int) -> dict:
    """Return milliseconds a row and peak memory above the weights, for each batch size."""
    found = {}
    for rows in batches:
        reset_peak(check.device)
        held = torch.cuda.memory_allocated() if check.device == "cuda" else 0
        times = 4 if rows < 16 else 2
        call = lambda rows=rows: predict(prior, rows, side)  # noqa: E731
        took = lambda call=call, rows=rows, times=times: {"ms_a_row": milliseconds(check.device, call, times) / rows}  # noqa: E731
        found[f"{rows} rows"] = tried(took, torch.OutOfMemoryError)
        if check.device == "cuda":
            found[f"{rows} rows"]["activations_gib"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return found


def vae(check: Check) -> dict:
    """Measure the full-size VAE at 512²: milliseconds a picture and peak memory, also with a gradient."""
    prior, found, side = open_full(check), {}, 64 if check.rehearse else 512
    for count in (1, 2) if check.rehearse else (1, 4, 16):
        images = torch.rand(count, 3, side, side, device=check.device)
        for name in ("encode", "decode", "encode_with_gradient"):
            reset_peak(check.device)
            call = _vae_call(prior, images, name)
            took = lambda call=call, n=count: {"ms_a_picture": milliseconds(check.device, call, 1, 1) / n}  # noqa: E731
            found[f"{name} {count}"] = tried(took, torch.OutOfMemoryError) | peak(check.device)
    return found


def _vae_call(prior: Prior, images: torch.Tensor, name: str) -> Callable[[], object]:
    """Return the function to time."""
    if name == "encode_with_gradient":
        leaf = images.clone().requires_grad_()
        return lambda: torch.autograd.grad(prior.encode(leaf).sum(), leaf)
    z = torch.zeros(len(images), *prior.latent_shape(*images.shape[2:]), device=images.device)
    return torch.no_grad()(lambda: prior.encode(images) if name == "encode" else prior.decode(z))


def compiled(check: Check) -> dict:
    """Measure torch.compile on the full-size UNet with float16 weights: seconds to compile, milliseconds a row."""
    prior = open_full(check, dtype="float16" if check.device == "cuda" else "float32")
    side, rows = (8, 4) if check.rehearse else (64, 16)
    found = {"eager_ms_a_row": milliseconds(check.device, lambda: predict(prior, rows, side), 3) / rows}
    wanted = predict(prior, rows, side)
    prior.unet.compile(backend="eager" if check.rehearse else "inductor")
    started = time.monotonic()
    got = predict(prior, rows, side)
    synchronise(check.device)
    found |= {"compile_s": time.monotonic() - started, "difference": difference(got, wanted)}
    return found | {"compiled_ms_a_row": milliseconds(check.device, lambda: predict(prior, rows, side), 5) / rows}
