// What a program for the machine is made of. `program.py` writes these records; the two must agree field by field.
#pragma once
#include <cstdint>
#include <cstring>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

enum Kind : u16 { ARITHMETIC, SPECIAL, PARAMETER, LOAD, STORE, ATOMIC, BRANCH, BARRIER, SHUFFLE, VOTE, REDUCE, LOAD_MATRIX, STORE_MATRIX, WARP_BARRIER, EXIT };
enum Space : u8 { GLOBAL, SHARED };
enum Order : u8 { PLAIN = 0, STRONG = 1, ACQUIRE = 2, RELEASE = 4 };  // bits; a strong access is relaxed or more
enum Combine : u16 { ADD, MIN, MAX, AND, OR, XOR, EXCHANGE, COMPARE, ADD_FLOAT };
enum Exchange : u16 { BUTTERFLY, INDEX, UP, DOWN };
enum Question : u16 { BALLOT, ANY, ALL };

struct Instruction {
    u16 kind, function;  // function: of the table of arithmetic, a Combine, an Exchange, a Question, a special register
    u8 space, order, size, count;   // of an access: bytes of an item, items
    u8 is_signed, flag, pad[2];     // flag: setp's second operation, transposed, a negated operand
    s32 guard;                      // register + 1 of the predicate, negative: of its negation, 0: always
    s32 to[4], from[6];             // registers, -1: none
    s32 used_if[4];                 // of a load: where in `uses` the predicates under which an item matters begin, or -1
    s32 line;
    s64 immediate;
};

template <class T>
T as(u64 word) {  // a register read as T; what is above T's bytes is ignored
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class T>
u64 word(T value) {
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

inline u64 read_item(const u8* from, const Instruction& i) {
    u64 bits = 0;
    std::memcpy(&bits, from, i.size);
    if (!i.is_signed) return bits;
    int above = 64 - 8 * i.size;
    return u64(s64(bits << above) >> above);
}
