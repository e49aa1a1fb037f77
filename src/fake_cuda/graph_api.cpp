// Stream capture and graphs.
#include "driver.h"

using namespace fake_cuda;

FAKE_CUDA_EXPORT Result cuStreamBeginCapture_v2(void* handle, int mode) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.streams.find(handle);
        if (stream == nullptr) {
            return driver.fail(kStreamCaptureUnsupported, "only a stream that was created can capture");
        }
        if (stream->capture != nullptr || mode < 0 || mode > 2) {
            return driver.fail(kInvalidValue, "the stream captures already, or the mode is unknown");
        }
        stream->capture = std::make_shared<Capture>();
        stream->capture->origin = stream.get();
        stream->capture->mode = static_cast<CaptureMode>(mode);
        stream->capture->thread = std::this_thread::get_id();
        stream->capture->branches[stream.get()];
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuStreamEndCapture(void* handle, void** graph) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.streams.find(handle);
        *graph = nullptr;
        if (stream == nullptr || stream->capture == nullptr) {
            return driver.fail(kInvalidValue, "the stream does not capture");
        }
        const std::shared_ptr<Capture> capture = stream->capture;
        if (capture->origin != stream.get()) {
            return driver.fail(kStreamCaptureUnmatched, "the capture began in another stream");
        }
        if (capture->mode != CaptureMode::kRelaxed && capture->thread != std::this_thread::get_id()) {
            return driver.fail(kStreamCaptureWrongThread, "the capture began in another thread");
        }
        bool unjoined = false;
        for (const auto& [branch_stream, branch] : capture->branches) {
            unjoined =
                unjoined || (branch_stream != capture->origin && branch.num_nodes != 0 && !branch.is_joined);
        }
        for (const auto& [other_handle, other] : driver.streams.all()) {
            if (other->capture == capture) {
                other->capture = nullptr;
            }
        }
        if (capture->is_invalid) {
            return driver.fail(kStreamCaptureInvalidated,
                               "a call that is not permitted invalidated the capture");
        }
        if (unjoined) {
            return driver.fail(kStreamCaptureUnjoined,
                               "a stream was drawn into the capture and not waited for");
        }
        *graph = driver.graphs.add(capture->graph);
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuStreamIsCapturing(void* handle, int* status) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.stream(handle);
        if (stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such stream");
        }
        *status = stream->capture == nullptr ? 0 : stream->capture->is_invalid ? 2 : 1;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto graph = driver.graphs.find(handle);
        if (graph == nullptr) {
            return driver.fail(kInvalidHandle, "no such graph");
        }
        *executable = driver.executables.add(std::make_shared<Graph>(*graph));
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuGraphInstantiate(void** executable, void* graph, unsigned long long flags) {
    return cuGraphInstantiateWithFlags(executable, graph, flags);
}

FAKE_CUDA_EXPORT Result cuGraphInstantiate_v2(void** executable, void* graph, void**, char*, std::size_t) {
    return cuGraphInstantiateWithFlags(executable, graph, 0);
}

FAKE_CUDA_EXPORT Result cuGraphLaunch(void* handle, void* stream_handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto executable = driver.executables.find(handle);
        const auto stream = driver.stream(stream_handle);
        if (executable == nullptr || stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such graph, or no such stream");
        }
        return driver.submit(stream, [executable] {
            for (const auto& node : executable->nodes) {
                node();
            }
        });
    });
}

FAKE_CUDA_EXPORT Result cuGraphUpload(void* handle, void*) {
    return call(Needs::kContext, [&](Driver& driver) {
        return driver.executables.find(handle) != nullptr ? kSuccess
                                                          : driver.fail(kInvalidHandle, "no such graph");
    });
}

// With no array, how many nodes there are; the nodes themselves cannot be looked at here.
FAKE_CUDA_EXPORT Result cuGraphGetNodes(void* handle, void** nodes, std::size_t* count) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto graph = driver.graphs.find(handle);
        if (graph == nullptr || nodes != nullptr) {
            return driver.fail(graph == nullptr ? kInvalidHandle : kInvalidValue, "cuGraphGetNodes");
        }
        *count = graph->nodes.size();
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuGraphDestroy(void* handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        return driver.graphs.remove(handle) ? kSuccess : driver.fail(kInvalidHandle, "no such graph");
    });
}

// Launches that are not done yet hold on to what they need.
FAKE_CUDA_EXPORT Result cuGraphExecDestroy(void* handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        return driver.executables.remove(handle) ? kSuccess : driver.fail(kInvalidHandle, "no such graph");
    });
}
