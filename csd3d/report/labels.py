"""What the figures of a run are called, in which unit they are, and which way is better."""

import math
import re

# key -> (label, unit, better, decimals); a key not listed is shown under its own name
METRICS = {
    "psnr_truth": ("PSNR against the truth", "dB", "higher", 2),
    "ssim_truth": ("SSIM against the truth", "", "higher", 3),
    "psnr_outside": ("PSNR outside the edit", "dB", "higher", 2),
    "warped_error": ("Disagreement between views", "RMSE", "lower", 4),
    "warped_error_short": ("Disagreement between near views", "RMSE", "lower", 4),
    "warped_error_long": ("Disagreement between far views", "RMSE", "lower", 4),
    "warped_error_before": ("Disagreement between the views before", "RMSE", None, 4),
    "answer_agreement": ("Views nearest to the same right answer", "share", "higher", 2),
    "agreement": ("Pixels on which neighbouring views agree", "share", "higher", 3),
    "overlap": ("Pixels that a neighbouring view shows too", "share", None, 3),
    "met3r": ("MEt3R (VAE features)", "", "lower", 4),
    "lpips_warped": ("Distance between warped views, like LPIPS", "", "lower", 4),
    "psnr_source": ("PSNR against the source", "dB", None, 2),
    "lpips_like": ("Distance to the source, like LPIPS", "", None, 4),
    "flow_warped_error": ("Flow-warped error", "RMSE", "lower", 4),
    "flow_warped_error_short": ("Flow-warped error, next frame", "RMSE", "lower", 4),
    "flow_warped_error_long": ("Flow-warped error, frames further apart", "RMSE", "lower", 4),
    "neighbour_distance": ("Distance between neighbours, like LPIPS", "", "lower", 4),
    "lpips": ("LPIPS (VGG) between neighbours", "", "lower", 4),
    "seam_visibility": ("Seam visibility", "", "lower", 3),
    "seam_visibility_relative": ("Seam visibility over the source's", "", "lower", 3),
    "clip_directional": ("CLIP directional similarity", "", "higher", 3),
    "clip_image": ("CLIP similarity to the source", "", None, 3),
    "clip_consistency": ("CLIP image consistency", "", "higher", 3),
    "clip_direction_consistency": ("CLIP direction consistency", "", "higher", 3),
    "object_psnr": ("PSNR on the object, against the nearest right one", "dB", "higher", 2),
    "object_ssim": ("SSIM on the object", "", "higher", 3),
    "mask_iou": ("Overlap of silhouettes", "IoU", "higher", 3),
    "front_psnr": ("PSNR on the object, of the front view", "dB", "higher", 2),
    "front_iou": ("Overlap of silhouettes, front view", "IoU", "higher", 3),
    "chamfer": ("Distance between the surfaces", "world units", "lower", 3),
    "volume_iou": ("Overlap of volumes", "IoU", "higher", 3),
    "colours_found": ("Asked colours found on the surface", "share", "higher", 2),
    "pattern_found": ("Asked pattern found on the surface", "share", "higher", 2),
    "sides_right": ("Views that show the side which belongs there", "share", "higher", 2),
    "stray_matter": ("Surface that is not the object", "share", "lower", 3),
    "normal_consistency": ("Surface whose normals by depth and by density agree", "share", "higher", 3),
    "distinct_answers": ("Different right objects nearest to the assets", "", "higher", 0),
    "answers_covered": ("Different right objects that the assets resemble", "", "higher", 0),
    "ranked_first": ("Prompt ranked first among 32", "share", "higher", 2),
    "rank": ("Rank of the prompt; the worst of several assets", "", "lower", 0),
    "clip_score": ("CLIP similarity to the prompt", "", "higher", 3),
    "clip_colour": ("CLIP similarity to the prompt, in colour", "", "higher", 3),
    "clip_geometry": ("CLIP similarity to the prompt, shape alone", "", "higher", 3),
    "view_words": ("Views classified as the right view", "share", "higher", 2),
    "fd": ("FD to true renders", "", "lower", 3),
    "fd_floor": ("FD of as many true renders, its floor", "", None, 3),
    "fid": ("FID, biased upwards for few pictures", "", "lower", 1),
    "diversity": ("Diversity, CLIP distance between assets", "", "higher", 3),
    "distinct_colour": ("Distinct colours among the assets", "", "higher", 0),
    "clip_diversity": ("Diversity, CLIP distance between pictures", "", "higher", 3),
    "kernel_mean": ("Kernel between different particles, first step", "", None, 3),
    "unet_evaluations": ("UNet evaluations", "", None, 0),
    "seconds": ("Time taken", "s", None, 1),
}


def format_value(value: float | int | None, decimals: int = 3) -> str:
    """Format a metric for the table; a dash for None and values that are not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{decimals}f}".replace(",", "\u202f")  # a narrow space between thousands


def metric_label(key: str, judge: str = "") -> str:
    """Return a metric's label, with the name of the CLIP in it: "CLIP (world) similarity to the prompt"."""
    return name_judge(METRICS[key][0] if key in METRICS else key.replace("_", " "), judge)


def name_judge(label: str, judge: str) -> str:
    """Return a label that says "CLIP" or "FD" with the judge's name in place of it; unchanged if `judge` is empty.

    "CLIP (world)" and "FD (world)" are replaced as a whole.
    """
    by_judge = {"CLIP": judge, "FD": judge.replace("CLIP", "FD")} if judge else {}
    return re.sub(r"\b(CLIP|FD)\b( \(world\))?", lambda match: by_judge.get(match[1], match[0]), label)
