// Rows of W and of tokens as fp32: the sixteen even and the sixteen odd elements of 32 neighbours. A block is anything
// that gives two rows, n and n + 1, and knows what to prefetch meanwhile.

struct TwoRows {
    __m512 at[2][2];  // [row][even, odd]
};
KTV_INLINE __m512 even(__m512i pairs) {
    return (__m512)((U::Part)pairs << 16);
}
KTV_INLINE __m512 odd(__m512i pairs) {
    return (__m512)((U::Part)pairs & 0xffff0000u);
}
KTV_INLINE TwoRows widen(const bf16* first, const bf16* second) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    return {{{even(a), odd(a)}, {even(b), odd(b)}}};
}

// A weight block in memory, and the one to prefetch.
struct PlainBlock {
    const bf16 *weights, *later;
    KTV_INLINE void prefetch_rows(int n) const {
        prefetch<2>(later + n * kBlock);
        prefetch<2>(later + (n + 1) * kBlock);
    }
    KTV_INLINE TwoRows rows(int n) const { return widen(weights + n * kBlock, weights + (n + 1) * kBlock); }
};

struct GatheredBlock {
    const bf16* const* gathered;
    std::size_t column;
    KTV_INLINE TwoRows rows(int n) const { return widen(gathered[n] + column, gathered[n + 1] + column); }
};

// A block that is widened already, [row][even, odd][16].
struct PanelBlock {
    const float* wide;
    const bf16* later;
    KTV_INLINE void prefetch_rows(int n) const { PlainBlock{nullptr, later}.prefetch_rows(n); }
    KTV_INLINE TwoRows rows(int n) const {
        const auto at = [&](int i) { return _mm512_load_ps(wide + (2 * n + i) * 16); };
        return {{{at(0), at(1)}, {at(2), at(3)}}};
    }
};

// The first `pairs` pairs of rows of a block -> rows of `to`, `stride` apart.
template <typename Block>
KTV_INLINE void widen_block(const Block& block, int pairs, float* to, std::size_t stride) {
    for (int n = 0; n < 2 * pairs; n += 2) {
        const TwoRows two = block.rows(n);
        for (int i = 0; i < 2; ++i) {
            for (int o = 0; o < 2; ++o) _mm512_store_ps(to + (n + i) * stride + o * 16, two.at[i][o]);
        }
    }
}

// Pairs of a token pack -> [pair][2][16 tokens].
KTV_INLINE void widen_pairs(const bf16* x, int pairs, float* to) {
    for (int pair = 0; pair < pairs; ++pair, x += 2 * kGroup, to += 2 * kGroup) {
        const __m512i two = _mm512_loadu_si512(x);
        _mm512_store_ps(to, even(two));
        _mm512_store_ps(to + kGroup, odd(two));
    }
}

// A k-block of T tokens -> [even, odd][token][16].
template <int T>
KTV_INLINE void widen_tokens(const bf16* x, float* to) {
    for (int t = 0; t < T; ++t) {
        const __m512i pairs = _mm512_loadu_si512(x + t * kBlock);
        _mm512_store_ps(to + t * 16, even(pairs));
        _mm512_store_ps(to + (T + t) * 16, odd(pairs));
    }
}
