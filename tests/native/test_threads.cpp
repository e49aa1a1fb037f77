#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "thread_pool.h"

using namespace nanoserve;

TEST(every_thread_runs_once) {
    for (const int n : {1, 2, 3, 8}) {
        ThreadPool pool(n);
        std::vector<int> calls(static_cast<std::size_t>(n), 0);
        std::thread::id caller;
        for (int repeat = 0; repeat < 200; ++repeat) {
            pool.run([&](int id) {
                ++calls[static_cast<std::size_t>(id)];
                if (id == 0) {
                    caller = std::this_thread::get_id();
                }
            });
        }
        CHECK_EQ(calls, std::vector<int>(static_cast<std::size_t>(n), 200));
        CHECK(caller == std::this_thread::get_id());
    }
}

TEST(thread_counts_are_checked) {
    CHECK_THROWS(std::invalid_argument, "num_threads is 0", ThreadPool(0));
    CHECK_THROWS(std::invalid_argument, "num_threads is 5000", ThreadPool(5000));
}

TEST(exceptions_reach_the_caller) {
    ThreadPool pool(3);
    for (const int thrower : {0, 1, 2}) {
        std::atomic<int> finished{0};
        CHECK_THROWS(std::runtime_error, "from thread", pool.run([&](int id) {
            if (id == thrower) {
                throw std::runtime_error("from thread " + std::to_string(id));
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            ++finished;
        }));
        CHECK_EQ(finished.load(), 2);  // the others were waited for
    }
    std::atomic<int> after{0};
    pool.run([&](int) { ++after; });
    CHECK_EQ(after.load(), 3);
}

TEST(nested_runs_are_refused) {
    ThreadPool pool(2);
    CHECK_THROWS(std::logic_error, "from inside", pool.run([&](int) { pool.run([](int) {}); }));
    ThreadPool other(2);
    std::atomic<int> inner{0};
    pool.run([&](int id) {
        if (id == 0) {
            other.run([&](int) { ++inner; });  // another pool's threads are fine
        }
    });
    CHECK_EQ(inner.load(), 2);
}

TEST(callers_take_turns) {
    ThreadPool pool(2);
    std::atomic<int> inside{0}, most{0}, total{0};
    const auto caller = [&] {
        for (int i = 0; i < 200; ++i) {
            pool.run([&](int id) {
                if (id == 0) {
                    most.store(std::max(most.load(), ++inside));
                    ++total;
                    --inside;
                }
            });
        }
    };
    std::thread second(caller);
    caller();
    second.join();
    CHECK_EQ(total.load(), 400);
    CHECK_EQ(most.load(), 1);
}

// Each phase every thread writes its cell, then reads all others: one missed wait shows as a stale number.
TEST(barrier_separates_phases) {
    for (const int n : {2, 5}) {
        ThreadPool pool(n);
        Barrier barrier(n, pool.spin_us());
        std::vector<int> cells(static_cast<std::size_t>(n), -1);
        std::atomic<int> stale{0};
        pool.run([&](int id) {
            for (int phase = 0; phase < 2000; ++phase) {
                cells[static_cast<std::size_t>(id)] = phase;
                barrier.arrive_and_wait();
                for (const int cell : cells) {
                    stale += cell == phase ? 0 : 1;
                }
                barrier.arrive_and_wait();
            }
        });
        CHECK_EQ(stale.load(), 0);
    }
}

TEST(waiters_sleep_and_wake) {
    ThreadPool pool(2);
    Barrier barrier(2, pool.spin_us());
    std::atomic<int> passed{0};
    pool.run([&](int id) {
        if (id == 0) {  // far longer than the spin: the other thread is asleep by now
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
        barrier.arrive_and_wait();
        ++passed;
    });
    CHECK_EQ(passed.load(), 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // workers are parked
    pool.run([&](int) { ++passed; });
    CHECK_EQ(passed.load(), 4);
}

TEST(pools_come_and_go) {
    int total = 0;
    for (int i = 0; i < 50; ++i) {
        ThreadPool pool(1 + i % 4);
        std::atomic<int> calls{0};
        if (i % 2 == 0) {
            pool.run([&](int) { ++calls; });
            total += calls.load() == 1 + i % 4 ? 1 : 0;
        }
    }
    CHECK_EQ(total, 25);
}

#if !defined(__SANITIZE_THREAD__)  // that sanitizer does not follow a fork of a process with threads
TEST(a_forked_child_is_told_and_can_exit) {
    auto pool = std::make_unique<ThreadPool>(2);
    pool->run([](int) {});
    const pid_t child = ::fork();
    if (child == 0) {
        int status = 1;
        try {
            pool->run([](int) {});
        } catch (const std::runtime_error& error) {
            status = std::string(error.what()).find("before a fork") != std::string::npos ? 0 : 2;
        }
        pool.reset();  // must not wait for threads that do not exist here
        ::_exit(status);
    }
    int status = -1;
    for (int tries = 0; tries < 500 && ::waitpid(child, &status, WNOHANG) == 0; ++tries) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        if (tries == 499) {
            ::kill(child, SIGKILL);
        }
    }
    CHECK_EQ(status, 0);
    std::atomic<int> calls{0};
    pool->run([&](int) { ++calls; });
    CHECK_EQ(calls.load(), 2);
}
#endif
