// Which CPUs this process may use, and how many threads a pool should have for them.
//
// Two hardware threads of one core share its vector units, which one thread of ours fills: what counts is
// cores. A container may be allowed fewer CPUs' worth of time than it sees; threads beyond that would be
// stopped in the middle of a step, with the others waiting for them.
#pragma once

#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

namespace nanoserve {

// A core: the CPUs (hardware threads) of it that this process may use, ascending.
using Core = std::vector<int>;

// "0-3,8,10-11" as the kernel writes lists of CPUs; empty for anything else.
[[nodiscard]] std::vector<int> parse_cpu_list(std::string_view text);

// The usable CPUs by core, ordered by their first CPU. `system` holds cpuN/topology/ as
// /sys/devices/system/cpu does; a CPU it says nothing about is a core of its own.
[[nodiscard]] std::vector<Core> cores_of(const std::vector<int>& cpus, const std::filesystem::path& system);
[[nodiscard]] std::vector<Core> usable_cores();

// CPUs' worth of time that a cgroup (v2) allows, from `cpu.max` of the group and of those above it.
[[nodiscard]] std::optional<double> cpu_quota(const std::filesystem::path& cgroups, std::string_view own);

// One thread per usable core, fewer if a quota is less; at least 1.
[[nodiscard]] int default_num_threads();

// Keeps the calling thread on a core, from now on. False where that cannot be done.
bool stay_on(const Core& core);

}  // namespace nanoserve
