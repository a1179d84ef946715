// What the engine throws. Each becomes one Python exception (bind/module.cpp).
#pragma once

#include <stdexcept>

namespace ktv {

// Input that the layer refuses. Thrown before anything is computed or changed; the layer stays usable.
struct BadInput : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};
// A call at the wrong time, or a choice that this CPU cannot run.
struct BadState : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// The message states how much memory was needed and how much is available.
struct OutOfMemory : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace ktv
