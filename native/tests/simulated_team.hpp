// Workers in virtual time, in place of src/team.cpp: the engine's own calls, queues and turns run on as many workers as a
// test asks for, one at a time, always the one whose clock is behind the others'. A test's kernels spend() virtual time.
// So a schedule does not depend on this machine, and a slice of a call belongs to one worker.
//
// Include it once in a test that links no other part of team.cpp.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "team.hpp"

namespace ktv::simulated {

// One stage: what each worker spent in it, and how long it lasted.
struct Stage {
    std::vector<double> busy;
    double span = 0;
    double mean() const {
        double sum = 0;
        for (const double one : busy) sum += one;
        return sum / static_cast<double>(busy.size());
    }
};

struct Clock {
    enum class State { ready, in_turn, at_barrier, ended };
    struct Worker {
        State state = State::ready;
        double now = 0, spent = 0;
        const std::atomic<int>* turn = nullptr;
        int row = 0;
        std::condition_variable go;
    };
    std::mutex mutex;
    std::vector<Worker> workers;
    int running = -1;
    double stage_began = 0;
    std::vector<Stage> stages;  // since the test cleared them
    // Called with the worker when its slice ends, before another one begins.
    std::function<void(int)> on_slice = [](int) {};

    void begin(int count) {
        workers = std::vector<Worker>(count);
        stage_began = 0;
        running = 0;
    }
    // Gives the processor to the worker that is behind, and returns when `me` has it again.
    void yield(std::unique_lock<std::mutex>& lock, int me) {
        on_slice(me);
        hand_over();
        workers[me].go.wait(lock, [&] { return running == me; });
    }
    void hand_over() {
        const auto waiting = [](const Worker& w) { return w.state == State::at_barrier || w.state == State::ended; };
        if (std::all_of(workers.begin(), workers.end(), waiting)) end_stage();
        int next = -1;
        for (int i = 0; i < static_cast<int>(workers.size()); ++i) {
            if (workers[i].state == State::ready && (next < 0 || workers[i].now < workers[next].now)) next = i;
        }
        const bool ended =
            std::all_of(workers.begin(), workers.end(), [](const Worker& w) { return w.state == State::ended; });
        if (next < 0 && !ended) {
            std::printf("FAIL every worker waits for another\n");
            std::exit(1);
        }
        running = next;
        if (next >= 0) workers[next].go.notify_one();
    }
    void end_stage() {
        Stage stage;
        double end = stage_began;
        for (Worker& w : workers) {
            stage.busy.push_back(w.spent);
            end = std::max(end, w.now);
            w.spent = 0;
        }
        stage.span = end - stage_began;
        stages.push_back(std::move(stage));
        stage_began = end;
        for (Worker& w : workers) {
            w.now = end;
            if (w.state == State::at_barrier) w.state = State::ready;
        }
    }
};

inline Clock& clock() {
    static Clock one;
    return one;
}
inline thread_local int me = 0;

// The running worker computes for so long.
inline void spend(double time) {
    Clock& c = clock();
    std::unique_lock lock(c.mutex);
    c.workers[me].now += time;
    c.workers[me].spent += time;
    c.yield(lock, me);
}

}  // namespace ktv::simulated

namespace ktv {

int allowed_processors() {
    return 1 << 10;
}

Team::Team(int workers, std::vector<Home> homes) : workers_(workers), homes_(std::move(homes)), elsewhere_(false) {}
Team::~Team() = default;

void Team::run(const std::function<void(int)>& body) {
    auto& c = simulated::clock();
    c.begin(workers_);
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers_; ++worker) {
        threads.emplace_back([&, worker] {
            simulated::me = worker;
            std::unique_lock lock(c.mutex);
            c.workers[worker].go.wait(lock, [&] { return c.running == worker; });
            lock.unlock();
            body(worker);
            lock.lock();
            c.on_slice(worker);
            c.workers[worker].state = simulated::Clock::State::ended;
            c.hand_over();
        });
    }
    for (std::thread& thread : threads) thread.join();
}

void Team::barrier() {
    auto& c = simulated::clock();
    std::unique_lock lock(c.mutex);
    c.workers[simulated::me].state = simulated::Clock::State::at_barrier;
    c.yield(lock, simulated::me);
}

void Turns::wait(const Task& task) {
    auto& c = simulated::clock();
    std::unique_lock lock(c.mutex);
    const std::atomic<int>& next = next_row(task);
    auto& worker = c.workers[simulated::me];
    if (next.load() == task.row) return;
    worker.state = simulated::Clock::State::in_turn;
    worker.turn = &next;
    worker.row = task.row;
    c.yield(lock, simulated::me);
}

void Turns::pass(const Task& task) {
    auto& c = simulated::clock();
    const std::lock_guard lock(c.mutex);
    next_row(task).store(task.row + 1);
    for (auto& other : c.workers) {
        if (other.state != simulated::Clock::State::in_turn || other.turn != &next_row(task)) continue;
        if (other.row != task.row + 1) continue;
        other.state = simulated::Clock::State::ready;
        other.now = std::max(other.now, c.workers[simulated::me].now);
    }
}

}  // namespace ktv
