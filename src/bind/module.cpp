// The Python module `_ch16`. nanoserve/native.py finds and loads it; nothing else imports it by name.
#include "bind/bind.h"

#include <algorithm>

#include "errors.h"

namespace nanoserve::bind {

namespace {

std::string dtype_text(const py::array& array) {
    return py::str(array.dtype()).cast<std::string>();
}

// The array behind `values`, or the array NumPy makes of a list. Never a copy of what is int32 or int64
// already.
py::array as_int_array(const char* name, const py::handle& values) {
    py::array array = py::array::ensure(values);
    if (!array) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + " must be a list or an array of integers");
    }
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(name) + " has shape " + shape_text(array) +
                                    ", must have 1 dimension");
    }
    const char kind = array.dtype().kind();
    if (array.size() > 0 && kind != 'i' && kind != 'u') {
        throw py::type_error(std::string(name) + " has dtype " + dtype_text(array) + ", must hold integers");
    }
    return array;
}

}  // namespace

std::string shape_text(const py::array& array) {
    std::string text = "[";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
    }
    return text + "]";
}

std::vector<std::int32_t> page_ids(const std::vector<std::int64_t>& values) {
    std::vector<std::int32_t> out;
    out.reserve(values.size());
    for (const std::int64_t value : values) {
        if (!std::in_range<std::int32_t>(value)) {
            throw std::out_of_range("page " + std::to_string(value) +
                                    " is out of range: page ids have 32 bits");
        }
        out.push_back(static_cast<std::int32_t>(value));
    }
    return out;
}

std::vector<std::int64_t> int_vector(const char* name, const py::handle& values) {
    const py::array array = as_int_array(name, values);
    if (array.dtype().kind() == 'u' && array.itemsize() == 8) {
        throw py::type_error(std::string(name) + " has dtype uint64, must be a signed type");
    }
    const auto wide = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    return {wide.data(), wide.data() + wide.size()};
}

std::vector<std::int32_t> int32_vector(const char* name, const py::handle& values) {
    // What the engine passes every step; checked by identity of the type so that it costs one copy.
    if (py::isinstance<Int32Array>(values)) {
        const auto array = py::reinterpret_borrow<Int32Array>(values);
        if (array.ndim() == 1) {
            return {array.data(), array.data() + array.size()};
        }
    }
    const std::vector<std::int64_t> wide = int_vector(name, values);
    for (std::size_t i = 0; i < wide.size(); ++i) {
        if (!std::in_range<std::int32_t>(wide[i])) {
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                                        std::to_string(wide[i]) + ", does not fit in 32 bits");
        }
    }
    std::vector<std::int32_t> out(wide.size());
    std::transform(wide.begin(), wide.end(), out.begin(),
                   [](std::int64_t value) { return static_cast<std::int32_t>(value); });
    return out;
}

FloatArray float_array(const char* name, const py::handle& value, int ndim) {
    if (!py::isinstance<py::array>(value)) {
        throw py::type_error(std::string(name) + " must be a NumPy array of float32");
    }
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!py::isinstance<py::array_t<float>>(array)) {
        throw py::type_error(std::string(name) + " has dtype " + dtype_text(array) + ", must be float32");
    }
    if (array.ndim() != ndim) {
        throw std::invalid_argument(std::string(name) + " has shape " + shape_text(array) + ", must have " +
                                    std::to_string(ndim) + " dimensions");
    }
    return FloatArray::ensure(array);
}

}  // namespace nanoserve::bind

PYBIND11_MODULE(_ch16, m) {
    m.doc() = "nanoserve's native core: KV pages, page tables, threads and the step executor.";
    pybind11::register_exception<nanoserve::PoolExhausted>(m, "PoolExhausted", PyExc_RuntimeError).doc() =
        "Not enough free KV pages. Nothing was taken.";
    nanoserve::bind::populate_pool(m);
    nanoserve::bind::populate_table(m);
    nanoserve::bind::populate_threads(m);
    nanoserve::bind::populate_executor(m);
    nanoserve::bind::populate_attention(m);
    nanoserve::bind::populate_logits(m);
    nanoserve::bind::populate_cuda(m);
    nanoserve::bind::populate_cuda_tools(m);
    nanoserve::bind::populate_weights(m);
}
