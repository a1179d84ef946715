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

std::uint64_t bits_of(const float* values, std::size_t count) {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum = sum * 31 + std::bit_cast<std::uint32_t>(values[i]);
    return sum;
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

    void nt(int matrix_index, int first, int strips) {
        const int kblocks = sizes.k / kBlock;
        const std::size_t panel = kblocks * kBlockSize;
        NtSegment segments[kMostStrips];
        for (int i = 0; i < strips; ++i) {
            const bf16* w = weights + matrix_index * matrix() + (first + i) * panel;
            segments[i] = {w, rows + matrix_index * rows_size, kblocks * kPackSize, kblocks, w + strips * panel};
        }
        const int groups = (sizes.rows + kGroup - 1) / kGroup;
        if (sizes.rows <= kernels.few_rows) {
            kernels.nt_few(segments, 1, strips, sizes.rows, c);
            bits = bits_of(c, static_cast<std::size_t>(strips) * sizes.rows * kBlock);
        } else {
            kernels.nt(segments, 1, strips, sizes.rows, c);
            bits = 0;
            for (int i = 0; i < strips * groups * kBlock;
                 ++i) {  // the tokens that there are, of each row of each group
                const int tokens = std::min(kGroup, sizes.rows - i / kBlock % groups * kGroup);
                bits = bits * 31 + bits_of(c + i * kGroup, tokens);
            }
        }
    }
    void nn(int matrix_index, int first, int cblocks) {
        NnSegment segment{};
        segment.rows = rows + matrix_index * rows_size;
        segment.ld = sizes.k + kBlock;
        segment.weights = weights + matrix_index * matrix() + first * kBlockSize;
        segment.kblock_stride = sizes.n / kBlock * kBlockSize;
        segment.kblocks = sizes.k / kBlock;
        kernels.nn(&segment, 1, sizes.rows, cblocks, c);
        bits = 0;
        for (int cb = 0; cb < cblocks; ++cb)
            bits = bits * 31 + bits_of(c + cb * nn_stride(sizes.rows), static_cast<std::size_t>(sizes.rows) * kBlock);
    }
    // Neighbouring pieces of every matrix, as a worker's lane.
    void share(int worker, int workers) {
        const bool forward = sizes.product == Product::nt;
        const int width = forward ? kernels.strips(sizes.rows) : kernels.cblocks(sizes.rows), all = sizes.n / kBlock,
                  pieces = (all + width - 1) / width;
        for (int m = 0; m < sizes.matrices; ++m) {
            for (int piece = worker * pieces / workers; piece < (worker + 1) * pieces / workers; ++piece) {
                const int first = piece * width, count = std::min(width, all - first);
                forward ? nt(m, first, count) : nn(m, first, count);
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
    if (sizes.rows < 1 || sizes.rows > kernels.most_rows || used == 0 || sizes.n % kBlock != 0 ||
        sizes.k % kBlock != 0 || used + kBlockSize > all)
        throw BadInput("a product of " + std::to_string(sizes.rows) + " rows with " + std::to_string(sizes.matrices) +
                       " matrices of " + std::to_string(sizes.n) + " x " + std::to_string(sizes.k) +
                       "; it takes 1 to " + std::to_string(kernels.most_rows) +
                       " rows, multiples of 32, and at most the weights that there are");
    // rows of any layout, and a cache line more than a row of nn
    const std::size_t padded = (sizes.rows + kGroup - 1) / kGroup * kGroup, rows_size = padded * (sizes.k + kBlock);
    const Block rows(rows_size * sizes.matrices * sizeof(bf16));
    fill(reinterpret_cast<bf16*>(rows.data()), rows.size() / sizeof(bf16));
    const std::size_t scratch =
        nn_stride(sizes.rows) * std::max(kernels.strips(sizes.rows), kernels.cblocks(sizes.rows));
    const Block results(threads_ * scratch * sizeof(float));
    const std::size_t blocks = (all - used) / kBlockSize, first = window * (used / kBlockSize) % blocks * kBlockSize;
    std::vector<std::uint64_t> bits(threads_ * 8);

    const std::lock_guard lock(process().mutex);
    Team& team = process().team(threads_, 1);
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
    for (const std::uint64_t one : bits) sum = sum * 31 + one;
    return {took, static_cast<double>(used * sizeof(bf16)), 2.0 * sizes.rows * static_cast<double>(used), sum};
}

}  // namespace ktv
