// Blocks of codes whose rows become fp32, as wide_rows.inl has them. e4m3 is widened from bf16; int8 is computed; a row of
// 4-bit codes has a table of sixteen fp32, which a shuffle of lanes looks up.

struct Fp8Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const ByteTable* table;
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_bytes(n); }
    KTV_INLINE TwoRows rows(int n) const {
        const Bf16Rows two = fp8_rows(codes + n * kBlock, *table);
        return {{{even(two.first), odd(two.first)}, {even(two.second), odd(two.second)}}};
    }
};

// A product a of code and scale is rounded to bf16 as 65536 a - 65535 a: the second term is rounded where bf16 ends, to
// even. The code of an even column is 2^24 times as large.
struct Int8Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const float* scales;  // of rows
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_bytes(n); }
    KTV_INLINE TwoRows rows(int n) const {
        TwoRows two;
        for (int i = 0; i < 2; ++i) {
            const S pairs{(S::Part)_mm512_maskz_cvtepi16_epi32(
                0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + (n + i) * kBlock)))};
            const __m512 scale = _mm512_set1_ps(scales[n + i]);
            for (int o = 0; o < 2; ++o) {
                const S code = o == 0 ? pairs << 24 : pairs >> 8;
                const __m512 product = (__m512) __builtin_convertvector(code.part[0], F::Part) * scale;
                const float unit = o == 0 ? 0x1p-24f : 1;
                two.at[i][o] =
                    _mm512_fmadd_ps(product, _mm512_set1_ps(65536 * unit), product * _mm512_set1_ps(-65535 * unit));
            }
        }
        return two;
    }
};

// 2^(code - 127) by code, and `zero` for 0.
constexpr std::array<float, 256> powers(float zero) {
    std::array<float, 256> all{};
    all[0] = zero;
    for (std::uint32_t e = 1; e < 255; ++e) all[e] = __builtin_bit_cast(float, e << 23);
    return all;
}
alignas(64) inline constexpr auto kProducts = products_of<-8, 16>();
alignas(64) inline constexpr auto kProductsOfAny = products_of<-15, 32>();  // of codes less any zero point
inline constexpr std::array<float, 256> kPowers = powers(0), kE8m0 = powers(0x1p-127f);

// Two rows of 4-bit codes, of a table each.
KTV_INLINE TwoRows look_up_halves(const std::uint8_t* codes, __m512 first, __m512 second) {
    TwoRows two;
    for (int i = 0; i < 2; ++i) {
        const __m512i both = _mm512_maskz_cvtepu8_epi32(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i * kBlock / 2)));
        const __m512 table = i == 0 ? first : second;
        two.at[i][0] = _mm512_maskz_permutexvar_ps(0xffff, both, table);
        two.at[i][1] = _mm512_maskz_permutexvar_ps(0xffff, (__m512i)((U::Part)both >> 4), table);
    }
    return two;
}

template <bool with_zeros>
struct Int4Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const bf16* scales;
    const std::int8_t* zeros;
    Int4Block() = default;
    Int4Block(const std::uint8_t* at, const CodesAhead& ahead, const bf16* of, const std::int8_t* points, RowFacts&)
        : codes(at), later(ahead), scales(of), zeros(points) {}
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_halves(n); }
    KTV_INLINE __m512 table(int n) const {
        const std::uint32_t scale = scales[n];
        const float* products;  // of code 0 and more
        if constexpr (with_zeros) products = kProductsOfAny[scale & 127].data() + 7 - zeros[n];
        else products = kProducts[scale & 127].data();
        return _mm512_loadu_ps(products) * _mm512_set1_ps(kPowers[scale >> 7]);
    }
    KTV_INLINE TwoRows rows(int n) const { return look_up_halves(codes + n * kBlock / 2, table(n), table(n + 1)); }
};

struct Mxfp4Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const std::uint8_t* scales;  // e8m0
    static bool scales_are_plain(const std::uint8_t*) { return true; }
    Mxfp4Block() = default;
    Mxfp4Block(const std::uint8_t* at, const CodesAhead& ahead, const std::uint8_t* of, RowFacts&)
        : codes(at), later(ahead), scales(of) {}
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_halves(n); }
    KTV_INLINE __m512 table(int n) const {
        const __m512 all = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
        return all * _mm512_set1_ps(kE8m0[scales[n]]);
    }
    KTV_INLINE TwoRows rows(int n) const { return look_up_halves(codes + n * kBlock / 2, table(n), table(n + 1)); }
};

struct Fp32Kinds {
    using Fp8 = Fp8Block;
    using Int8 = Int8Block;
    template <bool with_zeros>
    using Int4 = Int4Block<with_zeros>;
    using Mxfp4 = Mxfp4Block;
    using Plain = PlainBlock;
    static constexpr bool int4_takes_0 = true;
    static bool decodes(Format format) { return format != Format::fp8 || __builtin_cpu_supports("avx512vbmi"); }
};
