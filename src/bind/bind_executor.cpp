#include "bind/bind.h"
#include "logits_row.h"
#include "step_executor.h"

namespace nanoserve::bind {

namespace {

Kernel kernel_at(std::uintptr_t address) {
    return reinterpret_cast<Kernel>(address);
}

// ("buffer", 3) or ("ids",): a name, and a number for the sources that have several.
Arg parse_arg(const py::tuple& tuple) {
    if (tuple.empty()) {
        throw std::invalid_argument(
            "an argument is a tuple: the name of its source, then its number if it has one");
    }
    Arg arg{.source = source_from_name(tuple[0].cast<std::string>())};
    const std::size_t expected = source_has_index(arg.source) ? 2 : 1;
    if (tuple.size() != expected) {
        throw std::invalid_argument("argument " + py::repr(tuple).cast<std::string>() + " must have " +
                                    std::to_string(expected) + (expected == 1 ? " part" : " parts"));
    }
    if (expected == 2) {
        arg.index = tuple[1].cast<std::int64_t>();
    }
    return arg;
}

std::vector<Arg> parse_args(const std::vector<py::tuple>& tuples) {
    std::vector<Arg> args;
    args.reserve(tuples.size());
    for (const py::tuple& tuple : tuples) {
        args.push_back(parse_arg(tuple));
    }
    return args;
}

bool parse_over(const std::string& over) {
    if (over != "rows" && over != "samples") {
        throw std::invalid_argument("over is '" + over + "', must be rows or samples");
    }
    return over == "samples";
}

void add_op(StepExecutor& executor, const std::string& name, std::uintptr_t address,
            const std::vector<py::tuple>& args, const std::string& domain, std::int64_t panels,
            std::int64_t row_block, const std::string& over, std::int64_t cost_per_unit) {
    executor.op({.name = name,
                 .kernel = kernel_at(address),
                 .args = parse_args(args),
                 .domain = domain_from_name(domain),
                 .panels = panels,
                 .row_block = row_block,
                 .over_samples = parse_over(over),
                 .cost_per_unit = cost_per_unit});
}

void add_attention(StepExecutor& executor, const std::string& name, std::uintptr_t small_address,
                   const Tiling& small_tiling, std::uintptr_t large_address, const Tiling& large_tiling,
                   const std::vector<py::tuple>& args, std::int64_t group, std::int64_t kv_heads,
                   std::int64_t window) {
    executor.attention({.name = name,
                        .kernel = kernel_at(small_address),
                        .large_kernel = kernel_at(large_address),
                        .args = parse_args(args)},
                       group, kv_heads, tiling_of(small_tiling), tiling_of(large_tiling), window);
}

std::int64_t most_parts_bytes(const Tiling& small_tiling, const Tiling& large_tiling, std::int64_t group,
                              std::int64_t kv_heads, std::int64_t head_dim, std::int64_t max_tokens,
                              std::int64_t max_context, std::int64_t num_threads, std::int64_t window) {
    require_range("num_threads", num_threads, 1, ThreadPool::kMaxThreads);
    const std::int64_t floats =
        AttentionWork::most_part_floats({.group = group,
                                         .kv_heads = kv_heads,
                                         .head_dim = head_dim,
                                         .small = tiling_of(small_tiling),
                                         .large = tiling_of(large_tiling),
                                         .window = window},
                                        max_tokens, max_context, narrow<int>(num_threads));
    return checked_product("parts in bytes", {{"floats", floats}, {"bytes", sizeof(float)}});
}

std::int64_t add_weight(StepExecutor& executor, const py::array& array) {
    if ((array.flags() & py::array::c_style) == 0) {
        throw std::invalid_argument("a weight must be C-contiguous, got strides of a view of shape " +
                                    shape_text(array));
    }
    if (array.size() == 0) {
        throw std::invalid_argument("a weight of shape " + shape_text(array) + " is empty");
    }
    return executor.weight(array.data());
}

// [rows, vocab] over rows of `row_stride` floats that start on a cache line; uninitialised.
py::array_t<float> new_logits(std::int64_t rows, std::int64_t vocab, std::int64_t row_stride) {
    constexpr std::int64_t kLine = 64 / sizeof(float);
    const py::array_t<float> storage(checked_product("the logits", {{"rows", rows}, {"stride", row_stride}}) +
                                     kLine);
    const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
    const std::int64_t skip = (kLine - static_cast<std::int64_t>(address / sizeof(float) % kLine)) % kLine;
    const auto item = static_cast<std::int64_t>(sizeof(float));
    return py::array_t<float>(std::vector<py::ssize_t>{rows, vocab},
                              std::vector<py::ssize_t>{row_stride * item, item}, storage.data() + skip,
                              storage);
}

py::tuple forward(StepExecutor& executor, const py::object& input_ids, const py::sequence& tables,
                  const py::object& starts, const py::object& counts, const py::object& sample_rows,
                  std::int64_t vocab, const std::optional<py::object>& position_offsets) {
    std::vector<const PageTable*> table_list;
    table_list.reserve(tables.size());
    for (const py::handle table : tables) {
        table_list.push_back(table.cast<const PageTable*>());
    }
    const std::vector<std::int32_t> ids = int32_vector("input_ids", input_ids);
    const std::vector<std::int32_t> start_list = int32_vector("starts", starts);
    const std::vector<std::int32_t> count_list = int32_vector("counts", counts);
    const std::vector<std::int32_t> sample_list = int32_vector("sample_rows", sample_rows);
    const std::vector<std::int32_t> offset_list =
        position_offsets ? int32_vector("position_offsets", *position_offsets) : std::vector<std::int32_t>{};
    const StepExecutor::Step step = executor.prepare({.input_ids = ids,
                                                      .tables = table_list,
                                                      .starts = start_list,
                                                      .counts = count_list,
                                                      .sample_rows = sample_list,
                                                      .vocab = vocab,
                                                      .position_offsets = offset_list});
    const std::int64_t row_stride = StepExecutor::logits_stride(vocab);
    py::array_t<float> logits = new_logits(std::ssize(sample_list), vocab, row_stride);
    const std::int64_t num_blocks = num_logits_blocks(vocab);
    py::array_t<float> block_max(std::vector<py::ssize_t>{std::ssize(sample_list), num_blocks});
    float* const data = logits.mutable_data();
    float* const block_data = block_max.mutable_data();
    if (!executor.writes_logits()) {
        std::fill_n(data, std::ssize(sample_list) * row_stride, 0.0F);
    }
    if (!executor.writes_block_max()) {
        std::fill_n(block_data, block_max.size(), 0.0F);
    }
    {
        const py::gil_scoped_release unlocked;
        executor.run(step, data, block_data);
    }
    return py::make_tuple(std::move(logits), std::move(block_max));
}

py::array buffer_view(const py::object& self, std::int64_t id) {
    const auto& executor = self.cast<const StepExecutor&>();
    const StepExecutor::BufferView view = executor.buffer_view(id);
    const py::dtype dtype = view.item_bytes == 4   ? py::dtype::of<float>()
                            : view.item_bytes == 2 ? py::dtype::of<std::uint16_t>()
                                                   : py::dtype::of<std::uint8_t>();
    return py::array(dtype, std::vector<py::ssize_t>{executor.max_tokens(), view.row_stride}, view.data,
                     self);
}

std::vector<std::pair<std::int64_t, std::int64_t>> share_list(std::int64_t num_units,
                                                              std::int64_t cost_per_unit,
                                                              std::int64_t num_threads) {
    require_range("num_threads", num_threads, 1, ThreadPool::kMaxThreads);
    std::vector<std::pair<std::int64_t, std::int64_t>> out;
    for (const StepExecutor::Share& share :
         StepExecutor::shares(num_units, cost_per_unit, narrow<int>(num_threads))) {
        out.emplace_back(share.begin, share.end);
    }
    return out;
}

py::list timing_list(const StepExecutor& executor) {
    py::list out;
    for (const OpTiming& timing : executor.timings()) {
        out.append(py::make_tuple(timing.name, timing.nanoseconds, timing.calls));
    }
    return out;
}

}  // namespace

void populate_executor(py::module_& m) {
    py::class_<StepExecutor>(m, "StepExecutor", "Runs a plan of compiled kernels over a ragged batch.")
        .def(py::init([](std::shared_ptr<KVCachePool> pool, std::shared_ptr<ThreadPool> threads,
                         std::int64_t max_tokens, std::optional<std::int64_t> max_positions) {
                 constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();
                 return std::make_unique<StepExecutor>(
                     std::move(pool), std::move(threads),
                     StepLimits{.max_tokens = max_tokens, .max_positions = max_positions.value_or(kNoLimit)});
             }),
             py::arg("pool").none(false), py::arg("threads").none(false), py::arg("max_tokens"),
             py::arg("max_positions") = py::none(),
             "max_positions: rows of the model's position tables; no position, with its offset, lies past "
             "them.")
        .def_static("stride", &StepExecutor::stride, py::arg("cols"), py::arg("item_bytes") = 4,
                    "Row stride of a buffer, in items.")
        .def_static("logits_stride", &StepExecutor::logits_stride, py::arg("vocab"),
                    "Row stride of the logits.")
        .def_static("shares", &share_list, py::arg("num_units"), py::arg("cost_per_unit"),
                    py::arg("num_threads"),
                    "[(begin, end)] of an operation's units for each thread that takes part; attention has a "
                    "rule of its own.")
        .def_static("most_parts_bytes", &most_parts_bytes, py::arg("small_tiling"), py::arg("large_tiling"),
                    py::arg("group"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("max_tokens"),
                    py::arg("max_context"), py::arg("num_threads"), py::arg("window") = 0,
                    "What the attention operations of one shape take at most for the results of segments, in "
                    "any step of max_tokens rows of sequences of max_context tokens.")
        .def_property_readonly("parts_bytes", &StepExecutor::parts_bytes,
                               "What they have taken so far, all shapes together.")
        .def_property_readonly("max_tokens", &StepExecutor::max_tokens)
        .def("buffer", &StepExecutor::buffer, py::arg("cols"), py::arg("item_bytes") = 4,
             "Activations [max_tokens, stride(cols, item_bytes)]; returns the id.")
        .def("row_scales", &StepExecutor::row_scales,
             "A buffer [max_tokens, 1] of float32, without gaps between rows; returns the id.")
        .def("buffer_view", &buffer_view, py::arg("id"),
             "The buffer's memory as an array (bfloat16 as uint16), for tests and debugging.")
        .def("weight", &add_weight, py::arg("array"), py::keep_alive<1, 2>(),
             "Keeps the array alive and hands its memory to kernels; returns the id.")
        .def("op", &add_op, py::arg("name"), py::arg("address"), py::arg("args"), py::arg("domain"),
             py::arg("panels") = 0, py::arg("row_block") = 0, py::arg("over") = "rows",
             py::arg("cost_per_unit") = 0)
        .def("attention", &add_attention, py::arg("name"), py::arg("small_address"), py::arg("small_tiling"),
             py::arg("large_address"), py::arg("large_tiling"), py::arg("args"), py::arg("group"),
             py::arg("kv_heads"), py::arg("window") = 0,
             "Tilings are (rows, tiles). window: keys a row sees, its own included, 0 for all; the kernels "
             "must agree.")
        .def(
            "forward", &forward, py::arg("input_ids"), py::arg("tables"), py::arg("starts"),
            py::arg("counts"), py::arg("sample_rows"), py::arg("vocab"),
            py::arg("position_offsets") = py::none(),
            "(logits [samples, vocab], block_max [samples, blocks of LOGITS_BLOCK]), each zero where no "
            "operation "
            "writes it. Runs without Python's lock. position_offsets: per sequence, added to what the source "
            "`positions` gives.")
        .def("profile", &StepExecutor::profile, py::arg("enable"))
        .def("timings", &timing_list,
             "[(operation, nanoseconds, calls)] since profile(True), as thread 0 saw it.");
}

}  // namespace nanoserve::bind
