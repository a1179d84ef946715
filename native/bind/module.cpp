// The only file that depends on Python. Tensors are passed as addresses: KTMoEWrapper has checked their shapes, dtypes and
// layout, and keeps them alive during a call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "emulation/amx_trap.hpp"
#include "instruction_sets.hpp"
#include "ktv/layer.hpp"
#include "machine_limits/ceilings.hpp"
#include "machine_limits/products.hpp"
#include "memory.hpp"
#include "process.hpp"
#include "team.hpp"

namespace py = pybind11;
using namespace ktv;
using namespace py::literals;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (addresses by slot, row stride, column stride, disposable, addresses of scales, of zero points); strides in elements.
using Addresses = std::vector<std::uintptr_t>;
using Source = std::tuple<Addresses, std::ptrdiff_t, std::ptrdiff_t, bool, Addresses, Addresses>;
WeightSource source(const Source& s) {
    const auto pointers = [](const Addresses& addresses) {
        std::vector<const void*> found;
        for (const std::uintptr_t address : addresses) found.push_back(pointer<const void>(address));
        return found;
    };
    return {pointers(std::get<0>(s)), std::get<1>(s),           std::get<2>(s),
            std::get<3>(s),           pointers(std::get<4>(s)), pointers(std::get<5>(s))};
}

// (name, group, zeros, name of the scales' dtype, offset): WeightFormat.
using FormatOf = std::tuple<std::string, int, bool, std::string, bool>;
WeightFormat weight_format(const FormatOf& f) {
    const auto& [name, group, zeros, scale, offset] = f;
    const std::map<std::string, Format> formats{{"bf16", Format::bf16},
                                                {"fp8", Format::fp8},
                                                {"int8", Format::int8},
                                                {"int4", Format::int4},
                                                {"mxfp4", Format::mxfp4}};
    const std::map<std::string, Scale> scales{
        {"fp32", Scale::fp32}, {"fp16", Scale::fp16}, {"bf16", Scale::bf16}, {"e8m0", Scale::e8m0}};
    if (!formats.contains(name) || !scales.contains(scale))
        throw BadInput("there is no weight format " + name + " with scales of " + scale);
    return {formats.at(name), group, zeros, scales.at(scale), offset};
}

py::dict as_dict(const StageTimes& t) {
    py::list phases, spans;
    for (const StageTimes::Row& row : t.phases)
        phases.append(
            py::dict("name"_a = name_of(row.phase), "ns"_a = row.ns, "flops"_a = row.flops, "bytes"_a = row.bytes));
    for (const auto& worker : t.spans) {
        py::list of_worker;
        for (const StageTimes::Span& s : worker)
            of_worker.append(
                py::dict("stage"_a = s.stage, "begin"_a = s.begin, "work_end"_a = s.work_end, "end"_a = s.end));
        spans.append(std::move(of_worker));
    }
    return py::dict("direction"_a = t.backward ? "backward" : "forward", "rows"_a = t.rows, "workers"_a = t.workers,
                    "stages"_a = t.stages, "wall_ns"_a = t.wall_ns, "phases"_a = phases, "spans"_a = spans);
}

using Six = std::array<std::uintptr_t, 6>;
LoraPointers six(const Six& s, bool fp32) {
    return std::apply([fp32](auto... address) { return LoraPointers{pointer<void>(address)..., fp32}; }, s);
}

// Keeps the object; may be dropped by a thread without the GIL.
std::shared_ptr<const void> shared(py::object object) {
    return {new py::object(std::move(object)), [](py::object* held) {
                const py::gil_scoped_acquire gil;
                delete held;
            }};
}

// With reuse, the array's memory comes from the process's pool, and returns to it when its last view is deleted.
std::pair<py::array_t<std::uint8_t>, bool> gradient_memory(std::size_t bytes, bool reuse) {
    GradientMemory::Taken taken = reuse ? process().gradients.take(bytes) : GradientMemory::Taken{Block(bytes), true};
    auto block = std::make_unique<Block>(std::move(taken.block));
    std::byte* const data = block->data();
    const auto give_back = [](void* p) {
        const std::unique_ptr<Block> owned(static_cast<Block*>(p));
        process().gradients.give(std::move(*owned));
    };
    const py::capsule owner = reuse ? py::capsule(block.get(), give_back)
                                    : py::capsule(block.get(), [](void* p) { delete static_cast<Block*>(p); });
    (void)block.release();
    return {py::array_t<std::uint8_t>(static_cast<py::ssize_t>(bytes), reinterpret_cast<std::uint8_t*>(data), owner),
            taken.zero};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    constexpr py::call_guard<py::gil_scoped_release> without_gil;
    m.doc() = "The engine behind ktverify.experts. Call it through KTMoEWrapper, which checks every argument.";

    // BadInput is a std::invalid_argument, BadState a std::runtime_error: pybind11 raises ValueError and RuntimeError.
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const OutOfMemory& e) {
            py::set_error(PyExc_MemoryError, e.what());
        } catch (const std::bad_alloc&) {
            const std::string have = std::to_string(available_memory() >> 20);
            py::set_error(PyExc_MemoryError,
                          ("a table of the engine needs more than there is: " + have + " MiB are available").c_str());
        }
    });

    m.def("available_isas", &available_isas, "Names of the instruction sets that run here, best first.");
    m.def("known_isas", &known_isas, "Names of all instruction sets, best first, whether they can run here or not.");
    m.def("require_isa", &require_isa, "ValueError for an unknown name, RuntimeError for one that cannot run here.");
    m.def("why_not", &why_not, "Why an instruction set cannot run here; empty when it can.");
    m.def(
        "emulate_amx", &emulate_amx,
        "Execute tile instructions in a trap handler on a CPU without AMX: for checks, far too slow for anything else. "
        "Does nothing on a CPU with AMX. True when emulation is on.");
    m.def("emulated_instructions", &emulation::amx_trap_count, "Tile instructions that the trap handler has executed.");
    m.def("allowed_processors", &allowed_processors, "Processors that this process may run on.");
    m.def(
        "require_numa_nodes",
        [](const std::vector<int>& nodes) { (void)homes_of_parts(static_cast<int>(nodes.size()), nodes); },
        "numa_nodes"_a, "ValueError for a node that has no processor for this process.");
    m.def("refused_placement", &refused_placement,
          "What the kernel refuses of the calls that place memory on NUMA nodes, as text; empty when nothing.");
    m.def("available_memory", &available_memory,
          "Bytes that can still be allocated: free memory, cgroup limit, RLIMIT_AS, RLIMIT_DATA.");
    m.def("read_system_below", &read_system_below, "root"_a, "Read proc/ and sys/ below this folder, for tests.");
    m.def(
        "memory_use",
        [](int num_experts, int top_k, int hidden, int intermediate, int rank, int parts, int threads,
           const std::string& isa, const FormatOf& format, bool lora_fp32, const std::vector<std::int64_t>& ids) {
            LayerConfig config;
            config.num_experts = num_experts;
            config.top_k = top_k;
            config.hidden = hidden;
            config.intermediate = intermediate;
            config.rank = rank;
            config.parts = parts;
            config.threads = threads;
            config.max_rows = std::max(1, static_cast<int>(ids.size()));
            config.isa = isa;
            const MemoryUse use = memory_use(config, weight_format(format), lora_fp32, ids);
            return std::tuple(use.expert, use.lora, use.saved, use.working);
        },
        py::kw_only(), "num_experts"_a, "top_k"_a, "hidden"_a, "intermediate"_a, "rank"_a, "parts"_a, "threads"_a,
        "isa"_a, "format"_a, "lora_fp32"_a, "ids"_a,
        "Bytes that a layer would take: (base weights of an expert, LoRA snapshot, a saved forward, working buffers).");
    m.def("clear_buffer_cache", &clear_buffer_cache, without_gil);
    m.attr("HUGE_PAGE") = kHuge;
    m.def("gradient_memory", &gradient_memory, "bytes"_a, "reuse"_a, "(uint8 array of this size, whether it is zero).");
    m.def("read_rate", &read_rate, "threads"_a, "bytes"_a, "passes"_a, without_gil,
          "Bytes per second that the threads read together, in the best pass.");
    m.def("multiply_rate", &multiply_rate, "isa"_a, "threads"_a, "seconds"_a, without_gil,
          "Floating-point operations per second of an instruction set, on registers only.");
    m.def(
        "kernels_of",
        [](const std::string& isa) {
            const InstructionSet& set = instruction_set(isa);
            const Kernels* here = &set.kernels_here();
            return std::pair(reinterpret_cast<std::uintptr_t>(here), here == set.on_intel);
        },
        "The address of the kernels that this processor gets, for Products.time, and whether they are those with "
        "Intel's "
        "counts. Raises as require_isa does.");
    py::class_<Products>(m, "Products")
        .def(py::init<int, std::size_t>(), "threads"_a, "bytes"_a, without_gil)
        .def(
            "time",
            [](Products& products, std::uintptr_t kernels, bool backward, int rows, int n, int k, int matrices,
               std::size_t window, bool check) {
                const Products::Sizes sizes{backward ? Product::nn : Product::nt, rows, n, k, matrices, check};
                const Products::Timed timed = products.time(*pointer<const Kernels>(kernels), sizes, window);
                return std::tuple(timed.seconds, timed.bytes, timed.flops, timed.bits);
            },
            py::kw_only(), "kernels"_a, "backward"_a, "rows"_a, "n"_a, "k"_a, "matrices"_a, "window"_a,
            "check"_a = false, without_gil,
            "(seconds, bytes of weights, operations, with check the bits of all results). kernels: an address of "
            "kernels_of, or "
            "of "
            "the same table in another library.");
    m.def("compiler", [] { return std::string("g++ " __VERSION__); });

    py::class_<Layer>(m, "Layer")
        .def(py::init([](int num_experts, int top_k, int hidden, int intermediate, int rank, float scaling, int parts,
                         int threads, int max_rows, int max_cache_depth, bool lora_backward, const std::string& isa,
                         const std::vector<int>& numa_nodes) {
                 return std::make_unique<Layer>(LayerConfig{num_experts, top_k, hidden, intermediate, rank, scaling,
                                                            parts, threads, max_rows, max_cache_depth, lora_backward,
                                                            isa, numa_nodes});
             }),
             py::kw_only(), "num_experts"_a, "top_k"_a, "hidden"_a, "intermediate"_a, "rank"_a, "scaling"_a, "parts"_a,
             "threads"_a, "max_rows"_a, "max_cache_depth"_a, "lora_backward"_a, "isa"_a,
             "numa_nodes"_a = std::vector<int>{})
        .def("load_weights",
             [](Layer& layer, const Source& gate, const Source& up, const Source& down,
                const std::vector<std::int64_t>& map, py::object owner, const FormatOf& format) {
                 std::shared_ptr<const void> kept = shared(std::move(owner));
                 const py::gil_scoped_release release;
                 return layer.load_weights(source(gate), source(up), source(down), map, std::move(kept),
                                           weight_format(format));
             })
        .def(
            "move_weights",
            [](Layer& layer, int name, const Source& gate, const Source& up, const Source& down) {
                layer.move_weights(name, source(gate), source(up), source(down));
            },
            without_gil)
        .def(
            "unpack",
            [](const Layer& layer, int expert, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t down) {
                return layer.unpack(expert, pointer<bf16>(gate), pointer<bf16>(up), pointer<bf16>(down));
            },
            without_gil)
        .def(
            "update_lora", [](Layer& layer, const Six& lora, bool fp32) { layer.update_lora(six(lora, fp32)); },
            without_gil)
        .def("forward",
             [](Layer& layer, int rows, std::uintptr_t x, std::uintptr_t ids, std::uintptr_t weights,
                std::uintptr_t output, bool save, int room, int given_up) {
                 const py::gil_scoped_release release;
                 return layer.forward({rows, pointer<const bf16>(x), pointer<const std::int64_t>(ids),
                                       pointer<const float>(weights), pointer<bf16>(output), save, room, given_up});
             })
        .def("backward",
             [](Layer& layer, int rows, std::uintptr_t grad_output, std::uintptr_t grad_input, const Six& grads,
                bool fp32, bool grads_zero, std::uintptr_t grad_weights, bool accumulate, Ticket ticket,
                bool of_any_thread) {
                 const py::gil_scoped_release release;
                 layer.backward({rows, pointer<const bf16>(grad_output), pointer<bf16>(grad_input), six(grads, fp32),
                                 grads_zero, pointer<float>(grad_weights), accumulate, ticket, of_any_thread});
             })
        .def("drop", &Layer::drop, without_gil)
        .def("fingerprint",
             [](const Layer& layer, const std::vector<std::pair<std::uintptr_t, std::size_t>>& memory) {
                 std::vector<std::uint64_t> found;
                 {
                     const py::gil_scoped_release release;
                     std::vector<MemorySpan> spans;
                     for (const auto& [data, bytes] : memory) spans.push_back({pointer<const void>(data), bytes});
                     found = layer.fingerprint(spans);
                 }
                 return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof found[0]);
             })
        .def("record_stages", &Layer::record_stages, "on"_a, without_gil)
        .def("stage_times",
             [](const Layer& layer) {
                 StageTimes times;
                 {
                     const py::gil_scoped_release release;
                     times = layer.stage_times();
                 }
                 return as_dict(times);
             })
        .def("placement",
             [](const Layer& layer) {
                 std::vector<PartPlacement> parts;
                 {
                     const py::gil_scoped_release release;
                     parts = layer.placement();
                 }
                 py::list found;
                 for (const PartPlacement& part : parts)
                     found.append(py::dict("nodes"_a = part.nodes, "workers"_a = part.workers,
                                           "weights"_a = part.weights, "lora"_a = part.lora, "saved"_a = part.saved,
                                           "buffers"_a = part.buffers, "error"_a = part.error));
                 return found;
             })
        .def_property_readonly("saved_forwards", &Layer::saved_forwards)
        .def_property_readonly("lora_fp32", &Layer::lora_fp32)
        .def_property_readonly("packed_experts", &Layer::packed_experts)
        .def_property_readonly("threads", &Layer::threads)
        .def_property_readonly("isa", [](const Layer& layer) { return layer.config().isa; });
}
