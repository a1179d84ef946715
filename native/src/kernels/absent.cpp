// On other processors than x86-64 only the portable kernels exist.
#include "kernels.hpp"

namespace ktv {

const Kernels* avx2_kernels() {
    return nullptr;
}
const Kernels* avx512_bf16_kernels() {
    return nullptr;
}
const Kernels* amx_bf16_kernels() {
    return nullptr;
}

}  // namespace ktv
