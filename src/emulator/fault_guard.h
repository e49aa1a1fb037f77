// Turns a fault inside a kernel into a failure of the launch.
//
// While one lives, SIGSEGV and SIGBUS that hit a CUDA thread end the launch: the handler notes the address
// and returns to the scheduler's stack instead of to the instruction. It runs on a stack of its own, for the
// fault may be an overflow of the thread's. Faults of anything else go to whoever handled them before.
#pragma once

#include <csignal>
#include <cstddef>
#include <memory>

namespace nvemu {

class FaultGuard {
  public:
    FaultGuard();
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;

  private:
    static void handle(int signal, siginfo_t* info, void* context);

    static struct sigaction previous_segv_;
    static struct sigaction previous_bus_;
    std::unique_ptr<std::byte[]> stack_;
    stack_t previous_stack_{};
};

}  // namespace nvemu
