// The instructions that read and write registers alone, by the name that `program.py` gives them.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "instruction.h"

using Function = void (*)(u64* r, const Instruction& i);
struct Named {
    std::string name;
    Function function;
};

template <class... T>
struct Types {};
using Unsigned = Types<u8, u16, u32, u64>;
using Signed = Types<s8, s16, s32, s64>;
using Floats = Types<float, double>;

template <class T>
std::string type_name() {
    std::string letter = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "s" : "u";
    return letter + std::to_string(8 * sizeof(T));
}

template <class T, class F>
void one(u64* r, const Instruction& i) {
    r[i.to[0]] = word(static_cast<T>(F()(as<T>(r[i.from[0]]))));
}
template <class T, class F>
void two(u64* r, const Instruction& i) {
    r[i.to[0]] = word(static_cast<T>(F()(as<T>(r[i.from[0]]), as<T>(r[i.from[1]]))));
}
template <class T, class F>
void three(u64* r, const Instruction& i) {
    r[i.to[0]] = word(static_cast<T>(F()(as<T>(r[i.from[0]]), as<T>(r[i.from[1]]), as<T>(r[i.from[2]]))));
}
template <class T, class F>
void shifted(u64* r, const Instruction& i) {  // the second operand is a u32
    r[i.to[0]] = word(static_cast<T>(F()(as<T>(r[i.from[0]]), as<u32>(r[i.from[1]]))));
}

template <class T>
using Wide = std::conditional_t<
    std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, s32, std::conditional_t<sizeof(T) == 4, s64, __int128>>,
    std::conditional_t<sizeof(T) == 2, u32, std::conditional_t<sizeof(T) == 4, u64, unsigned __int128>>>;

template <class T>
void multiply_wide(u64* r, const Instruction& i) {
    r[i.to[0]] = word(Wide<T>(as<T>(r[i.from[0]])) * Wide<T>(as<T>(r[i.from[1]])));
}
template <class T>
void multiply_add_wide(u64* r, const Instruction& i) {
    using W = Wide<T>;
    r[i.to[0]] = word(W(W(as<T>(r[i.from[0]])) * W(as<T>(r[i.from[1]])) + as<W>(r[i.from[2]])));
}
template <class T>
T high(T a, T b) {
    return T((Wide<T>(a) * Wide<T>(b)) >> (8 * sizeof(T)));
}
template <class T>
void multiply_high(u64* r, const Instruction& i) {
    r[i.to[0]] = word(high(as<T>(r[i.from[0]]), as<T>(r[i.from[1]])));
}
template <class T>
void multiply_add_high(u64* r, const Instruction& i) {
    r[i.to[0]] = word(T(high(as<T>(r[i.from[0]]), as<T>(r[i.from[1]])) + as<T>(r[i.from[2]])));
}

// setp: `flag` says how the comparison is joined with a third operand; the second result is its opposite.
template <class T, class F>
void compare(u64* r, const Instruction& i) {
    bool yes = F()(as<T>(r[i.from[0]]), as<T>(r[i.from[1]])), no = !yes;
    if (i.flag) {
        bool third = r[i.from[2]] & 1;
        auto joined = [&](bool b) { return i.flag == 1 ? b && third : i.flag == 2 ? b || third : b != third; };
        yes = joined(yes), no = joined(no);
    }
    r[i.to[0]] = yes;
    if (i.to[1] >= 0) r[i.to[1]] = no;
}

template <class D, class S>
D saturated(S rounded) {  // NaN is 0
    if (std::isnan(rounded)) return 0;
    if (rounded >= static_cast<S>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
    if (rounded <= static_cast<S>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    return static_cast<D>(rounded);
}
template <class D, class S>
void converted(u64* r, const Instruction& i) {
    r[i.to[0]] = word(static_cast<D>(as<S>(r[i.from[0]])));
}
template <class D, class S, class Round>
void rounded(u64* r, const Instruction& i) {
    S value = Round()(as<S>(r[i.from[0]]));
    if constexpr (std::is_floating_point_v<D>) r[i.to[0]] = word(static_cast<D>(value));
    else r[i.to[0]] = word(saturated<D>(value));
}

template <class T>
T extract(T value, u32 begin, u32 length) {  // bfe
    const u32 width = 8 * sizeof(T);
    begin &= 255, length &= 255;
    if (!length) return 0;
    u64 sign = std::is_signed_v<T> && (u64(value) >> std::min(begin + length - 1, width - 1) & 1) ? ~u64(0) : 0;
    u64 bits = begin >= width ? sign : u64(std::make_unsigned_t<T>(value)) >> begin;
    u32 kept = begin >= width ? 0 : std::min(length, width - begin);
    u64 mask = kept >= 64 ? ~u64(0) : (u64(1) << kept) - 1;
    return T((bits & mask) | (sign & ~mask));
}
template <class T>
void extracted(u64* r, const Instruction& i) {
    r[i.to[0]] = word(extract(as<T>(r[i.from[0]]), as<u32>(r[i.from[1]]), as<u32>(r[i.from[2]])));
}
template <class T>
void insert(u64* r, const Instruction& i) {  // bfi
    const u32 begin = r[i.from[2]] & 255, length = r[i.from[3]] & 255;
    u64 mask = length >= 64 ? ~u64(0) : (u64(1) << length) - 1;
    mask = begin >= 64 ? 0 : mask << begin;
    u64 moved = begin >= 64 ? 0 : r[i.from[0]] << begin;
    r[i.to[0]] = word(T((r[i.from[1]] & ~mask) | (moved & mask)));
}
inline void permute(u64* r, const Instruction& i) {  // prmt without a mode
    u64 bytes = (r[i.from[1]] << 32) | as<u32>(r[i.from[0]]);
    u32 chosen = 0;
    for (int k = 0; k < 4; k++) {
        u32 selector = as<u32>(r[i.from[2]]) >> (4 * k) & 15;
        u8 byte = u8(bytes >> (8 * (selector & 7)));
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        chosen |= u32(byte) << (8 * k);
    }
    r[i.to[0]] = chosen;
}
inline void logic(u64* r, const Instruction& i) {  // lop3: bit k of the table is the result where a, b, c spell k
    u32 result = 0;
    for (int k = 0; k < 8; k++) {
        if (!(i.immediate >> k & 1)) continue;
        u32 here = ~u32(0);
        for (int n = 0; n < 3; n++) {
            u32 value = as<u32>(r[i.from[n]]);
            here &= k >> (2 - n) & 1 ? value : ~value;
        }
        result |= here;
    }
    r[i.to[0]] = result;
}
template <bool LEFT, bool CLAMP>
void funnel(u64* r, const Instruction& i) {
    u64 pair = (r[i.from[1]] << 32) | as<u32>(r[i.from[0]]);
    u32 by = as<u32>(r[i.from[2]]);
    by = CLAMP ? std::min(by, 32u) : by & 31;
    r[i.to[0]] = LEFT ? u32(pair >> (32 - by)) : u32(pair >> by);
}
template <class T>
void select(u64* r, const Instruction& i) {
    r[i.to[0]] = word(as<T>(r[i.from[2]] & 1 ? r[i.from[0]] : r[i.from[1]]));
}
inline void packed(u64* r, const Instruction& i) {  // `size` bytes of each of `count` registers, the first lowest
    u64 bits = 0;
    for (int k = 0; k < i.count; k++) std::memcpy(reinterpret_cast<u8*>(&bits) + k * i.size, &r[i.from[k]], i.size);
    r[i.to[0]] = bits;
}
inline void unpacked(u64* r, const Instruction& i) {
    u64 bits = r[i.from[0]];
    for (int k = 0; k < i.count; k++) {
        if (i.to[k] < 0) continue;
        u64 part = 0;
        std::memcpy(&part, reinterpret_cast<u8*>(&bits) + k * i.size, i.size);
        r[i.to[k]] = part;
    }
}

class Table {
  public:
    std::vector<Named> entries;

    void add(const std::string& name, Function function) { entries.push_back({name, function}); }
    template <class F, class... T>
    void unary(const char* name, Types<T...>, F) { (add(dotted<T>(name), one<T, F>), ...); }
    template <class F, class... T>
    void binary(const char* name, Types<T...>, F) { (add(dotted<T>(name), two<T, F>), ...); }
    template <class F, class... T>
    void ternary(const char* name, Types<T...>, F) { (add(dotted<T>(name), three<T, F>), ...); }
    template <class F, class... T>
    void shift(const char* name, Types<T...>, F) { (add(dotted<T>(name), shifted<T, F>), ...); }
    template <class F, class... T>
    void comparison(const char* name, Types<T...>, F) { (add(dotted<T>(name), compare<T, F>), ...); }
    template <class... T>
    void selection(Types<T...>) { (add(dotted<T>("selp"), select<T>), ...); }
    template <class D, class... S>
    void conversions_to(Types<S...>) { (add("cvt." + type_name<D>() + "." + type_name<S>(), converted<D, S>), ...); }
    template <class S, class... D>
    void conversions(Types<D...>) { (conversions_to<D>(Types<S>()), ...); }
    template <class S, class Round, class... D>
    void roundings(const char* name, Types<D...>, Round) {
        (add(std::string("cvt.") + name + "." + type_name<D>() + "." + type_name<S>(), rounded<D, S, Round>), ...);
    }

  private:
    template <class T>
    static std::string dotted(const char* name) { return std::string(name) + "." + type_name<T>(); }
};

template <class... T>
void integer_functions(Table& t, Types<T...> types) {
    t.binary("add", types, [](auto a, auto b) { return a + b; });
    t.binary("sub", types, [](auto a, auto b) { return a - b; });
    t.binary("mul.lo", types, [](auto a, auto b) { return a * b; });
    t.ternary("mad.lo", types, [](auto a, auto b, auto c) { return a * b + c; });
    // What a division by 0 gives is not specified, and it does not trap: masked lanes do it.
    t.binary("div", types, [](auto a, auto b) { return b == 0 ? decltype(a)(-1) : b == decltype(b)(-1) && std::is_signed_v<decltype(a)> ? 0 - a : a / b; });
    t.binary("rem", types, [](auto a, auto b) { return b == 0 ? a : b == decltype(b)(-1) && std::is_signed_v<decltype(a)> ? 0 : a % b; });
    t.binary("min", types, [](auto a, auto b) { return std::min(a, b); });
    t.binary("max", types, [](auto a, auto b) { return std::max(a, b); });
    t.unary("neg", types, [](auto a) { return 0 - a; });
    t.unary("abs", types, [](auto a) { return a < 0 ? 0 - a : a; });
    t.unary("not", types, [](auto a) { return ~a; });
    t.binary("and", types, [](auto a, auto b) { return a & b; });
    t.binary("or", types, [](auto a, auto b) { return a | b; });
    t.binary("xor", types, [](auto a, auto b) { return a ^ b; });
    t.shift("shl", types, [](auto a, u32 by) { return by >= 8 * sizeof a ? 0 : a << by; });
    t.shift("shr", types, [](auto a, u32 by) { return by < 8 * sizeof a ? a >> by : a < 0 ? decltype(a)(-1) : 0; });
    (t.add("bfe." + type_name<T>(), extracted<T>), ...);
    (t.add("bfi." + type_name<T>(), insert<T>), ...);
}

template <class T>
void multiplications(Table& t) {
    t.add("mul.hi." + type_name<T>(), multiply_high<T>);
    t.add("mad.hi." + type_name<T>(), multiply_add_high<T>);
    if constexpr (sizeof(T) < 8) {
        t.add("mul.wide." + type_name<T>(), multiply_wide<T>);
        t.add("mad.wide." + type_name<T>(), multiply_add_wide<T>);
    }
}

template <class... T>
void comparisons(Table& t, Types<T...> types) {
    t.comparison("setp.eq", types, [](auto a, auto b) { return a == b; });
    t.comparison("setp.ne", types, [](auto a, auto b) { return a < b || a > b; });
    t.comparison("setp.lt", types, [](auto a, auto b) { return a < b; });
    t.comparison("setp.le", types, [](auto a, auto b) { return a <= b; });
    t.comparison("setp.gt", types, [](auto a, auto b) { return a > b; });
    t.comparison("setp.ge", types, [](auto a, auto b) { return a >= b; });
}

inline void float_functions(Table& t) {
    Floats types;
    t.binary("add", types, [](auto a, auto b) { return a + b; });
    t.binary("sub", types, [](auto a, auto b) { return a - b; });
    t.binary("mul", types, [](auto a, auto b) { return a * b; });
    t.binary("div", types, [](auto a, auto b) { return a / b; });
    t.ternary("fma", types, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
    t.binary("min", types, [](auto a, auto b) { return std::fmin(a, b); });
    t.binary("max", types, [](auto a, auto b) { return std::fmax(a, b); });
    t.binary("min.NaN", types, [](auto a, auto b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::fmin(a, b); });
    t.binary("max.NaN", types, [](auto a, auto b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::fmax(a, b); });
    t.unary("neg", types, [](auto a) { return -a; });
    t.unary("abs", types, [](auto a) { return std::fabs(a); });
    t.unary("sqrt", types, [](auto a) { return std::sqrt(a); });
    t.unary("rcp", types, [](auto a) { return 1 / a; });
    t.unary("rsqrt", types, [](auto a) { return 1 / std::sqrt(a); });
    t.unary("ex2", types, [](auto a) { return std::exp2(a); });
    t.unary("lg2", types, [](auto a) { return std::log2(a); });
    t.unary("sin", types, [](auto a) { return std::sin(a); });
    t.unary("cos", types, [](auto a) { return std::cos(a); });
    t.unary("tanh", types, [](auto a) { return std::tanh(a); });
    t.binary("copysign", types, [](auto sign, auto a) { return std::copysign(a, sign); });
    comparisons(t, types);
    t.comparison("setp.equ", types, [](auto a, auto b) { return !(a < b || a > b); });
    t.comparison("setp.neu", types, [](auto a, auto b) { return !(a == b); });
    t.comparison("setp.ltu", types, [](auto a, auto b) { return !(a >= b); });
    t.comparison("setp.leu", types, [](auto a, auto b) { return !(a > b); });
    t.comparison("setp.gtu", types, [](auto a, auto b) { return !(a <= b); });
    t.comparison("setp.geu", types, [](auto a, auto b) { return !(a < b); });
    t.comparison("setp.num", types, [](auto a, auto b) { return !std::isnan(a) && !std::isnan(b); });
    t.comparison("setp.nan", types, [](auto a, auto b) { return std::isnan(a) || std::isnan(b); });
}

template <class S>
void rounded_conversions(Table& t) {
    using Results = Types<S, u8, u16, u32, u64, s8, s16, s32, s64>;
    t.roundings<S>("rzi", Results(), [](S a) { return std::trunc(a); });
    t.roundings<S>("rmi", Results(), [](S a) { return std::floor(a); });
    t.roundings<S>("rpi", Results(), [](S a) { return std::ceil(a); });
    t.roundings<S>("rni", Results(), [](S a) { return std::nearbyint(a); });
}

template <class... S>
void conversions_between_integers(Table& t, Types<S...>) {
    using Results = Types<u8, u16, u32, u64, s8, s16, s32, s64, float, double>;
    (t.conversions<S>(Results()), ...);
}

inline const std::vector<Named>& functions() {
    static const std::vector<Named> all = [] {
        Table t;
        integer_functions(t, Unsigned());
        integer_functions(t, Signed());
        multiplications<u16>(t), multiplications<u32>(t), multiplications<u64>(t);
        multiplications<s16>(t), multiplications<s32>(t), multiplications<s64>(t);
        comparisons(t, Unsigned()), comparisons(t, Signed());
        float_functions(t);
        conversions_between_integers(t, Unsigned()), conversions_between_integers(t, Signed());
        t.conversions<float>(Floats()), t.conversions<double>(Floats());
        rounded_conversions<float>(t), rounded_conversions<double>(t);
        t.selection(Unsigned());
        t.unary("mov", Unsigned(), [](auto a) { return a; });
        t.unary("popc", Types<u32, u64>(), [](auto a) { return sizeof a == 8 ? __builtin_popcountll(a) : __builtin_popcount(a); });
        t.unary("clz", Types<u32, u64>(), [](auto a) { return a == 0 ? int(8 * sizeof a) : sizeof a == 8 ? __builtin_clzll(a) : __builtin_clz(u32(a)); });
        t.unary("brev", Types<u32, u64>(), [](auto a) {
            decltype(a) reversed = 0;
            for (size_t k = 0; k < 8 * sizeof a; k++) reversed |= (a >> k & 1) << (8 * sizeof a - 1 - k);
            return reversed;
        });
        t.add("not.pred", [](u64* r, const Instruction& i) { r[i.to[0]] = !(r[i.from[0]] & 1); });
        t.add("prmt.u32", permute), t.add("lop3.u32", logic), t.add("pack", packed), t.add("unpack", unpacked);
        t.add("shf.l.wrap.u32", funnel<true, false>), t.add("shf.l.clamp.u32", funnel<true, true>);
        t.add("shf.r.wrap.u32", funnel<false, false>), t.add("shf.r.clamp.u32", funnel<false, true>);
        return t.entries;
    }();
    return all;
}
