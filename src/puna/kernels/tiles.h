// Products of many rows, summed in float32. A unit is what a lane holds of a row: a float that stands for a number, or,
// where the processor multiplies them (AVX512-BF16), a pair of neighbouring bfloat16; the other side is then rounded too,
// as torch does it.
//
// The rows that serve as columns are turned so that a vector holds the same unit of so many of them. No sum runs across
// lanes, and each unit that is read serves six rows of the other side, whose sums do not depend on each other.

#pragma once

#include <cfloat>

#include "passes.h"

constexpr int VECTORS = LANES / 4;  // of sums a row: AVX2 has registers for six rows of two, AVX512 for six of four
constexpr int WIDE = VECTORS * LANES, PANEL = 32 * LANES;  // columns of a block; units of a weight that are laid out at a time

#define INLINE [[gnu::always_inline]] static inline  // where an array is to stay in registers

template <class W> constexpr int NUMBERS = 1;  // in a unit
template <class W> static Ints units_at(const W *p, int count) {  // of LANES at most, with zeros behind them
    if (count == LANES) return (Ints)load(p);
    W held[LANES] = {};
    std::copy_n(p, count, held);
    return (Ints)load(held);
}
template <class W> static Floats add_products(Floats sums, Ints a, Ints b) { return multiply_add((Floats)a, (Floats)b, sums); }
#ifdef __AVX512BF16__
template <> constexpr int NUMBERS<Bf16> = 2;
template <> Ints units_at(const Bf16 *p, int count) { return (Ints)_mm512_maskz_loadu_epi32((1 << count) - 1, p); }
template <> Floats add_products<Bf16>(Floats sums, Ints a, Ints b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
#endif

// Swaps what stands S rows and S lanes apart; after every S a square of LANES x LANES units is turned.
template <int S> INLINE void swap_across(Ints (&v)[LANES]) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) low[i] = i & S ? LANES + i - S : i, high[i] = i & S ? LANES + i : i + S;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            const Ints first = v[i];
            v[i] = __builtin_shuffle(first, v[i + S], low);
            v[i + S] = __builtin_shuffle(first, v[i + S], high);
        }
}

// `count` units of `rows` rows, LANES of either at most, turned; rows that lack are the last one again. What lies `next`
// bytes further is asked for on the way; 0 asks for nothing.
template <class W> INLINE void turned(const W *w, int64_t stride, int rows, int count, int64_t next, Ints (&held)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const W *at = w + std::min(i, rows - 1) * stride;
        if (next) __builtin_prefetch((const char *)at + next);
        held[i] = units_at(at, std::min(count, LANES));
    }
    swap_across<1>(held), swap_across<2>(held), swap_across<4>(held);
    if constexpr (LANES == 16) swap_across<8>(held);
}

// Units of up to WIDE rows as columns: out (units, WIDE), of which whole LANES are written.
template <class W> static void lay_out(const W *w, int64_t stride, int rows, int units, uint32_t *out, int64_t next = 0) {
    for (int first = 0; first < rows; first += LANES)
        for (int u = 0; u < units; u += LANES) {
            Ints held[LANES];
            turned(w + first * stride + u * NUMBERS<W>, stride, rows - first, units - u, next, held);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store((float *)out + (u + i) * WIDE + first, (Floats)held[i]);
        }
}

// x (count,) as units that meet W's: itself, or pairs in `held`.
template <class W> static const uint32_t *units_of(const float *x, int64_t count, std::vector<uint32_t> &held) {
    if constexpr (NUMBERS<W> == 1) return (const uint32_t *)x;
    held.resize(count / 2 + 1);
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i *)&held[i / 2], (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
    for (; i < count; i++) put((Bf16 *)held.data() + i, x[i]);
    return held.data();
}

struct Left { const uint32_t *at; int64_t row, unit; };  // units between neighbours
struct Right {                                           // WIDE columns a block, units between neighbours
    const uint32_t *at;
    int64_t block;
    int stride;
    const char *ahead = nullptr, *end = nullptr;  // memory that is read next, to be asked for on the way
};

// Units of two bfloat16 each.
static Floats pairs(Floats low, Floats high) {
#ifdef __AVX512BF16__
    auto wide = [](Floats x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
    return (Floats)_mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16));
#else
    return low;  // no product here is of pairs
#endif
}

static int padded(int count, int to) { return (count + to - 1) / to * to; }
template <class T> static int in_units(int count) { return (count + NUMBERS<T> - 1) / NUMBERS<T>; }

// out (R, N LANES) = x (R, units) w (units, N LANES), or more of it.
template <class T, int R, int N>
static void corner(const Left &x, const uint32_t *w, int stride, int units, float *out, int wide, bool adds, const char *ahead) {
    Floats sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = adds ? load(out + r * wide + n * LANES) : all(0);
    for (int u = 0; u < units; u++, w += stride) {
        if (ahead) __builtin_prefetch(ahead + u * LINE, 0, 2);
        for (int r = 0; r < R; r++) {
            const Ints unit = every(x.at[r * x.row + u * x.unit]);
            for (int n = 0; n < N; n++) sums[r][n] = add_products<T>(sums[r][n], unit, (Ints)load((const float *)w + n * LANES));
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + r * wide + n * LANES, sums[r][n]);
}

// out (rows, columns), whose rows stand `wide` numbers apart; columns are whole LANES.
template <class T>
static void product(const Left &x, const Right &w, int units, float *out, int wide, int rows, int columns, bool adds = false) {
    const char *ahead = w.ahead;
    auto block = [&](int column, auto n) {
        int r = 0;
        auto some = [&](auto count) {
            for (; r + count <= rows; r += count) {
                corner<T, count, n>({x.at + r * x.row, x.row, x.unit}, w.at + column / WIDE * w.block + column % WIDE, w.stride,
                                    units, out + (int64_t)r * wide + column, wide, adds, ahead);
                ahead = ahead && w.end - ahead > units * LINE ? ahead + units * LINE : nullptr;
            }
        };
        some(std::integral_constant<int, 6>()), some(std::integral_constant<int, 3>());
        some(std::integral_constant<int, 2>()), some(std::integral_constant<int, 1>());
    };
    int column = 0;
    for (; column + WIDE <= columns; column += WIDE) block(column, std::integral_constant<int, VECTORS>());
    const int left = (columns - column) / LANES;
    if (left == 3) block(column, std::integral_constant<int, 3>());
    if (left == 2) block(column, std::integral_constant<int, 2>());
    if (left == 1) block(column, std::integral_constant<int, 1>());
}

// The tokens of one head, and what products need of them.
template <class T> struct Head {
    const T *at;
    int64_t stride;
    int rows, width;

    Left left() const { return {(const uint32_t *)at, stride / NUMBERS<T>, 1}; }
    Head part(int begin, int count) const { return {at + begin * stride, stride, count, width}; }

    // The rows as columns: to multiply with other rows.
    Right turned(std::vector<uint32_t> &room, int64_t next = 0) const {
        const int units = width / NUMBERS<T>, block = padded(units, LANES) * WIDE;
        room.resize(padded(rows, WIDE) / WIDE * block);
        for (int r = 0; r < rows; r += WIDE)
            lay_out(at + r * stride, stride, std::min(WIDE, rows - r), units, room.data() + r / WIDE * block, next);
        return {room.data(), block, WIDE};
    }
    // The rows as they are, to be summed: neighbours in one unit.
    Right paired(std::vector<uint32_t> &room, int64_t next = 0) const {
        const int wide = padded(width, LANES);
        room.resize((rows + 1) * wide);
        for (int r = 0; r < rows; r += NUMBERS<T>)
            along(width, [&](int i, auto part) {
                const T *first = at + r * stride + i, *second = first + stride;
                if (next) __builtin_prefetch((const char *)first + next);
                if (next && NUMBERS<T> == 2) __builtin_prefetch((const char *)second + next);
                Floats units = part.get(first);
                if (NUMBERS<T> == 2) units = pairs(units, r + 1 < rows ? part.get(second) : all(0));
                store((float *)room.data() + r / NUMBERS<T> * wide + i, units);
            });
        return {room.data(), WIDE, wide};
    }
};

// The units of rows (count, wide) that stand below each other, to multiply what they weigh: (count / 2, wide) or as it is.
template <class T> static Left turned_left(const float *rows, int count, int wide, std::vector<uint32_t> &room) {
    if constexpr (NUMBERS<T> == 1) return {(const uint32_t *)rows, 1, wide};
    room.resize((count + 1) / 2 * wide);
    for (int r = 0; r < count; r += 2)
        for (int i = 0; i < wide; i += LANES) {
            const Floats high = r + 1 < count ? load(rows + (r + 1) * wide + i) : all(0);
            store((float *)room.data() + r / 2 * wide + i, pairs(load(rows + r * wide + i), high));
        }
    return {room.data(), 1, wide};
}

// Rows (count, wide) in place as numbers of type T.
template <class T> static Left left_of(float *rows, int count, int wide) {
    if constexpr (NUMBERS<T> == 2)
        for (int r = 0; r < count; r++)
            for (int i = 0; i < wide; i += LANES) store((Bf16 *)(rows + r * wide) + i, load(rows + r * wide + i));
    return {(const uint32_t *)rows, wide, 1};
}

// f(i, scores) along the keys that a query sees of its row of scores; `wide` is whole LANES, and -inf what it does not see.
template <class F> static void seen_scores(const float *row, int wide, int seen, const int8_t *marks, float scale, const F &f) {
    for (int i = 0; i < wide; i += LANES) {
        Floats score = load(row + i) * all(scale);
        if (i + LANES > seen) score = Part{std::max(0, seen - i)}.or_lowest(score);
        if (marks && i < seen) {
            const Floats marked = i + LANES > seen ? Part{seen - i}.get(marks + i) : load(marks + i);
            score = marked != all(0) ? score : all(-INFINITY);
        }
        f(i, score);
    }
}

// A query's row of scores becomes e^(score - the highest), and 0 where it sees no key: the highest and the sum of these.
static std::pair<float, float> weigh(float *row, int wide, int seen, const int8_t *marks, float scale) {
    Floats most = all(-INFINITY);
    seen_scores(row, wide, seen, marks, scale, [&](int i, Floats score) {
        store(row + i, score), most = score > most ? score : most;
    });
    const float at_most = std::max(highest(most), -FLT_MAX);  // it may see none
    return {at_most, exponentials(row, wide, at_most)};
}
