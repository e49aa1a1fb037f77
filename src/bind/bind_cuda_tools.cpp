// A device by hand, for tools that check and time single kernels: memory, launches, graphs, time.
#include "bind/bind.h"
#include "cuda_kernel.h"
#include "cuda_timer.h"

namespace nanoserve::bind {

namespace {

using cuda::Device;
using cuda::DeviceBlock;
using cuda::Graph;
using cuda::Kernel;
using cuda::Stream;
using cuda::TensorMap;
using cuda::TimeMark;

// A block of device memory with the stream that its copies go through.
struct Memory {
    std::shared_ptr<Stream> stream;
    DeviceBlock block;

    [[nodiscard]] cuda::DevicePtr at(std::int64_t offset, std::int64_t num_bytes) const {
        require_range("offset", offset, 0, block.num_bytes());
        require_range("bytes from there on", num_bytes, 0, block.num_bytes() - offset);
        stream->device()->use();
        return block.data() + static_cast<cuda::DevicePtr>(offset);
    }
};

void require_contiguous(const py::array& array) {
    if ((array.flags() & py::array::c_style) == 0) {
        throw std::invalid_argument("an array of shape " + shape_text(array) + " must be C-contiguous");
    }
}

void upload(const Memory& memory, const py::array& array, std::int64_t offset) {
    require_contiguous(array);
    const cuda::DevicePtr to = memory.at(offset, array.nbytes());
    const py::gil_scoped_release unlocked;
    memory.stream->copy_in(to, array.data(), array.nbytes());
    memory.stream->synchronize();
}

void download(const Memory& memory, py::array& array, std::int64_t offset) {
    require_contiguous(array);
    const cuda::DevicePtr from = memory.at(offset, array.nbytes());
    void* const to = array.mutable_data();
    const py::gil_scoped_release unlocked;
    memory.stream->copy_out(to, from, array.nbytes());
    memory.stream->synchronize();
}

void copy(const Memory& to, const Memory& from, std::int64_t num_bytes) {
    to.stream->copy(to.at(0, num_bytes), from.at(0, num_bytes), num_bytes);
}

// An argument: an address or an integer, or memory (address, bytes) that the kernel takes by a tensor map.
using LaunchArg = std::variant<std::int64_t, std::pair<cuda::DevicePtr, std::int64_t>>;

void launch(Stream& stream, const Kernel& kernel, const std::vector<unsigned>& grid,
            std::vector<LaunchArg> values, bool early) {
    require_range("dimensions of a grid", std::ssize(grid), 1, 3);
    std::array<unsigned, 3> blocks{1, 1, 1};
    std::copy(grid.begin(), grid.end(), blocks.begin());
    stream.device()->use();
    std::vector<void*> args;
    args.reserve(values.size());
    for (LaunchArg& value : values) {
        args.push_back(std::get_if<std::int64_t>(&value));
    }
    std::vector<TensorMap> maps;
    maps.reserve(kernel.tensors().size());
    for (const cuda::TensorForm& form : kernel.tensors()) {
        require_range("argument of a tensor map", narrow<std::int64_t>(form.argument), 0,
                      std::ssize(args) - 1);
        const auto* const memory = std::get_if<1>(&values[form.argument]);
        if (memory == nullptr) {
            throw std::invalid_argument(kernel.entry() + ": argument " + std::to_string(form.argument) +
                                        " is taken by a tensor map: give its address and its bytes");
        }
        args[form.argument] = maps.emplace_back(form, memory->first, memory->second, kernel.entry()).value();
    }
    if (std::count(args.begin(), args.end(), nullptr) != 0) {
        throw std::invalid_argument(kernel.entry() + ": an argument is memory, and taken by its address");
    }
    stream.launch(kernel.function(), kernel.entry().c_str(), kernel.shape(blocks, early), args);
}

// What `work` puts into the stream, as one graph.
Graph capture(Stream& stream, const py::function& work) {
    stream.device()->use();
    stream.begin_capture();
    try {
        work();
    } catch (...) {
        stream.abandon_capture();
        throw;
    }
    return stream.end_capture();
}

}  // namespace

void populate_cuda_tools(py::module_& m) {
    py::class_<Memory>(m, "CudaMemory", "Device memory, uninitialised. Copies are done when they return.")
        .def(py::init([](std::shared_ptr<Stream> stream, std::int64_t num_bytes) {
                 DeviceBlock block(stream->device(), "memory", num_bytes);
                 return std::make_unique<Memory>(std::move(stream), std::move(block));
             }),
             py::arg("stream").none(false), py::arg("num_bytes"))
        .def_property_readonly("address", [](const Memory& memory) { return memory.block.data(); })
        .def_property_readonly("num_bytes", [](const Memory& memory) { return memory.block.num_bytes(); })
        .def("upload", &upload, py::arg("array"), py::arg("offset") = 0)
        .def("download", &download, py::arg("array"), py::arg("offset") = 0,
             "Fills the array from the device.")
        .def("copy_from", &copy, py::arg("source"), py::arg("num_bytes"),
             "Puts a copy of another block's first bytes into the stream, and does not wait.");

    py::class_<Graph>(m, "CudaGraph", "Work that was captured from a stream.")
        .def(py::init(&capture), py::arg("stream").none(false), py::arg("work"),
             "Calls `work` and keeps what it puts into the stream, instead of running it.")
        .def(
            "launch",
            [](const Graph& graph, Stream& stream) {
                stream.device()->use();
                stream.launch(graph);
            },
            py::arg("stream").none(false));

    py::class_<TimeMark>(m, "CudaTimeMark", "A time in a stream: when everything before it there is done.")
        .def(py::init([](const std::shared_ptr<Device>& device) {
                 return std::make_unique<TimeMark>(std::shared_ptr<const Device>(device));
             }),
             py::arg("device").none(false))
        .def("record", &TimeMark::record, py::arg("stream").none(false))
        .def("until", &TimeMark::until, py::arg("later").none(false),
             py::call_guard<py::gil_scoped_release>(), "Milliseconds to a later mark, which is waited for.");

    m.def("cuda_launch", &launch, py::arg("stream").none(false), py::arg("kernel").none(false),
          py::arg("grid"), py::arg("args"), py::arg("early") = false,
          "Puts one launch into the stream; args: addresses and integers, 64 bits each, and (address, bytes) "
          "of what the kernel takes by a tensor map, in its order. early: what is in front is a kernel of "
          "ours, "
          "and this one may begin before it has ended, if it can.");
}

}  // namespace nanoserve::bind
