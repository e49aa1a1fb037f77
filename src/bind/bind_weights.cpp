#include "bind/bind.h"
#include "weight_arena.h"

namespace nanoserve::bind {

namespace {

py::array_t<std::uint8_t> view(const py::object& self, std::int64_t begin, std::int64_t num_bytes) {
    const std::span<std::byte> range = self.cast<const WeightArena&>().range(begin, num_bytes);
    return py::array_t<std::uint8_t>({std::ssize(range)}, {1}, reinterpret_cast<std::uint8_t*>(range.data()),
                                     self);
}

std::uint64_t read(WeightArena& arena, int file, std::int64_t offset, std::int64_t begin,
                   std::int64_t num_bytes, ThreadPool& threads) {
    const py::gil_scoped_release unlocked;
    return arena.read(file, offset, begin, num_bytes, threads);
}

std::uint64_t checksum_of(const py::array& bytes, ThreadPool& threads) {
    if (!py::isinstance<py::array_t<std::uint8_t>>(bytes) || bytes.ndim() != 1 ||
        (bytes.flags() & py::array::c_style) == 0) {
        throw std::invalid_argument("bytes must be a contiguous array of uint8 with one dimension");
    }
    const std::span<const std::byte> span(static_cast<const std::byte*>(bytes.data()), at(bytes.size()));
    const py::gil_scoped_release unlocked;
    return checksum(span, threads);
}

}  // namespace

void populate_weights(py::module_& m) {
    py::class_<WeightArena>(m, "WeightArena", "One block of memory, in huge pages where there are any.")
        .def(py::init<std::int64_t>(), py::arg("num_bytes"), "A multiple of 4096; zeroes when first read.")
        .def_property_readonly("num_bytes", &WeightArena::num_bytes)
        .def("view", &view, py::arg("begin"), py::arg("num_bytes"),
             "uint8 [num_bytes], writable, no copy; keeps the arena alive.")
        .def("read", &read, py::arg("file"), py::arg("offset"), py::arg("begin"), py::arg("num_bytes"),
             py::arg("threads"),
             "Fills [begin, begin + num_bytes) from a file descriptor's [offset, ...); their checksum.");
    m.def("checksum", &checksum_of, py::arg("bytes"), py::arg("threads"),
          "64 bits over uint8 [n], n a multiple of 4096: what read gives for the same bytes.");
}

}  // namespace nanoserve::bind
