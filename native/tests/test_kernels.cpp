// The products and silu of each instruction set against plain double loops, at many remainders of its register blocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "check.hpp"
#include "cpu.hpp"
#include "emulation/amx_trap.hpp"
#include "kernels/kernels.hpp"

using namespace ktv;

namespace {

constexpr float kGuard = 12345.0f;

// Tile loads and fp32 order differ between instruction sets; products of bf16 are exact in fp32.
constexpr double kSumError = 2e-6;

// Values that end where nobody may read on: asm and prefetches are beyond the sanitizers.
class Fenced {
  public:
    explicit Fenced(const std::vector<bf16>& values) {
        const std::size_t bytes = values.size() * sizeof(bf16), page = 4096;
        size_ = (bytes + page - 1) / page * page + page;
        void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<std::byte*>(mapped);
        mprotect(base_ + size_ - page, page, PROT_NONE);
        data_ = reinterpret_cast<bf16*>(base_ + size_ - page - bytes);
        std::memcpy(data_, values.data(), bytes);
    }
    Fenced(Fenced&& other) noexcept
        : base_(std::exchange(other.base_, nullptr)), size_(other.size_), data_(other.data_) {}
    ~Fenced() {
        if (base_) munmap(base_, size_);
    }
    const bf16* data() const { return data_; }
    bf16 operator[](std::size_t i) const { return data_[i]; }

  private:
    std::byte* base_ = nullptr;
    std::size_t size_ = 0;
    bf16* data_ = nullptr;
};

// What is fetched lies in the weights or in those that come next, and reaches their end.
void coming_weights() {
    bool inside = true;
    for (int kblocks = 1; kblocks <= 40; ++kblocks) {
        const std::vector<bf16> w(std::size_t(kblocks) * kBlockSize), next(w.size());
        const auto lies_in = [&](const std::vector<bf16>& in, const bf16* from, int blocks) {
            return from >= in.data() && from + std::size_t(blocks) * kBlockSize <= in.data() + in.size();
        };
        for (int blocks = 1; blocks <= std::min(kblocks, 16); ++blocks) {
            for (int kb = 0; kb <= kblocks + 2 * blocks; ++kb) {
                const NtSegment alone{w.data(), nullptr, 0, kblocks},
                    followed{w.data(), nullptr, 0, kblocks, next.data()};
                inside &= lies_in(w, alone.from(kb, blocks), blocks);
                inside &= lies_in(kb < kblocks ? w : next, followed.from(kb, blocks), blocks);
            }
        }
    }
    check::that(inside, "NtSegment::from leaves the weights");
}

// Segments of these lengths, in k-blocks; the first names weights to fetch next.
void nt(const Kernels& k, check::Random& random, int tokens, const std::vector<int>& lengths) {
    const int groups = (tokens + kGroup - 1) / kGroup;
    std::vector<Fenced> w, x;
    std::vector<NtSegment> segments;
    for (const int kblocks : lengths) {
        w.emplace_back(random.bf16s(std::size_t(kblocks) * kBlockSize, 1));
        x.emplace_back(random.bf16s(std::size_t(groups) * kblocks * kPackSize, 1));
        segments.push_back({w.back().data(), x.back().data(), std::size_t(kblocks) * kPackSize, kblocks});
    }
    const Fenced next(random.bf16s(std::size_t(lengths[0]) * kBlockSize, 1));
    segments[0].next = next.data();
    const int count = int(lengths.size());
    const std::size_t ldc = std::size_t(groups) * kGroup;
    std::vector<float> c(kBlock * ldc + kGroup, kGuard);
    k.enter();
    k.nt(segments.data(), count, tokens, c.data(), ldc);
    k.leave();
    std::vector<double> got, expected;
    for (int n = 0; n < kBlock; ++n) {
        for (int t = 0; t < tokens; ++t) {
            double sum = 0;
            for (std::size_t s = 0; s < lengths.size(); ++s) {
                for (int i = 0; i < lengths[s] * kBlock; ++i) {
                    const bf16* pack =
                        x[s].data() + std::size_t(t / kGroup) * lengths[s] * kPackSize + i / kBlock * kPackSize;
                    sum += double(to_float(w[s][std::size_t(i / kBlock) * kBlockSize + n * kBlock + i % kBlock])) *
                           double(to_float(pack[(i % kBlock / 2 * kGroup + t % kGroup) * 2 + i % 2]));
                }
            }
            expected.push_back(sum);
            got.push_back(c[n * ldc + t]);
        }
    }
    const std::string what = std::string(name_of(k.isa)) + " nt tokens=" + std::to_string(tokens) +
                             " kblocks=" + std::to_string(lengths[0]) + " segments=" + std::to_string(count);
    check::that(c[kBlock * ldc] == kGuard, what + ": wrote beyond its result");
    check::that(check::rel_l2(got, expected) < kSumError, what);
}

// Three segments of `kblocks`, 1 and 2 k-blocks; the first names weights to fetch next.
void nt_few(const Kernels& k, check::Random& random, int rows, int kblocks) {
    const std::vector<int> lengths = {kblocks, 1, 2};
    std::vector<Fenced> w, x;
    std::vector<NtSegment> segments;
    for (const int length : lengths) {
        w.emplace_back(random.bf16s(std::size_t(length) * kBlockSize, 1));
        x.emplace_back(random.bf16s(std::size_t(length * rows * kBlock), 1));
        segments.push_back({w.back().data(), x.back().data(), 0, length});
    }
    const Fenced next(random.bf16s(std::size_t(kblocks) * kBlockSize, 1));
    segments[0].next = next.data();
    std::vector<float> c(std::size_t(rows * kBlock + 1), kGuard);
    k.nt_few(segments.data(), int(segments.size()), rows, c.data());
    std::vector<double> got, expected;
    for (int n = 0; n < kBlock; ++n) {
        for (int t = 0; t < rows; ++t) {
            double sum = 0;
            for (std::size_t s = 0; s < segments.size(); ++s) {
                for (int i = 0; i < lengths[s] * kBlock; ++i) {
                    sum += double(to_float(w[s][std::size_t(i / kBlock) * kBlockSize + n * kBlock + i % kBlock])) *
                           double(to_float(x[s][std::size_t((i / kBlock * rows + t) * kBlock + i % kBlock)]));
                }
            }
            expected.push_back(sum);
            got.push_back(c[std::size_t(t * kBlock + n)]);
        }
    }
    const std::string what =
        std::string(name_of(k.isa)) + " nt_few rows=" + std::to_string(rows) + " kblocks=" + std::to_string(kblocks);
    check::that(c.back() == kGuard, what + ": wrote beyond its result");
    check::that(check::rel_l2(got, expected) < kSumError, what);
}

// A token's sums have the same bits whatever its place and however many there are.
void nt_in_any_place(const Kernels& k, check::Random& random) {
    constexpr int kblocks = 11, tokens = 9 * kGroup;
    const auto w = random.bf16s(kblocks * kBlockSize, 1);
    const auto one = random.bf16s(kblocks * kBlock, 1);
    std::vector<bf16> x(9 * kblocks * kPackSize);
    for (int t = 0; t < tokens; ++t) {
        for (int i = 0; i < kblocks * kBlock; ++i) {
            bf16* pack = x.data() + std::size_t(t / kGroup) * kblocks * kPackSize + i / kBlock * kPackSize;
            pack[(i % kBlock / 2 * kGroup + t % kGroup) * 2 + i % 2] = one[std::size_t(i)];
        }
    }
    const NtSegment segment{w.data(), x.data(), kblocks * kPackSize, kblocks};
    std::vector<float> c(kBlock * tokens);
    bool same = true;
    k.enter();
    k.nt(&segment, 1, tokens, c.data(), tokens);
    const std::vector<float> first = c;
    for (int rows = 1; rows <= tokens; ++rows) {
        k.nt(&segment, 1, rows, c.data(), tokens);
        for (int n = 0; n < kBlock; ++n) {
            for (int t = 0; t < rows; ++t) same &= c[std::size_t(n * tokens + t)] == first[std::size_t(n * tokens)];
        }
    }
    k.leave();
    check::that(same, std::string(name_of(k.isa)) + " nt: bits depend on a token's place");
}

// The same of few tokens.
void few_in_any_place(const Kernels& k, check::Random& random) {
    const std::vector<int> lengths = {11, 2};
    std::vector<std::vector<bf16>> w, one;
    for (const int length : lengths) {
        w.push_back(random.bf16s(std::size_t(length) * kBlockSize, 1));
        one.push_back(random.bf16s(std::size_t(length) * kBlock, 1));
    }
    std::vector<float> first;
    bool same = true;
    for (int tokens = 1; tokens <= k.few_rows; ++tokens) {
        std::vector<std::vector<bf16>> x;
        std::vector<NtSegment> segments;
        for (std::size_t s = 0; s < lengths.size(); ++s) {
            auto& pack = x.emplace_back();
            for (int kb = 0; kb < lengths[s]; ++kb) {
                for (int t = 0; t < tokens; ++t)
                    pack.insert(pack.end(), one[s].begin() + kb * kBlock, one[s].begin() + (kb + 1) * kBlock);
            }
            segments.push_back({w[s].data(), pack.data(), 0, lengths[s]});
        }
        std::vector<float> c(std::size_t(tokens) * kBlock);
        k.nt_few(segments.data(), int(segments.size()), tokens, c.data());
        if (tokens == 1) first = c;
        for (std::size_t i = 0; i < c.size(); ++i) same &= c[i] == first[i % kBlock];
    }
    check::that(same, std::string(name_of(k.isa)) + " nt_few: bits depend on a token's place");
}

// Segments of which two share W and one has its own, as the halves of an operand do: blocks, or gathered rows from column
// 32 on.
void nn_segments(const Kernels& k, check::Random& random, int rows, bool gathered) {
    constexpr int width = 4 * kBlock;
    const std::vector<int> lengths = {10, 10, 3};
    const int padded = (rows + 15) / 16 * 16;
    std::vector<std::vector<bf16>> g, w;
    for (const int length : lengths) {
        g.push_back(random.bf16s(std::size_t(padded) * length * kBlock, 1));
        w.push_back(random.bf16s(std::size_t(length) * kBlock * width, 1));
    }
    // Padding: the last seven rows of the shared W.
    constexpr int idle_pairs = 3;
    for (int i = 10 * kBlock - 7; i < 10 * kBlock; ++i) {
        for (int cb = 0; cb < 4; ++cb)
            std::memset(w[0].data() + std::size_t(i / kBlock * 4 + cb) * kBlockSize + i % kBlock * kBlock, 0, 64);
    }
    w[1] = w[0];
    // The same values as rows of 32 and 128 columns.
    std::vector<std::vector<bf16>> natural(lengths.size());
    std::vector<std::vector<const bf16*>> pointers(lengths.size());
    std::vector<NnSegment> segments;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
        const std::size_t from = s == 1 ? 0 : s, ld = std::size_t(lengths[s]) * kBlock;
        if (s == from) natural[s].resize(ld * (kBlock + width));
        for (std::size_t i = 0; i < ld; ++i) {
            bf16* row = natural[from].data() + i * (kBlock + width);
            pointers[s].push_back(row);
            for (int col = 0; col < width; ++col) {
                const std::size_t block = (i / kBlock * 4 + std::size_t(col) / kBlock) * kBlockSize;
                row[kBlock + col] = w[s][block + i % kBlock * kBlock + std::size_t(col % kBlock)];
            }
        }
        NnSegment segment{g[s].data(), ld, w[from].data(), 4 * kBlockSize, nullptr, 0, lengths[s]};
        if (gathered) segment = {g[s].data(), ld, nullptr, 0, pointers[from].data(), kBlock, lengths[s]};
        if (lengths[s] == 10) segment.idle_pairs = idle_pairs;
        segments.push_back(segment);
    }
    std::vector<float> c(std::size_t(padded) * width);
    k.enter();
    k.nn(segments.data(), int(segments.size()), rows, 4, c.data(), width);
    k.leave();
    std::vector<double> got, expected;
    for (int row = 0; row < rows; ++row) {
        for (int col = 0; col < width; ++col) {
            double sum = 0;
            for (std::size_t s = 0; s < lengths.size(); ++s) {
                for (int i = 0; i < lengths[s] * kBlock; ++i) {
                    const std::size_t block = std::size_t(i / kBlock * 4 + col / kBlock) * kBlockSize;
                    sum += double(to_float(g[s][std::size_t(row) * segments[s].ld + i])) *
                           double(to_float(w[s][block + i % kBlock * kBlock + std::size_t(col % kBlock)]));
                }
            }
            expected.push_back(sum);
            got.push_back(c[std::size_t(row) * width + std::size_t(col)]);
        }
    }
    check::that(check::rel_l2(got, expected) < kSumError, std::string(name_of(k.isa)) + " nn of three segments, rows=" +
                                                              std::to_string(rows) + (gathered ? " gathered" : ""));
}

void nn(const Kernels& k, check::Random& random, int rows, int kblocks, int cblocks, bool gathered) {
    const int padded = (rows + 15) / 16 * 16, width = 4 * kBlock;
    const std::size_t ld = std::size_t(kblocks) * kBlock;
    const auto g = random.bf16s(padded * ld, 1);
    const auto w = random.bf16s(ld * std::size_t(width), 1);  // as blocks [kblocks][4], or as rows of 128
    std::vector<const bf16*> pointers;
    for (std::size_t i = 0; i < ld; ++i) pointers.push_back(w.data() + i * std::size_t(width));
    NnSegment segment{g.data(), ld, gathered ? nullptr : w.data(), 4 * kBlockSize, pointers.data(), 0, kblocks};
    const std::size_t ldc = std::size_t(width);
    std::vector<float> c(padded * ldc + 16, kGuard);
    k.enter();
    k.nn(&segment, 1, rows, cblocks, c.data(), ldc);
    k.leave();
    std::vector<double> got, expected;
    for (int row = 0; row < rows; ++row) {
        for (int col = 0; col < cblocks * kBlock; ++col) {
            double sum = 0;
            for (std::size_t i = 0; i < ld; ++i) {
                const std::size_t block = (i / kBlock * 4 + std::size_t(col) / kBlock) * kBlockSize;
                const bf16 value =
                    gathered ? pointers[i][col] : w[block + i % kBlock * kBlock + std::size_t(col % kBlock)];
                sum += double(to_float(g[row * ld + i])) * double(to_float(value));
            }
            expected.push_back(sum);
            got.push_back(c[row * ldc + std::size_t(col)]);
        }
    }
    const std::string what = std::string(name_of(k.isa)) + " nn rows=" + std::to_string(rows) +
                             " kblocks=" + std::to_string(kblocks) + " cblocks=" + std::to_string(cblocks) +
                             (gathered ? " gathered" : "");
    check::that(c[padded * ldc] == kGuard, what + ": wrote beyond its result");
    if (cblocks < 4) check::that(c[ldc - 1] == kGuard, what + ": wrote beyond its columns");
    check::that(check::rel_l2(got, expected) < kSumError, what);
}

// Of two groups, or of few tokens.
void activation(const Kernels& k, check::Random& random, int few) {
    constexpr int groups = 2;
    const int tokens = few > 0 ? few : groups * kGroup;
    std::vector<float> g(std::size_t(kBlock * tokens)), u(g);
    for (auto& v : g) v = 120.0f * random.uniform();
    for (auto& v : u) v = random.uniform();
    g[0] = 0.0f;
    g[1] = 32.0f;
    g[2] = -110.0f;
    g[3] = -3e38f;
    g[4] = NAN;
    std::vector<bf16> pack(std::size_t(tokens * kBlock) + 1, 7);
    struct alignas(64) CacheLine {
        float lanes[16];
    };
    // a guard before and behind: what is streamed, the sanitizers do not see
    CacheLine guard;
    std::fill(std::begin(guard.lanes), std::end(guard.lanes), kGuard);
    std::vector<CacheLine> kept_g(g.size() / 16 + 2, guard), kept_u(kept_g);
    const auto floats = [](std::vector<CacheLine>& lines) { return reinterpret_cast<float*>(lines.data() + 1); };
    float *const keep_g = floats(kept_g), *const keep_u = floats(kept_u);
    const auto without = [&](float* keep) {
        if (few > 0) k.silu_mul_few(g.data(), u.data(), few, pack.data(), keep, keep, kBlock);
        else k.silu_mul(g.data(), u.data(), std::size_t(tokens), groups, pack.data(), kPackSize, keep, keep, kBlock);
    };
    without(nullptr);
    const auto alone = pack;
    if (few > 0) {
        k.silu_mul_few(g.data(), u.data(), few, pack.data(), keep_g, keep_u, kBlock);
    } else {
        k.silu_mul(g.data(), u.data(), std::size_t(tokens), groups, pack.data(), kPackSize, keep_g, keep_u, kBlock);
    }
    bool kept = true, right = true;
    for (int n = 0; n < kBlock; ++n) {
        for (int t = 0; t < tokens; ++t) {
            const auto from = std::size_t(few > 0 ? t * kBlock + n : n * tokens + t), to = std::size_t(t * kBlock + n);
            const float gate = g[from], up = u[from], was = keep_g[to];
            kept &= (std::isnan(gate) ? std::isnan(was) : was == gate) && keep_u[to] == up;
            const bf16* group = pack.data() + std::size_t(t / kGroup) * kPackSize;
            const int at = few > 0 ? t * kBlock + n : (n / 2 * kGroup + t % kGroup) * 2 + n % 2;
            const float h = to_float(group[at]);
            const double expected = gate / (1 + std::exp(-double(gate))) * up;
            right &= std::isnan(gate) ? std::isnan(h) : std::abs(h - expected) <= 0.004 * std::abs(expected) + 1e-35;
        }
    }
    for (const auto* lines : {&kept_g, &kept_u})
        kept &= lines->front().lanes[15] == kGuard && lines->back().lanes[0] == kGuard;
    check::that(kept, std::string(name_of(k.isa)) + " silu_mul keeps g and u");
    check::that(pack == alone, std::string(name_of(k.isa)) + " silu_mul that keeps nothing");
    check::that(pack.back() == 7, std::string(name_of(k.isa)) + " silu_mul: wrote beyond its result");
    check::that(right, std::string(name_of(k.isa)) + " silu_mul");
}

void turn(const Kernels& k, int rows, int cols) {
    constexpr std::size_t ldc = 128;
    std::vector<float> c(std::size_t((rows + 15) / 16 * 16) * ldc), out(std::size_t(rows) * cols + 1, kGuard);
    for (std::size_t i = 0; i < c.size(); ++i) c[i] = float(i);
    k.turn(c.data(), ldc, rows, cols, out.data());
    bool right = out.back() == kGuard;
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < cols; ++j) right = right && out[std::size_t(j) * rows + i] == c[i * ldc + j];
    }
    check::that(right, std::string(name_of(k.isa)) + " turn " + std::to_string(rows) + " x " + std::to_string(cols));
}

}  // namespace

int main() {
    coming_weights();
    if (!why_not(Isa::amx_bf16).empty() && emulation::amx_trap_install()) set_amx_emulation(true);
    for (const Isa isa : available_isas()) {
        const Kernels& k = kernels_for(isa);
        check::Random random(7);
        for (int tokens = 1; tokens <= 9 * kGroup; ++tokens) nt(k, random, tokens, {3});
        nt(k, random, kChunkRows, {17});
        nt(k, random, 37, {2, 2, 2, 2});
        for (const int tokens : {1, 19, 40}) nt(k, random, tokens, {17, 1, 2});
        for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 16, 17, 31, 33, 48, 64, 65})
            nn(k, random, rows, 2, 2, false);
        nn(k, random, 40, 19, 4, false);
        nn(k, random, 7, 9, 1, true);
        nn(k, random, 32, 3, 3, true);
        for (const int rows : {1, 8, 16, 17, 32, 40}) {
            for (const int cols : {1, 15, 16, 100, 128}) turn(k, rows, cols);
        }
        for (const int few : {0, 1, 7, std::max(k.few_rows, 10)}) activation(k, random, few);
        nt_in_any_place(k, random);
        few_in_any_place(k, random);
        for (const int rows : {3, 8, 16, 21}) {
            for (const bool gathered : {false, true}) nn_segments(k, random, rows, gathered);
        }
        for (int rows = 1; rows <= k.few_rows; ++rows) {
            for (const int kblocks : {1, 2, 3, 4, 5, 8, 9, 17}) nt_few(k, random, rows, kblocks);
        }
    }
    return check::finish();
}
