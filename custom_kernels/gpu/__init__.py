"""GPU kernels in Triton: the kernels alone, without torch. `hashgrid_triton` and `rendering_triton` launch them."""
