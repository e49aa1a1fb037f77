#include "driver.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace fake_cuda {

bool& context_is_current() {
    thread_local bool current = false;
    return current;
}

Driver& Driver::instance() {
    static Driver& driver = *new Driver;  // never destroyed: calls may come while the process ends
    return driver;
}

Driver::Driver() : legacy_(std::make_shared<Stream>(true)), per_thread_(std::make_shared<Stream>(true)) {
    blocking_.push_back(per_thread_);
}

void Driver::reset_context() {
    for (const auto& [handle, stream] : streams.all()) {
        stream->capture = nullptr;
        stream->abandon();
    }
    for (const std::weak_ptr<Stream>& weak : blocking_) {
        if (const auto stream = weak.lock()) {
            stream->abandon();
        }
    }
    legacy_->abandon();
    for (const auto& [address, bytes] : allocations) {
        nvemu_free(reinterpret_cast<void*>(address));
    }
    streams.clear();
    events.clear();
    functions.clear();
    modules.clear();
    graphs.clear();
    executables.clear();
    allocations.clear();
    used_bytes = 0;
    sticky = kSuccess;
}

Result Driver::fail(Result result, std::string why) {
    message = std::move(why);
    return result;
}

std::shared_ptr<Stream> Driver::stream(const void* handle) {
    const auto value = reinterpret_cast<std::uintptr_t>(handle);
    if (value == 0 || value == kLegacyStream) {
        return legacy_;
    }
    return value == kPerThreadStream ? per_thread_ : streams.find(handle);
}

void* Driver::add_stream(bool is_blocking) {
    const auto stream = std::make_shared<Stream>(is_blocking);
    if (is_blocking) {
        blocking_.push_back(stream);
    }
    return streams.add(stream);
}

Result Driver::submit(const std::shared_ptr<Stream>& stream, Stream::Work work) {
    if (stream->capture != nullptr) {
        Capture& capture = *stream->capture;
        if (capture.is_invalid) {
            return fail(kStreamCaptureInvalidated, "the capture of this stream was invalidated before");
        }
        Capture::Branch& branch = capture.branches[stream.get()];
        ++branch.num_nodes;
        branch.is_joined = false;
        capture.graph->nodes.push_back(std::move(work));
        return kSuccess;
    }
    if (stream == legacy_) {
        return submit_legacy(std::move(work));
    }
    std::vector<Position> after;
    if (stream->is_blocking()) {
        if (!legacy_->is_idle()) {
            after.push_back(legacy_->end());
        }
    }
    stream->enqueue(std::move(work), std::move(after));
    return kSuccess;
}

Result Driver::submit_legacy(Stream::Work work) {
    std::vector<Position> after;
    std::erase_if(blocking_, [](const auto& weak) { return weak.expired(); });
    for (const std::weak_ptr<Stream>& weak : blocking_) {
        const auto stream = weak.lock();
        if (stream->capture != nullptr) {
            stream->capture->is_invalid = true;
            return fail(kStreamCaptureImplicit, "the legacy stream would wait for a stream that captures");
        }
        if (!stream->is_idle()) {
            after.push_back(stream->end());
        }
    }
    legacy_->enqueue(std::move(work), std::move(after));
    return kSuccess;
}

void Driver::synchronize() {
    for (const auto& [handle, stream] : streams.all()) {
        stream->end().reach();
    }
    for (const std::weak_ptr<Stream>& weak : blocking_) {
        if (const auto stream = weak.lock()) {
            stream->end().reach();
        }
    }
    legacy_->end().reach();
}

namespace {

Result result_of(nvemu::FailureKind kind) {
    switch (kind) {
        case nvemu::FailureKind::kNone:
            return kSuccess;
        case nvemu::FailureKind::kIllegalAddress:
            return kIllegalAddress;
        case nvemu::FailureKind::kMisalignedAddress:
            return kMisalignedAddress;
        case nvemu::FailureKind::kDeadlock:
            return kLaunchTimeout;  // a GPU would hang; this is what a watchdog makes of it
        case nvemu::FailureKind::kInvalidOperand:
            return kIllegalInstruction;
        case nvemu::FailureKind::kInvalidLaunch:
            return kInvalidValue;
        default:
            return kLaunchFailed;
    }
}

std::string described(const Function& function, const nvemu::Failure& failure) {
    char place[160];
    std::snprintf(place, sizeof place,
                  ", block (%u, %u, %u), thread (%u, %u, %u), line %u, address %#llx: ", failure.block[0],
                  failure.block[1], failure.block[2], failure.thread[0], failure.thread[1], failure.thread[2],
                  failure.line, static_cast<unsigned long long>(failure.address));
    return std::string("kernel ") + function.entry->name + place + failure.message;
}

}  // namespace

void Driver::run(KernelLaunch& launch) {
    if (sticky != kSuccess) {
        return;  // nothing runs in a broken context
    }
    const Function& function = *launch.function;
    if (function.module->is_unloaded) {
        sticky =
            fail(kLaunchFailed, std::string("kernel ") + function.entry->name + ": its module was unloaded");
        return;
    }
    std::vector<void*> pointers = launch.pointers();
    nvemu::LaunchRequest request{};
    request.module = function.module->table();
    request.kernel = function.entry;
    request.params = pointers.data();
    std::copy(std::begin(launch.grid), std::end(launch.grid), request.grid);
    std::copy(std::begin(launch.block), std::end(launch.block), request.block);
    request.dynamic_shared_bytes = launch.shared_bytes;
    const auto seed = static_cast<std::uint32_t>(num_launches++);
    request.order = device.order < 2 ? device.order : device.order + seed;
    nvemu::Failure failure{};
    if (nvemu_launch(&request, &failure) != 0) {
        sticky = fail(result_of(failure.kind), described(function, failure));
    }
}

Result Driver::refuse_in_capture() {
    bool refused = false;
    for (const auto& [handle, stream] : streams.all()) {
        if (stream->capture == nullptr) {
            continue;
        }
        Capture& capture = *stream->capture;
        const bool mine = capture.thread == std::this_thread::get_id();
        if (capture.mode == CaptureMode::kGlobal || (capture.mode == CaptureMode::kThreadLocal && mine)) {
            capture.is_invalid = true;
            refused = true;
        }
    }
    return refused ? fail(kStreamCaptureUnsupported, "this call is not permitted while a stream captures")
                   : kSuccess;
}

bool Driver::is_pinned(const void* address, std::uint64_t num_bytes) const {
    const auto at = reinterpret_cast<std::uint64_t>(address);
    auto found = pinned.upper_bound(at);
    if (found == pinned.begin()) {
        return false;
    }
    --found;
    return at - found->first <= found->second && num_bytes <= found->second - (at - found->first);
}

}  // namespace fake_cuda

// --- for tests
// ------------------------------------------------------------------------------------------------------

// What went wrong last, in words: valid until the next call.
FAKE_CUDA_EXPORT const char* fake_cuda_message() {
    fake_cuda::Driver& driver = fake_cuda::Driver::instance();
    const std::lock_guard guard(driver.lock);
    return driver.message.c_str();
}

// Kernels that have run since the process started.
FAKE_CUDA_EXPORT std::uint64_t fake_cuda_num_launches() {
    fake_cuda::Driver& driver = fake_cuda::Driver::instance();
    const std::lock_guard guard(driver.lock);
    return driver.num_launches;
}
