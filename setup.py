"""Packaging, and the build of the C++ kernels (optional: without a compiler the torch reference takes over)."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    }
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors of GCC are passed between inlined functions only
    "-pthread",
]
SOURCES = sorted(str(path) for path in Path("custom_kernels/cpu").glob("*.cpp"))


class BuildKernels(build_ext):
    """Builds plain shared libraries, `custom_kernels/_native_<isa>.so`: no Python symbol in them."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        temp, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"  # same sources, other flags
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = temp


CORE = [
    "torch>=2.5",
    "diffusers>=0.31",
    "transformers>=4.45",
    "accelerate>=1.0",
    "safetensors>=0.4.3",
    "nerfacc>=0.5.3",
    "trimesh>=4.4",
    "kornia>=0.7.3",
    "omegaconf>=2.4",  # 2.4 limits what YAML aliases expand to
    "imageio>=2.34",
    "imageio-ffmpeg>=0.5",
    "opencv-python-headless>=4.9",
    "numpy>=1.26",
    "scipy>=1.11",
    "pillow>=10.3",
    "psutil>=5.9",
    "rich>=14.1",
    "scikit-image>=0.22",
    "fast-simplification>=0.1.7",
    "xatlas>=0.0.9",
    "tensorboard>=2.16",
]

TRITON = 'triton>=3.2; platform_system == "Linux"'  # CUDA builds of torch bring the version that they need

setup(
    name="csd3d",
    version="0.1.0",
    description="Text-to-3D and instruction-driven editing of captured 3D scenes by Collaborative Score Distillation",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["csd3d", "csd3d.*", "custom_kernels", "custom_kernels.*"]),
    py_modules=["launch"],
    package_data={"csd3d": ["assets/**/*", "report/*.html"], "custom_kernels": ["cpu/*"]},
    install_requires=CORE,
    extras_require={
        "test": [
            "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.6",
            "pycolmap>=4.0", "peft>=0.13", "submitit>=1.5", TRITON,
        ],
        "triton": [TRITON],
        "process": ["pycolmap>=4.0"],
        "metrics": ["lpips>=0.1.4", "open-clip-torch>=2.24", "torch-fidelity>=0.4"],
        "tcnn": ["tinycudann"],
        "openvino": ["openvino>=2026.0"],
        "onnxruntime": ["onnxruntime>=1.20", "onnx>=1.16"],
        "gsplat": ["gsplat>=1.4"],
        "lora": ["peft>=0.13"],
        "quantise": ["torchao>=0.15", "bitsandbytes>=0.45; platform_system != 'Darwin'"],
        "sweep": ["submitit>=1.5"],
    },
    entry_points={"console_scripts": ["csd3d=launch:main"]},
    ext_modules=[
        Extension(f"custom_kernels._native_{isa}", SOURCES, language="c++", optional=True,
                  extra_compile_args=FLAGS + flags, extra_link_args=["-pthread"])
        for isa, flags in ISA_FLAGS.items()
    ],
    cmdclass={"build_ext": BuildKernels},
)  # fmt: skip
