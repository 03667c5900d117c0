// wgmma: the asynchronous matrix unit of a warpgroup.
//
// From issue to the wait that retires a product, its accumulators live here: the registers hold a
// tagged NaN, so that touching them early shows; register operands must not change meanwhile.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "emulator/barriers.h"
#include "emulator/clocks.h"

namespace fused_attn::emulator {

class Machine;

// What one thread has issued to its warpgroup's unit.
struct MatrixQueue {
  uint64_t issued = 0;
  std::vector<uint64_t> groups;  // products issued when each group was committed
  bool fenced = false;
};

struct ProductShape {
  int columns = 0;  // N of m64nNk16
  bool a_in_registers = false;
  bool a_transposed = false;  // the operand's rows run along k
  bool b_transposed = false;
  float (*to_float)(uint16_t) = nullptr;

  bool operator==(const ProductShape& other) const {
    return columns == other.columns && a_in_registers == other.a_in_registers &&
           a_transposed == other.a_transposed && b_transposed == other.b_transposed &&
           to_float == other.to_float;
  }
};

class MatrixUnit {
 public:
  static constexpr int kRows = 64, kDepth = 16, kThreads = 128, kMaxColumns = 256;

  void reset(int first_thread);

  // On behalf of the running thread. `a` points to its four registers, or is null.
  void fence(Machine& machine);
  void issue(Machine& machine, const ProductShape& shape, float* accumulator, uint64_t a_descriptor,
             const uint32_t* const* a, uint64_t b_descriptor, bool accumulate);
  void commit(Machine& machine);
  void wait(Machine& machine, int groups_left);
  void check_thread_exit(Machine& machine);

  bool ready() const;  // a product that all threads issued can run
  void run_one(Machine& machine);
  // How many products a thread that knows `clock` knows to be over: all that some thread of this
  // warpgroup has waited for, as far as it knows.
  uint64_t known_over(const Clock& clock) const;
  uint64_t executed() const { return executed_; }

 private:
  struct Accumulator {
    int columns = 0;
    int owners = 0;  // threads whose registers are away
    std::array<float*, kThreads> registers = {};
    std::array<uint64_t, kThreads> last = {};  // product that used it last
    std::vector<float> tile;                   // kRows x kMaxColumns
  };
  struct Product {
    ProductShape shape;
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;
    int arrived = 0;
    bool executed = false, retired = false;
    std::shared_ptr<Accumulator> accumulator;
    std::array<std::array<const uint32_t*, 4>, kThreads> a = {};
    std::array<std::array<uint32_t, 4>, kThreads> a_value = {};
    PhasesSeen seen = {};          // the least of all threads
    std::vector<uint32_t> chunks;  // of shared memory that it reads
    std::vector<Step> stores;      // of threads, the last ones to these
  };
  Product& product(uint64_t index) { return *products_[index - first_]; }
  std::shared_ptr<Accumulator> find_accumulator(int thread, float* registers, int columns);
  void lend(Accumulator& accumulator, int thread, float* registers);
  void give_back(Machine& machine, Accumulator& accumulator, int thread);
  void note_chunks(Machine& machine, Product& product);
  void note_stores(Machine& machine, Product& product);
  void drop_retired();

  std::deque<std::unique_ptr<Product>> products_;
  uint64_t first_ = 0;  // index of products_.front()
  uint64_t executed_ = 0;
  std::vector<std::shared_ptr<Accumulator>> accumulators_;
  // By thread: up to which of its steps how many products were over for it.
  struct Waited {
    int32_t step;
    uint64_t products;
  };
  std::array<std::vector<Waited>, kThreads> waited_;
  int first_thread_ = 0;
  WaitList waiting_;
};

}  // namespace fused_attn::emulator
