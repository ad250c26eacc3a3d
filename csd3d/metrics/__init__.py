"""Metrics: images against images and texts, consistency of views, and of video frames along their motion."""

from csd3d.metrics.clip import (
    ClipModel,
    directional_similarity,
    image_consistency,
    image_similarity,
    load_clip,
    mean_pairwise_distance,
    retrieval_rank,
    text_image_score,
    view_word_accuracy,
)
from csd3d.metrics.consistency import reproject, view_pairs, warp_view, warped_error
from csd3d.metrics.fid import frechet_distance
from csd3d.metrics.image import dilate, psnr, psnr_outside, psnr_weighted, ssim, ssim_weighted
from csd3d.metrics.motion import WarpedError, seam_visibility

__all__ = [
    "ClipModel",
    "WarpedError",
    "dilate",
    "directional_similarity",
    "frechet_distance",
    "image_consistency",
    "image_similarity",
    "load_clip",
    "mean_pairwise_distance",
    "psnr",
    "psnr_outside",
    "psnr_weighted",
    "reproject",
    "retrieval_rank",
    "seam_visibility",
    "ssim",
    "ssim_weighted",
    "text_image_score",
    "view_pairs",
    "view_word_accuracy",
    "warp_view",
    "warped_error",
]
