"""What is measured: images against images, views against each other."""

from csd3d.metrics.consistency import view_pairs, warp_view, warped_error
from csd3d.metrics.image import best_answer, dilate, psnr, psnr_outside, ssim

__all__ = ["best_answer", "dilate", "psnr", "psnr_outside", "ssim", "view_pairs", "warp_view", "warped_error"]
