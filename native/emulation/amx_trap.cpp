#include "amx_trap.hpp"

#if defined(__x86_64__) && defined(__linux__)

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>

#include "amx_decode.hpp"
#include "amx_tiles.hpp"

namespace ktv::emulation {
namespace {

// TILECFG in the layout that ldtilecfg reads and sttilecfg writes. palette 0 is the initial, unconfigured state: every
// byte here and in the tiles is zero.
struct Config {
    std::uint8_t palette;
    std::uint8_t start_row;
    std::uint8_t reserved_a[14];
    std::uint16_t colsb[kTiles];
    std::uint8_t reserved_b[16];
    std::uint8_t rows[kTiles];
    std::uint8_t reserved_c[8];
};
static_assert(sizeof(Config) == 64);

struct ThreadState {
    Config config;
    Tile tiles[kTiles];

    void clear() { std::memset(static_cast<void*>(this), 0, sizeof *this); }
};

// Why AMX would refuse an instruction.
struct Fault {
    char reason[160];

    // Returns false, so that callers can `return fault.because(...)`. printf is safe in this signal handler, because the
    // SIGILL interrupts a tile instruction and never libc.
    [[gnu::format(printf, 2, 3)]] bool because(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(reason, sizeof reason, format, arguments);
        va_end(arguments);
        return false;
    }
};

// The general registers in the order in which instructions number them.
std::uint64_t read_register(const greg_t* registers, unsigned number) {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<std::uint64_t>(registers[kOrder[number]]);
}

// The address without the index, because the index is part of the address for ldtilecfg and sttilecfg only; for the others
// it is the stride.
std::uint64_t base_address(const Instruction& instruction, const greg_t* registers) {
    std::uint64_t base = 0;
    if (instruction.base == kInstructionPointer) {
        base = static_cast<std::uint64_t>(registers[REG_RIP]) + instruction.length;
    } else if (instruction.base != kNoRegister) {
        base = read_register(registers, instruction.base);
    }
    return base + static_cast<std::uint64_t>(std::int64_t{instruction.displacement});
}

std::uint64_t scaled_index(const Instruction& instruction, const greg_t* registers) {
    if (instruction.index == kNoRegister) return 0;
    return read_register(registers, instruction.index) << instruction.scale;
}

bool load_config(ThreadState& state, const void* memory, Fault& fault) {
    Config config;
    std::memcpy(&config, memory, sizeof config);
    if (config.palette == 0) {
        state.clear();
        return true;
    }
    if (config.palette != 1) return fault.because("#GP: palette %u, there are 0 and 1", config.palette);
    const auto is_zero = [](const auto& bytes) { return std::ranges::count(bytes, 0) == std::ssize(bytes); };
    if (!is_zero(config.reserved_a) || !is_zero(config.reserved_b) || !is_zero(config.reserved_c)) {
        return fault.because("#GP: bytes 2-15, 32-47 and 56-63 of the configuration must be zero");
    }
    for (unsigned tile = 0; tile < kTiles; ++tile) {
        const unsigned rows = config.rows[tile], colsb = config.colsb[tile];
        if (rows > kRows || colsb > kRowBytes) {
            return fault.because("#GP: tmm%u has %u rows of %u bytes, at most %u of %u fit", tile, rows, colsb, kRows,
                                 kRowBytes);
        }
        if ((rows == 0) != (colsb == 0)) {
            return fault.because("#GP: tmm%u has %u rows of %u bytes: both must be zero, or neither", tile, rows,
                                 colsb);
        }
    }
    state.clear();
    state.config = config;
    return true;
}

bool require_tile(const ThreadState& state, unsigned tile, Fault& fault) {
    if (state.config.palette == 0) return fault.because("#UD: no tile is configured, ldtilecfg must come first");
    if (tile >= kTiles) return fault.because("#UD: there is no tmm%u, only tmm0 to tmm7", tile);
    if (state.config.rows[tile] == 0) return fault.because("#UD: tmm%u has no rows in the loaded configuration", tile);
    return true;
}

bool require_whole_elements(const ThreadState& state, unsigned tile, Fault& fault) {
    const unsigned colsb = state.config.colsb[tile];
    return colsb % 4 == 0 || fault.because("#UD: rows of tmm%u have %u bytes, no multiple of 4", tile, colsb);
}

bool move_tile(ThreadState& state, const Instruction& instruction, const greg_t* registers, Fault& fault) {
    const unsigned number = instruction.tile;
    if (!instruction.has_sib) return fault.because("#UD: the address must be encoded with a SIB byte");
    if (!require_tile(state, number, fault) || !require_whole_elements(state, number, fault)) return false;
    const unsigned rows = state.config.rows[number], colsb = state.config.colsb[number];
    const unsigned start = state.config.start_row;
    if (start >= rows) return fault.because("#UD: start_row is %u, tmm%u has %u rows", start, number, rows);

    Tile& tile = state.tiles[number];
    const std::uint64_t base = base_address(instruction, registers);
    const std::uint64_t stride = scaled_index(instruction, registers);
    if (instruction.encoding->op == Op::tilestored) {
        for (unsigned row = start; row < rows; ++row) {
            std::memcpy(reinterpret_cast<void*>(base + row * stride), tile.bytes[row], colsb);
        }
    } else {
        std::memset(tile.bytes[start], 0, (kRows - start) * kRowBytes);
        for (unsigned row = start; row < rows; ++row) {
            std::memcpy(tile.bytes[row], reinterpret_cast<const void*>(base + row * stride), colsb);
        }
    }
    state.config.start_row = 0;
    return true;
}

bool multiply(ThreadState& state, const Instruction& instruction, Fault& fault) {
    const unsigned c = instruction.tile, a = instruction.source1, b = instruction.source2;
    for (const unsigned tile : {c, a, b}) {
        if (!require_tile(state, tile, fault) || !require_whole_elements(state, tile, fault)) return false;
    }
    if (c == a || c == b || a == b) return fault.because("#UD: its three tiles must differ");
    const auto& rows = state.config.rows;
    const auto& colsb = state.config.colsb;
    if (rows[c] != rows[a]) {
        return fault.because("#UD: tmm%u has %u rows, tmm%u has %u: they must be equal", c, rows[c], a, rows[a]);
    }
    if (colsb[a] / 4u != rows[b]) {
        return fault.because("#UD: rows of tmm%u have %u 4-byte elements, tmm%u has %u rows: they must be equal", a,
                             colsb[a] / 4u, b, rows[b]);
    }
    if (colsb[c] != colsb[b]) {
        return fault.because("#UD: rows of tmm%u have %u bytes, of tmm%u %u: they must be equal", c, colsb[c], b,
                             colsb[b]);
    }
    tdpbf16ps(state.tiles[c], state.tiles[a], state.tiles[b], {rows[c], rows[b], colsb[c] / 4u}, best_path());
    state.config.start_row = 0;
    return true;
}

// Executes an instruction on the thread's tiles and on memory. False, with the reason in `fault`, when AMX would refuse
// it; nothing has changed then.
bool execute(ThreadState& state, const Instruction& instruction, const greg_t* registers, Fault& fault) {
    const std::uint64_t address = base_address(instruction, registers) + scaled_index(instruction, registers);
    switch (instruction.encoding->op) {
        case Op::ldtilecfg:
            return load_config(state, reinterpret_cast<const void*>(address), fault);
        case Op::sttilecfg:
            std::memcpy(reinterpret_cast<void*>(address), &state.config, sizeof state.config);
            return true;
        case Op::tilerelease:
            state.clear();
            return true;
        case Op::tilezero:
            if (!require_tile(state, instruction.tile, fault)) return false;
            state.tiles[instruction.tile] = Tile{};
            state.config.start_row = 0;
            return true;
        case Op::tileloadd:
        case Op::tileloaddt1:
        case Op::tilestored:
            return move_tile(state, instruction, registers, fault);
        default:
            return multiply(state, instruction, fault);
    }
}

// The registers are 8 KiB, too much for the static TLS that all libraries loaded by dlopen share. Any other TLS may call
// malloc on first use, which is forbidden in a signal handler. So there is a pointer in static TLS, a block from the
// kernel, and a pthread key that frees the block when the thread ends.
[[gnu::tls_model("initial-exec")]] thread_local constinit ThreadState* this_thread_state = nullptr;
pthread_key_t release_key;

void release_thread_state(void* state) {
    this_thread_state = nullptr;
    syscall(SYS_munmap, state, sizeof(ThreadState));
}

ThreadState* thread_state() {
    if (this_thread_state == nullptr) {
        const long block =
            syscall(SYS_mmap, nullptr, sizeof(ThreadState), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == -1) return nullptr;
        this_thread_state = new (reinterpret_cast<void*>(block)) ThreadState{};
        pthread_setspecific(release_key, this_thread_state);
    }
    return this_thread_state;
}

std::atomic<std::uint64_t> emulated{0};
struct sigaction previous_action;  // written once, before the handler is installed

void report(const Instruction& instruction, std::uint64_t address, const Fault& fault) {
    char operands[48] = "";
    const int tiles = instruction.encoding->tiles;
    if (tiles == 1) std::snprintf(operands, sizeof operands, " tmm%u", instruction.tile);
    if (tiles == 3)
        std::snprintf(operands, sizeof operands, " tmm%u, tmm%u, tmm%u", instruction.tile, instruction.source1,
                      instruction.source2);
    char line[320];
    const int length =
        std::snprintf(line, sizeof line, "AMX emulation: %s%s at 0x%llx: %s\n", instruction.encoding->name, operands,
                      static_cast<unsigned long long>(address), fault.reason);
    if (length > 0) [[maybe_unused]]
        const auto written = write(STDERR_FILENO, line, static_cast<std::size_t>(length));
}

void restore_default() {
    struct sigaction action{};
    action.sa_handler = SIG_DFL;
    sigaction(SIGILL, &action, nullptr);
}

// Calls the previous SIGILL handler as the kernel would have called it. The interrupted code gets its own signal mask back
// when it continues.
void pass_on(siginfo_t* info, void* context) {
    const bool sent = info->si_code <= 0;  // by kill() and similar calls, not by an instruction
    if (previous_action.sa_handler == SIG_IGN && sent) return;
    if (previous_action.sa_handler == SIG_DFL || previous_action.sa_handler == SIG_IGN) {
        restore_default();
        if (sent) raise(SIGILL);
        return;  // to the same instruction, which raises it again
    }
    pthread_sigmask(SIG_BLOCK, &previous_action.sa_mask, nullptr);
    if (previous_action.sa_flags & SA_NODEFER) {
        sigset_t self;
        sigemptyset(&self);
        sigaddset(&self, SIGILL);
        pthread_sigmask(SIG_UNBLOCK, &self, nullptr);
    }
    if (previous_action.sa_flags & SA_SIGINFO) {
        previous_action.sa_sigaction(SIGILL, info, context);
    } else {
        previous_action.sa_handler(SIGILL);
    }
}

void on_sigill(int, siginfo_t* info, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto code = [registers] { return reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]); };

    Instruction instruction;
    if (info->si_code <= 0 || !decode(code(), instruction)) {
        pass_on(info, context);
        return;
    }
    // A trap costs far more than an instruction, and tile instructions come in runs: execute the whole run.
    ThreadState* state = thread_state();
    Fault fault;
    do {
        const bool done = state != nullptr ? execute(*state, instruction, registers, fault)
                                           : fault.because("no memory for the thread's tile registers");
        if (!done) {
            report(instruction, static_cast<std::uint64_t>(registers[REG_RIP]), fault);
            restore_default();
            break;  // the instruction raises SIGILL again, which now ends the process
        }
        registers[REG_RIP] += instruction.length;
        emulated.fetch_add(1, std::memory_order_relaxed);
    } while (decode(code(), instruction));
}

}  // namespace

bool amx_trap_installed() noexcept {
    struct sigaction current{};
    return sigaction(SIGILL, nullptr, &current) == 0 && (current.sa_flags & SA_SIGINFO) != 0 &&
           current.sa_sigaction == on_sigill;
}

bool amx_trap_install() {
    static std::mutex mutex;
    static bool was_installed = false;
    const std::lock_guard lock(mutex);
    if (amx_trap_installed()) return true;
    if (was_installed || pthread_key_create(&release_key, release_thread_state) != 0) return false;
    sigaction(SIGILL, nullptr, &previous_action);
    // SIGILL stays blocked inside the handler: an illegal instruction in the emulator ends the process at once.
    struct sigaction action{};
    action.sa_sigaction = on_sigill;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&action.sa_mask);
    was_installed = sigaction(SIGILL, &action, nullptr) == 0;
    return was_installed;
}

std::uint64_t amx_trap_count() noexcept {
    return emulated.load(std::memory_order_relaxed);
}

}  // namespace ktv::emulation

#else

namespace ktv::emulation {

bool amx_trap_install() {
    return false;
}
bool amx_trap_installed() noexcept {
    return false;
}
std::uint64_t amx_trap_count() noexcept {
    return 0;
}

}  // namespace ktv::emulation

#endif
