#include "cpu/level.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu/kernel_dtypes.h"

namespace fused_attn {
namespace {

constexpr const char* kNames[kNumCpuLevels] = {"portable", "avx2", "avx512", "avx512_bf16"};

bool available(CpuLevel level) {
#if defined(FUSED_ATTN_X86_LEVELS)
  switch (level) {
    case CpuLevel::kPortable:
      return true;
    case CpuLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case CpuLevel::kAvx512:
      return available(CpuLevel::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    case CpuLevel::kAvx512Bf16:
      return available(CpuLevel::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return level == CpuLevel::kPortable;
#endif
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

struct Choice {
  CpuLevel level = CpuLevel::kPortable;
  std::string error;
};

Choice choose() {
  Choice choice;
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (available(static_cast<CpuLevel>(i))) choice.level = static_cast<CpuLevel>(i);
  }
  const char* wanted = std::getenv("FUSED_ATTN_CPU");
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    choice.level = static_cast<CpuLevel>(i);
    if (!available(choice.level)) {
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
  while (!level_has_kernels(level, dtype)) --level;
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
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (available(static_cast<CpuLevel>(i))) names.push_back(kNames[i]);
  }
  return names;
}

}  // namespace fused_attn
