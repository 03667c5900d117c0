# CPU kernels are written once and compiled once per instruction-set level.
#
#   fused_attn_add_cpu_kernel(<target> <source>)
#
# adds <source> to <target> once for each level of this processor family, with FUSED_ATTN_LEVEL (the
# level's name, which is also the namespace of everything in the file) and FUSED_ATTN_LEVEL_ID (its
# number in cpu/level.h) defined. `cpu/vec.h` picks the vector types by that number.
# `cpu/kernel_dtypes.h` says which dtypes a level has kernels of its own for.

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" _fused_attn_processor)
if(_fused_attn_processor MATCHES "^(x86_64|amd64)$" AND NOT MSVC)
  set(FUSED_ATTN_X86_LEVELS ON)
else()
  set(FUSED_ATTN_X86_LEVELS OFF)
endif()

# Next to faster levels, the portable one is worth half of the time that -O3 takes to compile it.
if(FUSED_ATTN_X86_LEVELS)
  set(_fused_attn_flags_portable -O2)
else()
  set(_fused_attn_flags_portable -O3)
endif()
set(_fused_attn_flags_avx2 -O3 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt)
set(_fused_attn_flags_avx512 ${_fused_attn_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mavx512cd -mprefer-vector-width=512)
set(_fused_attn_flags_avx512_bf16 ${_fused_attn_flags_avx512} -mavx512bf16)

function(fused_attn_add_cpu_kernel target source)
  if(FUSED_ATTN_X86_LEVELS)
    set(levels portable avx2 avx512 avx512_bf16)
    target_compile_definitions(${target} PRIVATE FUSED_ATTN_X86_LEVELS)
  else()
    set(levels portable)
  endif()
  string(REGEX REPLACE "^csrc/|\\.cpp$" "" stem ${source})
  string(REPLACE "/" "_" stem ${stem})
  set(id 0)
  foreach(level IN LISTS levels)
    # An object library for each level: one file with four sets of flags cannot be in one target.
    set(object ${target}_${stem}_${level})
    add_library(${object} OBJECT ${source})
    target_include_directories(${object} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_compile_features(${object} PRIVATE cxx_std_17)
    target_compile_definitions(${object} PRIVATE
      FUSED_ATTN_LEVEL=${level} FUSED_ATTN_LEVEL_ID=${id})
    target_compile_options(${object} PRIVATE
      $<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-Wall;-Wextra> ${_fused_attn_flags_${level}})
    # Passing 64-byte vectors by value changes between ABIs, but every such function is inlined; and
    # gcc 12 warns of its own intrinsics ("__Y is used uninitialized").
    target_compile_options(${object} PRIVATE
      $<$<CXX_COMPILER_ID:GNU>:-Wno-psabi;-Wno-uninitialized;-Wno-maybe-uninitialized>)
    set_target_properties(${object} PROPERTIES
      POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    if(OpenMP_CXX_FOUND)
      target_link_libraries(${object} PRIVATE OpenMP::OpenMP_CXX)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
    math(EXPR id "${id} + 1")
  endforeach()
endfunction()
