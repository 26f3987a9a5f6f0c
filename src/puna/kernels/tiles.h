// Products of many rows, summed in float32. A unit is what a lane holds of a row: a float that stands for a number, or,
// where the processor multiplies them (AVX512-BF16), a pair of neighbouring bfloat16; the other side is then rounded too,
// as torch does it.
//
// The rows that serve as columns are turned so that a vector holds the same unit of so many of them. No sum runs across
// lanes, and each unit that is read serves six rows of the other side, whose sums do not depend on each other. A processor
// with matrix tiles (AMX) takes sixteen units of sixteen rows and columns at once: the layout is the one that they ask for.

#pragma once

#include <cfloat>
#include <sys/syscall.h>
#include <unistd.h>

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
template <class W> INLINE void turned_square(const W *w, int64_t stride, int rows, int count, int64_t next, Ints (&held)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const W *at = w + std::min(i, rows - 1) * stride;
        if (next) __builtin_prefetch((const char *)at + next);
        held[i] = units_at(at, std::min(count, LANES));
    }
    swap_across<1>(held), swap_across<2>(held), swap_across<4>(held);
    if constexpr (LANES == 16) swap_across<8>(held);
}

// Units of rows as columns: out (units, wide), of which whole LANES are written.
template <class W>
static void lay_out(const W *w, int64_t stride, int rows, int units, uint32_t *out, int wide = WIDE, int64_t next = 0) {
    for (int first = 0; first < rows; first += LANES)
        for (int u = 0; u < units; u += LANES) {
            Ints held[LANES];
            turned_square(w + first * stride + u * NUMBERS<W>, stride, rows - first, units - u, next, held);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store((float *)out + (u + i) * wide + first, (Floats)held[i]);
        }
}

struct Left {  // units between rows
    const uint32_t *at;
    int64_t row;
    const char *ahead = nullptr, *end = nullptr;  // memory that is read next, to be asked for on the way
};
struct Right { const uint32_t *at; int64_t block; int stride; };  // WIDE columns a block, units between neighbours

// Units of two bfloat16 each.
static Floats pairs(Floats low, Floats high) {
#ifdef __AVX512BF16__
    auto wide = [](Floats x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
    return (Floats)_mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16));
#else
    return low;  // no product here is of pairs
#endif
}

template <class T> static int in_units(int count) { return (count + NUMBERS<T> - 1) / NUMBERS<T>; }

// out (R, N LANES) = x (R, units) w (units, N LANES), or more of it.
template <class T, int R, int N>
static void corner(const Left &x, const uint32_t *w, int stride, int units, float *out, int wide, bool adds) {
    Floats sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = adds ? load(out + r * wide + n * LANES) : all(0);
    for (int u = 0; u < units; u++, w += stride) {
        if (x.ahead) __builtin_prefetch(x.ahead + u * LINE, 0, 2);
        for (int r = 0; r < R; r++) {
            const Ints unit = every(x.at[r * x.row + u]);
            for (int n = 0; n < N; n++) sums[r][n] = add_products<T>(sums[r][n], unit, (Ints)load((const float *)w + n * LANES));
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + r * wide + n * LANES, sums[r][n]);
}

// Whether matrix tiles multiply such units: the system keeps tiles only for a program that asks for them.
template <class T> static bool is_tiled() {
#ifdef __AMX_BF16__
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    static const bool given = NUMBERS<T> == 2 && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return given;
#else
    return false;
#endif
}

#ifdef __AMX_BF16__
constexpr int TILE = 16;  // rows, columns and units of a tile
static_assert(NUMBERS<Bf16> == 1 || TILE == LANES);

template <int T> INLINE void load_tile(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void store_tile(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T> INLINE void clear_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int SUMS, int A, int B> INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}
template <int N, class F> INLINE void each(const F &f) {
    [&]<int... n>(std::integer_sequence<int, n...>) { (f(std::integral_constant<int, n>()), ...); }(std::make_integer_sequence<int, N>());
}

// Tiles 0 to 3 are sums, 4 units of rows, 5 of columns; 6 and 7 the same of the units that do not fill a tile, or, where
// none are left, of columns too: a tile is loaded while what another held is multiplied.
static void set_tiles(int rows, int left) {
    struct { uint8_t palette = 1, start = 0, unused[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
    auto set = [&](int tile, int rows, int columns) { shape.rows[tile] = rows, shape.bytes[tile] = 4 * columns; };
    for (int tile = 0; tile < 5; tile++) set(tile, rows, TILE);
    for (int tile = 5; tile < 8; tile++) set(tile, TILE, TILE);
    if (left) set(6, rows, left), set(7, left, TILE);
    asm volatile("ldtilecfg %0" ::"m"(shape));
}

// As `corner`, for as many rows as the tiles are set to, and whether units are left.
template <int N, bool LEFT>
static void tiled_corner(const Left &x, const uint32_t *w, int stride, int units, float *out, int wide, bool adds) {
    each<N>([&](auto n) { adds ? load_tile<n>(out + n * TILE, 4 * wide) : clear_tile<n>(); });
    const char *ahead = x.ahead;
    int u = 0;
    for (; u + TILE <= units; u += TILE, w += TILE * stride) {
        for (int i = 0; ahead && i < TILE; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        load_tile<4>(x.at + u, 4 * x.row);
        each<N>([&](auto n) {
            constexpr int COLUMNS = LEFT ? 5 : 5 + n % 3;
            load_tile<COLUMNS>(w + n * TILE, 4 * stride), multiply_tiles<n, 4, COLUMNS>();
        });
    }
    if constexpr (LEFT) {
        load_tile<6>(x.at + u, 4 * x.row);
        each<N>([&](auto n) { load_tile<7>(w + n * TILE, 4 * stride), multiply_tiles<n, 6, 7>(); });
    }
    each<N>([&](auto n) { store_tile<n>(out + n * TILE, 4 * wide); });
}
#endif

// out (rows, columns), whose rows stand `wide` numbers apart; columns are whole LANES.
template <class T>
static void product(Left x, const Right &w, int units, float *out, int wide, int rows, int columns, bool adds = false) {
    auto over_columns = [&](const auto &f) {  // f(column, vectors)
        int column = 0;
        for (; column + WIDE <= columns; column += WIDE) f(column, std::integral_constant<int, VECTORS>());
        const int left = (columns - column) / LANES;
        if (left == 3) f(column, std::integral_constant<int, 3>());
        if (left == 2) f(column, std::integral_constant<int, 2>());
        if (left == 1) f(column, std::integral_constant<int, 1>());
    };
    auto part = [&](int r) { return Left{x.at + r * x.row, x.row, x.ahead, x.end}; };
    auto at = [&](int column) { return w.at + column / WIDE * w.block + column % WIDE; };
    auto asked = [&] { x.ahead = x.ahead && x.end - x.ahead > units * LINE ? x.ahead + units * LINE : nullptr; };
#ifdef __AMX_BF16__
    if (is_tiled<T>()) {
        for (int r = 0; r < rows; r += TILE) {
            set_tiles(std::min(TILE, rows - r), units % TILE);
            over_columns([&](int column, auto n) {
                float *to = out + (int64_t)r * wide + column;
                units % TILE ? tiled_corner<n, true>(part(r), at(column), w.stride, units, to, wide, adds)
                             : tiled_corner<n, false>(part(r), at(column), w.stride, units, to, wide, adds);
                asked();
            });
        }
        asm volatile("tilerelease");
        return;
    }
#endif
    over_columns([&](int column, auto n) {
        int r = 0;
        auto some = [&](auto count) {
            for (; r + count <= rows; r += count)
                corner<T, count, n>(part(r), at(column), w.stride, units, out + (int64_t)r * wide + column, wide, adds), asked();
        };
        some(std::integral_constant<int, 6>()), some(std::integral_constant<int, 3>());
        some(std::integral_constant<int, 2>()), some(std::integral_constant<int, 1>());
    });
}

// The tokens of one head, and what products need of them.
template <class T> struct Head {
    const T *at;
    int64_t stride;
    int rows, width;

    Left left() const { return {(const uint32_t *)at, stride / NUMBERS<T>}; }
    Head part(int begin, int count) const { return {at + begin * stride, stride, count, width}; }

    // The rows as columns: to multiply with other rows.
    Right turned(Room<uint32_t> &room, int64_t next = 0) const {
        const int units = width / NUMBERS<T>, block = padded(units, LANES) * WIDE;
        room.resize(padded(rows, WIDE) / WIDE * block);
        for (int r = 0; r < rows; r += WIDE)
            lay_out(at + r * stride, stride, std::min(WIDE, rows - r), units, room.data() + r / WIDE * block, WIDE, next);
        return {room.data(), block, WIDE};
    }
    // The rows as they are, to be summed: neighbours in one unit.
    Right paired(Room<uint32_t> &room, int64_t next = 0) const {
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
    // The same turned, a row for each place of the width.
    Left across(Room<uint32_t> &paired_room, Room<uint32_t> &room) const {
        const Right by_pair = paired(paired_room);
        const int units = in_units<T>(rows), stride = padded(units, LANES);
        room.resize(by_pair.stride * stride);
        lay_out((const float *)by_pair.at, by_pair.stride, units, by_pair.stride, room.data(), stride);
        return {room.data(), stride};
    }
};

// Rows (count, wide) of floats as `paired` has them.
template <class T> static Right paired(const float *rows, int count, int wide, Room<uint32_t> &room) {
    if constexpr (NUMBERS<T> == 1) return {(const uint32_t *)rows, WIDE, wide};
    room.resize((count + 1) / 2 * wide);
    for (int r = 0; r < count; r += 2)
        for (int i = 0; i < wide; i += LANES) {
            const Floats high = r + 1 < count ? load(rows + (r + 1) * wide + i) : all(0);
            store((float *)room.data() + r / 2 * wide + i, pairs(load(rows + r * wide + i), high));
        }
    return {room.data(), WIDE, wide};
}

// Rows (count, wide) in place as numbers of type T.
template <class T> static Left left_of(float *rows, int count, int wide) {
    if constexpr (NUMBERS<T> == 2)
        for (int r = 0; r < count; r++)
            for (int i = 0; i < wide; i += LANES) store((Bf16 *)(rows + r * wide) + i, load(rows + r * wide + i));
    return {(const uint32_t *)rows, wide};
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
