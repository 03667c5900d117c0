# CPU kernels are written once and compiled once per instruction-set level.
#
#   fused_attn_add_cpu_kernel(<target> <source>)
#
# adds <source> to <target> once for each level of this family of processors, with FUSED_ATTN_LEVEL
# (the level's name, which is also the namespace of everything in the file) defined. What a level is
# and can do, and their order, is said in csrc/cpu/levels.h; here are its compiler flags.

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" _fused_attn_processor)
if(_fused_attn_processor MATCHES "^(x86_64|amd64)$" AND NOT MSVC)
  set(FUSED_ATTN_LEVEL_FAMILY x86)
elseif(_fused_attn_processor MATCHES "^(aarch64|arm64)$" AND NOT MSVC)  # Linux's and macOS' name
  set(FUSED_ATTN_LEVEL_FAMILY arm)
else()
  set(FUSED_ATTN_LEVEL_FAMILY other)
endif()

set(FUSED_ATTN_CPU_LEVELS all CACHE STRING
  "all: every level of this family of processors; native: those that this machine has")
if(NOT FUSED_ATTN_CPU_LEVELS MATCHES "^(all|native)$")
  message(FATAL_ERROR "FUSED_ATTN_CPU_LEVELS must be all or native, got ${FUSED_ATTN_CPU_LEVELS}")
endif()

get_filename_component(_fused_attn_root ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
file(READ ${CMAKE_CURRENT_LIST_DIR}/levels.h _fused_attn_levels_h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/levels.h)
string(REGEX MATCH "FUSED_ATTN_LEVELS_${FUSED_ATTN_LEVEL_FAMILY}\\(X, \\.\\.\\.\\)[^#]*"
  _fused_attn_row "${_fused_attn_levels_h}")
string(REGEX MATCHALL "X\\([a-z0-9_]+" FUSED_ATTN_LEVELS "${_fused_attn_row}")
list(TRANSFORM FUSED_ATTN_LEVELS REPLACE "X\\(" "")

# Each level is a minute of compiling, so a build for one machine has those that run there.
if(FUSED_ATTN_CPU_LEVELS STREQUAL "native" AND FUSED_ATTN_LEVEL_FAMILY STREQUAL "x86"
    AND NOT CMAKE_CROSSCOMPILING)
  try_run(_fused_attn_count _fused_attn_compiled ${CMAKE_CURRENT_BINARY_DIR}/levels_here
    ${CMAKE_CURRENT_LIST_DIR}/levels_here.cpp
    CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${_fused_attn_root}/csrc)
  list(LENGTH FUSED_ATTN_LEVELS _fused_attn_all)
  if(NOT _fused_attn_compiled OR NOT _fused_attn_count MATCHES "^[0-9]+$")
    message(STATUS "fused_attn: this machine's CPU level cannot be told, all are compiled")
  elseif(_fused_attn_count LESS 2)
    set(FUSED_ATTN_LEVEL_FAMILY other)
    set(FUSED_ATTN_LEVELS portable)
  elseif(_fused_attn_count LESS _fused_attn_all)
    list(SUBLIST FUSED_ATTN_LEVELS 0 ${_fused_attn_count} FUSED_ATTN_LEVELS)
    list(GET FUSED_ATTN_LEVELS -1 _fused_attn_last)
    set(FUSED_ATTN_LEVEL_FAMILY x86_${_fused_attn_last})
  endif()
  list(JOIN FUSED_ATTN_LEVELS ", " _fused_attn_words)
  message(STATUS "fused_attn: CPU levels of this machine: ${_fused_attn_words}")
endif()

# Next to faster levels, the portable one is worth half of the time that -O3 takes to compile it.
if(FUSED_ATTN_LEVEL_FAMILY STREQUAL "other")
  set(_fused_attn_flags_portable -O3)
else()
  set(_fused_attn_flags_portable -O2)
endif()
set(_fused_attn_flags_avx2 -O3 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt)
set(_fused_attn_flags_avx512 ${_fused_attn_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mavx512cd -mprefer-vector-width=512)
set(_fused_attn_flags_avx512_bf16 ${_fused_attn_flags_avx512} -mavx512bf16)
set(_fused_attn_flags_avx512_amx ${_fused_attn_flags_avx512_bf16} -mamx-tile -mamx-bf16)
set(_fused_attn_flags_neon -O3)

function(fused_attn_add_cpu_kernel target source)
  target_compile_definitions(${target} PRIVATE FUSED_ATTN_LEVEL_FAMILY=${FUSED_ATTN_LEVEL_FAMILY})
  string(REGEX REPLACE "^csrc/|\\.cpp$" "" stem ${source})
  string(REPLACE "/" "_" stem ${stem})
  foreach(level IN LISTS FUSED_ATTN_LEVELS)
    if(NOT DEFINED _fused_attn_flags_${level})
      message(FATAL_ERROR "csrc/cpu/levels.cmake has no compiler flags for the level ${level}")
    endif()
    # An object library for each level: one file with four sets of flags cannot be in one target.
    set(object ${target}_${stem}_${level})
    add_library(${object} OBJECT ${_fused_attn_root}/${source})
    target_include_directories(${object} PRIVATE ${_fused_attn_root}/csrc)
    target_compile_features(${object} PRIVATE cxx_std_17)
    target_compile_definitions(${object} PRIVATE
      FUSED_ATTN_LEVEL=${level} FUSED_ATTN_LEVEL_FAMILY=${FUSED_ATTN_LEVEL_FAMILY})
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
  endforeach()
endfunction()

function(fused_attn_add_cpu_kernels target)
  # The norms ask for fused multiply-adds where they want them: a compiler's own would keep the
  # difference of two equal products from being 0.
  set_source_files_properties(${_fused_attn_root}/csrc/layer_norm/cpu/forward.cpp
    ${_fused_attn_root}/csrc/layer_norm/cpu/backward.cpp
    PROPERTIES COMPILE_OPTIONS "$<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-ffp-contract=off>")
  foreach(kernel attention/cpu/forward attention/cpu/backward attention/cpu/weights
      layer_norm/cpu/forward layer_norm/cpu/backward
      bias_activation/cpu/forward bias_activation/cpu/backward
      embedding/cpu/forward embedding/cpu/backward linear/cpu/product)
    fused_attn_add_cpu_kernel(${target} csrc/${kernel}.cpp)
  endforeach()
endfunction()
