// The threads of the programs that are resident, and the order in which they get to run.
#pragma once
#include <vector>

#include "memory.h"

enum State : u8 { READY, AT_BARRIER, IN_WARP, DONE };

struct Thread {
    u64* registers = nullptr;
    s32 counter = 0, number = 0, place_in_ready = -1;
    State state = READY;
    Shared acquired;  // since the program's last barrier
};

struct Program {
    s32 number = -1;
    s32 alive = 0, at_barrier = 0;
    u64 barrier = 0;
    Shared view;
    std::vector<u64> warp_barriers, registers;
    std::vector<u8> shared;
    std::vector<Cell> cells;  // of shared memory
    std::vector<Thread> threads;
    std::vector<s32> ready;

    void make_ready(Thread& t) {
        t.state = READY;
        if (t.place_in_ready >= 0) return;
        t.place_in_ready = s32(ready.size());
        ready.push_back(t.number);
    }
    void make_waiting(Thread& t) {
        s32 last = ready.back();
        ready[t.place_in_ready] = last;
        threads[last].place_in_ready = t.place_in_ready;
        ready.pop_back();
        t.place_in_ready = -1;
    }
};

// Says which thread makes the next access. Every choice gives all threads a turn in the end.
enum Mode { THREADS, BURSTS, WARPS, PROGRAMS };

class Scheduler {
  public:
    Scheduler(u64 seed, Mode mode) : random(seed), mode(mode) {}
    std::mt19937_64 random;

    // False where no thread can go on.
    bool next(std::vector<Program>& programs, s32& slot, s32& thread) {
        bool goes_on = left > 0 && !programs[at_slot].ready.empty();
        if (mode == WARPS) {
            if (goes_on && in_warp(programs[at_slot])) return left--, give(slot, thread);
        } else if (mode == BURSTS) {
            if (goes_on && programs[at_slot].threads[at_thread].place_in_ready >= 0) return left--, give(slot, thread);
        } else if (mode == PROGRAMS) {
            if (goes_on) return left--, at_thread = any(programs[at_slot].ready), give(slot, thread);
        }
        if (!choose_program(programs)) return false;
        at_thread = any(programs[at_slot].ready);
        left = mode == THREADS ? 0 : mode == BURSTS ? drawn(7) : mode == WARPS ? drawn(11) : drawn(13);
        return give(slot, thread);
    }

  private:
    Mode mode;
    s32 at_slot = 0, at_thread = 0;
    u64 left = 0;

    u64 drawn(int powers) { return u64(1) << random() % powers; }
    s32 any(const std::vector<s32>& of) { return of[random() % of.size()]; }
    bool give(s32& slot, s32& thread) { return slot = at_slot, thread = at_thread, true; }
    // The next lane of the warp that can go on, in turn.
    bool in_warp(const Program& p) {
        s32 first = at_thread / 32 * 32, lanes = std::min<s32>(32, s32(p.threads.size()) - first);
        for (s32 k = 1; k <= lanes; k++) {
            s32 lane = first + (at_thread - first + k) % lanes;
            if (p.threads[lane].place_in_ready >= 0) return at_thread = lane, true;
        }
        return false;
    }
    bool choose_program(const std::vector<Program>& programs) {
        s32 num = s32(programs.size()), from = s32(random() % num);
        for (s32 k = 0; k < num; k++) {
            at_slot = (from + k) % num;
            if (!programs[at_slot].ready.empty()) return true;
        }
        return false;
    }
};
