// Runs one launch of a program: every thread with its own registers, switched at every access to memory.
#include <map>
#include <string>

#include "arithmetic.h"
#include "memory.h"
#include "threads.h"
#include "warp.h"

struct Launch {  // the records that Python fills and reads; `library.py` has the same
    const Instruction* code;
    const u64* registers;  // what a thread begins with: constants
    const u8* parameters;
    const Region* regions;
    const s32 *uses, *hoisted;  // predicates + 1 in lists that end with 0; instructions done before a thread begins
    s32 num_instructions, num_registers, num_regions, num_hoisted;
    s32 grid[3], num_threads, shared_bytes, global_unit, shared_unit, resident, mode, stale;
    u64 seed, limit;
};
struct Outcome {
    u64 executed, accesses, global_accesses, accesses_16_bytes, atomics, hottest, lost_swaps, stale_loads;
    s32 num_races;
    Race races[64];
    s32 line;
    char fault[400];
};

struct Fault {
    std::string what;
    s32 line;
};

class Machine {
  public:
    Machine(const Launch& l, Outcome& o)
        : l(l), o(o), memory(l.regions, l.num_regions, l.global_unit), scheduler(l.seed, Mode(l.mode)) {}

    void run() {
        total = l.grid[0] * l.grid[1] * l.grid[2];
        programs.resize(std::max(0, std::min(l.resident, total)));
        for (Program& p : programs) start(p);
        s32 slot, thread;
        for (s32 done = 0; done < total;) {
            if (!scheduler.next(programs, slot, thread)) throw Fault{deadlock(), 0};
            Program& p = programs[slot];
            Thread& t = p.threads[thread];
            advance(p, t);
            if (t.state != READY && t.place_in_ready >= 0) p.make_waiting(t);
            if (p.alive > 0) continue;
            done++;
            p.number = -1;
            if (started < total) start(p);
        }
    }
    void report() {
        o.stale_loads = memory.stale_loads;
        o.num_races = s32(std::min<size_t>(64, races.found.size()));
        std::copy_n(races.found.begin(), o.num_races, o.races);
    }

  private:
    const Launch& l;
    Outcome& o;
    GlobalMemory memory;
    Scheduler scheduler;
    Races races;
    std::vector<Program> programs;
    s32 total = 0, started = 0;
    u64 now = 0;

    void start(Program& p) {
        const s32 n = l.num_threads;
        p.number = started++, p.alive = n, p.at_barrier = 0, p.barrier = now, p.view = nullptr;
        p.warp_barriers.assign((n + 31) / 32, now);
        p.shared.assign(l.shared_bytes, 0xA7);
        p.cells.assign(l.shared_bytes / l.shared_unit + 1, Cell());
        p.registers.resize(size_t(n) * l.num_registers);
        p.threads.assign(n, Thread());
        p.ready.clear();
        for (s32 k = 0; k < n; k++) {
            Thread& t = p.threads[k];
            t.number = k, t.registers = &p.registers[size_t(k) * l.num_registers];
            std::copy_n(l.registers, l.num_registers, t.registers);
            for (s32 h = 0; h < l.num_hoisted; h++) calculate(p, t, l.code[l.hoisted[h]]);
            p.make_ready(t);
        }
    }

    static bool holds(const Thread& t, s32 predicate) {
        return predicate == 0 || (predicate > 0 ? t.registers[predicate - 1] & 1 : !(t.registers[-predicate - 1] & 1));
    }
    static bool is_access(const Instruction& i) { return i.kind == LOAD || i.kind == STORE || i.kind == ATOMIC; }

    // Makes the access that the thread has come to, and goes on to the next one.
    void advance(Program& p, Thread& t) {
        for (bool accessed = false;; ) {
            const Instruction& i = l.code[t.counter];
            const bool on = holds(t, i.guard);
            if (on && accessed && is_access(i)) return;
            if (++o.executed > l.limit) throw Fault{"more than " + std::to_string(l.limit) + " instructions. A loop does not end, or waits for what never comes", i.line};
            t.counter++;
            if (!on) continue;
            switch (i.kind) {
                case ARITHMETIC: case SPECIAL: case PARAMETER: calculate(p, t, i); break;
                case LOAD: load(p, t, i), accessed = true; break;
                case STORE: store(p, t, i), accessed = true; break;
                case ATOMIC: atomic(p, t, i), accessed = true; break;
                case BRANCH: t.counter = s32(i.immediate); break;
                case BARRIER: t.state = AT_BARRIER, p.at_barrier++; return pass_barrier(p);
                case EXIT: t.state = DONE, p.alive--; return pass_barrier(p);
                default: t.state = IN_WARP, t.counter--; return meet(p, t);
            }
        }
    }
    void calculate(Program& p, Thread& t, const Instruction& i) {
        u64* r = t.registers;
        if (i.kind == ARITHMETIC) {
            functions()[i.function].function(r, i);
        } else if (i.kind == PARAMETER) {
            for (int k = 0; k < i.count; k++) r[i.to[k]] = read_item(l.parameters + r[i.from[0]] + i.immediate + k * i.size, i);
        } else {
            const s32 x = l.grid[0], y = l.grid[1];
            const s32 values[] = {t.number, 0, 0, p.number % x, p.number / x % y, p.number / x / y, x, y, l.grid[2], t.number % 32, l.num_threads, 1, 1, t.number / 32};
            r[i.to[0]] = u64(values[i.function]);
        }
    }

    Viewer viewer(const Program& p, const Thread& t) const {
        s32 warp = t.number / 32;
        return {p.number * l.num_threads + t.number, p.number, warp, l.num_threads, p.barrier, p.warp_barriers[warp], &p.view, &t.acquired};
    }
    [[noreturn]] void fail(const Program& p, const Thread& t, const Instruction& i, const char* what, u64 address) {
        char text[200];
        std::snprintf(text, sizeof text, "%d x %d bytes at 0x%llx %s, by thread %d of program %d", i.count, i.size, (unsigned long long)address, what, t.number, p.number);
        throw Fault{text, i.line};
    }
    // Where an access goes. Global: the address itself, and its region.
    u8* reach(Program& p, const Thread& t, const Instruction& i, u64& address, int& region) {
        const u64 bytes = u64(i.size) * i.count;
        address = t.registers[i.from[0]] + i.immediate;
        if (i.space == SHARED) address &= 0xFFFFFFFF;
        if (address % bytes) fail(p, t, i, "are misaligned", address);
        if (i.space == SHARED) {
            if (address + bytes > p.shared.size()) fail(p, t, i, "outside shared memory", address);
            return &p.shared[address];
        }
        region = memory.region_of(address, bytes);
        if (region < 0) fail(p, t, i, "outside every tensor of the launch", address);
        return reinterpret_cast<u8*>(address);
    }
    Access begin_access(const Program& p, const Thread& t, const Instruction& i) {
        o.accesses++;
        o.global_accesses += i.space == GLOBAL;
        o.accesses_16_bytes += i.size * i.count >= 16;
        return {p.number * l.num_threads + t.number, s32(&i - l.code), ++now};
    }
    template <class F>
    void each_cell(Program& p, const Instruction& i, u64 address, u64 bytes, int region, F visit) {
        const u64 unit = i.space == SHARED ? l.shared_unit : l.global_unit;
        for (u64 at = address / unit * unit; at < address + bytes; at += unit)
            visit(i.space == SHARED ? p.cells[at / unit] : memory.cell(region, at), at);
    }

    void load(Program& p, Thread& t, const Instruction& i) {
        u64 address;
        int region = 0;
        u8 bytes[32];
        const u64 size = u64(i.size) * i.count;
        const u8* from = reach(p, t, i, address, region);
        const Access access = begin_access(p, t, i);
        const Viewer who = viewer(p, t);
        std::memcpy(bytes, from, size);
        if (i.order == PLAIN && i.space == GLOBAL && l.stale) memory.age(address, size, who, scheduler.random, bytes);
        for (int k = 0; k < i.count; k++) {
            if (!is_used(t, i.used_if[k])) continue;
            each_cell(p, i, address + u64(k) * i.size, i.size, region, [&](Cell& c, u64) {
                if (i.order == PLAIN) races.read(c, who, access, i.space);
                else races.strong(c, who, access, i.space, false);
            });
        }
        if (i.order & ACQUIRE) t.acquired = joined(t.acquired, memory.released(address));
        for (int k = 0; k < i.count; k++)
            if (i.to[k] >= 0) t.registers[i.to[k]] = read_item(bytes + k * i.size, i);
    }
    bool is_used(const Thread& t, s32 first) const {
        if (first < 0) return true;
        for (const s32* use = l.uses + first; *use; use++)
            if (holds(t, *use)) return true;
        return false;
    }

    void store(Program& p, Thread& t, const Instruction& i) {
        u64 address;
        int region = 0;
        u8 bytes[32];
        const u64 size = u64(i.size) * i.count;
        u8* to = reach(p, t, i, address, region);
        const Access access = begin_access(p, t, i);
        const Viewer who = viewer(p, t);
        for (int k = 0; k < i.count; k++) std::memcpy(bytes + k * i.size, &t.registers[i.from[1 + k]], i.size);
        each_cell(p, i, address, size, region, [&](Cell& c, u64 at) {
            const u64 unit = i.space == SHARED ? l.shared_unit : l.global_unit;
            if (i.order == PLAIN) races.write(c, who, access, i.space, !std::memcmp(to + (at - address), bytes + (at - address), unit));
            else races.strong(c, who, access, i.space, true);
        });
        if (i.space == GLOBAL) {
            if (l.stale) memory.remember(address, size, access);
            publish(p, t, i, address, false);
        }
        std::memcpy(to, bytes, size);
    }
    // What a release makes known to who acquires it. A relaxed atomic passes on what was there; other writes end it.
    void publish(const Program& p, const Thread& t, const Instruction& i, u64 address, bool passes_on) {
        if (i.order & RELEASE) {
            auto mine = std::make_shared<View>(View{{-1 - (p.number * l.num_threads + t.number), now}, {p.number, p.barrier}});
            Shared all = joined(joined(p.view, t.acquired), mine);
            memory.release(address, passes_on ? joined(all, memory.released(address)) : all);
        } else if (!passes_on) {
            memory.forget_release(address);
        }
    }

    void atomic(Program& p, Thread& t, const Instruction& i) {
        u64 address;
        int region = 0;
        u8* at = reach(p, t, i, address, region);
        const Access access = begin_access(p, t, i);
        const Viewer who = viewer(p, t);
        const u64* r = t.registers;
        u64 before[4] = {}, after[4] = {};
        bool changes = false;
        for (int k = 0; k < i.count; k++) {
            std::memcpy(&before[k], at + k * i.size, i.size);
            after[k] = combined(i, before[k], r[i.from[1 + k]], i.function == COMPARE ? r[i.from[2]] : 0);
            changes |= std::memcmp(&before[k], &after[k], i.size) != 0;
            if (i.function == COMPARE) o.lost_swaps += before[k] != (r[i.from[1]] & ~u64(0) >> (64 - 8 * i.size));
        }
        each_cell(p, i, address, u64(i.size) * i.count, region, [&](Cell& c, u64 place) {
            races.strong(c, who, access, i.space, changes);
            if (place == address && i.space == GLOBAL) o.hottest = std::max<u64>(o.hottest, ++c.atomics);
        });
        if (i.space == GLOBAL) {
            o.atomics++;
            if (i.order & ACQUIRE) t.acquired = joined(t.acquired, memory.released(address));
            if (changes && l.stale) memory.remember(address, u64(i.size) * i.count, access);
            if (changes || i.function != COMPARE) publish(p, t, i, address, true);
        }
        for (int k = 0; k < i.count; k++) {
            std::memcpy(at + k * i.size, &after[k], i.size);
            if (i.to[k] >= 0) t.registers[i.to[k]] = before[k];
        }
    }
    void pass_barrier(Program& p) {
        if (!p.at_barrier || p.at_barrier != p.alive) return;
        p.at_barrier = 0, p.barrier = ++now;
        for (Thread& t : p.threads) {
            p.view = joined(p.view, t.acquired);
            t.acquired = nullptr;
            if (t.state == AT_BARRIER) p.make_ready(t);
        }
    }

    // An instruction that the lanes of a warp do together, once all have come to it.
    void meet(Program& p, Thread& t) {
        const s32 first = t.number / 32 * 32, lanes = std::min(32, l.num_threads - first);
        Thread* warp = &p.threads[first];
        for (s32 k = 0; k < lanes; k++)
            if (warp[k].state != DONE && (warp[k].state != IN_WARP || warp[k].counter != t.counter)) return;
        const Instruction& i = l.code[t.counter];
        if (i.kind == WARP_BARRIER) pass_warp_barrier(p, warp, lanes);
        else if (i.kind == LOAD_MATRIX || i.kind == STORE_MATRIX) move_matrices(p, warp, i);
        else exchange(warp, lanes, i);
        for (s32 k = 0; k < lanes; k++) {
            if (warp[k].state == DONE) continue;
            warp[k].counter++;
            p.make_ready(warp[k]);
        }
    }
    void pass_warp_barrier(Program& p, Thread* warp, s32 lanes) {
        p.warp_barriers[warp->number / 32] = ++now;
        Shared all;
        for (s32 k = 0; k < lanes; k++) all = joined(all, warp[k].acquired);
        for (s32 k = 0; k < lanes; k++) warp[k].acquired = all;
    }
    void exchange(Thread* warp, s32 lanes, const Instruction& i) {
        u64 results[32] = {}, inside[32] = {};
        for (s32 k = 0; k < lanes; k++) {
            if (warp[k].state == DONE) continue;
            const s32 mask = i.from[i.kind == SHUFFLE ? 3 : 1];
            if (as<u32>(warp[k].registers[mask]) != 0xFFFFFFFF) throw Fault{"an instruction of a warp whose mask is not all lanes", i.line};
            if (i.kind == SHUFFLE) {
                s32 source = source_of(warp[k], i, k, inside[k]);
                results[k] = as<u32>(warp[source % lanes].registers[i.from[0]]);
            } else {
                results[k] = i.kind == VOTE ? voted(warp, lanes, i) : reduced(warp, lanes, i);
            }
        }
        for (s32 k = 0; k < lanes; k++) {
            if (warp[k].state == DONE) continue;
            warp[k].registers[i.to[0]] = results[k];
            if (i.to[1] >= 0) warp[k].registers[i.to[1]] = inside[k];
        }
    }
    // Matrices of 8 x 8 items of two bytes: lane 8 m + k gives the address of row k of matrix m; lane k holds of each
    // the items 2 (k % 4) and 2 (k % 4) + 1 of row k / 4, or, transposed, of column k / 4.
    void move_matrices(Program& p, Thread* warp, const Instruction& i) {
        const bool stores = i.kind == STORE_MATRIX;
        u32 held[32][4] = {};
        for (int lane = 0; stores && lane < 32; lane++)
            for (int m = 0; m < i.count; m++) held[lane][m] = as<u32>(warp[lane].registers[i.from[1 + m]]);
        for (int m = 0; m < i.count; m++) {
            for (int row = 0; row < 8; row++) {
                u16* items[8];
                for (int column = 0; column < 8; column++) {
                    const int across = i.flag ? row : column, along = i.flag ? column : row;
                    items[column] = reinterpret_cast<u16*>(&held[4 * along + across / 2][m]) + across % 2;
                }
                move_row(p, warp[8 * m + row], i, items);
            }
        }
        for (int lane = 0; !stores && lane < 32; lane++)
            for (int m = 0; m < i.count; m++) warp[lane].registers[i.to[m]] = held[lane][m];
    }
    void move_row(Program& p, const Thread& owner, const Instruction& i, u16* const* items) {
        Instruction whole = i;
        whole.size = 16, whole.count = 1;
        u64 address;
        int region = 0;
        u8* at = reach(p, owner, whole, address, region);
        const Access access = begin_access(p, owner, i);
        const Viewer who = viewer(p, owner);
        u16 row[8];
        for (int k = 0; k < 8; k++) row[k] = *items[k];
        each_cell(p, whole, address, 16, region, [&](Cell& c, u64 unit) {
            const u64 offset = unit - address;
            if (i.kind == LOAD_MATRIX) races.read(c, who, access, SHARED);
            else races.write(c, who, access, SHARED, !std::memcmp(at + offset, reinterpret_cast<u8*>(row) + offset, l.shared_unit));
        });
        if (i.kind == STORE_MATRIX) std::memcpy(at, row, 16);
        else for (int k = 0; k < 8; k++) std::memcpy(items[k], at + 2 * k, 2);
    }

    std::string deadlock() const {
        std::string text = "deadlock: no thread can go on. There wait";
        for (const Program& p : programs) {
            if (p.number < 0) continue;
            std::map<s32, s32> waiting;
            for (const Thread& t : p.threads)
                if (t.state != DONE) waiting[l.code[t.state == AT_BARRIER ? t.counter - 1 : t.counter].line]++;
            for (auto [line, num] : waiting) text += " " + std::to_string(num) + " threads of program " + std::to_string(p.number) + " at line " + std::to_string(line) + ";";
            if (text.size() > 250) break;
        }
        return text;
    }
};

extern "C" {
s32 num_functions() { return s32(functions().size()); }
const char* function_name(s32 nth) { return functions()[nth].name.c_str(); }
s32 size_of_instruction() { return sizeof(Instruction); }
void evaluate(s32 nth, u64* registers, const Instruction* i) { functions()[nth].function(registers, *i); }
void launch(const Launch* l, Outcome* o) {
    Machine machine(*l, *o);
    try {
        machine.run();
    } catch (const Fault& fault) {
        o->line = fault.line;
        std::snprintf(o->fault, sizeof o->fault, "%s", fault.what.c_str());
    }
    machine.report();
}
}
