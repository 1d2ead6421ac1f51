// What atomics compute, and what the lanes of a warp do together.
#pragma once
#include "arithmetic.h"
#include "threads.h"

inline u64 combined(const Instruction& i, u64 old, u64 given, u64 instead) {
    const int above = 64 - 8 * i.size;
    const u64 cut = ~u64(0) >> above;
    given &= cut;
    const bool less = i.is_signed ? s64(given << above) < s64(old << above) : given < old;
    switch (i.function) {
        case ADD: return (old + given) & cut;
        case MIN: return less ? given : old;
        case MAX: return less ? old : given;
        case AND: return old & given;
        case OR: return old | given;
        case XOR: return old ^ given;
        case EXCHANGE: return given;
        case ADD_FLOAT: return i.size == 4 ? word(as<float>(old) + as<float>(given)) : word(as<double>(old) + as<double>(given));
        default: return old == given ? instead & cut : old;
    }
}

// The lane that a shuffle reads; `inside`: whether the one that was asked for is in the segment.
inline s32 source_of(const Thread& t, const Instruction& i, s32 lane, u64& inside) {
    const u32 by = as<u32>(t.registers[i.from[1]]) & 31, clamp = as<u32>(t.registers[i.from[2]]);
    const s32 segment = clamp >> 8 & 31, last = (lane & segment) | (clamp & 31 & ~segment), first = lane & segment;
    const s32 sources[] = {lane ^ s32(by), first | s32(by & ~u32(segment)), lane - s32(by), lane + s32(by)};
    const s32 source = sources[i.function];
    inside = i.function == UP ? source >= last : source <= last;
    return inside ? source : lane;
}
inline u64 voted(const Thread* warp, s32 lanes, const Instruction& i) {
    u32 yes = 0, voters = 0;
    for (s32 k = 0; k < lanes; k++) {
        if (warp[k].state == DONE) continue;
        voters |= u32(1) << k;
        yes |= u32((warp[k].registers[i.from[0]] & 1) != i.flag) << k;
    }
    return i.function == BALLOT ? yes : i.function == ANY ? yes != 0 : yes == voters;
}
inline u64 reduced(const Thread* warp, s32 lanes, const Instruction& i) {
    u64 result = 0;
    bool begun = false;
    for (s32 k = 0; k < lanes; k++) {
        if (warp[k].state == DONE) continue;
        u64 value = as<u32>(warp[k].registers[i.from[0]]);
        result = begun ? combined(i, result, value, 0) : value;
        begun = true;
    }
    return result;
}
