#include "bind/bind.h"
#include "page_table.h"

namespace nanoserve::bind {

namespace {

// Python's rule: -1 is the last page.
std::int64_t from_the_end(const PageTable& table, std::int64_t index) {
    return index < 0 ? index + table.size() : index;
}

py::array_t<std::int32_t> slot_array(const PageTable& table, std::int64_t start, std::int64_t count) {
    require_at_least("start", start, 0);
    require_range("count", count, 0, table.capacity());
    py::array_t<std::int32_t> out(count);
    table.slots(start, {out.mutable_data(), static_cast<std::size_t>(count)});
    return out;
}

std::vector<std::int32_t> page_list(const PageTable& table) {
    return {table.pages().begin(), table.pages().end()};
}

}  // namespace

void populate_table(py::module_& m) {
    py::class_<PageTable>(m, "PageTable", "One sequence's pages; owns one reference on each.")
        .def(py::init<std::shared_ptr<KVCachePool>>(), py::arg("pool").none(false))
        .def("__len__", &PageTable::size)
        .def("__getitem__",
             [](const PageTable& t, std::int64_t index) { return t.page(from_the_end(t, index)); })
        .def_property_readonly("pool", &PageTable::pool)
        .def_property_readonly("pages", &page_list)
        .def_property_readonly("capacity", &PageTable::capacity, "Tokens that fit in the pages it has.")
        .def_property_readonly("num_tokens", &PageTable::num_tokens, "Tokens it was grown to.")
        .def("grow_to", &PageTable::grow_to, py::arg("num_tokens"),
             "Adds pages until num_tokens fit; returns them. PoolExhausted takes nothing.")
        .def(
            "adopt", [](PageTable& t, const std::vector<std::int64_t>& pages) { t.adopt(page_ids(pages)); },
            py::arg("pages"), "Appends pages that others hold too, taking one reference on each.")
        .def(
            "make_writable",
            [](PageTable& t, std::int64_t index) { return t.make_writable(from_the_end(t, index)); },
            py::arg("index"), "Replaces the page by a copy when anyone else holds it; True when it did.")
        .def("release", &PageTable::release, "Drops every reference; the table is empty afterwards.")
        .def("slots", &slot_array, py::arg("start"), py::arg("count"),
             "page_id * page_size + offset of positions start to start + count, int32.")
        .def("__repr__", [](const PageTable& t) {
            return "PageTable(pages=" + py::repr(py::cast(page_list(t))).cast<std::string>() +
                   ", num_tokens=" + std::to_string(t.num_tokens()) + ")";
        });
}

}  // namespace nanoserve::bind
