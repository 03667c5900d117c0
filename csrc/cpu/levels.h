// The instruction-set levels of the CPU kernels: which there are, in what order, and what each can
// do. Nothing else says so: the enum, the names, the tables of kernels and the dtypes come from
// here, and csrc/cpu/levels.cmake reads the order from here.
#pragma once

#if !defined(FUSED_ATTN_LEVEL_FAMILY)
#error "levels.h is for targets of csrc/cpu/levels.cmake, which say what family of processors it is"
#endif

// clang-format off

// The levels of a family of processors, lowest first: each needs what those before it need.
#define FUSED_ATTN_LEVELS_x86(X, ...) \
  X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) \
  X(avx512_bf16, __VA_ARGS__) X(avx512_amx, __VA_ARGS__)
// The first of them, in a build for machines that have no more (levels.cmake, "native").
#define FUSED_ATTN_LEVELS_x86_avx2(X, ...) X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__)
#define FUSED_ATTN_LEVELS_x86_avx512(X, ...) \
  X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#define FUSED_ATTN_LEVELS_x86_avx512_bf16(X, ...) \
  X(portable, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512_bf16, __VA_ARGS__)
#define FUSED_ATTN_LEVELS_arm(X, ...) X(portable, __VA_ARGS__) X(neon, __VA_ARGS__)
#define FUSED_ATTN_LEVELS_other(X, ...) X(portable, __VA_ARGS__)

// A row of each level:
//   the header with its vectors, the bytes of a vector register, how many registers there are
//   BF16_DOT: has it an instruction that multiplies pairs of bfloat16 and adds them up?
//   BF16_TILES: has it instructions that multiply tiles of such pairs?
//   has it kernels of its own for problems of `dtype`? A level that computes a dtype no better than
//     the level below does not compile it again, and the kernels of that one run
//   has the processor what it needs?
#define FUSED_ATTN_LEVEL_portable    ("cpu/vec_portable.h", 16, 16, 0, 0, true, true)
// In float64 the portable kernels beat avx2's.
#define FUSED_ATTN_LEVEL_avx2        ("cpu/vec_avx2.h", 32, 16, 0, 0, dtype != DType::kFloat64, \
    FUSED_ATTN_HAS("avx2") && FUSED_ATTN_HAS("fma") && has_f16c())
#define FUSED_ATTN_LEVEL_avx512      ("cpu/vec_avx512.h", 64, 32, 0, 0, true, \
    FUSED_ATTN_HAS("avx512f") && FUSED_ATTN_HAS("avx512bw") && FUSED_ATTN_HAS("avx512dq") && \
    FUSED_ATTN_HAS("avx512vl") && FUSED_ATTN_HAS("avx512cd"))
// Only bfloat16 has instructions that avx512 lacks.
#define FUSED_ATTN_LEVEL_avx512_bf16 ("cpu/vec_avx512.h", 64, 32, 1, 0, dtype == DType::kBFloat16, \
    FUSED_ATTN_HAS("avx512bf16"))
#define FUSED_ATTN_LEVEL_avx512_amx  ("cpu/vec_avx512.h", 64, 32, 1, 1, dtype == DType::kBFloat16, \
    tiles_permitted())
// NEON belongs to every 64-bit ARM. Of float64 the portable level makes NEON code, too.
#define FUSED_ATTN_LEVEL_neon        ("cpu/vec_neon.h", 16, 32, 0, 0, dtype != DType::kFloat64, true)

// Columns of a row.
#define FUSED_ATTN_COLUMN_HEADER(header, bytes, registers, dot, tiles, dtypes, processor) header
#define FUSED_ATTN_COLUMN_BYTES(header, bytes, registers, dot, tiles, dtypes, processor) bytes
#define FUSED_ATTN_COLUMN_REGISTERS(header, bytes, registers, dot, tiles, dtypes, processor) registers
#define FUSED_ATTN_COLUMN_BF16_DOT(header, bytes, registers, dot, tiles, dtypes, processor) dot
#define FUSED_ATTN_COLUMN_BF16_TILES(header, bytes, registers, dot, tiles, dtypes, processor) tiles
#define FUSED_ATTN_COLUMN_DTYPES(header, bytes, registers, dot, tiles, dtypes, processor) (dtypes)
#define FUSED_ATTN_COLUMN_PROCESSOR(header, bytes, registers, dot, tiles, dtypes, processor) (processor)

// clang-format on

#define FUSED_ATTN_APPLY(macro, arguments) macro arguments
#define FUSED_ATTN_JOIN(a, b) a##b
#define FUSED_ATTN_JOINED(a, b) FUSED_ATTN_JOIN(a, b)
#define FUSED_ATTN_OF_LEVEL(column, level) \
  FUSED_ATTN_APPLY(FUSED_ATTN_COLUMN_##column, FUSED_ATTN_JOINED(FUSED_ATTN_LEVEL_, level))

// X(portable, ...) X(avx2, ...) and so on, of the levels that are compiled in.
#define FUSED_ATTN_EVERY_LEVEL(...) \
  FUSED_ATTN_JOINED(FUSED_ATTN_LEVELS_, FUSED_ATTN_LEVEL_FAMILY)(__VA_ARGS__)

// What the level at hand can do, for a source that is compiled once per level.
#if defined(FUSED_ATTN_LEVEL)
#define FUSED_ATTN_VECTOR_HEADER FUSED_ATTN_OF_LEVEL(HEADER, FUSED_ATTN_LEVEL)
#define FUSED_ATTN_VECTOR_BYTES FUSED_ATTN_OF_LEVEL(BYTES, FUSED_ATTN_LEVEL)
#define FUSED_ATTN_VECTOR_REGISTERS FUSED_ATTN_OF_LEVEL(REGISTERS, FUSED_ATTN_LEVEL)
#define FUSED_ATTN_BF16_DOT FUSED_ATTN_OF_LEVEL(BF16_DOT, FUSED_ATTN_LEVEL)
#define FUSED_ATTN_BF16_TILES FUSED_ATTN_OF_LEVEL(BF16_TILES, FUSED_ATTN_LEVEL)
#endif
