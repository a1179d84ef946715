// Times one kernel of an instruction set alone, for `python -m ktverify bench kernels`: with weights that no cache holds, as
// in a layer. No layer uses it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.hpp"
#include "memory.hpp"

namespace ktv {

// nt: [rows, K] times W [N, K], as the forward; nn: [rows, K] times W [K, N], as the backward.
enum class Product { nt, nn };

class Products {
  public:
    static constexpr int kMostTokens = 1 << 16;
    struct Sizes {
        Product product;
        int rows;      // 1 to kMostTokens; by more than the kernels' most_rows in several calls, as in a layer
        int n, k;      // multiples of 32
        int matrices;  // that one call multiplies, one after the other
        bool check;    // also computes Timed::bits, within the time
    };
    struct Timed {
        double seconds;
        double bytes, flops;  // of W read; of the rows, without padding
        std::uint64_t bits;   // of all results, with check: equal where two kernels compute the same
    };
    // Fills `bytes` of weights; OutOfMemory where there is not enough.
    Products(int threads, std::size_t bytes);
    // Multiplies the weights of a window, which begins where window - 1 ends and wraps around. BadInput for sizes that do
    // not fit. The kernels must be able to run here.
    Timed time(const Kernels& kernels, const Sizes& sizes, std::size_t window);

  private:
    const int threads_;
    Block weights_;
};

}  // namespace ktv
