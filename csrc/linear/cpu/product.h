// C = A B^T + bias, blocked and packed as BLIS does it (Van Zee, van de Geijn 2015, "BLIS: a
// framework for rapidly instantiating BLAS functionality"):
//
//   B   once for all, in panels of a tile's columns and kDepthOf numbers, one after the other
//   A   a block of kBlockRows rows and kDepthOf numbers at a time, in panels of a tile's rows
//   C   a tile of registers for the whole depth of a panel
//
// What is made of C (linear/cpu/epilogue.h) is made of a strip of it, a block of rows by the
// columns of a panel, before the next panel comes. Of a gated call, the panels of gates and of what
// they are multiplied by take turns.
//
// A panel of B stays in the first cache while the block's panels of A, in the second, pass by.
#pragma once

#include "linear/cpu/epilogue.h"

namespace fused_attn::linear::FUSED_ATTN_LEVEL {

// Registers decide the tile: accumulators, one row of B and one number of A.
constexpr int kVectors = kRegisterVectors<float>;
constexpr int kTileVectors = kVectors >= 32 ? 2 : 1;
constexpr int kTileRows = kVectors >= 32 ? 12 : kVectors >= 8 ? 6 : 2;
constexpr int kTileColumns = kTileVectors * kLanes;

// A tile's sums run over so many products one after the other. Twice as many are 3 % faster, and
// off by more than what torch's product is; a result of 16 bits does not show that.
template <class T>
constexpr int64_t kDepthOf = sizeof(T) == 2 ? 256 : 128;
constexpr int64_t kBlockRows = 96;
constexpr int64_t kBlockColumns = 512;
static_assert(kBlockRows % kTileRows == 0 && kBlockColumns % kTileColumns == 0);
// Of B packed at a time.
constexpr int64_t kPackedNumbers = int64_t{4} << 20;

using Tile = VecF[kTileRows][kTileVectors];

// tile = the products of `depth` numbers of a panel of A and one of B.
FUSED_ATTN_INLINE void multiply(const float* a, const float* b, int64_t depth, Tile& tile) {
  FUSED_ATTN_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    FUSED_ATTN_UNROLL
    for (int g = 0; g < kTileVectors; ++g) tile[r][g] = VecF::zero();
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    VecF lanes[kTileVectors];
    FUSED_ATTN_UNROLL
    for (int g = 0; g < kTileVectors; ++g) lanes[g] = VecF::load(b + g * kLanes);
    FUSED_ATTN_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const VecF number = VecF::set1(a[r]);
      FUSED_ATTN_UNROLL
      for (int g = 0; g < kTileVectors; ++g) tile[r][g] = fma(number, lanes[g], tile[r][g]);
    }
    a += kTileRows;
    b += kTileColumns;
  }
}

// C = A B^T + bias, or what an epilogue makes of it: A (rows, depth), B (columns, depth), or twice
// as many columns if gated.
template <class T>
class Product {
 public:
  Product(Operand<T> a, Operand<T> b, const Rows& bias, const Rows& c, int64_t rows,
          int64_t columns, int64_t depth)
      : a_(a),
        b_(b),
        bias_(bias),
        c_(static_cast<T*>(c.data)),
        rows_(rows),
        columns_(columns),
        depth_(depth) {}

  // The product of a forward call.
  explicit Product(const Params& p)
      : Product(by_rows<T>(p.x), by_rows<T>(p.weight), p.bias, p.y, p.rows, p.out, p.in) {
    if (!p.activates && !p.gated && p.rng == nullptr && p.residual.data == nullptr) return;
    epilogue_ = &p;
    finish_ = finish_strip<T>(p);
    parts_ = p.gated ? 2 : 1;
  }

  void run(int threads) {
    static thread_local Buffer buffer;
    const int64_t together =
        smaller(columns_, larger(kBlockColumns, kPackedNumbers / larger<int64_t>(depth_, 1) /
                                                    kBlockColumns * kBlockColumns));
    packed_ = buffer.get<float>(ceil_div(together, kTileColumns) * parts_ * kTileColumns * depth_);
    for (int64_t first = 0; first < columns_; first += together) {
      run_columns(first, smaller(together, columns_ - first), threads);
    }
  }

 private:
  static constexpr int64_t kDepth = kDepthOf<T>;

  void run_columns(int64_t first, int64_t count, int threads) {
    panels_ = ceil_div(count, kTileColumns) * parts_;
    parallel_for(threads, panels_, [&](int64_t panel) { pack_panel(first, count, panel); });
    const int64_t piece = kBlockColumns / parts_;
    const int64_t blocks = ceil_div(rows_, kBlockRows), pieces = ceil_div(count, piece);
    parallel_for(threads, blocks * pieces, [&](int64_t task) {
      const int64_t column = task % pieces * piece, row = task / pieces * kBlockRows;
      run_block(row, smaller(kBlockRows, rows_ - row), first, column,
                smaller(piece, count - column));
    });
  }

  // Panels of one piece of the depth lie next to each other.
  float* panel_of(int64_t begin, int64_t panel) const {
    const int64_t depth = smaller(kDepth, depth_ - begin);
    return packed_ + (begin * panels_ + panel * depth) * kTileColumns;
  }

  void pack_panel(int64_t first, int64_t count, int64_t panel) {
    const int64_t from = panel % parts_ * columns_ + first;
    for (int64_t begin = 0; begin < depth_; begin += kDepth) {
      for (int g = 0; g < kTileVectors; ++g) {
        const int64_t column = panel / parts_ * kTileColumns + g * kLanes;
        pack_lanes(b_, from + smaller(column, count - 1), lanes_left(count - column), begin,
                   smaller(kDepth, depth_ - begin), panel_of(begin, panel) + g * kLanes,
                   kTileColumns);
      }
    }
  }

  static int lanes_left(int64_t columns) {
    return static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kLanes, columns)));
  }

  // The part of C from (row, first + column) on.
  void run_block(int64_t row, int64_t rows, int64_t first, int64_t column, int64_t columns) {
    static thread_local Buffer buffers[3];
    float* block = buffers[0].get<float>(kBlockRows * kDepth);
    float* sums = nullptr;
    int64_t stride = columns_;
    if (std::is_same_v<T, float> && epilogue_ == nullptr) {
      sums = reinterpret_cast<float*>(c_) + row * columns_ + first + column;
    } else if (depth_ > kDepth) {
      sums = buffers[1].get<float>(kBlockRows * kBlockColumns);
      stride = kBlockColumns;
    }
    const Mask* keep = draw_dropout(row, rows, first + column, columns, buffers[2]);
    for (int64_t begin = 0; begin < larger<int64_t>(depth_, 1); begin += kDepth) {
      const int64_t depth = smaller(kDepth, depth_ - begin);
      const bool last = begin + kDepth >= depth_;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        pack_rows<kTileRows>(a_, row + r, static_cast<int>(smaller<int64_t>(kTileRows, rows - r)),
                             begin, depth, block + r * depth);
      }
      alignas(64) float strip[2][kBlockRows * kTileColumns];
      for (int64_t q = 0; q < ceil_div(columns, kTileColumns) * parts_; ++q) {
        const int64_t part = q % parts_, c = q / parts_ * kTileColumns;
        const float* panel = panel_of(begin, column / kTileColumns * parts_ + q);
        for (int64_t r = 0; r < rows; r += kTileRows) {
          Tile tile;
          multiply(block + r * depth, panel, depth, tile);
          finish(tile, sums == nullptr ? nullptr : sums + r * stride + q * kTileColumns, stride,
                 begin > 0, last, row + r, first + column + c,
                 static_cast<int>(smaller<int64_t>(kTileRows, rows - r)), columns - c,
                 epilogue_ == nullptr ? nullptr : strip[part] + r * kTileColumns);
        }
        if (last && epilogue_ != nullptr && part + 1 == parts_) {
          finish_columns(strip[0], parts_ == 1 ? nullptr : strip[1], row, static_cast<int>(rows),
                         first + column + c, columns - c,
                         keep == nullptr ? nullptr : keep + c / kLanes, Dropout::masks(columns));
        }
      }
    }
  }

  // The dropout of a block of C, or null if there is none.
  const Mask* draw_dropout(int64_t row, int64_t rows, int64_t column, int64_t columns,
                           Buffer& buffer) const {
    if (epilogue_ == nullptr || epilogue_->rng == nullptr) return nullptr;
    static_assert(kBlockColumns / 2 % 64 == 0);
    const int64_t masks = Dropout::masks(columns);
    Mask* keep = buffer.get<Mask>(rows * masks);
    const Dropout dropout(epilogue_->rng, epilogue_->dropout_p);
    for (int64_t r = 0; r < rows; ++r) dropout.draw(row + r, column, columns, keep + r * masks);
    return keep;
  }

  void finish_columns(const float* sums, const float* up, int64_t row, int rows, int64_t column,
                      int64_t columns, const Mask* keep, int64_t keep_stride) const {
    for (int g = 0; g < kTileVectors; ++g) {
      const int lanes = lanes_left(columns - g * kLanes);
      if (lanes == 0) return;
      finish_(*epilogue_, {sums + g * kLanes, up == nullptr ? nullptr : up + g * kLanes,
                           kTileColumns, row, rows, column + g * kLanes, lanes,
                           keep == nullptr ? nullptr : keep + g, keep_stride});
    }
  }

  // Adds what earlier pieces of the depth gave; the last piece goes to `strip`, or adds the bias
  // and writes C if that is null.
  FUSED_ATTN_INLINE void finish(Tile& tile, float* sums, int64_t stride, bool add, bool last,
                                int64_t row, int64_t column, int rows, int64_t columns,
                                float* strip) {
    for (int g = 0; g < kTileVectors; ++g) {
      const int lanes = lanes_left(columns - g * kLanes);
      if (lanes == 0) return;
      const bool writes = last && strip == nullptr;
      const VecF bias = writes && bias_.data != nullptr
                            ? parameters<T>(bias_, column + g * kLanes, lanes)
                            : VecF::zero();
      FUSED_ATTN_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= rows) break;
        VecF value = tile[r][g];
        float* at = sums + r * stride + g * kLanes;
        if (add) value = value + (lanes == kLanes ? VecF::load(at) : VecF::load(at, lanes));
        if (writes) {
          value = value + bias;
          T* to = c_ + (row + r) * columns_ + column + g * kLanes;
          lanes == kLanes ? store(to, value) : store(to, value, lanes);
        } else if (last) {
          value.store(strip + r * kTileColumns + g * kLanes);
        } else {
          lanes == kLanes ? value.store(at) : value.store(at, lanes);
        }
      }
    }
  }

  Operand<T> a_, b_;
  const Rows& bias_;
  T* c_;
  int64_t rows_, columns_, depth_;
  const Params* epilogue_ = nullptr;
  FinishStrip<T> finish_ = nullptr;
  int64_t parts_ = 1;  // panels of B to the columns of one panel of C
  float* packed_ = nullptr;
  int64_t panels_ = 0;
};

}  // namespace fused_attn::linear::FUSED_ATTN_LEVEL
