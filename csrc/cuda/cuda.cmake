# The CUDA kernels as part of a module. FUSED_ATTN_CUDA: auto (where there is a compiler), on, off.
# FUSED_ATTN_CUDA_ARCHS: what to compile for, e.g. "80;90a": 90a are the Hopper kernels, numbers
# without a letter the plain ones.
set(FUSED_ATTN_CUDA auto CACHE STRING "Build the CUDA kernels: auto, on or off")
# Why a build that tries again without CUDA does so (setup.py).
set(FUSED_ATTN_CUDA_FAILURE "" CACHE STRING "What info says of the missing kernels")
set(FUSED_ATTN_CUDA_ARCHS "80;90a" CACHE STRING "Architectures of the CUDA kernels")
option(FUSED_ATTN_CUDA_TRAP "Kernels trap after a second in an mbarrier, for debugging" OFF)
option(FUSED_ATTN_CUDA_LATE_EXP "A second module, to compare: exponentials behind the product" OFF)
set(_fused_attn_oldest_nvcc 12.3)  # the first whose ptxas knows all that the kernels use

# What is wrong with a compiler, if anything is.
function(fused_attn_nvcc_problem compiler result)
  set(${result} "" PARENT_SCOPE)
  if(NOT compiler)
    set(${result} "no CUDA compiler (nvcc) was found" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${compiler} --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${text}")
  if(NOT CMAKE_MATCH_1)
    set(${result} "${compiler} does not say which release of nvcc it is" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS _fused_attn_oldest_nvcc)
    set(${result} "nvcc ${CMAKE_MATCH_1} is older than ${_fused_attn_oldest_nvcc}" PARENT_SCOPE)
  endif()
endfunction()

# `result`: whether there will be CUDA kernels; `missing`: why not.
function(fused_attn_find_cuda result missing)
  set(${result} OFF PARENT_SCOPE)
  if(FUSED_ATTN_CUDA STREQUAL "off")
    set(${missing} "FUSED_ATTN_CUDA was off" PARENT_SCOPE)
    if(NOT FUSED_ATTN_CUDA_FAILURE STREQUAL "")
      set(${missing} "${FUSED_ATTN_CUDA_FAILURE}" PARENT_SCOPE)
    endif()
    return()
  endif()
  include(CheckLanguage)
  # Architectures are given by hand: CMake's own notion does not know 90a everywhere.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  check_language(CUDA)
  fused_attn_nvcc_problem("${CMAKE_CUDA_COMPILER}" problem)
  set(${missing} "${problem}" PARENT_SCOPE)
  if(problem STREQUAL "")
    set(${result} ON PARENT_SCOPE)
  elseif(FUSED_ATTN_CUDA STREQUAL "on")
    message(FATAL_ERROR "FUSED_ATTN_CUDA=on, but ${problem}")
  else()
    message(STATUS "Building without CUDA kernels: ${problem}")
  endif()
endfunction()

# Sources compiled for some architectures, added to the module.
function(_fused_attn_cuda_objects target name archs)
  set(object ${target}_cuda_${name})
  add_library(${object} OBJECT ${ARGN})
  target_include_directories(${object} PRIVATE csrc ${CMAKE_CURRENT_BINARY_DIR}/generated)
  target_compile_features(${object} PRIVATE cuda_std_17)
  if(FUSED_ATTN_CUDA_TRAP)
    target_compile_definitions(${object} PRIVATE FUSED_ATTN_TRAP)
  endif()
  foreach(arch IN LISTS archs)
    target_compile_options(${object} PRIVATE "SHELL:-gencode=arch=compute_${arch},code=sm_${arch}")
  endforeach()
  target_compile_options(${object} PRIVATE -O3 --use_fast_math
    "SHELL:-Xptxas -v,-warn-spills,-warn-lmem-usage" "SHELL:-Xfatbin -compress-all")
  # Spills and serialised matrix products are errors, but where it does not matter: a clock in every
  # wait takes a register.
  if(NOT FUSED_ATTN_CUDA_TRAP)
    set_target_properties(${object} PROPERTIES CUDA_COMPILER_LAUNCHER
      "${Python_EXECUTABLE};${PROJECT_SOURCE_DIR}/csrc/cuda/check_ptxas.py")
  endif()
  set_target_properties(${object} PROPERTIES
    POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
endfunction()

function(fused_attn_add_cuda target)
  set(wrappers ${CMAKE_CURRENT_BINARY_DIR}/generated/wgmma_wrappers.h)
  set(generator ${PROJECT_SOURCE_DIR}/csrc/cuda/generate_wgmma.py)
  add_custom_command(OUTPUT ${wrappers}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/generated
    COMMAND ${Python_EXECUTABLE} ${generator} ${wrappers}
    DEPENDS ${generator} VERBATIM)
  find_package(CUDAToolkit REQUIRED)

  # Without 90a there are the plain kernels only.
  if("90a" IN_LIST FUSED_ATTN_CUDA_ARCHS)
    _fused_attn_cuda_objects(${target} hopper 90a ${wrappers}
      csrc/attention/sm90/dkdv_bfloat16.cu
      csrc/attention/sm90/dkdv_float16.cu
      csrc/attention/sm90/dq_bfloat16.cu
      csrc/attention/sm90/dq_float16.cu
      csrc/attention/sm90/dqdkdv_bfloat16.cu
      csrc/attention/sm90/dqdkdv_float16.cu
      csrc/attention/sm90/forward_bfloat16.cu
      csrc/attention/sm90/forward_float16.cu
      csrc/attention/sm90/host.cu)
    target_sources(${target} PRIVATE
      csrc/attention/sm90/bindings.cpp
      csrc/cuda/map_cache.cpp)
    target_compile_definitions(${target} PRIVATE FUSED_ATTN_WITH_HOPPER)
  endif()
  _fused_attn_cuda_objects(${target} plain "${FUSED_ATTN_CUDA_ARCHS}" ${wrappers}
    csrc/layer_norm/cuda/launch.cu)

  target_sources(${target} PRIVATE
    csrc/cuda/launch.cpp
    csrc/layer_norm/cuda/bindings.cpp)
  target_compile_definitions(${target} PRIVATE FUSED_ATTN_WITH_CUDA)
  # The runtime is linked in; the driver is asked for its functions at run time.
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_include_directories(${target} PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
  if(FUSED_ATTN_CUDA_LATE_EXP AND "90a" IN_LIST FUSED_ATTN_CUDA_ARCHS)
    _fused_attn_late_module(${target} ${target}_late)
  endif()
endfunction()

# The module once more, in the folder `late`: everything from the same objects, but the bfloat16
# forward is compiled anew, as ptxas orders it when it may. `make gpu` times it beside the other.
function(_fused_attn_late_module target late)
  add_library(${late} MODULE $<TARGET_OBJECTS:${target}>)
  _fused_attn_cuda_objects(${late} forward 90a csrc/attention/sm90/forward_bfloat16.cu)
  target_compile_definitions(${late}_cuda_forward PRIVATE FUSED_ATTN_LATE_EXP)
  add_dependencies(${late}_cuda_forward ${target}_cuda_hopper)  # which writes wgmma_wrappers.h
  get_target_property(sources ${target} SOURCES)
  list(FILTER sources INCLUDE REGEX "TARGET_OBJECTS")
  list(REMOVE_ITEM sources "$<TARGET_OBJECTS:${target}_cuda_hopper>")
  target_sources(${late} PRIVATE ${sources}
    $<FILTER:$<TARGET_OBJECTS:${target}_cuda_hopper>,EXCLUDE,forward_bfloat16>)
  target_link_libraries(${late} PRIVATE pybind11::module CUDA::cudart_static)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${late} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  pybind11_extension(${late})
  set_target_properties(${late} PROPERTIES LINKER_LANGUAGE CXX OUTPUT_NAME ${target}
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/late)
endfunction()
