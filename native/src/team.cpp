#include "team.hpp"

#include <sched.h>

#include <algorithm>
#include <system_error>

#include "ktv/errors.hpp"

namespace ktv {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Rounds of spinning before a worker blocks on a futex: about the time between two stages, some tens to some hundreds of
// microseconds, depending on the duration of `pause` on this CPU.
constexpr int kSpins = 4000;

void wait_while(const std::atomic<int>& word, int value) {
    for (int i = 0; i < kSpins; ++i) {
        if (word.load(std::memory_order_acquire) != value) return;
        pause();
    }
    while (word.load(std::memory_order_acquire) == value) word.wait(value, std::memory_order_acquire);
}

}  // namespace

int allowed_processors() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return std::max(1, CPU_COUNT(&set));
}

Team::Team(int workers, std::vector<Home> homes)
    : workers_(workers), homes_(std::move(homes)), elsewhere_(homes_.front().nodes != 0) {
    const auto parts = static_cast<int>(homes_.size());
    for (int part = workers; part < parts; ++part) {
        const auto of_its_home = [&](const Home& home) { return home.nodes == homes_[part].nodes; };
        if (std::none_of(homes_.begin(), homes_.begin() + workers, of_its_home)) help_everywhere_ = true;
    }
    const int first = elsewhere_ ? 0 : 1;
    threads_.reserve(workers);
    for (int worker = first; worker < workers; ++worker) {
        try {
            threads_.emplace_back([this, worker] { serve(worker); });
        } catch (const std::system_error& error) {
            dismiss();
            throw BadState("worker " + std::to_string(worker) + " of " + std::to_string(workers) +
                           " could not be started (" + error.what() + "); lower cpuinfer_threads or raise the limit");
        }
        const Home& home = homes_[worker % parts];
        if (home.nodes == 0) continue;
        cpu_set_t set;
        CPU_ZERO(&set);
        for (const int cpu : home.cpus) CPU_SET(cpu, &set);
        // If the kernel refuses, the worker may run on any processor: slower, with the same results.
        (void)pthread_setaffinity_np(threads_.back().native_handle(), sizeof set, &set);
    }
}

Team::~Team() {
    dismiss();
}

void Team::dismiss() {
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Team::serve(int worker) {
    for (int seen = 0;;) {
        wait_while(epoch_, seen);
        ++seen;
        if (stop_.load(std::memory_order_relaxed)) return;
        (*body_)(worker);
        barrier();
        if (worker > 0 || !elsewhere_) continue;
        done_.store(seen, std::memory_order_release);
        done_.notify_one();
    }
}

void Team::run(const std::function<void(int)>& body) {
    if (workers_ == 1 && !elsewhere_) return body(0);
    body_ = &body;
    const int before = epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    if (elsewhere_) {
        // Without spinning: the processor may be one that a worker needs.
        while (done_.load(std::memory_order_acquire) == before) done_.wait(before, std::memory_order_acquire);
    } else {
        body(0);
        barrier();
    }
}

void Team::barrier() {
    if (workers_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase);
    }
}

void Turns::wait(const Task& task) {
    const std::atomic<int>& next = next_row(task);
    for (int spins = 0; next.load(std::memory_order_acquire) != task.row; ++spins) {
        // The worker that is next may have lost its processor to another process: yield ours.
        if (spins < kSpins) {
            pause();
        } else {
            sched_yield();
        }
    }
}

void Turns::pass(const Task& task) {
    next_row(task).store(task.row + 1, std::memory_order_release);
}

}  // namespace ktv
