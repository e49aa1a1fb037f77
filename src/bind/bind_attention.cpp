#include "bind/bind.h"
namespace nanoserve::bind {
void populate_attention(py::module_& m) {
    m.def("paged_attention", [](const py::args&, const py::kwargs&) { throw std::runtime_error("paged_attention is not built yet"); });
}
}  // namespace nanoserve::bind
