// Which of the things that threads do come before which: vector clocks (Mattern, "Virtual time and
// global states of distributed systems", 1989), and last accesses as in FastTrack (Flanagan,
// Freund, 2009). Barriers and __syncwarp order threads; shuffles, votes and products do not.
#pragma once

#include <cstdint>
#include <vector>

namespace fused_attn::emulator {

// By thread of the block: up to which of its steps a thread knows what it did.
using Clock = std::vector<int32_t>;

void join(Clock& into, const Clock& from);

// A step of a thread. Of no thread: everybody knows it.
struct Step {
  int32_t thread = -1, at = 0;
};
inline bool knows(const Clock& clock, const Step& step) {
  return step.thread < 0 || clock[static_cast<std::size_t>(step.thread)] >= step.at;
}

// The last plain accesses to each word of shared memory.
class Accesses {
 public:
  void reset(uint32_t words, int threads);

  // A load or store by `step.thread`, which knows `clock`. Returns the thread whose access nothing
  // orders before it, or -1.
  int read(uint32_t word, const Step& step, const Clock& clock);
  int write(uint32_t word, const Step& step, const Clock& clock);
  // Like a write that leaves nothing behind: a copy, whose readers a barrier orders.
  int overwrite(uint32_t word, const Clock& clock);
  // Who has written it last; of no thread if it was a copy.
  Step last_write(uint32_t word) const { return words_[word].write; }

 private:
  struct Word {
    Step write, read;
    int32_t readers = -1;  // several: an index into `readers_`
  };
  int unordered(const Word& word, const Clock& clock) const;

  std::vector<Word> words_;
  std::vector<Clock> readers_;  // by thread, when it read last
  std::size_t threads_ = 0;
};

}  // namespace fused_attn::emulator
