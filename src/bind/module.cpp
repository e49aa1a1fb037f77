// The Python module `_ch16`. nanoserve/native.py finds and loads it; nothing else imports it by name.
#include "bind/bind.h"
#include "errors.h"

namespace nanoserve::bind {

namespace {

std::string dtype_text(const py::array& array) {
    return py::str(array.dtype()).cast<std::string>();
}

// The array behind `values`, or the array NumPy makes of a list. Never a copy of what is int32 or int64 already.
py::array as_int_array(const char* name, const py::handle& values) {
    py::array array = py::array::ensure(values);
    if (!array) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + " must be a list or an array of integers");
    }
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(name) + " has shape " + shape_text(array) + ", must have 1 dimension");
    }
    const char kind = array.dtype().kind();
    if (array.size() > 0 && kind != 'i' && kind != 'u') {
        throw py::type_error(std::string(name) + " has dtype " + dtype_text(array) + ", must hold integers");
    }
    return array;
}

[[noreturn]] void throw_out_of_range(const char* name, py::ssize_t index, const std::string& value) {
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] is " + value +
                                ", does not fit in 32 bits");
}

}  // namespace

std::string shape_text(const py::array& array) {
    std::string text = "[";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
    }
    return text + "]";
}

std::vector<std::int32_t> to_int32(const char* name, const std::vector<std::int64_t>& values) {
    std::vector<std::int32_t> out;
    out.reserve(values.size());
    for (const std::int64_t value : values) {
        if (!std::in_range<std::int32_t>(value)) {
            throw_out_of_range(name, std::ssize(out), std::to_string(value));
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
    return to_int32(name, int_vector(name, values));
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
}
