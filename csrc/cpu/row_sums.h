// Sums over rows, such as gradients of parameters. They are taken in three steps, so that their
// error grows with the cube root of the number of rows: over a block, over the blocks of a group,
// over the groups of a task. The tasks' sums are then added in a fixed order.
#pragma once

#include "cpu/rows.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// Rows that add to a sum together, so that it is read and written once a block.
constexpr int kBlockRows = 4;
constexpr int64_t kGroupRows = 32 * kBlockRows;

template <class A>
void add_to(A* sums, const A* more, int64_t width) {
  for_columns(width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
    put(sums + j, load(sums + j, lanes) + load(more + j, lanes), lanes, false);
  });
}

// Adds the tasks' sums (one after the other, `stride` apart) and writes them out.
template <class A>
void write_parameter_gradient(const Rows& rows, int64_t width, A* sums, int64_t tasks,
                              int64_t stride) {
  const Writer<A> writer(rows, width);
  if (writer.absent()) return;
  for (int64_t t = 1; t < tasks; ++t) add_to(sums, sums + t * stride, width);
  static thread_local Buffer buffer;
  A* row = writer.get(0, buffer.get<A>(writer.scratch_size()));
  std::copy_n(sums, width, row);
  writer.put(0, row);
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
