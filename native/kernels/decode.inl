// Blocks of codes that are decoded in registers, as wide_rows.inl has them. A row of codes has a table: sixteen fp32 for 4
// bits, which a shuffle of lanes looks up; 128 bf16 for e4m3, as their low and their high bytes. int8 is computed.

// ---- 8 bits

using Words = std::uint16_t __attribute__((vector_size(64)));
// The low and the high bytes of the bf16 of 128 magnitudes of e4m3.
struct ByteTable {
    alignas(64) std::uint8_t low[128], high[128];
};
// bf16 in the upper half of each lane; of no NaN.
KTV_INLINE U rounded_up(const F& value) {
    const U b = bits_as<std::uint32_t>(value);
    return b + ((b >> 16) & 1u) + 0x7fffu;
}
// Of a scale that fp8_looks_up. An exponent adds the same to each product of it.
inline void make_fp8_table(float scale, ByteTable& to) {
    // of 0 to 7 without an exponent, of 8 to 15 with the exponent 1
    F multiples;
    for (int i = 0; i < 16; ++i) multiples.part[0][i] = static_cast<float>(i) * 0x1p-9f;
    const U products = rounded_up(multiples * scale);
    // words 2 i + 1 of the products: in the first 32 places all of them, then those of 8 to 15
    alignas(64) static constexpr auto places = [] {
        std::array<std::uint16_t, 64> all{};
        for (std::size_t i = 0; i < 64; ++i) all[i] = static_cast<std::uint16_t>(2 * (i < 8 ? i : 8 + i % 8) + 1);
        return all;
    }();
    alignas(64) static constexpr auto exponents = [] {  // less 1, at their place in bf16
        std::array<std::uint16_t, 128> all{};
        for (std::size_t i = 8; i < 128; ++i) all[i] = static_cast<std::uint16_t>((i / 8 - 1) << 7);
        return all;
    }();
    for (int i = 0; i < 4; ++i) {
        const __m512i all = (__m512i)products.part[0], place = _mm512_load_si512(places.data() + (i == 0 ? 0 : 32));
        const __m512i words = _mm512_add_epi16(_mm512_maskz_permutexvar_epi16(~0u, place, all),
                                               _mm512_load_si512(exponents.data() + 32 * i));
        const auto put = [&](std::uint8_t* bytes, __m512i from) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 32 * i), _mm512_maskz_cvtepi16_epi8(~0u, from));
        };
        put(to.low, words);
        put(to.high, (__m512i)((Words)words >> 8));
    }
}
// Bytes of a table by the codes' lower seven bits: two instructions of AVX-512 VBMI, as asm because this file is compiled
// without it. seventh: the codes with that bit.
KTV_INLINE __m512i look_up(const std::uint8_t* table, __m512i codes, __mmask64 seventh) {
    using Line = std::uint8_t __attribute__((may_alias, vector_size(64)));
    __m512i found;
    asm("vpermb %2, %1, %0" : "=v"(found) : "v"(codes), "m"(*reinterpret_cast<const Line*>(table)));
    asm("vpermb %3, %2, %0%{%1%}"
        : "+v"(found)
        : "Yk"(seventh), "v"(codes), "m"(*reinterpret_cast<const Line*>(table + 64)));
    return found;
}
struct Fp8Block {
    const std::uint8_t* codes;
    const ByteTable* table;
    const std::uint8_t* later;
    KTV_INLINE void prefetch_rows(int n) const { prefetch<2>(later + n * kBlock); }
    KTV_INLINE TwoRows rows(int n) const {
        // in each of four lanes eight codes of the first row, eight of the second
        const __m512i two = _mm512_maskz_permutexvar_epi64(0xff, _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                                                           _mm512_loadu_si512(codes + n * kBlock));
        const __mmask64 seventh = _mm512_test_epi8_mask(two, _mm512_set1_epi8(0x40));
        const __m512i low = look_up(table->low, two, seventh), high = look_up(table->high, two, seventh);
        // high | (two & 0x80)
        const __m512i with_sign = _mm512_ternarylogic_epi32(high, two, _mm512_set1_epi8(-128), 0xf8);
        const __m512i first = _mm512_unpacklo_epi8(low, with_sign), second = _mm512_unpackhi_epi8(low, with_sign);
        return {{{even(first), odd(first)}, {even(second), odd(second)}}};
    }
};

// A product a of code and scale is rounded to bf16 as 65536 a - 65535 a: the second term is rounded where bf16 ends, to
// even. The code of an even column is 2^24 times as large.
struct Int8Block {
    const std::uint8_t* codes;
    const float* scales;  // of rows
    const std::uint8_t* later;
    // Whether no step of that is subnormal or overflows, for 32 scales.
    static bool takes(const float* scales) {
        const auto fit = [&](int n) {
            const __m512 some = _mm512_loadu_ps(scales + n);
            return _mm512_cmp_ps_mask(some, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ) &
                   _mm512_cmp_ps_mask(some, _mm512_set1_ps(0x1p80f), _CMP_LT_OQ);
        };
        return (fit(0) & fit(16)) == 0xffff;
    }
    KTV_INLINE void prefetch_rows(int n) const { prefetch<2>(later + n * kBlock); }
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

// ---- 4 bits: a row has a table of sixteen numbers, and a shuffle of lanes looks codes up

// 2^(code - 127) by code, and `zero` for 0.
constexpr std::array<float, 256> powers(float zero) {
    std::array<float, 256> all{};
    all[0] = zero;
    for (std::uint32_t e = 1; e < 255; ++e) all[e] = __builtin_bit_cast(float, e << 23);
    return all;
}
// bf16(q (1 + m / 128)) for q from `first` on. With 2^e, that is every product with a scale in bf16, but for scales that are
// subnormal or so large that a product may overflow.
template <int first, std::size_t count>
constexpr auto products_of() {
    std::array<std::array<float, count>, 128> all{};
    for (int m = 0; m < 128; ++m) {
        for (int i = 0; i < static_cast<int>(count); ++i) {
            const int q = first + i, exact = (q < 0 ? -q : q) * (128 + m);
            int unit = 1;
            while (exact >= 256 * unit) unit *= 2;
            const int rest = exact % unit;
            int steps = exact / unit;
            steps += 2 * rest > unit || (2 * rest == unit && steps % 2 == 1);
            const float value = static_cast<float>(steps * unit) / 128;
            all[static_cast<std::size_t>(m)][static_cast<std::size_t>(i)] = q < 0 ? -value : value;
        }
    }
    return all;
}
// Of codes without zero points, a line for each m; and of codes less any zero point.
alignas(64) inline constexpr auto kProducts = products_of<-8, 16>();
alignas(64) inline constexpr auto kProductsOfAny = products_of<-15, 32>();
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
KTV_INLINE void prefetch_halves(const std::uint8_t* later, int n) {
    if (n % 4 == 0) prefetch<2>(later + n * kBlock / 2);
}

template <bool with_zeros>
struct Int4Block {
    const std::uint8_t* codes;
    const bf16* scales;
    const std::int8_t* zeros;
    const std::uint8_t* later;
    // Whether the 32 scales are 0 or normal, and small enough.
    static bool takes(const bf16* scales) {
        const __m512i all = _mm512_loadu_si512(scales);
        const __mmask32 normal = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(all, _mm512_set1_epi16(0x80)),
                                                         _mm512_set1_epi16(static_cast<short>((250 << 7) - 0x80)));
        return (normal | _mm512_testn_epi16_mask(all, all)) == 0xffffffffu;
    }
    KTV_INLINE void prefetch_rows(int n) const { prefetch_halves(later, n); }
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
    const std::uint8_t* scales;  // e8m0
    const std::uint8_t* later;
    KTV_INLINE void prefetch_rows(int n) const { prefetch_halves(later, n); }
    KTV_INLINE __m512 table(int n) const {
        const __m512 all = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
        return all * _mm512_set1_ps(kE8m0[scales[n]]);
    }
    KTV_INLINE TwoRows rows(int n) const { return look_up_halves(codes + n * kBlock / 2, table(n), table(n + 1)); }
};

// ---- blocks of any format

inline constexpr int kAtOnce = 8;  // most blocks that are decoded at once
struct DecodeScratch {
    ByteTable tables[kAtOnce];
    float first_scale = -1;  // of tables[0]; -1 before there is one
    alignas(64) bf16 unpacked[kAtOnce * kBlockSize];
};

// Calls use(blocks) with up to kAtOnce blocks of codes from a place on, along the row. Prefetches as many codes at `ahead`.
// Where a scale, the cut of a part or the processor is out of the ordinary, they are unpacked to bf16 first.
template <typename Use>
KTV_INLINE void decode_blocks(const CodedBlocks& from, CodedBlocks::Place at, int count, const std::uint8_t* ahead,
                              DecodeScratch& scratch, const Use& use) {
    CodedBlocks::Parts parts[kAtOnce] = {};
    for (int i = 0; i < count && from.whole; ++i) parts[i] = from.parts({at.n, at.k + i});
    const auto run = [&](std::size_t bytes, const auto& block) __attribute__((always_inline)) {
        std::remove_cvref_t<decltype(block(0, ahead))> blocks[kAtOnce];
        for (int i = 0; i < count; ++i) blocks[i] = block(i, ahead + i * bytes);
        use(blocks);
    };
    const auto all = [&](const auto& good) __attribute__((always_inline)) {
        bool every = from.whole;
        for (int i = 0; i < count && every; ++i) every = good(i);
        return every;
    };
    const auto bf16s = [&](int i) { return reinterpret_cast<const bf16*>(parts[i].scales); };
    const auto floats = [&](int i) { return reinterpret_cast<const float*>(parts[i].scales); };
    if (from.format == Format::fp8) {
        if (__builtin_cpu_supports("avx512vbmi") && all([&](int i) { return fp8_looks_up(*floats(i)); })) {
            int last = 0;
            const auto before = [&](int i) { return i > 0 ? *floats(i - 1) : scratch.first_scale; };
            for (int i = 0; i < count; ++i) {
                if (*floats(i) != before(i)) make_fp8_table(*floats(i), scratch.tables[i]);
            }
            scratch.first_scale = *floats(0);
            return run(kBlockSize, [&](int i, const std::uint8_t* later) {
                if (*floats(i) != before(i)) last = i;
                return Fp8Block{parts[i].codes, &scratch.tables[last], later};
            });
        }
    } else if (from.format == Format::int8) {
        if (all([&](int i) { return Int8Block::takes(floats(i)); }))
            return run(kBlockSize,
                       [&](int i, const std::uint8_t* later) { return Int8Block{parts[i].codes, floats(i), later}; });
    } else if (from.format == Format::int4) {
        if (all([&](int i) { return Int4Block<false>::takes(bf16s(i)); })) {
            const auto int4 = [&](auto with_zeros) __attribute__((always_inline)) {
                run(kBlockSize / 2, [&](int i, const std::uint8_t* later) {
                    return Int4Block<decltype(with_zeros)::value>{parts[i].codes, bf16s(i), parts[i].zeros, later};
                });
            };
            return parts[0].zeros ? int4(std::true_type()) : int4(std::false_type());
        }
    } else if (from.whole) {
        return run(kBlockSize / 2, [&](int i, const std::uint8_t* later) {
            return Mxfp4Block{parts[i].codes, reinterpret_cast<const std::uint8_t*>(parts[i].scales), later};
        });
    }
    from.unpack(at, count, ahead, scratch.unpacked);
    run(0, [&](int i, const std::uint8_t*) {
        const bf16* block = scratch.unpacked + i * kBlockSize;
        return PlainBlock{block, block};
    });
}
