#include "context_switch.h"

#include <cstdint>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks by hand: x86-64 Linux only"
#endif

// The control words of the floating point units are preserved as well, but nothing here changes them.
asm(R"(
.text
.p2align 4
.globl nvemu_switch_context
.hidden nvemu_switch_context
.type nvemu_switch_context, @function
nvemu_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
.globl nvemu_resume_context
.hidden nvemu_resume_context
.type nvemu_resume_context, @function
nvemu_resume_context:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size nvemu_switch_context, .-nvemu_switch_context
.size nvemu_resume_context, .-nvemu_resume_context
)");

namespace nvemu {

void* new_context(void* top, void (*entry)()) {
    auto* slot = static_cast<std::uint64_t*>(top);
    *--slot = 0;  // where entry would return to; also what makes its frame as aligned as after a call
    *--slot = reinterpret_cast<std::uint64_t>(entry);
    for (int saved = 0; saved < 6; ++saved) {
        *--slot = 0;
    }
    return slot;
}

}  // namespace nvemu
