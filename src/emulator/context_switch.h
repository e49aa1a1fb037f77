// Leaving one call stack and continuing on another: what makes a function call into a CUDA thread.
//
// A CUDA thread waits in the middle of a kernel, at a barrier or for the other lanes of its warp. On a CPU
// that takes a stack of its own per thread and a way to change stacks: the System V ABI says which registers
// a call preserves, so a switch is a function that pushes those, stores the stack pointer, loads another one
// and pops. Some nanoseconds, against microseconds for operating system threads: a block has up to 1024.
#pragma once

namespace nvemu {

// Saves the caller's stack pointer in *save and continues where `load` was saved.
extern "C" void nvemu_switch_context(void** save, void* load);

// The second half of a switch, to be jumped to with the stack pointer already loaded (from a signal handler).
extern "C" void nvemu_resume_context();

// What to `load` so that `entry` starts on an empty stack that ends at `top` (a multiple of 16).
void* new_context(void* top, void (*entry)());

}  // namespace nvemu
