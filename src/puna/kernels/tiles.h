// Products of many rows, summed in float32. A unit is what a lane holds of a row: a float that stands for a number, or,
// where the processor multiplies them (AVX512-BF16), a pair of neighbouring bfloat16; the other side is then rounded too,
// as torch does it.
//
// Rows are turned so that a vector holds the same unit of so many of them. No sum runs across lanes. Of a weight a block
// is laid out thus at a time, and each unit that is read serves six rows of x. The sums of a row of x do not depend on
// its other rows.

#pragma once

#include "shared.h"

constexpr int VECTORS = LANES / 4;  // of sums a row of x: AVX2 has registers for six rows of two, AVX512 for six of four
constexpr int WIDE = VECTORS * LANES, PANEL = 32 * LANES;  // weight rows of a block; units that are laid out at a time

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
template <int S> static void swap_across(Ints (&v)[LANES]) {
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

// `count` units of `rows` rows, LANES of either at most, turned; rows that lack are the last one again.
template <class W> static void turned(const W *w, int64_t stride, int rows, int count, Ints (&held)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) held[i] = units_at(w + std::min(i, rows - 1) * stride, std::min(count, LANES));
    swap_across<1>(held), swap_across<2>(held), swap_across<4>(held);
    if constexpr (LANES == 16) swap_across<8>(held);
}

// Units of up to WIDE rows: out (units, WIDE).
template <class W> static void lay_out(const W *w, int64_t stride, int rows, int units, uint32_t *out) {
    for (int first = 0; first < WIDE; first += LANES)
        for (int u = 0; u < units; u += LANES) {
            Ints held[LANES];
            const int from = std::min(first, rows - 1);
            turned(w + from * stride + u * NUMBERS<W>, stride, rows - from, units - u, held);
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

// Dots of x (units,) with `count` rows of w, which stand `stride` numbers apart.
template <class W>
static void dots_with(const uint32_t *x, const W *w, int64_t stride, int count, int units, float *out) {
    for (; count > 0; count -= LANES, w += LANES * stride, out += LANES) {
        Floats sums[4] = {};
        auto some = [&](int u, auto few) {
            Ints held[LANES];
            turned(w + u * NUMBERS<W>, stride, count, units - u, held);
#pragma GCC unroll 16
            for (int i = 0; i < few; i++) sums[i % 4] = add_products<W>(sums[i % 4], held[i], every(x[u + i]));
        };
        int u = 0;
        for (; u + LANES <= units; u += LANES) some(u, std::integral_constant<int, LANES>());
        if (u < units) some(u, units - u);
        const Floats total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        memcpy(out, &total, std::min(count, LANES) * sizeof(float));
    }
}

// Adds the products of R rows of x, `units` of each, to sums (R, WIDE).
template <int R, class W> static void tile(const uint32_t *x, int stride, const uint32_t *w, int units, float *sums) {
    Floats held[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++) held[r][n] = load(sums + r * WIDE + n * LANES);
    for (int u = 0; u < units; u++, w += WIDE)
        for (int r = 0; r < R; r++) {
            const Ints unit = every(x[(int64_t)r * stride + u]);
            for (int n = 0; n < VECTORS; n++)
                held[r][n] = add_products<W>(held[r][n], unit, (Ints)load((const float *)w + n * LANES));
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < VECTORS; n++) store(sums + r * WIDE + n * LANES, held[r][n]);
}

// Calls give(row of x, row of w, dot) for rows begin..end of a matrix w, whose columns fill whole units.
template <class W, class Give>
static void tiles(const float *x, int rows, const W *w, int columns, int begin, int end, const Give &give) {
    static thread_local std::vector<uint32_t> held_x, held_w(PANEL * WIDE);
    static thread_local std::vector<float> held_sums;
    const int units = columns / NUMBERS<W>;
    const uint32_t *from = units_of<W>(x, (int64_t)rows * columns, held_x);
    uint32_t *laid = held_w.data();
    held_sums.resize((int64_t)rows * WIDE);
    float *sums = held_sums.data();
    for (; begin < end; begin += WIDE) {
        const int wide = std::min(WIDE, end - begin);
        std::fill(sums, sums + (int64_t)rows * WIDE, 0.f);
        for (int u = 0; u < units; u += PANEL) {
            const int n = std::min(PANEL, units - u);
            lay_out(w + (int64_t)begin * columns + u * NUMBERS<W>, columns, wide, n, laid);
            auto some = [&](int r, auto count) {
                for (; r + count <= rows; r += count)
                    tile<count, W>(from + (int64_t)r * units + u, units, laid, n, sums + (int64_t)r * WIDE);
                return r;
            };
            some(some(some(0, std::integral_constant<int, 6>()), std::integral_constant<int, 2>()), std::integral_constant<int, 1>());
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < wide; n++) give(r, begin + n, sums[(int64_t)r * WIDE + n]);
    }
}
