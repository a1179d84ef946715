// Where the time of a call goes: off by default, and then one branch a lap.
//
// A worker's time inside a call is cut into laps without gaps, each booked to a phase; what is left, at barriers and
// before its first task, is booked to waiting. So the phases of a worker add up to the call's wall time.
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

// What one worker writes while it works, on cache lines of its own.
struct alignas(64) Lane {
    std::int64_t ns[kPhases] = {};
    std::vector<StageTimes::Span> spans;  // room for all stages is there before they begin
};

// One worker's clock. Without a lane it does nothing.
class Watch {
  public:
    explicit Watch(Lane* lane = nullptr) : lane_(lane) {
        if (on()) stage_ = last_ = now_ns();
    }
    // Books the time since the last lap to `phase`.
    void lap(Phase phase) {
        if (!on()) return;
        const std::int64_t now = now_ns();
        lane_->ns[static_cast<int>(phase)] += now - last_;
        last_ = now;
    }
    // A stage ends with its last task and, after the barrier, for good.
    void tasks_done() {
        if (on()) work_ = now_ns();
    }
    void stage_done() {
        if (!on()) return;
        lap(Phase::wait);
        lane_->spans.push_back({static_cast<int>(lane_->spans.size()), stage_, work_, last_});
        stage_ = last_;
    }

  private:
    bool on() const { return kStages && lane_; }

    Lane* lane_;
    std::int64_t last_ = 0, stage_ = 0, work_ = 0;
};

// The lanes of a call; none when nobody asked.
class Recording {
  public:
    Recording(bool on, int workers, int stages);
    // The clock of a worker inside the parallel region, to be made where its work begins.
    Watch watch(int worker) { return Watch(on() ? &lanes_[static_cast<std::size_t>(worker)] : nullptr); }
    bool on() const { return kStages && !lanes_.empty(); }
    // Everything in one piece, times counted from the call's beginning.
    StageTimes finish(bool backward, int rows, const Costs& costs) const;

  private:
    std::int64_t began_ = 0;
    std::vector<Lane> lanes_;
};

}  // namespace ktv
