// Graphs: work recorded from streams, to be done again and again.
//
// What a kernel gets as parameters, and where a copy reads and writes, is frozen when it is captured; the
// memory behind the pointers is what it is at each replay.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_types.h"

namespace fake_cuda {

class Stream;

struct Graph {
    // In the order of capture, which no dependency points against.
    std::vector<std::function<void()>> nodes;
};

// One capture going on, in the stream that began it and in those that were drawn in by its events.
struct Capture {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    Stream* origin = nullptr;
    CaptureMode mode = CaptureMode::kGlobal;
    std::thread::id thread;
    bool is_invalid = false;
    struct Branch {
        std::uint64_t num_nodes = 0;
        bool is_joined = false;  // somebody waited for its last node
    };
    std::map<Stream*, Branch> branches;  // the origin among them
};

}  // namespace fake_cuda
