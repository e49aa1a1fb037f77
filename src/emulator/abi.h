// What crosses the border of libnvemu: the tables a compiled GPU module carries, a launch, and its failure.
//
// A GPU module is LLVM IR that python/nanoserve/emulator rewrote for the host and linked into a shared
// object. That object exports one symbol, `nvemu_module`, a ModuleTable; everything else a kernel needs (its
// thread index, barriers, shuffles, matrix operations) are the functions of runtime.h, which it imports from
// here. The structures are plain C: the other side writes them as LLVM constants and reads them through
// ctypes.
#pragma once

#include <cstdint>

#define NVEMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace nvemu {

inline constexpr std::uint32_t kAbiVersion = 3;

// "Device" memory lies in one reserved range and shared memory at one fixed 32-bit address, so that compiled
// code checks an address with constants, and so that pointers to shared memory fit the 32-bit registers and
// the 18-bit descriptor fields that kernels put them into. Far from where Linux places anything itself, but
// for the heap of a program that is not position-independent, which grows towards it from below.
inline constexpr std::uint64_t kDeviceBase = 0x2000'0000'0000;
inline constexpr std::uint64_t kDeviceBytes = std::uint64_t{1} << 40;
inline constexpr std::uint64_t kSharedBase = 0x7000'0000;
inline constexpr std::uint64_t kSharedBytes = 256 * 1024;
inline constexpr std::uint64_t kShadowBase =
    kSharedBase + 0x10'0000;  // one byte for every four: see shared_memory.h

// A variable of the module: shared memory by offset from kSharedBase, anything else by address.
struct Variable {
    const char* name;
    std::uint64_t place;
    std::uint64_t num_bytes;
};

struct KernelEntry {
    const char* name;
    void (*call)(void** params);  // params[i] points at the value of parameter i, as for cuLaunchKernel
    const std::uint32_t* param_bytes;
    std::uint32_t num_params;
    std::uint32_t static_shared_bytes;
    std::uint32_t max_threads;       // per block; 0: what the device allows
    std::uint32_t required_threads;  // per block, exactly; 0: any number
    std::uint32_t awaits_previous;   // it has griddepcontrol.wait, which each of its threads must get to
};

struct ModuleTable {
    std::uint32_t abi_version;
    std::uint32_t num_kernels;
    const KernelEntry* kernels;
    const Variable* shared;  // dynamic shared memory is no variable: it begins at dynamic_offset
    const Variable* data;    // constants and globals, which kernels reach by ordinary pointers
    std::uint32_t num_shared;
    std::uint32_t num_data;
    std::uint32_t dynamic_offset;
    std::uint32_t checks_proxies;  // stores to shared memory are noted, wgmma demands a proxy fence
};

struct LaunchRequest {
    const ModuleTable* module;
    const KernelEntry* kernel;
    void** params;
    std::uint32_t grid[3];
    std::uint32_t block[3];
    std::uint32_t dynamic_shared_bytes;
    std::uint32_t
        order;  // 0: each warp as far as it gets, 1: the same backwards, others: random with this seed
};

enum class FailureKind : std::int32_t {
    kNone = 0,
    kIllegalAddress = 1,
    kMisalignedAddress = 2,
    kDeadlock = 3,
    kDivergence = 4,
    kAsyncRace = 5,       // shared memory touched while an asynchronous operation uses it
    kAsyncAtExit = 6,     // a thread, or its block, ended before what it started asynchronously
    kInvalidLaunch = 7,   // nothing ran
    kInvalidOperand = 8,  // an instruction's operands are not what the hardware takes
};

struct Failure {
    FailureKind kind;
    std::uint32_t block[3];
    std::uint32_t thread[3];
    std::uint32_t line;  // of the LLVM IR text, where known
    std::uint64_t address;
    char message[512];
};

}  // namespace nvemu

// Zero, or the kind of the failure, which `failure` describes. One launch at a time: others wait.
NVEMU_EXPORT std::int32_t nvemu_launch(const nvemu::LaunchRequest* request, nvemu::Failure* failure);

// The same without running anything: only whether the launch is a valid one.
NVEMU_EXPORT std::int32_t nvemu_check_launch(const nvemu::LaunchRequest* request, nvemu::Failure* failure);

// Memory as cudaMalloc gives it, but full of NaN and between pages that fault. Null when the system refuses.
NVEMU_EXPORT void* nvemu_allocate(std::uint64_t num_bytes);
// 0; 1 when there is no such allocation; 2 when bytes just behind its end were written (it is freed).
NVEMU_EXPORT std::int32_t nvemu_free(void* address);
// Whether [address, address + num_bytes) lies in one live allocation.
NVEMU_EXPORT std::int32_t nvemu_is_allocated(const void* address, std::uint64_t num_bytes);
