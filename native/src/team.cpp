#include "team.hpp"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
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

std::vector<int> parse_cpu_list(const std::string& text) {
    std::vector<int> cpus;
    std::istringstream ranges(text);
    for (std::string range; std::getline(ranges, range, ',');) {
        int first = 0, last = 0;
        char dash = 0;
        std::istringstream numbers(range);
        if (!(numbers >> first)) continue;
        if (!(numbers >> dash >> last)) last = first;
        for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    }
    return cpus;
}

std::vector<std::vector<int>> numa_nodes() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    std::vector<std::vector<int>> nodes;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return nodes;
    constexpr int most = 64;
    for (int node = 0; node < most; ++node) {
        std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
        std::string text;
        if (!std::getline(file, text)) continue;
        std::vector<int> cpus = parse_cpu_list(text);
        std::erase_if(cpus, [&](int cpu) { return cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &allowed); });
        if (!cpus.empty()) nodes.push_back(std::move(cpus));
    }
    return nodes;
}

Team::Team(int workers, int parts) : workers_(workers) {
    const auto nodes = numa_nodes();
    const bool pin = nodes.size() > 1 && parts > 1;
    helps_ = !pin || workers < parts;
    threads_.reserve(workers - 1);
    for (int worker = 1; worker < workers; ++worker) {
        try {
            threads_.emplace_back([this, worker] { serve(worker); });
        } catch (const std::system_error& error) {
            dismiss();
            throw BadState("worker " + std::to_string(worker) + " of " + std::to_string(workers) +
                           " could not be started (" + error.what() + "); lower cpuinfer_threads or raise the limit");
        }
        if (!pin) continue;
        cpu_set_t set;
        CPU_ZERO(&set);
        for (const int cpu : nodes[(worker % parts) % nodes.size()]) CPU_SET(cpu, &set);
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
    }
}

void Team::run(const std::function<void(int)>& body) {
    if (workers_ == 1) return body(0);
    body_ = &body;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    body(0);
    barrier();
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
