// tdpbf16ps, as a function and as an instruction, against an oracle in integer arithmetic.
// The checks are also valid on a CPU with AMX: there they test the oracle.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "amx_trap_data.hpp"

void check_bf16() {
    Random random{4};
    for (const Data data :
         {Data::integer, Data::gaussian, Data::wide, Data::tiny, Data::huge, Data::special, Data::bits}) {
        const char* name = kDataNames[static_cast<int>(data)];
        for (unsigned trial = 0; trial < 40; ++trial) {
            Shape shape{16, 16, 16};
            if (trial % 2) shape = {1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
            Tile dest, a, b;
            fill_dest(dest, data, random);
            fill(a, data, random);
            fill(b, data, random);
            const Tile expected = oracle_bf16(dest, a, b, shape);
            for (const Path path : kPaths) {
                if (!path_available(path)) continue;
                Tile actual = dest;
                const unsigned mxcsr = 0x1f80 | (static_cast<unsigned>(random()) & 0xe040);
                _mm_setcsr(mxcsr);
                tdpbf16ps(actual, a, b, shape, path);
                const bool untouched = _mm_getcsr() == mxcsr;
                _mm_setcsr(0x1f80);
                check(untouched, "%s changes MXCSR", kPathNames[static_cast<int>(path)]);
                check(same(actual, expected, false), "%s on %s, %u x %u x %u", kPathNames[static_cast<int>(path)], name,
                      shape.rows, shape.depth, shape.columns);
            }
            Tile actual = dest;
            _mm_setcsr(0x1f80 | (static_cast<unsigned>(random()) & 0xe040));
            multiply_in_tiles(product_bf16, actual, a, b, shape);
            _mm_setcsr(0x1f80);
            for (unsigned i = 0; i < 256; ++i) {  // elements that the store did not write
                if (i / 16 >= shape.rows || i % 16 >= shape.columns) set_element(actual, i / 16, i % 16, 0);
            }
            check(same(actual, expected), "tdpbf16ps on %s, %u x %u x %u", name, shape.rows, shape.depth,
                  shape.columns);

            if (data == Data::integer || data == Data::gaussian) {  // also the oracle against fp64
                double worst = 0;
                for (unsigned m = 0; m < shape.rows; ++m) {
                    for (unsigned n = 0; n < shape.columns; ++n) {
                        double sum = std::bit_cast<float>(element(dest, m, n)), size = std::fabs(sum);
                        for (unsigned k = 0; k < shape.depth; ++k) {
                            for (const unsigned half : {16u, 0u}) {
                                const double product =
                                    double{std::bit_cast<float>(element(a, m, k) << half & 0xffff0000)} *
                                    std::bit_cast<float>(element(b, k, n) << half & 0xffff0000);
                                sum += product;
                                size += std::fabs(product);
                            }
                        }
                        const double error = std::fabs(std::bit_cast<float>(element(expected, m, n)) - sum);
                        worst = std::max(worst, error / (size + 1e-30));
                    }
                }
                check(worst <= (data == Data::integer ? 0 : 19 * 0x1p-24), "the oracle on %s is %g off fp64", name,
                      worst);
            }
        }
    }

    // Every tile as destination, left and right operand.
    for (unsigned dest = 0; dest < 8; ++dest) {
        for (unsigned left = 0; left < 8; ++left) {
            for (unsigned right = 0; right < 8; ++right) {
                if (dest == left || dest == right || left == right) continue;
                const Shape shape{1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
                Tile c{}, a, b;
                fill(a, Data::integer, random);
                fill(b, Data::integer, random);
                Tile actual = c;
                multiply_in_tiles(product_bf16, actual, a, b, shape, dest, left, right);
                check(same(actual, oracle_bf16(c, a, b, shape)), "tdpbf16ps tmm%u, tmm%u, tmm%u", dest, left, right);
            }
        }
    }
}

int main() {
    begin();
    check_bf16();
    Random random{8};
    for (unsigned trial = 0; trial < 20; ++trial)
        check(matmul_is_right(random), "a 32 x 32 x 96 product by intrinsics");
    return finish_amx();
}
