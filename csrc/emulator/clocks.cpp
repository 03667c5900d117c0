#include "emulator/clocks.h"

#include <algorithm>

namespace fused_attn::emulator {

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  int32_t* const to = into.data();
  const int32_t* const other = from.data();
  const std::size_t count = from.size();
  for (std::size_t i = 0; i < count; ++i) to[i] = std::max(to[i], other[i]);
}

void Accesses::reset(uint32_t words, int threads) {
  words_.assign(words, Word());
  readers_.clear();
  threads_ = static_cast<std::size_t>(threads);
}

int Accesses::unordered(const Word& word, const Clock& clock) const {
  if (!knows(clock, word.write)) return word.write.thread;
  if (!knows(clock, word.read)) return word.read.thread;
  if (word.readers < 0) return -1;
  const Clock& readers = readers_[static_cast<std::size_t>(word.readers)];
  for (std::size_t i = 0; i < readers.size(); ++i) {
    if (readers[i] > clock[i]) return static_cast<int>(i);
  }
  return -1;
}

int Accesses::read(uint32_t at, const Step& step, const Clock& clock) {
  Word& word = words_[at];
  const int other = knows(clock, word.write) ? -1 : word.write.thread;
  if (word.readers >= 0) {
    readers_[static_cast<std::size_t>(word.readers)][static_cast<std::size_t>(step.thread)] =
        step.at;
  } else if (knows(clock, word.read)) {
    word.read = step;  // who is ordered after this one is after that one, too
  } else {
    word.readers = static_cast<int32_t>(readers_.size());
    readers_.emplace_back(threads_, 0);
    readers_.back()[static_cast<std::size_t>(word.read.thread)] = word.read.at;
    readers_.back()[static_cast<std::size_t>(step.thread)] = step.at;
    word.read = Step();
  }
  return other;
}

int Accesses::write(uint32_t at, const Step& step, const Clock& clock) {
  const int other = overwrite(at, clock);
  words_[at].write = step;
  return other;
}

int Accesses::overwrite(uint32_t at, const Clock& clock) {
  Word& word = words_[at];
  const int other = unordered(word, clock);
  word = Word();
  return other;
}

}  // namespace fused_attn::emulator
