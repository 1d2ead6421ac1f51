// What the machine knows of every unit of memory: who touched it, what it held before, and what is ordered before what.
//
// A unit is the smallest item that the program accesses (1, 2 or 4 bytes). Every access has a time; the order in which
// the machine makes accesses is one of many, so two accesses are ordered only where the program says so: by one
// thread, a barrier, or a release that an acquire has read. Two of one unit that are not, one of them a write and one
// of them plain, are a race.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "instruction.h"

struct Access {
    s32 thread = -1;  // of the whole grid
    s32 at = 0;       // instruction
    u64 time = 0;
};

// What was before now: everything of a program, or of one thread (key -1 - thread), up to a time. Sorted by key.
using View = std::vector<std::pair<s32, u64>>;
using Shared = std::shared_ptr<const View>;

inline u64 time_of(const Shared& view, s32 key) {
    if (!view) return 0;
    auto found = std::lower_bound(view->begin(), view->end(), std::pair<s32, u64>(key, 0));
    return found != view->end() && found->first == key ? found->second : 0;
}

inline Shared joined(const Shared& a, const Shared& b) {
    if (!a || a == b) return b;
    if (!b) return a;
    auto both = std::make_shared<View>();
    auto x = a->begin(), y = b->begin();
    while (x != a->end() || y != b->end()) {
        if (y == b->end() || (x != a->end() && x->first < y->first)) both->push_back(*x++);
        else if (x == a->end() || y->first < x->first) both->push_back(*y++);
        else both->push_back({x->first, std::max(x->second, y->second)}), x++, y++;
    }
    return both;
}

// Where a thread is in the order of things; the machine fills it in before it asks for an access.
struct Viewer {
    s32 thread, program, warp, threads_of_program;
    u64 barrier, warp_barrier;  // when the program's, the warp's last barrier was
    const Shared *of_program, *own;

    bool knows(const Access& other) const {
        if (other.thread == thread) return true;
        s32 their_program = other.thread / threads_of_program;
        if (their_program == program) {
            if (other.time <= barrier) return true;
            if (other.thread % threads_of_program / 32 == warp && other.time <= warp_barrier) return true;
        }
        for (const Shared* view : {of_program, own}) {
            if (!*view) continue;
            if (other.time <= time_of(*view, their_program) || other.time <= time_of(*view, -1 - other.thread)) return true;
        }
        return false;
    }
};

enum Conflict { TWO_WRITES, WRITE_THEN_READ, READ_THEN_WRITE, WRITE_AND_STRONG, READ_AND_STRONG };

struct Race {
    s32 conflict, space, earlier, later;
    bool operator==(const Race& o) const {
        return conflict == o.conflict && space == o.space && earlier == o.earlier && later == o.later;
    }
};

// Some of the accesses that are not ordered among each other.
template <int N>
struct Recent {
    std::array<Access, N> kept;

    void add(const Access& now, const Viewer& who) {
        Access* place = &kept[now.time % N];
        for (Access& one : kept)
            if (one.thread < 0 || who.knows(one)) place = &one;
        for (Access& one : kept)
            if (one.thread == now.thread) place = &one;
        *place = now;
    }
};

struct Cell {
    Access write;
    Recent<3> reads;
    Recent<2> strong, strong_writes;
    u32 atomics = 0;
};

// One plain or strong access to one unit, against those before it.
class Races {
  public:
    std::vector<Race> found;

    void read(Cell& cell, const Viewer& who, const Access& now, u8 space) {
        tell(WRITE_THEN_READ, space, cell.write, who, now);
        for (const Access& one : cell.strong_writes.kept) tell(READ_AND_STRONG, space, one, who, now);
        cell.reads.add(now, who);
    }
    void write(Cell& cell, const Viewer& who, const Access& now, u8 space, bool same_value) {
        if (!same_value) tell(TWO_WRITES, space, cell.write, who, now);
        for (const Access& one : cell.strong.kept) tell(WRITE_AND_STRONG, space, one, who, now);
        for (const Access& one : cell.reads.kept) tell(READ_THEN_WRITE, space, one, who, now);
        cell.write = now;
    }
    void strong(Cell& cell, const Viewer& who, const Access& now, u8 space, bool writes) {
        tell(WRITE_AND_STRONG, space, cell.write, who, now);
        cell.strong.add(now, who);
        if (!writes) return;
        for (const Access& one : cell.reads.kept) tell(READ_AND_STRONG, space, one, who, now);
        cell.strong_writes.add(now, who);
    }

  private:
    void tell(Conflict conflict, u8 space, const Access& earlier, const Viewer& who, const Access& later) {
        if (earlier.thread < 0 || who.knows(earlier)) return;
        Race race{conflict, space, earlier.at, later.at};
        if (std::find(found.begin(), found.end(), race) == found.end()) found.push_back(race);
    }
};

struct Region {
    u64 begin, end;
};

// The tensors of a launch: bounds, a cell for each unit that was touched, and what words held before they were written.
class GlobalMemory {
  public:
    u64 stale_loads = 0;

    GlobalMemory(const Region* regions, int num_regions, u64 unit) : regions(regions, regions + num_regions), unit(unit) {
        pages.resize(num_regions);
        for (int k = 0; k < num_regions; k++) pages[k].resize((regions[k].end - regions[k].begin) / (unit * PAGE) + 2);
    }
    // The region that holds these bytes, or -1.
    int region_of(u64 address, u64 bytes) const {
        auto above = std::upper_bound(regions.begin(), regions.end(), address, [](u64 a, const Region& r) { return a < r.begin; });
        if (above == regions.begin() || address + bytes > std::prev(above)->end || address + bytes < address) return -1;
        return int(above - regions.begin()) - 1;
    }
    Cell& cell(int region, u64 address) {
        u64 nth = (address - regions[region].begin / unit * unit) / unit;
        auto& page = pages[region][nth / PAGE];
        if (!page) page.reset(new Cell[PAGE]);
        return page[nth % PAGE];
    }
    // To be called before `bytes` at `address` change.
    void remember(u64 address, u64 bytes, const Access& now) {
        for (u64 at = address / unit * unit; at < address + bytes; at += unit) {
            u32 before = 0;
            std::memcpy(&before, reinterpret_cast<void*>(at), unit);
            auto& versions = history[at];
            if (versions.size() == VERSIONS) versions.erase(versions.begin());
            versions.push_back({before, now});
        }
    }
    // Replaces what a plain load has read by what its sector held at some time since which nothing that the thread
    // knows of was written there, and which is not before what its program has already seen: a cache's line.
    void age(u64 address, u64 bytes, const Viewer& who, std::mt19937_64& random, u8* read) {
        if (history.empty()) return;
        u64 since = 0;
        times.clear();
        for (u64 at = address / unit * unit; at < address + bytes; at += unit) {
            auto found = history.find(at);
            if (found == history.end()) continue;
            for (auto v = found->second.rbegin(); v != found->second.rend(); v++) {
                if (who.knows(v->write)) { since = std::max(since, v->write.time); break; }
                times.push_back(v->write.time - 1);
            }
            // what was forgotten is known to have been
            if (found->second.size() == VERSIONS) since = std::max(since, found->second.front().write.time - 1);
        }
        if (times.empty()) return;
        u64& seen = latest_seen[{address / 32, who.program}];
        since = std::max(since, seen);
        u64 pick = random();
        if (pick & 1) {  // what is there now
            seen = std::max(since, *std::max_element(times.begin(), times.end()) + 1);
            return;
        }
        u64 chosen = std::max(since, times[(pick >> 1) % times.size()]);
        seen = chosen;
        bool differs = false;
        for (u64 at = address / unit * unit; at < address + bytes; at += unit) {
            auto found = history.find(at);
            if (found == history.end()) continue;
            for (const Version& v : found->second) {
                if (v.write.time <= chosen) continue;
                differs |= std::memcmp(read + (at - address), &v.before, unit) != 0;
                std::memcpy(read + (at - address), &v.before, unit);
                break;
            }
        }
        stale_loads += differs;
    }
    // What whoever reads `address` with acquire may know from then on.
    Shared released(u64 address) const {
        auto found = releases.find(address);
        return found == releases.end() ? nullptr : found->second;
    }
    void release(u64 address, const Shared& view) { releases[address] = view; }
    void forget_release(u64 address) {
        if (!releases.empty()) releases.erase(address);
    }

  private:
    static constexpr u64 PAGE = 256;
    static constexpr size_t VERSIONS = 8;
    struct Version {
        u32 before;
        Access write;
    };
    struct Sector {
        u64 number;
        s32 program;
        bool operator==(const Sector& o) const { return number == o.number && program == o.program; }
    };
    struct Hash {
        size_t operator()(const Sector& s) const { return (s.number * 1000003 + u64(s.program)) * 0x9E3779B97F4A7C15u >> 16; }
    };
    std::vector<Region> regions;
    u64 unit;
    std::vector<std::vector<std::unique_ptr<Cell[]>>> pages;
    std::unordered_map<u64, std::vector<Version>> history;
    std::unordered_map<Sector, u64, Hash> latest_seen;
    std::unordered_map<u64, Shared> releases;
    std::vector<u64> times;
};
