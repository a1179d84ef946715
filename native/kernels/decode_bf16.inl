// Blocks of codes whose rows become bf16. A block gives rows n and n + 1, as they lie in a weight block or interleaved as a
// panel has them, and knows what to prefetch meanwhile. from(n): the block without its first n rows. Rows of it have
// constant offsets; with n in each address gcc runs out of general registers and moves addresses through vector registers.

// A register of constants: place(i) for element i.
constexpr auto places_of(auto place) {
    std::array<decltype(place(0)), 64 / sizeof(place(0))> all{};
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = place(i);
    return all;
}
template <typename Place>
KTV_INLINE __m512i load_places(const Place& places) {
    return _mm512_load_si512(places.data());
}

struct PlainBlock {
    const bf16 *weights, *later;
    KTV_INLINE PlainBlock from(int n) const { return {weights + n * kBlock, later + n * kBlock}; }
    KTV_INLINE void prefetch_rows(int n) const {
        prefetch<2>(later + n * kBlock);
        prefetch<2>(later + (n + 1) * kBlock);
    }
    KTV_INLINE Bf16Rows rows(int n) const {
        return {_mm512_load_si512(weights + n * kBlock), _mm512_load_si512(weights + (n + 1) * kBlock)};
    }
    KTV_INLINE RowPair interleaved(int n) const {
        const Bf16Rows two = rows(n);
        return interleave_rows(two.first, two.second);
    }
};

struct Fp8Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const ByteTable* table;
    KTV_INLINE Fp8Block from(int n) const { return {codes + n * kBlock, later + n * kBlock, table}; }
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_bytes(n); }
    KTV_INLINE Bf16Rows rows(int n) const { return fp8_rows(codes + n * kBlock, *table); }
    KTV_INLINE RowPair interleaved(int n) const {
        // quarter q: columns 4 q to 4 q + 3 of both rows in turn, and those 16 further on
        alignas(64) static constexpr auto places = places_of([](std::size_t i) {
            const std::size_t column = i / 16 * 4 + i % 8 / 2 + i % 16 / 8 * 16;
            return static_cast<std::uint8_t>(i % 2 * 32 + column);
        });
        const Bf16Rows two = fp8_of(bytes_at(load_places(places), _mm512_loadu_si512(codes + n * kBlock)), *table);
        return {two.first, two.second};
    }
};

// Products of fp32, rounded by an instruction of AVX-512 BF16. It is asm because the AMX kernels are compiled without it.
struct Int8Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const float* scales;  // of rows
    KTV_INLINE Int8Block from(int n) const { return {codes + n * kBlock, later + n * kBlock, scales + n}; }
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_bytes(n); }
    // 16 of row n, from column `first` on.
    KTV_INLINE __m512 products(int n, int first) const {
        const __m512i some = _mm512_maskz_cvtepi8_epi32(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + n * kBlock + first)));
        return _mm512_maskz_cvtepi32_ps(0xffff, some) * _mm512_set1_ps(scales[n]);
    }
    KTV_INLINE static __m512i to_bf16s(__m512 lower, __m512 upper) {
        __m512i both;
        asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(upper), "v"(lower));
        return both;
    }
    KTV_INLINE Bf16Rows rows(int n) const {
        return {to_bf16s(products(n, 0), products(n, 16)), to_bf16s(products(n + 1, 0), products(n + 1, 16))};
    }
    KTV_INLINE RowPair interleaved(int n) const {
        alignas(64) static constexpr auto places =
            places_of([](std::size_t i) { return static_cast<std::uint16_t>(i % 2 * 16 + i / 2); });
        const auto columns = [&](int first) {
            return _mm512_maskz_permutexvar_epi16(~0u, load_places(places),
                                                  to_bf16s(products(n, first), products(n + 1, first)));
        };
        return {columns(0), columns(16)};
    }
};

// ---- 4 bits: a row has a table of sixteen bf16, in which the exponent of its scale is added to each

// The 32 bf16 of a row; table: sixteen words.
KTV_INLINE __m512i look_up_row(const std::uint8_t* codes, __m512i table) {
    const __m512i bytes = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // (bytes | bytes << 12) & 0x000f000f
    const __m512i places =
        _mm512_ternarylogic_epi32(bytes, (__m512i)((U::Part)bytes << 12), _mm512_set1_epi16(15), 0xa8);
    return _mm512_maskz_permutexvar_epi16(~0u, places, table);
}
// Tables of sixteen words; asm because gcc warns about its own header where 256 bits become 512.
KTV_INLINE __m512i difference_or_0(__m256i a, __m256i b) {
    __m512i wide;
    asm("vpsubusw %2, %1, %t0" : "=v"(wide) : "v"(a), "v"(b));
    return wide;
}
KTV_INLINE __m512i side_by_side(__m512i first, __m512i second) {
    __m512i both;
    asm("vinserti64x4 $1, %t2, %1, %0" : "=v"(both) : "v"(first), "v"(second));
    return both;
}
// 16 columns of two rows, interleaved; table: the first row's sixteen, then the second's.
template <int half>
KTV_INLINE __m512i look_up_columns(__m512i codes, __m512i table) {
    alignas(64) static constexpr auto places = places_of([](std::size_t i) {  // both bytes of a word are the same
        return static_cast<std::uint8_t>(i / 2 % 2 * 16 + half * 8 + i / 8);
    });
    // shifts to the right by 8 or by 12, as products of which the high word is taken
    alignas(64) static constexpr auto shifts =
        places_of([](std::size_t i) { return static_cast<std::uint16_t>(i / 2 % 2 == 0 ? 1 << 8 : 1 << 4); });
    alignas(64) static constexpr auto second =
        places_of([](std::size_t i) { return static_cast<std::uint16_t>(i % 2 * 16); });
    const __m512i words = _mm512_mulhi_epu16(bytes_at(load_places(places), codes), load_places(shifts));
    // (words & 15) | second
    const __m512i place = _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(15), load_places(second), 0xea);
    return _mm512_maskz_permutexvar_epi16(~0u, place, table);
}
KTV_INLINE RowPair look_up_pair(const std::uint8_t* codes, __m512i table) {
    const __m512i both =
        _mm512_maskz_broadcast_i64x4(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return {look_up_columns<0>(both, table), look_up_columns<1>(both, table)};
}
// 32 words -> each twice in a lane.
KTV_INLINE void store_twice(std::uint32_t* to, __m512i words) {
    alignas(64) static constexpr auto lower =
        places_of([](std::size_t i) { return static_cast<std::uint16_t>(i / 2); });
    const __m512i places = load_places(lower);
    _mm512_store_si512(to, _mm512_maskz_permutexvar_epi16(~0u, places, words));
    _mm512_store_si512(to + 16,
                       _mm512_maskz_permutexvar_epi16(~0u, _mm512_add_epi16(places, _mm512_set1_epi16(16)), words));
}

// The same products as bf16, times 2^kMostPower. A row's table is the line of its scale's mantissa, less the rest of the
// exponent; 0 stays 0, because that subtraction saturates.
inline constexpr int kMostPower = 122;
template <int first, std::size_t count>
constexpr auto bf16_products_of() {
    constexpr auto products = products_of<first, count>();
    std::array<std::array<bf16, count>, 128> all{};
    for (std::size_t m = 0; m < 128; ++m) {
        for (std::size_t i = 0; i < count; ++i) {
            const auto bits = static_cast<bf16>(__builtin_bit_cast(std::uint32_t, products[m][i]) >> 16);
            all[m][i] = static_cast<bf16>(products[m][i] == 0 ? 0 : bits + (kMostPower << 7));
        }
    }
    return all;
}
alignas(64) inline constexpr auto kProducts = bf16_products_of<-8, 16>();
alignas(64) inline constexpr auto kProductsOfAny = bf16_products_of<-15, 32>();  // of codes less any zero point

template <bool with_zeros>
struct Int4Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const std::uint32_t* exponents;  // of rows, to subtract
    const std::uint16_t* offsets;    // of rows: bytes from the first product to that of code 0
    Int4Block() = default;
    Int4Block(const std::uint8_t* at, const CodesAhead& ahead, const bf16* scales, const std::int8_t* zeros,
              RowFacts& facts)
        : codes(at), later(ahead), exponents(facts.exponents), offsets(facts.offsets) {
        const __m512i all = _mm512_loadu_si512(scales);
        store_twice(facts.exponents, _mm512_sub_epi16(_mm512_set1_epi16((kMostPower + 127) << 7),
                                                      _mm512_and_si512(all, _mm512_set1_epi16(0x7f80))));
        static_assert(sizeof(kProducts[0]) == 1 << 5 && sizeof(kProductsOfAny[0]) == 1 << 6);
        __m512i line = _mm512_maskz_slli_epi16(~0u, _mm512_and_si512(all, _mm512_set1_epi16(127)), with_zeros ? 6 : 5);
        if constexpr (with_zeros) {
            const __m512i zero =
                _mm512_maskz_cvtepi8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zeros)));
            const __m512i first = _mm512_sub_epi16(_mm512_set1_epi16(7), zero);
            line = _mm512_add_epi16(line, _mm512_add_epi16(first, first));
        }
        _mm512_store_si512(facts.offsets, line);
    }
    KTV_INLINE Int4Block from(int n) const {
        Int4Block rest = *this;
        rest.codes += n * kBlock / 2, rest.later = later + n * kBlock / 2, rest.exponents += n, rest.offsets += n;
        return rest;
    }
    KTV_INLINE __m256i line(int n) const {
        const void* products = with_zeros ? static_cast<const void*>(kProductsOfAny.data()) : kProducts.data();
        return _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(static_cast<const std::byte*>(products) + offsets[n]));
    }
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_halves(n); }
    KTV_INLINE __m512i table(int n) const {
        return difference_or_0(line(n), _mm256_set1_epi32(static_cast<int>(exponents[n])));
    }
    KTV_INLINE __m512i row(int n) const { return look_up_row(codes + n * kBlock / 2, table(n)); }
    KTV_INLINE Bf16Rows rows(int n) const { return {row(n), row(n + 1)}; }
    KTV_INLINE RowPair interleaved(int n) const {
        return look_up_pair(codes + n * kBlock / 2, side_by_side(table(n), table(n + 1)));
    }
};

struct Mxfp4Block {
    const std::uint8_t* codes;
    CodesAhead later;
    const std::uint32_t* exponents;  // of rows, to add
    // Whether no product of 32 scales is subnormal or overflows.
    static bool scales_are_plain(const std::uint8_t* scales) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
        return _mm256_cmplt_epu8_mask(_mm256_sub_epi8(all, _mm256_set1_epi8(2)), _mm256_set1_epi8(251 - 256)) == ~0u;
    }
    Mxfp4Block() = default;
    Mxfp4Block(const std::uint8_t* at, const CodesAhead& ahead, const std::uint8_t* scales, RowFacts& facts)
        : codes(at), later(ahead), exponents(facts.exponents) {
        const __m512i all =
            _mm512_maskz_cvtepu8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
        store_twice(facts.exponents, _mm512_maskz_slli_epi16(~0u, _mm512_sub_epi16(all, _mm512_set1_epi16(127)), 7));
    }
    KTV_INLINE Mxfp4Block from(int n) const {
        Mxfp4Block rest = *this;
        rest.codes += n * kBlock / 2, rest.later = later + n * kBlock / 2, rest.exponents += n;
        return rest;
    }
    // Sixteen twice, with exponents added to all but the zeros.
    KTV_INLINE static __m512i table(__m512i to_add) {
        alignas(64) static constexpr auto values = places_of([](std::size_t i) {
            constexpr float magnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
            const auto bits = __builtin_bit_cast(std::uint32_t, magnitudes[i % 8]) >> 16;
            return static_cast<std::uint16_t>(bits | (i % 16 / 8 << 15));
        });
        const __m512i all = load_places(values);
        return _mm512_mask_add_epi16(all, 0xfefefefe, all, to_add);
    }
    KTV_INLINE __m512i of_row(int n) const { return _mm512_set1_epi32(static_cast<int>(exponents[n])); }
    KTV_INLINE void prefetch_rows(int n) const { later.prefetch_halves(n); }
    KTV_INLINE __m512i row(int n) const { return look_up_row(codes + n * kBlock / 2, table(of_row(n))); }
    KTV_INLINE Bf16Rows rows(int n) const { return {row(n), row(n + 1)}; }
    KTV_INLINE RowPair interleaved(int n) const {
        const __m512i both = _mm512_mask_set1_epi32(of_row(n), 0xff00, static_cast<int>(exponents[n + 1]));
        return look_up_pair(codes + n * kBlock / 2, table(both));
    }
};

static_assert(kNnBlocks <= kAtOnce, "a panel is decoded at once");

// Blocks of any kind -> weight blocks.
template <typename Block>
[[gnu::noinline]] void store_blocks(const Block* blocks, int count, bf16* to) {
    for (int i = 0; i < count; ++i, to += kBlockSize) {
        for (int n = 0; n < kBlock; n += 2) {
            blocks[i].prefetch_rows(n);
            const Bf16Rows two = blocks[i].rows(n);
            _mm512_store_si512(to + n * kBlock, two.first);
            _mm512_store_si512(to + (n + 1) * kBlock, two.second);
        }
    }
}

struct Bf16Kinds {
    using Fp8 = Fp8Block;
    using Int8 = Int8Block;
    template <bool with_zeros>
    using Int4 = Int4Block<with_zeros>;
    using Mxfp4 = Mxfp4Block;
    using Plain = PlainBlock;
    static constexpr bool int4_takes_0 = false;  // products with 0 keep the sign of the code
    static bool decodes(Format format) {
        return format == Format::int8 ? __builtin_cpu_supports("avx512bf16") : __builtin_cpu_supports("avx512vbmi");
    }
};
