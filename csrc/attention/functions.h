// Functions of pairs of a query and a key: a mask, and a change of scores with its derivatives, as
// short lists of instructions that the kernels run on tiles (cpu/interpreter.h).
//
// Whatever depends on one index alone (a query, a key, or the distance of the two) is no
// instruction but a vector, made before the call; the instructions join such vectors, tables and
// the score.
#pragma once

#include <atomic>
#include <type_traits>
#include <vector>

#include "common/types.h"

namespace fused_attn::attention {

// X(name). Registers hold a number for each pair: numbers r[n], whole numbers and truths i[n].
//   load_*: a vector (number `leaf`) by batch, head and: nothing, query, key, query - key.
//   Arguments are registers; `value` is a constant. Loads come first, then real numbers, whole
//   numbers and sums: the interpreter tells the kinds by their order.
// clang-format off
#define FUSED_ATTN_PAIR_OPERATIONS(X)                                                            \
  X(constant) X(constant_int) X(load_one) X(load_one_int) X(load_query) X(load_query_int)        \
  X(load_key) X(load_key_int) X(load_distance) X(load_distance_int) X(load_score)                \
  X(load_gradient) X(load_visible) X(gather) X(gather_int)                                       \
  X(add) X(sub) X(mul) X(div) X(max) X(min) X(pow) X(neg) X(abs) X(sign) X(floor) X(ceil)        \
  X(trunc) X(sqrt) X(exp) X(log) X(log1p) X(expm1) X(sin) X(cos) X(tanh) X(sigmoid) X(erf)       \
  X(to_float32) X(from_int) X(select) X(lt) X(le) X(gt) X(ge) X(eq) X(ne)                        \
  X(add_int) X(sub_int) X(mul_int) X(floor_div_int) X(trunc_div_int) X(remainder_int) X(max_int) \
  X(min_int) X(neg_int) X(abs_int) X(sign_int) X(and_int) X(or_int) X(xor_int) X(select_int)     \
  X(lt_int) X(le_int) X(gt_int) X(ge_int) X(eq_int) X(ne_int)                                    \
  X(sum_one) X(sum_query) X(sum_key) X(sum_distance) X(sum_table)
// clang-format on

enum class PairOperation : int64_t {
#define FUSED_ATTN_NAME(name) k_##name,
  FUSED_ATTN_PAIR_OPERATIONS(FUSED_ATTN_NAME)
#undef FUSED_ATTN_NAME
};

// As Python writes it: eight int64, `value` with the bits of a double.
struct PairInstruction {
  PairOperation operation;
  int64_t out;
  int64_t arg[4];
  int64_t leaf;  // number of a vector or table
  double value;
};
static_assert(sizeof(PairInstruction) == 64);

// Machine code that Python made of a program's last stage, those instructions from `per_tile` on
// (fused_attn/ops/attention/jit). It runs them on `keys` rows of `width` queries and gives what the
// interpreter gives. All fields are eight bytes; Python knows them by their names and order.
//   reals, ints      the registers, `register_size` numbers each; the code reads those of the first
//                    two stages
//   leaves           as many as the program's vectors and tables
//   scores, gradient q . k and the gradient of the scores, rows `stride` apart
//   visible          which queries see a key, a word of bits each
//   result, slope    where numbers go, rows `stride` apart; `result` may be `scores`
//   truths           where truths go, a word of bits a key
//   valid            the bits of the block's `rows` queries; `width` is a multiple of 16
//   first, key       the first query and key
//   distance         the place of (first - key) in a vector by distance
//   outside          is set to 1 where an index left its table
// clang-format off
#define FUSED_ATTN_STRIP_FIELDS(X)                                                           \
  X(const void*, reals) X(const void*, ints) X(int64_t, register_size)                      \
  X(const MachineLeaf*, leaves) X(const void*, scores) X(const void*, gradient)             \
  X(int64_t, stride) X(const uint64_t*, visible) X(void*, result) X(void*, slope)           \
  X(uint64_t*, truths) X(uint64_t, valid) X(int64_t, rows) X(int64_t, width)                \
  X(int64_t, keys) X(int64_t, first) X(int64_t, key) X(int64_t, distance) X(double, scale)  \
  X(int64_t, outside)
// clang-format on

// `table` is the leaf as a table, `vector` as a vector of the batch and head at hand; its gradient
// too is that of the batch and head.
// clang-format off
#define FUSED_ATTN_LEAF_FIELDS(X)                                                           \
  X(const void*, table, 1) X(const void*, vector, 1) X(void*, gradient, 1)                  \
  X(int64_t, size, 4) X(int64_t, stride, 4) X(int64_t, gradient_stride, 4)
// clang-format on

struct MachineLeaf {
#define FUSED_ATTN_FIELD(type, name, count) std::conditional_t<count == 1, type, type[count]> name;
  FUSED_ATTN_LEAF_FIELDS(FUSED_ATTN_FIELD)
#undef FUSED_ATTN_FIELD
};

struct MachineStrip {
#define FUSED_ATTN_FIELD(type, name) type name;
  FUSED_ATTN_STRIP_FIELDS(FUSED_ATTN_FIELD)
#undef FUSED_ATTN_FIELD
};

using MachineCode = void (*)(MachineStrip*);

// The instructions before `per_block` run once a head, those before `per_tile` once a block of
// queries, the rest on every few keys.
struct PairProgram {
  const PairInstruction* instructions = nullptr;
  int64_t count = 0;
  int64_t per_block = 0, per_tile = 0;
  int64_t reals = 0, ints = 0;  // registers
  int64_t result = -1;          // register of the mask (int) or the score; none: -1
  int64_t slope = -1;           // of the derivative by the score
  MachineCode code = nullptr;   // null: the last stage is interpreted

  explicit operator bool() const { return instructions != nullptr; }
};

// A vector (batch, head, place) or a table of up to four dimensions. `gradient` has the batch and
// head strides of its own, so that heads never add to the same numbers; absent where none is
// wanted.
struct PairLeaf {
  View4 view;
  View4 gradient;
  bool gradient_by_head = false;                  // a table's: batch and head stand before it
  int64_t gradient_batch = 0, gradient_head = 0;  // strides of a table's, beside those of the table
  int64_t size[4] = {1, 1, 1, 1};
  int dims = 0;
};

struct PairFunctions {
  PairProgram mask;
  PairProgram score;  // gives result and, in the backward, slope
  PairProgram sums;   // adds up the gradients of leaves
  std::vector<PairLeaf> leaves;
  // What a list of blocks says, (batch, head, block of queries, block of keys) int32: nothing is
  // seen, the mask decides, or all is.
  View4 kinds;
  int64_t block_q = 0, block_k = 0;
  mutable std::atomic<bool> outside{false};  // an index left its table
};

constexpr int32_t kBlockHidden = 0, kBlockMixed = 1, kBlockSeen = 2;

}  // namespace fused_attn::attention
