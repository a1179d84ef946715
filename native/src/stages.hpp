// Records where the time of a call goes. Off by default; it then costs one branch a lap.
//
// A worker's time inside a call is cut into laps without gaps. Each lap counts for a phase; the rest, at barriers and
// before its first task, counts as waiting. So the phases of a worker add up to the call's wall time.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "ktv/stage_times.hpp"

namespace ktv {

#ifdef KTV_NO_STAGES
inline constexpr bool kStages = false;
#else
inline constexpr bool kStages = true;
#endif

inline std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// The record of one worker, on cache lines of its own.
struct alignas(64) WorkerTimes {
    std::int64_t ns[kPhases] = {};
    std::vector<StageTimes::Span> spans;  // reserved for all stages before they begin
};

// One worker's clock. Does nothing without `times`.
class Watch {
  public:
    explicit Watch(WorkerTimes* times = nullptr) : times_(times) {
        if (on()) stage_ = last_ = now_ns();
    }
    // Counts the time since the last lap for `phase`.
    void lap(Phase phase) {
        if (!on()) return;
        const std::int64_t now = now_ns();
        times_->ns[static_cast<int>(phase)] += now - last_;
        last_ = now;
    }
    // A worker's stage ends after its last task (work_end) and after the barrier (end).
    void tasks_done() {
        if (on()) work_ = now_ns();
    }
    void stage_done() {
        if (!on()) return;
        lap(Phase::wait);
        times_->spans.push_back({static_cast<int>(times_->spans.size()), stage_, work_, last_});
        stage_ = last_;
    }

  private:
    bool on() const { return kStages && times_; }

    WorkerTimes* times_;
    std::int64_t last_ = 0, stage_ = 0, work_ = 0;
};

// The times of a call's workers; none when recording is off.
class Recording {
  public:
    Recording(bool on, int workers, int stages);
    // The clock of a worker inside the parallel region; it starts now.
    Watch watch(int worker) { return Watch(on() ? &workers_[worker] : nullptr); }
    bool on() const { return kStages && !workers_.empty(); }
    // The whole record, in ns since the call began.
    StageTimes finish(bool backward, int rows, const Costs& costs) const;

  private:
    std::int64_t began_ = 0;
    std::vector<WorkerTimes> workers_;
};

}  // namespace ktv
