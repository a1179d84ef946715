// The engine's own tasks on 60 workers in virtual time: barriers, balance, and which worker writes which cache line.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "instruction_sets.hpp"
#include "problem.hpp"
#include "simulated_team.hpp"
#include "state.hpp"

namespace ktv {

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels amx_bf16_kernels;
#endif

namespace {

// Kernels that spend the time that a product takes where 60 workers share 270 GB/s and multiply 1 TFLOP/s each. With
// `real`, they compute as well; without, the weights are addresses that nobody reads.
constexpr double kBytes = 4.5e9, kFlops = 1e12;
bool real = false;

double seconds(double bytes, double blocks, int rows) {
    return std::max(bytes / kBytes, 2.0 * kBlockSize * blocks * (rows + kGroup - 1) / kGroup * kGroup / kFlops);
}

void nt(const NtSegment* segments, int count, int strips, int tokens, float* c) {
    double blocks = 0;
    for (int s = 0; s < count * strips; ++s) blocks += segments[s].kblocks;
    if (real) scalar_kernels.nt(segments, count, strips, tokens, c);
    simulated::spend(seconds(blocks * kBlockSize * sizeof(bf16), blocks, tokens));
}

void nn(const NnSegment* segments, int count, int rows, int cblocks, float* c) {
    double blocks = 0, read = 0;
    const bf16* last = nullptr;
    for (int s = 0; s < count; ++s) {
        blocks += segments[s].kblocks * cblocks;
        // the second half of a small activation multiplies the same W
        if (segments[s].weights == nullptr || segments[s].weights != last) read += segments[s].kblocks * cblocks;
        last = segments[s].weights;
    }
    if (real) scalar_kernels.nn(segments, count, rows, cblocks, c);
    simulated::spend(seconds(read * kBlockSize * sizeof(bf16), blocks, rows));
}

void pack_tokens(const bf16* const* rows, int k, int kblocks, bf16* pack) {
    scalar_kernels.pack_tokens(rows, k, kblocks, pack);
    simulated::spend(seconds(kblocks * kPackSize * sizeof(bf16), 0, 0));
}

// With the calls of the portable kernels, or of those that multiply most at once.
Kernels counted;

void count_calls_as(const Kernels& cut) {
    counted = scalar_kernels;
    counted.nt = nt;
    counted.nn = nn;
    counted.pack_tokens = pack_tokens;
    counted.strips = cut.strips;
    counted.cblocks = cut.cblocks;
    counted.most_rows = cut.most_rows;
}

}  // namespace

// In place of src/instruction_sets.cpp: every layer of this program has these kernels.
const InstructionSet& instruction_set(const std::string&) {
    static const InstructionSet set{"counted", nullptr, &counted, nullptr};
    return set;
}

const Kernels& InstructionSet::kernels_here() const {
    return *kernels;
}

}  // namespace ktv

using namespace ktv;
using simulated::Stage;

namespace {

struct CaseSizes {
    const char* name;
    int E, k, H, I, T, r;
};

// A layer whose weights and LoRA are addresses without memory: of experts that count as packed.
struct Addresses {
    explicit Addresses(const CaseSizes& s)
        : state(LayerConfig{s.E, s.k, s.H, s.I, s.r, 2.0f, 1, 60, s.T, 1, true, ""}) {
        reserved = mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        auto* at = static_cast<bf16*>(reserved);
        const auto take = [&](std::size_t count) { return std::exchange(at, at + count); };
        const std::size_t matrix = state.panel(state.size.hb) * state.size.ib;
        for (PackedExpert& expert : state.experts[0]) {
            expert.gate = take(2 * matrix);
            expert.up = expert.gate + state.panel(state.size.hb);
            expert.down = take(matrix);
        }
        const LoraStrides strides = state.lora_strides();
        state.lora = std::make_shared<LoraPack>();
        const auto pair = [&](std::size_t each) { return Pair{take(each * s.E), nullptr}; };
        state.lora->gate_up_a = pair(strides.gate_up_a);
        state.lora->down_b = pair(strides.down_b);
        state.lora->gate_b = {pair(strides.gate_b)};
        state.lora->up_b = {pair(strides.gate_b)};
        state.lora->down_a = {pair(strides.down_a)};
        state.weights_loaded = state.lora_loaded = true;
        state.packed = s.E;
    }
    ~Addresses() { munmap(reserved, kReserved); }
    static constexpr std::size_t kReserved = std::size_t{64} << 30;
    void* reserved;
    Layer::State state;
};

// Every token chooses k different experts.
std::vector<std::int64_t> routed(const CaseSizes& s) {
    Random random{1};
    std::vector<std::int64_t> ids;
    for (int t = 0; t < s.T; ++t) {
        std::vector<std::int64_t> experts(s.E);
        std::iota(experts.begin(), experts.end(), 0);
        for (int slot = 0; slot < s.k; ++slot) {
            std::swap(experts[slot], experts[slot + random.below(s.E - slot)]);
            ids.push_back(experts[slot]);
        }
    }
    return ids;
}

// What a layer's forward and backward take over what they would take if all workers had the same share, less 1; counts the
// barriers.
std::pair<double, double> imbalance(const CaseSizes& s) {
    real = false;
    Addresses layer(s);
    const std::size_t rows = wide(s.T) * s.H;
    std::vector<bf16> x(rows), out(rows), grad(rows);
    const std::vector<std::int64_t> ids = routed(s);
    std::vector<float> weights(ids.size(), 0.5f), grad_weights(ids.size());
    std::vector<std::vector<bf16>> lora;
    for (const std::size_t count : layer.state.grad_sizes()) lora.emplace_back(count);
    std::vector<Stage>& stages = simulated::clock().stages;
    const auto measured = [&](const char* direction, const auto& compute) {
        stages.clear();
        compute();
        check(stages.size() <= 4, "%s %s: %zu barriers, at most 4", s.name, direction, stages.size());
        double span = 0, mean = 0;
        for (const Stage& stage : stages) {
            span += stage.span;
            mean += stage.mean();
        }
        std::printf("%s, 60 workers, %s: imbalance %.1f %%\n", s.name, direction, 100 * (span / mean - 1));
        return span / mean - 1;
    };
    const double forward = measured(
        "forward", [&] { layer.state.forward({s.T, x.data(), ids.data(), weights.data(), out.data(), true}, ids); });
    const double backward = measured("backward", [&] {
        layer.state.backward({s.T, x.data(), grad.data(), Problem::pointers(lora), true, grad_weights.data(), false});
    });
    return {forward, backward};
}

void test_balance() {
    const auto [forward, backward] = imbalance({"DeepSeek-V3, 128 tokens", 256, 8, 7168, 2048, 128, 16});
    check(forward <= 0.05 && backward <= 0.05, "at most 5 %%");
    // the simulation sees imbalance: 16 tokens of one expert with two strips
    const auto [narrow, narrow_back] = imbalance({"two strips", 1, 1, 64, 64, 16, 4});
    check(narrow > 5 && narrow_back > 5, "60 workers have no use for two strips");
}

// Memory in whole cache lines, with the worker that wrote each word of it in the present stage.
class Watched {
  public:
    Watched(const char* name, void* data, std::size_t bytes)
        : name_(name), data_(static_cast<std::byte*>(data)), before_(data_, data_ + bytes / kLine * kLine) {}
    // What has changed was written by `worker`. Most has not, so it compares whole pages first.
    void attribute(int worker) {
        constexpr std::size_t page = 4096;
        for (std::size_t from = 0; from < before_.size(); from += page) {
            const std::size_t end = std::min(from + page, before_.size());
            if (std::memcmp(data_ + from, &before_[from], end - from) == 0) continue;
            for (std::size_t line = from; line < end; line += kLine) attribute_line(line, worker);
        }
    }
    // Ends a stage: no two workers may have written different words of one line. The same words, one worker after the
    // other, are a sum that is handed on in turn.
    void end_stage(const char* direction, std::size_t stage) {
        std::size_t shared = 0, first = 0;
        for (const auto& [line, writers] : writers_) {
            unsigned words = 0;
            bool apart = false;
            for (const auto& [worker, written] : writers) {
                apart |= words != 0 && (words & written) == 0;
                words |= written;
            }
            if (apart && shared++ == 0) first = line;
        }
        writers_.clear();
        check(shared == 0, "%s, stage %zu: %zu cache lines of the %s have two writers, the first at byte %zu",
              direction, stage, shared, name_, first);
    }

  private:
    static constexpr std::size_t kLine = 64, kWord = 2;
    void attribute_line(std::size_t line, int worker) {
        const std::byte* now = data_ + line;
        std::byte* then = &before_[line];
        for (std::size_t at = 0; at < kLine; at += kWord) {
            if (std::memcmp(now + at, then + at, kWord) != 0) writers_[line][worker] |= 1u << (at / kWord);
        }
        std::memcpy(then, now, kLine);
    }
    const char* name_;
    std::byte* data_;
    std::vector<std::byte> before_;
    std::map<std::size_t, std::map<int, unsigned>> writers_;  // of a line at so many bytes, words by worker
};

struct alignas(64) Line {
    std::byte bytes[64];
};

// No cache line is written by two workers in one stage, on sizes whose rows fill whole lines.
void test_lines(const Shape& shape, int workers) {
    real = true;
    Problem problem(shape);
    const auto layer = problem.layer("", workers);
    const auto lines = [](std::size_t bytes) { return std::vector<Line>((bytes + 63) / 64); };
    auto output = lines(problem.x.size() * sizeof(bf16)), grad_input = output, dw = lines(problem.ids.size() * 4);
    std::vector<std::vector<Line>> grads;
    for (const int size : problem.sizes) grads.push_back(lines(size * (shape.fp32 ? sizeof(float) : sizeof(bf16))));
    const LoraPointers pointers{grads[0].data(), grads[1].data(), grads[2].data(), grads[3].data(),
                                grads[4].data(), grads[5].data(), shape.fp32};
    std::vector<Watched> watched;
    const char* direction = "";
    std::size_t stage = 0;
    const auto call = [&](const char* name, const auto& compute) {
        direction = name;
        simulated::clock().stages.clear();
        stage = 0;
        simulated::clock().on_slice = [&](int worker) {
            const std::size_t ended = simulated::clock().stages.size();
            for (; stage < ended; ++stage) {
                for (Watched& one : watched) one.end_stage(direction, stage + 1);
            }
            for (Watched& one : watched) one.attribute(worker);
        };
        compute();
        simulated::clock().on_slice = [](int) {};
        for (Watched& one : watched) one.end_stage(direction, stage + 1);
    };
    const auto both = [&] {
        call("forward", [&] {
            layer->forward({shape.T, problem.x.data(), problem.ids.data(), problem.weights.data(),
                            reinterpret_cast<bf16*>(output.data()), true});
        });
        call("backward", [&] {
            layer->backward({shape.T, problem.grad_output.data(), reinterpret_cast<bf16*>(grad_input.data()), pointers,
                             false, reinterpret_cast<float*>(dw.data()), false});
        });
    };
    clear_buffer_cache();
    both();  // packs the experts, and leaves the calls' blocks in the cache
    std::size_t most = 0;
    const std::vector<BlockCache::Size> blocks(3 * shape.parts, {1});
    for (const Block& block : process().cache.take(blocks, {}, "blocks")) most = std::max(most, block.size());
    clear_buffer_cache();
    // so large that every call takes them and frees none
    std::vector<Block> large;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        const Block& block = large.emplace_back(most);
        std::memset(static_cast<void*>(block.data()), 0x5a, most);
        watched.emplace_back("a working block", block.data(), most);
    }
    process().cache.give(std::move(large));
    const auto watch = [&](const char* name, std::vector<Line>& memory) {
        watched.emplace_back(name, memory.data(), memory.size() * sizeof(Line));
    };
    watch("output", output);
    watch("grad_input", grad_input);
    watch("routing gradient", dw);
    for (auto& grad : grads) watch("LoRA gradients", grad);
    both();
    process().teams.clear();
    clear_buffer_cache();
}

}  // namespace

int main() {
    read_system_below("/proc/self/task");  // names no NUMA nodes: the watched blocks are of none
    std::vector<const Kernels*> cuts{&scalar_kernels};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) cuts.push_back(&amx_bf16_kernels);
#endif
    for (const Kernels* cut : cuts) {
        count_calls_as(*cut);
        test_balance();
        for (const int parts : {1, 2}) test_lines({2, 1, 128, 256 * parts, 80, 4, parts, false}, 4);
    }
    return finish();
}
