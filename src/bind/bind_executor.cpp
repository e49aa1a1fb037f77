#include "bind/bind.h"
namespace nanoserve::bind {
void populate_executor(py::module_& m) {
    m.def("StepExecutor", [](const py::args&, const py::kwargs&) { throw std::runtime_error("StepExecutor is not built yet"); });
}
}  // namespace nanoserve::bind
