#include "cpu/level.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

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
    if (!available(i)) {
      choice.error =
          std::string("FUSED_ATTN_CPU=") + wanted +
          ": this machine or build lacks that level; available: " + join(available_levels());
    }
    return choice;
  }
  choice.error = std::string("FUSED_ATTN_CPU must be one of ") + join(available_levels()) +
                 ", got '" + wanted + "'";
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

std::string cpu_vendor() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "";
}

}  // namespace fused_attn
