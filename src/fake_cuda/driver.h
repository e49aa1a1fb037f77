// The state of the driver: one device, its primary context, and every object that a program was given a
// handle of.
//
// One lock is held during every call. A handle is looked up before it is used, so a stale or invented one is
// an error and not a crash. An error of a kernel makes the context unusable, as on a GPU: every later call
// fails with it, until the context is reset.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_types.h"
#include "device.h"
#include "graph.h"
#include "module.h"
#include "stream.h"

namespace fake_cuda {

template <typename Object>
class Handles {
  public:
    void* add(std::shared_ptr<Object> object) {
        void* handle = object.get();
        objects_[handle] = std::move(object);
        return handle;
    }
    [[nodiscard]] std::shared_ptr<Object> find(const void* handle) const {
        const auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second;
    }
    bool remove(const void* handle) { return objects_.erase(handle) != 0; }
    [[nodiscard]] const auto& all() const { return objects_; }
    void clear() { objects_.clear(); }

  private:
    std::unordered_map<const void*, std::shared_ptr<Object>> objects_;
};

class Driver {
  public:
    static Driver& instance();

    std::mutex lock;
    bool is_initialized = false;
    Device device;

    // --- the primary context
    int num_retained = 0;
    Result sticky = kSuccess;
    std::string message;  // of the last error, for people and tests
    Handles<Stream> streams;
    Handles<Event> events;
    Handles<Module> modules;
    Handles<Function> functions;
    Handles<Graph> graphs;
    Handles<Graph> executables;                          // copies, made by cuGraphInstantiate
    std::map<std::uint64_t, std::uint64_t> allocations;  // address -> bytes charged
    std::map<std::uint64_t, std::uint64_t> pinned;       // page-locked host memory, address -> bytes
    std::uint64_t used_bytes = 0;
    std::uint64_t num_launches = 0;

    void reset_context();
    static void* context_handle() { return &instance(); }

    // A null pointer when there is no such stream.
    std::shared_ptr<Stream> stream(const void* handle);
    std::shared_ptr<Stream> legacy_stream() { return legacy_; }
    void* add_stream(bool is_blocking);
    // Puts work into a stream, or into the graph it captures. `work` must not use what the program may free.
    Result submit(const std::shared_ptr<Stream>& stream, Stream::Work work);
    // The same for the legacy stream, for calls that do not name one.
    Result submit_legacy(Stream::Work work);
    // Waits for everything. Later errors are in `sticky`.
    void synchronize();

    // Runs a kernel now; a failure becomes sticky.
    void run(KernelLaunch& launch);
    // What a call may not do while a stream captures: the call fails and the captures are void.
    Result refuse_in_capture();
    [[nodiscard]] bool is_pinned(const void* address, std::uint64_t num_bytes) const;
    Result fail(Result result, std::string why);

  private:
    Driver();
    std::shared_ptr<Stream> legacy_;
    std::shared_ptr<Stream> per_thread_;
    std::vector<std::weak_ptr<Stream>> blocking_;  // every one that exists
};

// Whether the context is current to the calling thread.
bool& context_is_current();

enum class Needs { kNothing, kInit, kContext };

// The frame of every call: lock, checks, and no exception out of it.
template <typename Body>
Result call(Needs needs, const Body& body) {
    Driver& driver = Driver::instance();
    const std::lock_guard guard(driver.lock);
    if (needs != Needs::kNothing && !driver.is_initialized) {
        return driver.fail(kNotInitialized, "cuInit was not called");
    }
    if (needs == Needs::kContext) {
        if (driver.num_retained == 0 || !context_is_current()) {
            return driver.fail(kInvalidContext, "no context is current to this thread");
        }
        if (driver.sticky != kSuccess) {
            return driver.sticky;
        }
    }
    try {
        return body(driver);
    } catch (const std::bad_alloc&) {
        return driver.fail(kOutOfMemory, "no memory on the host");
    }
}

}  // namespace fake_cuda
