// The table of instruction sets is complete, and every row that runs here has a register peak. The products and silu of
// each against plain double loops, at many remainders of its register blocks.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <set>
#include <string>

#include "check.hpp"
#include "instruction_sets.hpp"
#include "ktv/errors.hpp"
#include "ktv/isa.hpp"
#include "machine_limits/ceilings.hpp"

using namespace ktv;

namespace {

void check_kernels(const char* name, const Kernels& k) {
    check(k.enter && k.leave && k.strips && k.cblocks && k.nt && k.nn && k.pack_tokens && k.silu_mul &&
              k.silu_mul_few && k.silu_mul_grad && k.add_transposed && k.add_rows && k.round_sum && k.transpose &&
              k.fingerprint && std::all_of(std::begin(k.unpack), std::end(k.unpack), [](auto f) { return f; }),
          "%s: a kernel is missing", name);
    check(k.few_rows >= 0 && k.few_rows <= kGroup && (k.few_rows > 0) == (k.nt_few != nullptr),
          "%s: nt_few does not match few_rows", name);
    bool cut = k.most_rows > 0 && k.most_rows % kGroup == 0;
    for (int rows = 1; rows <= k.most_rows; ++rows) {
        const int strips = k.strips(rows), cblocks = k.cblocks(rows);
        cut = cut && strips >= 1 && strips <= kMostStrips && (strips & (strips - 1)) == 0;
        cut = cut && cblocks >= kPanelBlocks && cblocks % kPanelBlocks == 0;
    }
    check(cut, "%s: how calls are cut", name);
    k.enter();
    k.leave();
}

void check_row(const InstructionSet& row) {
    check(row.missing != nullptr, "%s: the requirement is missing", row.name);
    check((row.kernels != nullptr) == (row.register_peak != nullptr), "%s: kernels without a register peak", row.name);
    const std::string reason = row.why_not();
    check(row.kernels || !reason.empty(), "%s: no kernels and no reason", row.name);
    check(reason == why_not(row.name), "%s: why_not", row.name);
    if (row.runs_here()) {
        require_isa(row.name);
        check_kernels(row.name, *row.kernels);
        check(&row.kernels_here() == row.kernels || &row.kernels_here() == row.on_intel, "%s: kernels_here", row.name);
        if (row.on_intel) check_kernels(row.name, *row.on_intel);
        check(multiply_rate(row.name, 1, 1e-4) > 0, "%s: register peak", row.name);
    } else {
        check(throws<BadState>([&] { require_isa(row.name); }), "%s is accepted, but: %s", row.name, reason.c_str());
    }
}

void check_table() {
    std::set<std::string> names;
    std::vector<std::string> known, available;
    for (const InstructionSet& row : instruction_sets()) {
        if (!check(row.name && *row.name && names.insert(row.name).second, "a row without a name of its own")) continue;
        check_row(row);
        known.push_back(row.name);
        if (row.runs_here()) available.push_back(row.name);
    }
    check(known == known_isas() && available == available_isas(), "names in the order of the table");
    check(!available.empty() && available.back() == "scalar" && known.back() == "scalar", "scalar is last and runs");
    check(throws<BadInput>([] { require_isa("avx9"); }) && throws<BadInput>([] { (void)why_not("avx9"); }),
          "an unknown name is refused");
}

// Kernels under test; one instruction set may have them with the counts of several processors.
struct Set {
    const char* name;
    const Kernels* kernels;
};

constexpr float kGuard = 12345.0f;

// The order of fp32 sums differs between instruction sets; products of bf16 are exact in fp32.
constexpr double kSumError = 2e-6;

// Values that end at an unreadable page, because asm and prefetches are invisible to the sanitizers.
class Fenced {
  public:
    explicit Fenced(const std::vector<bf16>& values) {
        const std::size_t bytes = values.size() * sizeof(bf16), page = 4096;
        const std::size_t usable = (bytes + page - 1) / page * page;
        void* mapped = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        mapped_ = {static_cast<std::byte*>(mapped), Unmap{usable + page}};
        mprotect(mapped_.get() + usable, page, PROT_NONE);
        data_ = reinterpret_cast<bf16*>(mapped_.get() + usable - bytes);
        std::memcpy(data_, values.data(), bytes);
    }
    const bf16* data() const { return data_; }
    float operator[](std::size_t i) const { return to_float(data_[i]); }

  private:
    struct Unmap {
        std::size_t bytes;
        void operator()(std::byte* mapped) const { munmap(mapped, bytes); }
    };
    std::unique_ptr<std::byte, Unmap> mapped_;
    bf16* data_ = nullptr;
};

// NtSegment::from stays inside the weights or inside those that follow, and reaches their end.
void prefetched_weights() {
    bool inside = true;
    for (int kblocks = 1; kblocks <= 40; ++kblocks) {
        const std::vector<bf16> w(kblocks * kBlockSize), next(w.size());
        const auto lies_in = [&](const std::vector<bf16>& in, const bf16* from, int blocks) {
            return from >= in.data() && from + blocks * kBlockSize <= in.data() + in.size();
        };
        for (int blocks = 1; blocks <= std::min(kblocks, 16); ++blocks) {
            for (int kb = 0; kb <= kblocks + 2 * blocks; ++kb) {
                const NtSegment segment{w.data(), nullptr, 0, kblocks};
                inside &= lies_in(w, segment.from(kb, blocks, nullptr), blocks);
                inside &= lies_in(kb < kblocks ? w : next, segment.from(kb, blocks, next.data()), blocks);
            }
        }
    }
    check(inside, "NtSegment::from leaves the weights");
}

// Tokens in one of the two layouts of nt's operands and results.
struct Tokens {
    int count;
    bool few;
    int groups() const { return (count + kGroup - 1) / kGroup; }
    std::size_t elements(int kblocks) const { return kblocks * (few ? count * kBlock : groups() * kPackSize); }
    std::size_t group_stride(int kblocks) const { return few ? 0 : kblocks * kPackSize; }
    // Element k of token t in a segment of `kblocks`.
    std::size_t at(int kblocks, int t, int k) const {
        if (few) return (k / kBlock * count + t) * kBlock + k % kBlock;
        return t / kGroup * group_stride(kblocks) + k / kBlock * kPackSize +
               (k % kBlock / 2 * kGroup + t % kGroup) * 2 + k % 2;
    }
    // Element (n, t) of one strip's result, and how many it has.
    std::size_t result(int n, int t) const {
        return few ? t * kBlock + n : t / kGroup * kResultSize + n * kGroup + t % kGroup;
    }
    std::size_t results() const { return few ? count * kBlock : groups() * kResultSize; }

    // segments [strips][..]
    void multiply(const Kernels& k, const std::vector<NtSegment>& segments, int strips, float* c) const {
        const int terms = static_cast<int>(segments.size()) / strips;
        k.enter();
        (few ? k.nt_few : k.nt)(segments.data(), terms, strips, count, c);
        k.leave();
    }
};

// Strips of segments of these lengths in k-blocks. The first segment of each names weights to prefetch next.
void nt(const Set& set, Random& random, const Tokens& tokens, const std::vector<int>& lengths, int strips = 1) {
    std::vector<Fenced> w, x, next;
    std::vector<NtSegment> segments;
    const std::size_t terms = lengths.size();
    for (const int kblocks : lengths) x.emplace_back(random.bf16s(tokens.elements(kblocks), 1));
    for (int strip = 0; strip < strips; ++strip) {
        next.emplace_back(random.bf16s(lengths[0] * kBlockSize, 1));
        for (std::size_t s = 0; s < terms; ++s) {
            w.emplace_back(random.bf16s(lengths[s] * kBlockSize, 1));
            segments.push_back({w.back().data(), x[s].data(), tokens.group_stride(lengths[s]), lengths[s],
                                s == 0 ? next.back().data() : nullptr});
        }
    }
    std::vector<float> c(strips * tokens.results() + kGroup, kGuard);
    tokens.multiply(*set.kernels, segments, strips, c.data());
    std::vector<double> got, expected;
    for (int strip = 0; strip < strips; ++strip) {
        for (int n = 0; n < kBlock; ++n) {
            for (int t = 0; t < tokens.count; ++t) {
                double sum = 0;
                for (std::size_t s = 0; s < terms; ++s) {
                    const Fenced& from = w[strip * terms + s];
                    for (int k = 0; k < lengths[s] * kBlock; ++k)
                        sum += double(from[k / kBlock * kBlockSize + n * kBlock + k % kBlock]) *
                               double(x[s][tokens.at(lengths[s], t, k)]);
                }
                expected.push_back(sum);
                got.push_back(c[strip * tokens.results() + tokens.result(n, t)]);
            }
        }
    }
    const char* product = tokens.few ? "nt_few" : "nt";
    check(c[strips * tokens.results()] == kGuard, "%s %s: wrote beyond its result", set.name, product);
    check(rel_l2(got, expected) < kSumError, "%s %s tokens=%d kblocks=%d segments=%zu strips=%d", set.name, product,
          tokens.count, lengths[0], terms, strips);
}

// A token's sums have the same bits whatever its place, and whatever the number of tokens and of strips.
void nt_in_any_place(const Set& set, Random& random, int most, bool few) {
    const std::vector<int> lengths = {11, 2};
    std::vector<std::vector<bf16>> w, one;
    for (const int kblocks : lengths) {
        w.push_back(random.bf16s(kblocks * kBlockSize, 1));
        one.push_back(random.bf16s(kblocks * kBlock, 1));
    }
    std::vector<float> first;
    bool same = true;
    for (int count = 1; count <= most; ++count) {
        const Tokens tokens{count, few};
        std::vector<std::vector<bf16>> x;
        std::vector<NtSegment> segments;
        for (std::size_t s = 0; s < lengths.size(); ++s) {
            auto& pack = x.emplace_back(tokens.elements(lengths[s]));
            for (int t = 0; t < count; ++t) {
                for (int k = 0; k < lengths[s] * kBlock; ++k) pack[tokens.at(lengths[s], t, k)] = one[s][k];
            }
            segments.push_back({w[s].data(), pack.data(), tokens.group_stride(lengths[s]), lengths[s]});
        }
        const int strips = few ? 1 : set.kernels->strips(count);
        const std::size_t terms = segments.size();
        for (std::size_t i = terms; i < strips * terms; ++i) segments.push_back(segments[i % terms]);
        std::vector<float> c(strips * tokens.results());
        tokens.multiply(*set.kernels, segments, strips, c.data());
        for (int n = 0; n < kBlock; ++n) {
            if (count == 1) first.push_back(c[tokens.result(n, 0)]);
            for (int strip = 0; strip < strips; ++strip) {
                for (int t = 0; t < count; ++t) same &= c[strip * tokens.results() + tokens.result(n, t)] == first[n];
            }
        }
    }
    check(same, "%s %s: bits depend on a token's place", set.name, few ? "nt_few" : "nt");
}

// Segments of these lengths in k-blocks, by `cblocks` column blocks of W, which has four or more. Neighbours of the same length share W, as
// the halves of an operand do. The last idle_pairs row pairs of such a W, and one row more, are padding. W comes as
// blocks, or as gathered rows of which the first 32 columns are skipped.
void nn(const Set& set, Random& random, int rows, const std::vector<int>& lengths, int cblocks, bool gathered,
        int idle_pairs = 0) {
    const int wide = std::max(cblocks, 4), width = wide * kBlock;
    const int padded = (rows + 15) / 16 * 16;
    const std::size_t count = lengths.size();
    std::vector<std::vector<bf16>> g(count), blocks(count), natural(count);
    std::vector<std::vector<const bf16*>> pointers(count);
    std::vector<NnSegment> segments;
    std::size_t from = 0;
    const auto in_blocks = [wide](int k, int col) {
        return (k / kBlock * wide + col / kBlock) * kBlockSize + k % kBlock * kBlock + col % kBlock;
    };
    for (std::size_t s = 0; s < count; ++s) {
        const int depth = lengths[s] * kBlock;
        g[s] = random.bf16s(padded * depth, 1);
        if (s == 0 || lengths[s] != lengths[s - 1]) {
            from = s;
            blocks[s] = random.bf16s(depth * width, 1);
            natural[s].resize(depth * (kBlock + width));
            for (int k = 0; k < depth; ++k) {
                bf16* row = &natural[s][k * (kBlock + width)];
                pointers[s].push_back(row);
                for (int col = 0; col < width; ++col) {
                    bf16& value = blocks[s][in_blocks(k, col)];
                    if (s == 0 && idle_pairs > 0 && k >= depth - 2 * idle_pairs - 1) value = 0;
                    row[kBlock + col] = value;
                }
            }
        } else {
            blocks[s] = blocks[from];
        }
        const std::size_t ld = depth;
        NnSegment segment{g[s].data(), ld, blocks[from].data(), wide * kBlockSize, nullptr, 0, lengths[s]};
        if (gathered) segment = {g[s].data(), ld, nullptr, 0, pointers[from].data(), kBlock, lengths[s]};
        if (from == 0) segment.idle_pairs = idle_pairs;
        if (s == 0 && !gathered) segment.next = blocks[0].data();
        segments.push_back(segment);
    }
    const std::size_t stride = nn_stride(rows);
    std::vector<float> c(cblocks * stride + 16, kGuard);
    set.kernels->enter();
    set.kernels->nn(segments.data(), static_cast<int>(count), rows, cblocks, c.data());
    set.kernels->leave();
    std::vector<double> got, expected;
    for (int row = 0; row < rows; ++row) {
        for (int col = 0; col < cblocks * kBlock; ++col) {
            double sum = 0;
            for (std::size_t s = 0; s < count; ++s) {
                const int depth = lengths[s] * kBlock;
                for (int k = 0; k < depth; ++k)
                    sum += double(to_float(g[s][row * depth + k])) * double(to_float(blocks[s][in_blocks(k, col)]));
            }
            expected.push_back(sum);
            got.push_back(c[col / kBlock * stride + row * kBlock + col % kBlock]);
        }
    }
    check(c[cblocks * stride] == kGuard, "%s nn: wrote beyond its result", set.name);
    check(rel_l2(got, expected) < kSumError, "%s nn rows=%d kblocks=%d segments=%zu cblocks=%d%s", set.name, rows,
          lengths[0], count, cblocks, gathered ? " gathered" : "");
}

// Of two groups, or of few tokens.
void activation(const Set& set, Random& random, int few) {
    const Kernels& k = *set.kernels;
    constexpr int groups = 2;
    const Tokens tokens{few > 0 ? few : groups * kGroup, few > 0};
    std::vector<float> g(tokens.results()), u(g);
    for (auto& v : g) v = 120.0f * random.uniform();
    for (auto& v : u) v = random.uniform();
    g[0] = 0.0f;
    g[1] = 32.0f;
    g[2] = -110.0f;
    g[3] = -3e38f;
    g[4] = NAN;
    struct alignas(64) CacheLine {
        float lanes[16];
    };
    // One guard line before and one behind, because streaming stores are invisible to the sanitizers.
    CacheLine guard;
    std::fill(std::begin(guard.lanes), std::end(guard.lanes), kGuard);
    std::vector<CacheLine> kept_g(g.size() / 16 + 2, guard), kept_u(kept_g);
    float *const keep_g = kept_g[1].lanes, *const keep_u = kept_u[1].lanes;
    const auto pack_with = [&](float* to_g, float* to_u) {
        std::vector<bf16> pack(g.size() + 1, 7);
        if (few > 0) k.silu_mul_few(g.data(), u.data(), few, pack.data(), to_g, to_u, kBlock);
        else k.silu_mul(g.data(), u.data(), groups, pack.data(), kPackSize, to_g, to_u, kBlock);
        return pack;
    };
    const auto alone = pack_with(nullptr, nullptr), pack = pack_with(keep_g, keep_u);
    bool kept = true, right = true;
    for (int n = 0; n < kBlock; ++n) {
        for (int t = 0; t < tokens.count; ++t) {
            const std::size_t from = tokens.result(n, t), to = t * kBlock + n;
            const float gate = g[from], up = u[from], was = keep_g[to];
            kept &= (std::isnan(gate) ? std::isnan(was) : was == gate) && keep_u[to] == up;
            const float h = to_float(pack[tokens.at(1, t, n)]);
            const double expected = gate / (1 + std::exp(-double(gate))) * up;
            right &= std::isnan(gate) ? std::isnan(h) : std::abs(h - expected) <= 0.004 * std::abs(expected) + 1e-35;
        }
    }
    for (const auto* lines : {&kept_g, &kept_u})
        kept &= lines->front().lanes[15] == kGuard && lines->back().lanes[0] == kGuard;
    check(kept, "%s silu_mul keeps g and u", set.name);
    check(pack == alone, "%s silu_mul that keeps nothing", set.name);
    check(pack.back() == 7, "%s silu_mul: wrote beyond its result", set.name);
    check(right, "%s silu_mul", set.name);
}

// A row's sums have the same bits whatever its place, and whatever the number of rows and of column blocks. Two operands
// share a W of `kblocks`, as the halves of a small activation do, behind a W of one operand.
void nn_in_any_place(const Set& set, Random& random, int kblocks) {
    const std::vector<int> lengths = {9, kblocks, kblocks};
    constexpr int wide = 16;
    std::vector<std::vector<bf16>> one, w;
    for (const int length : lengths) {
        one.push_back(random.bf16s(length * kBlock, 1));
        w.push_back(random.bf16s(length * wide * kBlockSize, 1));
    }
    w[2] = w[1];
    std::vector<float> first;
    bool same = true;
    for (const int rows : {1, 4, 5, 16, 33, 128, 129, 256}) {
        std::vector<std::vector<bf16>> g;
        std::vector<NnSegment> segments;
        for (std::size_t s = 0; s < lengths.size(); ++s) {
            auto& all = g.emplace_back();
            const std::size_t padded = nn_stride(rows) / kBlock;
            for (std::size_t row = 0; row < padded; ++row) all.insert(all.end(), one[s].begin(), one[s].end());
            const auto& from = w[std::min<std::size_t>(s, 1)];
            segments.push_back(
                {all.data(), one[s].size(), from.data(), wide * kBlockSize, nullptr, 0, lengths[s], 0, false, nullptr});
        }
        const int cblocks = std::min(set.kernels->cblocks(rows), wide);
        std::vector<float> c(cblocks * nn_stride(rows));
        set.kernels->enter();
        set.kernels->nn(segments.data(), static_cast<int>(segments.size()), rows, cblocks, c.data());
        set.kernels->leave();
        for (int cb = 0; cb < kPanelBlocks; ++cb) {
            for (int col = 0; col < kBlock; ++col) {
                if (rows == 1) first.push_back(c[cb * nn_stride(rows) + col]);
                for (int row = 0; row < rows; ++row)
                    same &= c[cb * nn_stride(rows) + row * kBlock + col] == first[cb * kBlock + col];
            }
        }
    }
    check(same, "%s nn, %d k-blocks: bits depend on the number of rows", set.name, kblocks);
}

void transpose(const Set& set, int rows, int cols) {
    const std::size_t stride = nn_stride(rows);
    const auto at = [&](int i, int j) { return j / kBlock * stride + i * kBlock + j % kBlock; };
    std::vector<float> c((cols + kBlock - 1) / kBlock * stride), out(rows * cols + 1, kGuard);
    for (std::size_t i = 0; i < c.size(); ++i) c[i] = float(i);
    set.kernels->transpose(c.data(), stride, rows, cols, out.data());
    bool right = out.back() == kGuard;
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < cols; ++j) right = right && out[j * rows + i] == c[at(i, j)];
    }
    check(right, "%s transpose %d x %d", set.name, rows, cols);
}

// The memory has exactly `bytes` bytes, so that a sanitizer reports an access beyond it.
void fingerprint(const Set& set, Random& random, std::size_t bytes) {
    using State = std::array<std::uint64_t, 16>;
    std::vector<std::uint8_t> data(bytes);
    random.fill(data.data(), bytes);
    const auto of = [&](const Kernels& kernels) {
        State state;
        kernels.fingerprint(data.data(), bytes, state.data());
        return state;
    };
    const State before = of(*set.kernels);
    check(before == of(*instruction_sets().back().kernels), "%s fingerprint of %zu bytes", set.name, bytes);
    for (std::size_t bit = 0; bit < 8 * bytes; ++bit) {
        const auto flip = [&] { data[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8); };
        flip();
        if (!check(of(*set.kernels) != before, "%s fingerprint: bit %zu of %zu bytes", set.name, bit, bytes)) return;
        flip();
    }
    // Changes of many words, of which plain sums would not show any.
    std::vector<std::uint8_t> was = data;
    for (std::size_t i = 3; i < bytes; i += 4) data[i] ^= 0x80;
    check(bytes < 4 || of(*set.kernels) != before, "%s fingerprint: all signs of %zu bytes", set.name, bytes);
    data = was;
    for (const std::size_t apart : {8, 64, 1024}) {
        if (bytes < apart + 8) continue;
        std::swap_ranges(data.begin(), data.begin() + 8, data.begin() + static_cast<std::ptrdiff_t>(apart));
        check(of(*set.kernels) != before, "%s fingerprint: words %zu bytes apart swapped", set.name, apart);
        data = was;
    }
}

void test(const Set& set) {
    const int few_rows = set.kernels->few_rows;
    Random random{7};
    for (int tokens = 1; tokens <= 9 * kGroup; ++tokens) nt(set, random, {tokens, false}, {3});
    nt(set, random, {256, false}, {17});
    nt(set, random, {37, false}, {2, 2, 2, 2});
    for (const int tokens : {1, 19, 40}) nt(set, random, {tokens, false}, {17, 1, 2});
    for (const int tokens : {5, 30, 50, 70, 130, 290}) {
        if (tokens > set.kernels->most_rows) continue;
        for (const int strips : {2, 3, 8}) nt(set, random, {tokens, false}, {10, 1}, strips);
    }
    for (int tokens = 1; tokens <= few_rows; ++tokens) {
        for (const int kblocks : {1, 2, 3, 4, 5, 8, 9, 17})
            nt(set, random, {tokens, true}, {kblocks, 1, 2}, 1 + kblocks % 2);
    }
    nt_in_any_place(set, random, 9 * kGroup, false);
    nt_in_any_place(set, random, few_rows, true);
    for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 16, 17, 31, 33, 48, 64, 65})
        nn(set, random, rows, {2}, 2, false);
    nn(set, random, 40, {19}, 4, false);
    for (const int rows : {128, 129, 225, 300}) {
        if (rows <= set.kernels->most_rows) nn(set, random, rows, {9, 9, 2}, set.kernels->cblocks(rows), false);
    }
    nn(set, random, 7, {9}, 1, true);
    nn(set, random, 32, {3}, 3, true);
    for (const int rows : {3, 8, 16, 21}) {
        for (const bool gathered : {false, true}) nn(set, random, rows, {10, 10, 3}, 4, gathered, 3);
    }
    for (const int kblocks : {4, 5, 6, 8}) nn_in_any_place(set, random, kblocks);
    for (const int rows : {1, 8, 16, 17, 32, 40}) {
        for (const int cols : {1, 15, 16, 100, 128}) transpose(set, rows, cols);
    }
    for (const std::size_t bytes : {0, 1, 63, 64, 200, 1024, 1087, 2500}) fingerprint(set, random, bytes);
    for (const int few : {0, 1, 7, std::max(few_rows, 10)}) activation(set, random, few);
}

}  // namespace

int main() {
    emulate_amx();
    check_table();
    prefetched_weights();
    for (const InstructionSet& row : instruction_sets()) {
        if (!row.runs_here()) continue;
        test({row.name, row.kernels});
        if (row.on_intel) test({row.name, row.on_intel});
    }
    return finish();
}
