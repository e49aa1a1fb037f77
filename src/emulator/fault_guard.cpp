#include "fault_guard.h"

#include <ucontext.h>

#include <cstdint>

#include "block.h"
#include "context_switch.h"

namespace nvemu {

struct sigaction FaultGuard::previous_segv_;
struct sigaction FaultGuard::previous_bus_;

namespace {
constexpr std::size_t kStackBytes = 64 * 1024;
}

FaultGuard::FaultGuard() : stack_(new std::byte[kStackBytes]) {
    stack_t stack{};
    stack.ss_sp = stack_.get();
    stack.ss_size = kStackBytes;
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &FaultGuard::handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv_);
    sigaction(SIGBUS, &action, &previous_bus_);
}

FaultGuard::~FaultGuard() {
    sigaction(SIGSEGV, &previous_segv_, nullptr);
    sigaction(SIGBUS, &previous_bus_, nullptr);
    sigaltstack(&previous_stack_, nullptr);
}

void FaultGuard::handle(int signal, siginfo_t* info, void* context) {
    Block* block = Block::running;
    if (block == nullptr || block->faults_elsewhere()) {
        sigaction(signal, signal == SIGSEGV ? &previous_segv_ : &previous_bus_, nullptr);
        return;  // and it faults again, into the previous handler
    }
    const auto address = reinterpret_cast<std::uint64_t>(info->si_addr);
    const bool device = address - kDeviceBase < kDeviceBytes;
    block->note_fault(address, device ? "access to device memory that is not allocated (any more)"
                                      : "access to an address that is no memory of the device");
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    registers[REG_RSP] = static_cast<greg_t>(reinterpret_cast<std::uint64_t>(block->scheduler_context()));
    registers[REG_RIP] = static_cast<greg_t>(reinterpret_cast<std::uint64_t>(&nvemu_resume_context));
}

}  // namespace nvemu
