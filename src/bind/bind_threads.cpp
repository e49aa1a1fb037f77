#include "bind/bind.h"
#include "cpus.h"
#include "thread_pool.h"

namespace nanoserve::bind {

void populate_threads(py::module_& m) {
    py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(
        m, "ThreadPool", "The threads that run a step; the caller is one of them.")
        .def(py::init([](const std::optional<std::int64_t>& num_threads) {
                 if (num_threads) {
                     require_range("num_threads", *num_threads, 1, ThreadPool::kMaxThreads);
                 }
                 return std::make_shared<ThreadPool>(num_threads ? narrow<int>(*num_threads)
                                                                 : default_num_threads());
             }),
             py::arg("num_threads") = py::none(), "num_threads: None for one per core this process may use.")
        .def_property_readonly("num_threads", &ThreadPool::num_threads);
    m.def("default_num_threads", &default_num_threads, "How many a ThreadPool has that is not told.");
}

}  // namespace nanoserve::bind
