"""Tiny randomly initialised pipelines of the real diffusers classes, saved as the folders a user would point to."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

MERGES = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>")]
MAX_TOKENS = 12


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json and merges.txt as CLIP's are laid out (bytes, bytes ending a word, merges, specials)."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int = 16, projection: int | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP of `width` features; with `projection` one whose first output is the pooled text of so many."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projection or 16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def build_t5(width: int) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """T5 with a Unigram vocabulary of small letters and two words; tokens are </s> at the end, <pad> behind it."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxy"]  # no z: one letter is unknown
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -1.0), ("▁blue", -1.0), *letters]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes)
    return tokenizer, T5EncoderModel(config).eval()


def build_unet(in_channels: int) -> UNet2DConditionModel:
    """`attention_head_dim` is the number of heads in this class, whatever its name says."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    ).eval()


def build_vae(**options) -> AutoencoderKL:
    """Eight pixels to one latent, as Stable Diffusion's."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.18215} | options,
    ).eval()


def build_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def save_tiny_pipeline(folder: Path, kind: str = "edit", prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Saves a tiny `edit` (InstructPix2Pix, 8 channels) or `text` (Stable Diffusion, 4 channels) pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(folder / "tokenizer")
        parts = {
            "vae": build_vae(),
            "text_encoder": build_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "unet": build_unet(8 if kind == "edit" else 4),
            "scheduler": build_scheduler(prediction_type),
        }
    pipeline = StableDiffusionInstructPix2PixPipeline if kind == "edit" else StableDiffusionPipeline
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline(**parts, **extra).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_sdxl(folder: Path, in_channels: int = 4, zero_null: bool = True, seed: int = 0) -> Path:
    """SDXL: two CLIPs of 16 and 24 features, a pooled text of 12; 8 channels make an editing model of it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = {name: build_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")}
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=in_channels,
            out_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        ).eval()
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(scaling_factor=0.13025),
            text_encoder=build_text_encoder(tokenizers["tokenizer"]),
            text_encoder_2=build_text_encoder(tokenizers["tokenizer_2"], 24, 12),
            **tokenizers,
            unet=unet,
            scheduler=build_scheduler(),
            force_zeros_for_empty_prompt=zero_null,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_if(folder: Path, seed: int = 0) -> Path:
    """DeepFloyd IF's first stage: pictures of 8 pixels, T5, learned variance, text in the time embedding too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, text_encoder = build_t5(16)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=32,  # its norm has 32 groups
            encoder_hid_dim=16,
            attention_head_dim=4,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ).eval()
        scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.0, variance_type="learned_range"
        )
        parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "unet": unet, "scheduler": scheduler}
    extra = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    IFPipeline(**parts, **extra, requires_safety_checker=False).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_sd3(folder: Path, t5: bool = True, seed: int = 0, **more) -> Path:
    """Stable Diffusion 3: patches of two latents, 16 channels, text of width 48, a pooled text of 16 + 12.

    `more`: of the transformer; 32 or 48 `in_channels` make an UltraEdit of it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = {name: build_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")}
        tokenizer_3, text_encoder_3 = build_t5(48) if t5 else (None, None)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=28,
            pos_embed_max_size=8,
            **{"in_channels": 16} | more,
        ).eval()
        vae = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
        pipeline = StableDiffusion3Pipeline(
            vae=build_vae(**vae, use_quant_conv=False, use_post_quant_conv=False),
            transformer=transformer,
            text_encoder=build_text_encoder(tokenizers["tokenizer"], 16, 16),
            text_encoder_2=build_text_encoder(tokenizers["tokenizer_2"], 24, 12),
            **tokenizers,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux(folder: Path, kontext: bool = True, guided: bool = True, seed: int = 0) -> Path:
    """FLUX.1: 16 channels in tokens of 2 x 2, T5 of width 48, CLIP's pooled text of width 16; Kontext edits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, (tokenizer_2, text_encoder_2) = build_tokenizer(folder / "tokenizer"), build_t5(48)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guided,
        ).eval()
        vae = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        pipeline = (FluxKontextPipeline if kontext else FluxPipeline)(
            vae=build_vae(**vae, use_quant_conv=False, use_post_quant_conv=False),
            transformer=transformer,
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


QWEN_SPECIALS = [
    f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
]


def build_qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """One token for each byte, and the special ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *QWEN_SPECIALS]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_SPECIALS})
    return tokenizer


def build_qwen_vl(tokenizer: Qwen2Tokenizer, width: int = 32) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL that sees patches of 8 x 8 pixels, of which 2 x 2 become a token."""
    names = ("vision_start", "vision_end", "image", "video")
    words = dict(zip(names, QWEN_SPECIALS[2:], strict=True))
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    same = {"intermediate_size": 32, "hidden_act": "silu"}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**text, **same, "bos_token_id": None, "eos_token_id": None},
        vision_config={**vision, **same},
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def save_tiny_qwen_edit(folder: Path, plus: bool = False, seed: int = 0) -> Path:
    """Qwen-Image-Edit, or its successor 2509: 16 channels in tokens of 2 x 2, text of width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer(folder / "tokenizer")
        sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
        parts = {
            "vae": AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 2], num_res_blocks=1).eval(),
            "transformer": QwenImageTransformer2DModel(
                in_channels=64, out_channels=16, axes_dims_rope=(4, 6, 6), **sizes
            ),
            "text_encoder": build_qwen_vl(tokenizer),
            "tokenizer": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "processor").mkdir()
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 256, "max_pixels": 65536}))
    kind = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder
