// Tile instructions, as asm with memory clobbers, because gcc's intrinsics do not declare what they read and write.
// Everywhere, tiles 0-3 are results and 4-7 operands.

// Of a function with an inner loop: one symbol, in which tests/count_tile_instructions.py counts what the loop
// executes.
#define KTV_PASS [[gnu::noinline, gnu::noclone]]

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

void enter() {
    static constexpr TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
// Back to the initial state: oneDNN in the same thread loads its own configuration, and the OS has less state to save.
void leave() {
    wait_for_streams();
    asm volatile("tilerelease" ::: "memory");
}

template <int n>
using Int = std::integral_constant<int, n>;

template <int T>
KTV_INLINE void tile_load(const void* p, std::size_t stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// Of an operand that streams through the first-level cache: its lines do not push out those that stay.
template <int T>
KTV_INLINE void tile_load_streaming(const void* p, std::size_t stride = 64) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
KTV_INLINE void tile_store(void* p, std::size_t stride = 64) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
KTV_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
KTV_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The results of the tile at c, so far; zero where nothing has been added yet.
template <int T>
KTV_INLINE void load_result(const float* c, std::size_t stride, bool add) {
    if (add) tile_load<T>(c, stride);
    else tile_zero<T>();
}

// Prefetches the given quarter of `lines` lines: a few at a time, between two tile instructions.
template <int lines, int quarter>
KTV_INLINE void prefetch_quarter(const bf16* from) {
    for (int line = lines * quarter / 4; line < lines * (quarter + 1) / 4; ++line) prefetch<2>(from + line * kBlock);
}
