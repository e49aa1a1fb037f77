#include "cpus.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <thread>

#include "checked.h"

namespace nanoserve {

namespace {

constexpr int kMaxCpus = 16 * 1024;

std::string first_line(const std::filesystem::path& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

std::optional<int> whole(std::string_view text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool is_whole = error == std::errc{} && end == text.data() + text.size();
    return is_whole && value >= 0 && value < kMaxCpus ? std::optional(value) : std::nullopt;
}

std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    // Sized for machines with more than the 1024 CPUs of a plain cpu_set_t.
    std::vector<cpu_set_t> set(16);
    const std::size_t bytes = set.size() * sizeof(cpu_set_t);
    if (::sched_getaffinity(0, bytes, set.data()) == 0) {
        for (int cpu = 0; cpu < static_cast<int>(bytes * 8); ++cpu) {
            if (CPU_ISSET_S(at(cpu), bytes, set.data())) {
                cpus.push_back(cpu);
            }
        }
    }
#endif
    if (cpus.empty()) {
        for (int cpu = 0; cpu < std::max(1, static_cast<int>(std::thread::hardware_concurrency())); ++cpu) {
            cpus.push_back(cpu);
        }
    }
    return cpus;
}

std::optional<double> quota_of(const std::filesystem::path& group) {
    std::istringstream line(first_line(group / "cpu.max"));  // "200000 100000", or "max 100000"
    double quota = 0;
    double period = 0;
    return line >> quota >> period && quota > 0 && period > 0 ? std::optional(quota / period) : std::nullopt;
}

}  // namespace

std::vector<int> parse_cpu_list(std::string_view text) {
    std::vector<int> cpus;
    while (!text.empty()) {
        const std::string_view part = text.substr(0, text.find(','));
        text.remove_prefix(std::min(text.size(), part.size() + 1));
        const std::size_t dash = part.find('-');
        const std::optional<int> first = whole(part.substr(0, dash));
        const std::optional<int> last = dash == part.npos ? first : whole(part.substr(dash + 1));
        if (!first || !last) {
            return {};
        }
        for (int cpu = *first; cpu <= *last; ++cpu) {
            cpus.push_back(cpu);
        }
    }
    return cpus;
}

std::vector<Core> cores_of(const std::vector<int>& cpus, const std::filesystem::path& system) {
    std::map<int, Core> by_first_sibling;
    for (const int cpu : cpus) {
        const auto topology = system / ("cpu" + std::to_string(cpu)) / "topology";
        const std::vector<int> siblings = parse_cpu_list(first_line(topology / "thread_siblings_list"));
        by_first_sibling[siblings.empty() ? cpu : siblings.front()].push_back(cpu);
    }
    std::vector<Core> cores;
    for (auto& [first, core] : by_first_sibling) {
        std::ranges::sort(core);
        cores.push_back(std::move(core));
    }
    return cores;
}

std::vector<Core> usable_cores() {
    return cores_of(allowed_cpus(), "/sys/devices/system/cpu");
}

std::optional<double> cpu_quota(const std::filesystem::path& cgroups, std::string_view own) {
    std::optional<double> least;
    auto group = cgroups / std::filesystem::path(own).relative_path();
    for (;; group = group.parent_path()) {
        if (const std::optional<double> quota = quota_of(group)) {
            least = std::min(quota, least.has_value() ? least : quota);
        }
        if (group == cgroups || group.native().size() <= cgroups.native().size()) {
            return least;
        }
    }
}

int default_num_threads() {
    const auto cores = static_cast<double>(usable_cores().size());
    std::ifstream memberships("/proc/self/cgroup");
    std::string line;
    double allowed = cores;
    while (std::getline(memberships, line)) {
        if (line.starts_with("0::")) {  // cgroup v2
            allowed = cpu_quota("/sys/fs/cgroup", std::string_view(line).substr(3)).value_or(cores);
        }
    }
    return std::max(1, static_cast<int>(std::min(cores, std::ceil(allowed))));
}

bool stay_on(const Core& core) {
#if defined(__linux__)
    std::vector<cpu_set_t> set(16);
    const std::size_t bytes = set.size() * sizeof(cpu_set_t);
    CPU_ZERO_S(bytes, set.data());
    for (const int cpu : core) {
        CPU_SET_S(at(cpu), bytes, set.data());
    }
    return !core.empty() && ::sched_setaffinity(0, bytes, set.data()) == 0;
#else
    static_cast<void>(core);
    return false;
#endif
}

}  // namespace nanoserve
