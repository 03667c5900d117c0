// Gradients of y[i] = dropout(scale * weight[tokens[i]] + table[position of i]):
//
//   g = dy where y was kept, times 1 / (1 - p)
//   dweight[v] = scale * sum of g[i] over tokens[i] = v,  0 for the padding
//   dtable[p] = sum of g[i] over the tokens at position p
//
// A counting sort lists the rows of each sum in their order. Each sum is then one thread's, so the
// result depends neither on the number of threads nor on their timing.
#include <numeric>

#include "cpu/row_dropout.h"
#include "cpu/row_sums.h"
#include "embedding/params.h"

namespace fused_attn::embedding::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

// Which rows of dy add to which row of a gradient.
struct Groups {
  const int64_t* start;  // (count + 1,): where the rows of a group begin in `order`
  const int64_t* order;
  int64_t count;
};

template <class Id>
Groups sort_rows(int64_t rows, int64_t count, const Id& id, Buffer& starts, Buffer& orders) {
  int64_t* start = starts.get<int64_t>(count + 2);
  int64_t* order = orders.get<int64_t>(rows);
  std::fill_n(start, count + 2, int64_t{0});
  // Counted two places on, so that start[g + 1] can serve as the place of the next row of group g.
  for (int64_t i = 0; i < rows; ++i) ++start[id(i) + 2];
  std::partial_sum(start, start + count + 2, start);
  for (int64_t i = 0; i < rows; ++i) order[start[id(i) + 1]++] = i;
  return {start, order, count};
}

template <class T>
class Backward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  explicit Backward(const BackwardParams& p) : p_(p), dy_(p.dy, p.width) {}

  // Writes rows [begin, end) of the gradient `to`; group `skipped` gets 0.
  void run(const Groups& groups, int64_t begin, int64_t end, double scale, int64_t skipped,
           const Writer<A>& to) const {
    static thread_local Buffer buffers[5];
    A* block = buffers[0].get<A>(p_.width);
    A* total = buffers[1].get<A>(p_.width);
    A* scratch = buffers[2].get<A>(to.scratch_size());
    T* scratch_dy = buffers[3].get<T>(dy_.scratch_size());
    Mask* keep = buffers[4].get<Mask>(Dropout::masks(p_.width));
    for (int64_t g = begin; g < end; ++g) {
      std::fill_n(total, p_.width, A(0));
      const int64_t last = g == skipped ? groups.start[g] : groups.start[g + 1];
      for (int64_t first = groups.start[g]; first < last; first += kGroupRows) {
        std::fill_n(block, p_.width, A(0));
        for (int64_t n = first; n < std::min(last, first + kGroupRows); ++n) {
          add_row(groups.order[n], scratch_dy, keep, block);
        }
        add_to(total, block, p_.width);
      }
      A* row = to.get(g, scratch);
      const V factor = V::set1(static_cast<A>(scale));
      for_columns(p_.width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
        put(row + j, load(total + j, lanes) * factor, lanes, false);
      });
      to.put(g, row);
    }
  }

 private:
  void add_row(int64_t i, T* scratch, Mask* masks, A* sums) const {
    const T* dy = dy_.get(i, scratch);
    const Mask* keep = p_.rng == nullptr ? nullptr : masks;
    A scale = A(1);
    if (keep != nullptr) {
      const Dropout dropout(p_.rng, p_.dropout_p);
      dropout.draw(i, p_.width, masks);
      scale = static_cast<A>(dropout.scale());
    }
    const V factor = V::set1(scale);
    for_columns(p_.width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
      V g = load(dy + j, lanes);
      if (keep != nullptr) g = select(keep[j / kLanes], g * factor, V::zero());
      put(sums + j, load(sums + j, lanes) + g, lanes, false);
    });
  }

  const BackwardParams& p_;
  Reader<T> dy_;
};

// Rows of a gradient that a task writes: few enough to balance frequent tokens with rare ones.
constexpr int64_t kTaskRows = 64;

template <class T, class Id>
void sum_rows(const BackwardParams& p, const Rows& gradient, int64_t count, double scale,
              int64_t skipped, const Id& id) {
  const Writer<Compute<T>> to(gradient, p.width);
  if (to.absent()) return;
  static thread_local Buffer starts, orders;
  const Groups groups = sort_rows(p.rows, count, id, starts, orders);
  const Backward<T> kernel(p);
  const int64_t tasks = (count + kTaskRows - 1) / kTaskRows;
  parallel_for(threads_for(p.rows + count, p.width, p.threads), tasks, [&](int64_t t) {
    kernel.run(groups, t * kTaskRows, std::min(count, (t + 1) * kTaskRows), scale, skipped, to);
  });
}

}  // namespace

void backward(const BackwardParams& p) {
  if (p.width == 0) return;
  with_problem_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_rows<T>(p, p.dweight, p.num_tokens, p.scale, p.padding_idx,
                [&](int64_t i) { return p.tokens[i]; });
    sum_rows<T>(p, p.dtable, p.num_positions, 1.0, -1, [&](int64_t i) {
      return p.positions == nullptr ? p.offset + i % p.length : p.positions[i];
    });
  });
}

}  // namespace fused_attn::embedding::FUSED_ATTN_LEVEL
