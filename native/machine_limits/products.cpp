#include "products.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "ktv/errors.hpp"
#include "process.hpp"

namespace ktv {
namespace {

using Clock = std::chrono::steady_clock;

// bf16 values of about 1/16, all different in a block, so that results depend on the order of sums.
void fill(bf16* to, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] = to_bf16(0.0625f + 0.0001f * static_cast<float>(i % 997));
}

// One value of a result and its place, as a term of a sum that does not depend on the order of the calls.
std::uint64_t bits_at(std::size_t place, float value) {
    std::uint64_t z = place * 0x9e3779b97f4a7c15 + std::bit_cast<std::uint32_t>(value);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    return z ^ (z >> 27);
}

// One call's operands, and the worker's share of its products.
struct Call {
    const Kernels& kernels;
    const Products::Sizes& sizes;
    const bf16* weights;
    const bf16* rows;  // of the first matrix
    std::size_t rows_size;
    float* c;
    std::uint64_t bits = 0;

    std::size_t matrix() const { return static_cast<std::size_t>(sizes.n) * sizes.k; }
    void add_bits(int m, int n, int row, float value) {
        bits += bits_at((static_cast<std::size_t>(m) * sizes.n + n) * sizes.rows + row, value);
    }

    // Strips first to first + count of matrix m, by `tokens` rows from `row` on.
    void nt(int m, int first, int count, int batch, int row, int tokens) {
        const int kblocks = sizes.k / kBlock;
        const std::size_t panel = kblocks * kBlockSize;
        const bf16* w = weights + m * matrix() + first * panel;
        const bool few = sizes.rows <= kernels.few_rows;
        NtSegment segments[kMostStrips];
        const std::size_t group_stride = kblocks * kPackSize;
        const bf16* x = rows + m * rows_size + row / kGroup * group_stride;
        const bool last = row + tokens == sizes.rows;
        for (int i = 0; i < count; ++i)
            segments[i] = {w + i * panel, x, group_stride, kblocks, w + ((last ? batch : 0) + i) * panel};
        (few ? kernels.nt_few : kernels.nt)(segments, 1, count, tokens, c);
        if (!sizes.check) return;
        const std::size_t result =
            few ? tokens * std::size_t{kBlock} : (tokens + kGroup - 1) / kGroup * std::size_t{kResultSize};
        for (int i = 0; i < count * kBlock; ++i) {
            const float* strip = c + i / kBlock * result;
            const int n = i % kBlock;
            for (int t = 0; t < tokens; ++t) {
                const float value =
                    few ? strip[t * kBlock + n] : strip[t / kGroup * kResultSize + n * kGroup + t % kGroup];
                add_bits(m, first * kBlock + i, row + t, value);
            }
        }
    }

    // Column blocks first to first + count of matrix m, by `count_rows` rows from `row` on.
    void nn(int m, int first, int count, int row, int count_rows) {
        const int blocks = sizes.n / kBlock;
        NnSegment segment{};
        segment.ld = sizes.k + kBlock;
        segment.rows = rows + m * rows_size + row * segment.ld;
        segment.weights = weights + m * matrix() + first * kBlockSize;
        segment.kblock_stride = blocks * kBlockSize;
        segment.kblocks = sizes.k / kBlock;
        if (row + count_rows < sizes.rows) {
            segment.next = segment.weights;
        } else if (first + 2 * count <= blocks) {
            segment.next = segment.weights + count * kBlockSize;
        }
        kernels.nn(&segment, 1, count_rows, count, c);
        if (!sizes.check) return;
        for (int i = 0; i < count * kBlock; ++i) {
            const float* block = c + i / kBlock * nn_stride(count_rows);
            for (int at = 0; at < count_rows; ++at)
                add_bits(m, first * kBlock + i, row + at, block[at * kBlock + i % kBlock]);
        }
    }
    // Neighbouring pieces of every matrix, as a worker's lane. A piece is multiplied by at most most_rows rows at once.
    void share(int worker, int workers) {
        const bool forward = sizes.product == Product::nt;
        const int most = forward ? kernels.strips(sizes.rows) : kernels.cblocks(sizes.rows), blocks = sizes.n / kBlock,
                  pieces = (blocks + most - 1) / most;
        for (int m = 0; m < sizes.matrices; ++m) {
            for (int piece = worker * pieces / workers; piece < (worker + 1) * pieces / workers; ++piece) {
                const int first = piece * most, count = std::min(most, blocks - first);
                for (int row = 0; row < sizes.rows; row += kernels.most_rows) {
                    const int at_once = std::min(kernels.most_rows, sizes.rows - row);
                    forward ? nt(m, first, count, most, row, at_once) : nn(m, first, count, row, at_once);
                }
            }
        }
    }
};

}  // namespace

Products::Products(int threads, std::size_t bytes)
    : threads_(std::clamp(threads, 1, allowed_processors())),
      weights_((require_memory({bytes, bytes}, "weights"), bytes)) {
    fill(reinterpret_cast<bf16*>(weights_.data()), bytes / sizeof(bf16));
}

Products::Timed Products::time(const Kernels& kernels, const Sizes& sizes, std::size_t window) {
    const std::size_t matrix = static_cast<std::size_t>(std::max(sizes.n, 0)) * std::max(sizes.k, 0);
    const std::size_t used = matrix * std::max(sizes.matrices, 0), all = weights_.size() / sizeof(bf16);
    if (sizes.rows < 1 || sizes.rows > kMostTokens || used == 0 || sizes.n % kBlock != 0 || sizes.k % kBlock != 0 ||
        used + kBlockSize > all)
        throw BadInput("a product of " + std::to_string(sizes.rows) + " rows with " + std::to_string(sizes.matrices) +
                       " matrices of " + std::to_string(sizes.n) + " x " + std::to_string(sizes.k) +
                       "; it takes 1 to " + std::to_string(kMostTokens) +
                       " rows, multiples of 32, and at most the weights that there are");
    // rows of any layout, and a cache line more than a row of nn
    const std::size_t padded = (sizes.rows + kGroup - 1) / kGroup * kGroup, rows_size = padded * (sizes.k + kBlock);
    const Block rows(rows_size * sizes.matrices * sizeof(bf16));
    fill(reinterpret_cast<bf16*>(rows.data()), rows.size() / sizeof(bf16));
    const std::size_t pieces = std::max(kMostStrips, kernels.cblocks(sizes.rows)),
                      scratch = pieces * nn_stride(std::min(sizes.rows, kernels.most_rows));
    const Block results(threads_ * scratch * sizeof(float));
    const std::size_t blocks = (all - used) / kBlockSize, first = window * (used / kBlockSize) % blocks * kBlockSize;
    std::vector<std::uint64_t> bits(threads_ * 8);

    const std::lock_guard lock(process().mutex);
    Team& team = process().team(threads_);
    team.run([](int) {});  // the workers are awake
    const auto start = Clock::now();
    team.run([&](int worker) {
        Call call{kernels,
                  sizes,
                  reinterpret_cast<const bf16*>(weights_.data()) + first,
                  reinterpret_cast<const bf16*>(rows.data()),
                  rows_size,
                  reinterpret_cast<float*>(results.data()) + worker * scratch};
        kernels.enter();
        call.share(worker, threads_);
        kernels.leave();
        bits[worker * 8] = call.bits;
    });
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    std::uint64_t sum = 0;
    for (const std::uint64_t one : bits) sum += one;
    return {took, static_cast<double>(used * sizeof(bf16)), 2.0 * sizes.rows * static_cast<double>(used), sum};
}

}  // namespace ktv
