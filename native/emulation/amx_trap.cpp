#include "amx_trap.hpp"

#if defined(__x86_64__) && defined(__linux__)

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <new>

#include "amx_execute.hpp"

namespace ktv::emulation {
namespace {

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
    switch (instruction.encoding->form) {
        case Form::tile:
        case Form::tile_and_memory:
            std::snprintf(operands, sizeof operands, " tmm%u", instruction.tile);
            break;
        case Form::three_tiles:
            std::snprintf(operands, sizeof operands, " tmm%u, tmm%u, tmm%u", instruction.tile, instruction.source1,
                          instruction.source2);
            break;
        default:
            break;
    }
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
