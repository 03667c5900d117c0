#include "cpu/level.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cpu/processor_features.h"

namespace fused_attn {
namespace {

#define FUSED_ATTN_NAME(level, ...) #level,
constexpr const char* kNames[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_NAME)};
constexpr int kLevels = sizeof(kNames) / sizeof(kNames[0]);

bool available(int level) {
#define FUSED_ATTN_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define FUSED_ATTN_RUNS(level, ...) FUSED_ATTN_OF_LEVEL(PROCESSOR, level),
  static const bool runs[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_RUNS)};
  return std::all_of(runs, runs + level + 1, [](bool x) { return x; });
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// The names of all levels of processors such as this, also of those that were left out.
bool known(const std::string& name) {
#if defined(__x86_64__)
  for (const char* each : {FUSED_ATTN_LEVELS_x86(FUSED_ATTN_NAME)}) {
    if (name == each) return true;
  }
#endif
  return std::find(kNames, kNames + kLevels, name) != kNames + kLevels;
}

struct Choice {
  CpuLevel level = CpuLevel::portable;
  std::string error;
};

Choice choose() {
  Choice choice;
  for (int i = 0; i < kLevels; ++i) {
    if (available(i)) choice.level = static_cast<CpuLevel>(i);
  }
  const char* wanted = std::getenv("FUSED_ATTN_CPU");
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (int i = 0; i < kLevels; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    choice.level = static_cast<CpuLevel>(i);
    if (available(i)) return choice;
  }
  const std::string there = join(available_levels());
  choice.error = known(wanted)
                     ? std::string("FUSED_ATTN_CPU=") + wanted +
                           ": this machine or build lacks that level; available: " + there
                     : "FUSED_ATTN_CPU must be one of " + there + ", got '" + wanted + "'";
  return choice;
}

}  // namespace

CpuLevel cpu_level() {
  static const Choice choice = choose();
  if (!choice.error.empty()) throw std::runtime_error(choice.error);
  return choice.level;
}

CpuLevel kernel_level(DType dtype) {
  int level = static_cast<int>(cpu_level());
  while (!level_has_kernels(static_cast<CpuLevel>(level), dtype)) --level;
  return static_cast<CpuLevel>(level);
}

const char* level_name(CpuLevel level) {
  return kNames[static_cast<int>(level)];
}

std::string current_level_name() {
  return level_name(cpu_level());
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < kLevels; ++i) {
    if (available(i)) names.push_back(kNames[i]);
  }
  return names;
}

std::string level_left_out() {
#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_ATTN_KNOWN(level, ...) {#level, FUSED_ATTN_OF_LEVEL(PROCESSOR, level)},
  static const struct {
    const char* name;
    bool runs;
  } known[] = {FUSED_ATTN_LEVELS_x86(FUSED_ATTN_KNOWN)};
  const char* best = "";
  int count = 0;
  for (const auto& level : known) {
    if (!level.runs) break;
    best = level.name;
    ++count;
  }
  if (count > kLevels) return best;
#endif
  return "";
}

bool multiplies_tiles() {
#define FUSED_ATTN_TILES(level, ...) FUSED_ATTN_OF_LEVEL(BF16_TILES, level),
  constexpr bool tiles[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_TILES)};
  return tiles[static_cast<int>(kernel_level(DType::kBFloat16))];
}

std::string cpu_vendor() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "";
}

}  // namespace fused_attn
