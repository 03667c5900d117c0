"""What compilers make of the GPU kernels: registers, spills, instructions."""
