// Everything between two matrix products, written once with the compiler's vector types and compiled once for each
// instruction set. Include it inside an unnamed namespace of a file that has its own -m flags. It uses no intrinsics and
// the same operations in the same order everywhere, so that all instruction sets compute the same bits. A file may
// define KTV_STREAM(to, lanes), a store of a whole line past the caches; its Kernels::leave then waits for the stores.

#include "lanes.inl"

// Calls of the instruction sets that do not share a chunk of x among strips of W: one strip, one panel, and as many rows
// as the second-level cache holds with their results.
inline int one_strip(int) {
    return 1;
}
inline int one_panel(int) {
    return kPanelBlocks;
}
inline constexpr int kMostRows = 256;
#define KTV_SMALL_CALLS .strips = one_strip, .cblocks = one_panel, .most_rows = kMostRows

// What an instruction set does that has no state to enter or leave.
inline void nothing() {}

#ifndef KTV_STREAM
#define KTV_STREAM(to, lanes) store(to, lanes)
#endif

// bf16 in the low half of each lane. Nearest even; a NaN stays a quiet NaN. The same rounding as ktv::to_bf16.
KTV_INLINE U round_bf16(const F& v) {
    const U b = bits_as<std::uint32_t>(v);
    const U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const U nan = (b >> 16) | 0x40u;
    return select(greater(bits_as<std::int32_t>(b & 0x7fffffffu), 0x7f800000), nan, rounded);
}
KTV_INLINE void store_bf16(bf16* p, const F& v) {
    store_halves(p, round_bf16(v));
}
// Two rows of 16 values as 16 pairs: one row of a token pack.
KTV_INLINE void store_pairs(bf16* p, const F& even, const F& odd) {
    store(p, round_bf16(even) | (round_bf16(odd) << 16));
}

// exp(-|x|), to about 1 ulp; 0 where it would be subnormal; NaN stays NaN. Cody-Waite reduction by ln 2 in two parts,
// then the Taylor series, whose first omitted term is (ln2/2)^8/8! = 5e-9, below half an ulp.
KTV_INLINE F exp_of_minus_abs(const F& x) {
    const F a = bits_as<float>(bits_as<std::uint32_t>(x) & 0x7fffffffu);
    const S tiny = greater(a, 87.3f);
    const F y = -select(tiny, splat(87.3f), a);
    const F shifted = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
    const F n = shifted - 12582912.0f;
    const F r = (y - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    F p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const S exponent = (bits_as<std::int32_t>(shifted) - (0x4b400000 - 127)) << 23;
    return select(tiny, F{}, p * bits_as<float>(exponent));
}

struct Sigmoid {
    F value, complement;  // sigma(x) and 1 - sigma(x), each to full relative precision
};
KTV_INLINE Sigmoid sigmoid(const F& x) {
    const F z = exp_of_minus_abs(x);
    const F p = splat(1.0f) / (z + 1.0f);
    const F q = z * p;
    const S positive = greater(bits_as<std::int32_t>(x), -1);
    return {select(positive, p, q), select(positive, q, p)};
}

KTV_INLINE void load_transposed(const float* c, std::size_t ldc, F (&m)[16]) {
    for (int i = 0; i < 16; ++i) m[i] = load(c + i * ldc);
    transpose_16x16(m);
}

void pack_tokens(const bf16* const* rows, int k, int kblocks, bf16* pack) {
    // A k-pair is one 32-bit unit, so that packing is a 16 x 16 transpose of units: [token][pair] -> [pair][token].
    for (int kb = 0; kb < kblocks; ++kb) {
        F unit[16];
        const int have = k - kb * kBlock;
        for (int t = 0; t < 16; ++t) {
            if (!rows[t]) {
                unit[t] = F{};
            } else if (have >= kBlock) {
                unit[t] = load(rows[t] + kb * kBlock);
            } else {
                bf16 padded[kBlock] = {};
                __builtin_memcpy(padded, rows[t] + kb * kBlock, sizeof(bf16) * static_cast<std::size_t>(have));
                unit[t] = load(padded);
            }
        }
        transpose_16x16(unit);
        for (int pair = 0; pair < 16; ++pair) store(pack + kb * kPackSize + pair * 2 * kGroup, unit[pair]);
    }
}

KTV_INLINE F silu_times(const float* g, const float* u) {
    const F gate = load(g);
    return gate * sigmoid(gate).value * load(u);
}

void silu_mul(const float* g, const float* u, int groups, bf16* pack, std::size_t group_stride, float* keep_g,
              float* keep_u, std::size_t keep_ld) {
    for (int group = 0; group < groups; ++group, g += kResultSize, u += kResultSize) {
        for (int n = 0; n < kBlock; n += 2) {
            F h[2];
            for (int i = 0; i < 2; ++i) h[i] = silu_times(g + (n + i) * kGroup, u + (n + i) * kGroup);
            store_pairs(pack + group * group_stride + n * kGroup, h[0], h[1]);
        }
        if (!keep_g) continue;
        // Past the caches, because a layer or a whole model passes through them before backward reads g and u.
        for (int half = 0; half < kBlock; half += 16) {
            F m[16];
            load_transposed(g + half * kGroup, kGroup, m);
            for (int t = 0; t < 16; ++t) KTV_STREAM(keep_g + (group * kGroup + t) * keep_ld + half, m[t]);
            load_transposed(u + half * kGroup, kGroup, m);
            for (int t = 0; t < 16; ++t) KTV_STREAM(keep_u + (group * kGroup + t) * keep_ld + half, m[t]);
        }
    }
}

void silu_mul_few(const float* g, const float* u, int tokens, bf16* pack, float* keep_g, float* keep_u,
                  std::size_t keep_ld) {
    for (int t = 0; t < tokens; ++t) {
        for (int n = t * kBlock; n < (t + 1) * kBlock; n += 16) store_bf16(pack + n, silu_times(g + n, u + n));
        if (!keep_g) continue;
        __builtin_memcpy(keep_g + t * keep_ld, g + t * kBlock, kBlock * sizeof *g);
        __builtin_memcpy(keep_u + t * keep_ld, u + t * kBlock, kBlock * sizeof *u);
    }
}

// Column col, a multiple of 16, of a row of an nn result.
KTV_INLINE const float* in_nn(const float* c, std::size_t stride, int row, int col) {
    return c + col / kBlock * stride + row * kBlock + col % kBlock;
}

// Rows of g, u and the results that silu_mul_grad prefetches ahead. Of each row it has only some lines, a page or more
// from those of the next, and they are in no cache: the processor itself does not prefetch them. On an Intel Xeon, built
// for AVX-512, one thread, 8192 rows of 2048, ns an element: 4.0 without, 2.0 to 2.4 with 2 or 4 rows, 2.1 to 2.8 with 8.
constexpr int kGradAhead = 4;

void silu_mul_grad(const float* c, std::size_t stride, int rows, int cblocks, const float* weight, const float* g,
                   const float* u, std::size_t ld, bf16* grad_g, bf16* grad_u, bf16* h, float* dot) {
    const std::size_t ahead = kGradAhead * ld;
    for (int row = 0; row < rows; ++row) {
        F sum{};
        const F w = splat(weight[row]);
        const bool prefetches = row + kGradAhead < rows;
        for (int col = 0; col < cblocks * kBlock; col += 16) {
            const std::size_t at = row * ld + col;
            if (prefetches) {
                __builtin_prefetch(g + at + ahead);
                __builtin_prefetch(u + at + ahead);
                if (col % kBlock == 0) {
                    __builtin_prefetch(h + at + ahead, 1);
                    __builtin_prefetch(grad_u + at + ahead, 1);
                    __builtin_prefetch(grad_g + at + ahead, 1);
                }
            }
            const F gate = load(g + at), up = load(u + at), unweighted = load(in_nn(c, stride, row, col));
            const Sigmoid s = sigmoid(gate);
            const F silu = gate * s.value;
            const F hidden = silu * up;
            const F dh = w * unweighted;
            sum += unweighted * hidden;
            store_bf16(h + at, hidden);
            store_bf16(grad_u + at, dh * silu);
            store_bf16(grad_g + at, dh * up * (s.value * (gate * s.complement + 1.0f)));
        }
        dot[row] = sum_of_lanes(sum);
    }
}

void add_transposed(const float* c, int rows, const std::int32_t* token, const float* weight, float* sum,
                    std::size_t ld) {
    for (int first = 0; first < rows; first += kGroup, c += kResultSize) {
        const int count = rows - first < kGroup ? rows - first : kGroup;
        for (int half = 0; half < kBlock; half += 16) {
            F m[16];
            load_transposed(c + half * kGroup, kGroup, m);
            for (int t = 0; t < count; ++t) {
                float* out = sum + token[first + t] * ld + half;
                store(out, load(out) + splat(weight[first + t]) * m[t]);
            }
        }
    }
}

void add_rows(const float* c, std::size_t stride, int rows, int cblocks, const std::int32_t* token, const float* weight,
              float* sum, std::size_t ld) {
    // Rows of the sum, which is in no near cache where there are many tokens. On the same Xeon 0.35 to 0.50 ns an element
    // with 1024 and 4096 tokens, 0.37 to 0.75 without.
    constexpr int ahead = 2;
    for (int row = 0; row < rows; ++row) {
        float* out = sum + token[row] * ld;
        const float* after = sum + token[row + ahead < rows ? row + ahead : row] * ld;
        const F w = splat(weight ? weight[row] : 1.0f);
        for (int col = 0; col < cblocks * kBlock; col += 16) {
            __builtin_prefetch(after + col, 1);
            store(out + col, load(out + col) + w * load(in_nn(c, stride, row, col)));
        }
    }
}

void round_sum(const float* const* in, int parts, std::size_t count, bf16* out) {
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        F v = load(in[0] + i);
        for (int p = 1; p < parts; ++p) v += load(in[p] + i);
        store_bf16(out + i, v);
    }
    for (; i < count; ++i) {
        float v = in[0][i];
        for (int p = 1; p < parts; ++p) v += in[p][i];
        out[i] = to_bf16(v);
    }
}

void transpose(const float* c, std::size_t stride, int rows, int cols, float* out) {
    const std::size_t ld = static_cast<std::size_t>(rows);
    for (int col = 0; col < cols; col += 16) {
        const int width = cols - col < 16 ? cols - col : 16;
        for (int row = 0; row < rows; row += 16) {
            F m[16];
            load_transposed(in_nn(c, stride, row, col), kBlock, m);
            float* to = out + col * ld + row;
            if (rows - row >= 16) {
                for (int i = 0; i < width; ++i) store(to + i * ld, m[i]);
            } else {
                for (int i = 0; i < width; ++i) __builtin_memcpy(to + i * ld, &m[i], (rows - row) * sizeof(float));
            }
        }
    }
}

using W = std::uint64_t __attribute__((vector_size(32)));
KTV_INLINE W load_words(const void* p) {
    W v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
KTV_INLINE W mixed(W v) {
    return (v ^ (v >> 47)) * 0x9e3779b1u;
}

void fingerprint(const std::uint8_t* data, std::size_t bytes, std::uint64_t* state) {
    constexpr std::size_t kStripe = 2 * sizeof(W);
    W plain[2] = {}, product[2] = {};
    const auto absorb = [&](const std::uint8_t* stripe, const std::uint64_t* key) {
        for (int half = 0; half < 2; ++half) {
            const W words = load_words(stripe + half * sizeof(W)), keyed = words ^ load_words(key + half * 4);
            plain[half] += words;
            product[half] += (keyed & 0xffffffffu) * (keyed >> 32);
        }
    };
    const auto mix = [&] {
        for (int half = 0; half < 2; ++half) {
            plain[half] = mixed(plain[half] ^ product[half]);
            product[half] = mixed(product[half] + plain[half]);
        }
    };
    std::size_t at = 0;
    for (; at + kFingerprintStripes * kStripe <= bytes; mix()) {
        for (int n = 0; n < kFingerprintStripes; ++n, at += kStripe) {
            // half a page ahead, because the processor's own prefetcher stops at the end of a page
            __builtin_prefetch(data + at + 2048);
            absorb(data + at, kFingerprintKeys[n]);
        }
    }
    for (int n = 0; at < bytes; ++n, at += kStripe) {
        std::uint8_t last[kStripe] = {};
        __builtin_memcpy(last, data + at, bytes - at < kStripe ? bytes - at : kStripe);
        absorb(last, kFingerprintKeys[n]);
    }
    mix();
    __builtin_memcpy(state, plain, sizeof plain);
    __builtin_memcpy(state + 8, product, sizeof product);
}

#include "unpack.inl"

// The initialisers of these functions in a table of Kernels.
#define KTV_ELEMENTWISE                                                                                             \
    .pack_tokens = pack_tokens, .silu_mul = silu_mul, .silu_mul_few = silu_mul_few, .silu_mul_grad = silu_mul_grad, \
    .add_transposed = add_transposed, .add_rows = add_rows, .round_sum = round_sum, .transpose = transpose,         \
    .fingerprint = fingerprint, .unpack = {unpack_fp8, unpack_int8, unpack_int4, unpack_mxfp4}
