# The kernels' own source as host C++ on the emulated device: the module `_emulator`, for tests.
# Not part of the package; `cmake --build <folder> --target _emulator` makes it.
set(FUSED_ATTN_CUDA_KERNELS
  csrc/attention/cuda_forward.cu)

pybind11_add_module(_emulator MODULE NO_EXTRAS EXCLUDE_FROM_ALL
  csrc/attention/cuda_bindings.cpp
  csrc/attention/cuda_host.cpp
  csrc/common/tensor.cpp
  csrc/emulator/barriers.cpp
  csrc/emulator/copies.cpp
  csrc/emulator/fiber.cpp
  csrc/emulator/launch.cpp
  csrc/emulator/machine.cpp
  csrc/emulator/matrix.cpp
  csrc/emulator/module.cpp
  csrc/emulator/shared_memory.cpp
  ${FUSED_ATTN_CUDA_KERNELS})
set_source_files_properties(${FUSED_ATTN_CUDA_KERNELS} PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-xc++")
target_compile_definitions(_emulator PRIVATE FUSED_ATTN_EMULATED)
target_include_directories(_emulator PRIVATE csrc)
target_compile_features(_emulator PRIVATE cxx_std_17)
target_compile_options(_emulator PRIVATE -O2 -Wall -Wextra)
