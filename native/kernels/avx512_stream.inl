// Stores past the caches for AVX-512 files. Include it before elementwise.inl, inside the same unnamed namespace.

#ifdef KTV_STREAM
#error "include avx512_stream.inl before elementwise.inl"
#endif
#define KTV_STREAM(to, lanes) _mm512_stream_ps(to, (__m512)(lanes))
// Makes streamed data visible to other threads that read it after the parallel region.
inline void wait_for_streams() {
    _mm_sfence();
}
