#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "check.h"
#include "cpus.h"
#include "thread_pool.h"

using namespace nanoserve;
namespace fs = std::filesystem;

namespace {

// A folder of small files, gone when it goes out of scope.
struct Tree {
    fs::path root = fs::temp_directory_path() / ("nanoserve-cpus-" + std::to_string(::getpid()));

    Tree() { fs::create_directories(root); }
    ~Tree() { fs::remove_all(root); }
    Tree(const Tree&) = delete;
    Tree& operator=(const Tree&) = delete;

    void write(const fs::path& name, const std::string& text) const {
        fs::create_directories((root / name).parent_path());
        std::ofstream(root / name) << text << "\n";
    }
};

using Cores = std::vector<Core>;

}  // namespace

TEST(cpu_lists_are_parsed) {
    CHECK_EQ(parse_cpu_list("0"), std::vector<int>{0});
    CHECK_EQ(parse_cpu_list("0-2,7,10-11"), (std::vector<int>{0, 1, 2, 7, 10, 11}));
    for (const char* bad : {"", "x", "1-", "-1", "1,,2", "3 4", "1-99999999", "99999999999999999999"}) {
        CHECK_EQ(parse_cpu_list(bad), std::vector<int>{});
    }
}

TEST(hardware_threads_are_grouped_by_core) {
    const Tree tree;
    for (int cpu = 0; cpu < 4; ++cpu) {  // CPU n and n + 4 are one core
        for (const int sibling : {cpu, cpu + 4}) {
            tree.write("cpu" + std::to_string(sibling) + "/topology/thread_siblings_list",
                       std::to_string(cpu) + "," + std::to_string(cpu + 4));
        }
    }
    CHECK(cores_of({0, 1, 2, 3, 4, 5, 6, 7}, tree.root) == (Cores{{0, 4}, {1, 5}, {2, 6}, {3, 7}}));
    CHECK(cores_of({6, 2, 5}, tree.root) == (Cores{{5}, {2, 6}}));        // only what may be used
    CHECK(cores_of({3, 1}, tree.root / "nothing") == (Cores{{1}, {3}}));  // no topology: a core each
}

TEST(a_cgroup_limits_time_at_every_level) {
    const Tree tree;
    tree.write("cpu.max", "800000 100000");
    tree.write("a/cpu.max", "max 100000");
    tree.write("a/b/cpu.max", "250000 100000");
    tree.write("broken/cpu.max", "many");
    CHECK_EQ(cpu_quota(tree.root, "/a/b").value_or(0), 2.5);
    CHECK_EQ(cpu_quota(tree.root, "/a").value_or(0), 8.0);
    CHECK_EQ(cpu_quota(tree.root, "/").value_or(0), 8.0);
    CHECK_EQ(cpu_quota(tree.root, "/broken").value_or(0), 8.0);
    CHECK(!cpu_quota(tree.root / "a", "/").has_value());
    CHECK(!cpu_quota(tree.root / "nothing", "/x").has_value());
}

TEST(a_full_team_stays_on_its_cores) {
    const auto cores = usable_cores();
    CHECK(default_num_threads() >= 1);
    CHECK(default_num_threads() <= static_cast<int>(cores.size()));
    const auto on_core = [&](int num_threads) {
        ThreadPool pool(num_threads);
        std::vector<std::size_t> allowed(static_cast<std::size_t>(num_threads));
        pool.run([&](int id) { allowed[static_cast<std::size_t>(id)] = usable_cores().size(); });
        return allowed;
    };
    if (cores.size() > 1) {
        std::vector<std::size_t> expected(cores.size(), 1);
        expected[0] = cores.size();  // the caller's own
        CHECK_EQ(on_core(static_cast<int>(cores.size())), expected);
        expected.assign(cores.size() + 1, cores.size());
        CHECK_EQ(on_core(static_cast<int>(cores.size()) + 1), expected);
    }
    CHECK(!stay_on({}));
}
