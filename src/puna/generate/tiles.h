// Products of many rows, summed in float32; with bfloat16 numbers the other side is rounded too, as torch does it.
//
// Rows are turned so that a vector holds the same unit of sixteen of them: a float, or a pair of neighbouring bfloat16.
// No sum runs across lanes. Of a weight a block is laid out thus at a time, and each unit that is read serves six rows
// of x. The sums of a row of x do not depend on its other rows.

#pragma once

#include "shared.h"

template <class W> constexpr bool TILED = false;  // whether this processor has such products of W

#ifdef __AVX512F__
template <> constexpr bool TILED<float> = true;
constexpr int WIDE = 64, PANEL = 512;  // weight rows of a block; units that are laid out at a time

static __m512 add_products(__m512 sums, __m512i a, __m512i b, float) { return _mm512_fmadd_ps((__m512)a, (__m512)b, sums); }
#ifdef __AVX512BF16__
template <> constexpr bool TILED<Bf16> = true;
static __m512 add_products(__m512 sums, __m512i a, __m512i b, Bf16) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
#endif

// Swaps what stands S rows and S lanes apart; four such stages turn 16 x 16 units.
template <int S> static void swap_across(__m512i (&v)[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), all16 = _mm512_set1_epi32(16);
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(S));
    const __m512i low = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - S));
    const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(S)), odd, lane, all16);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & S)) {
            const __m512i first = v[i];
            v[i] = _mm512_permutex2var_epi32(first, low, v[i + S]);
            v[i + S] = _mm512_permutex2var_epi32(first, high, v[i + S]);
        }
}

// Units u..u+15 of sixteen rows, turned; units beyond the last are zeros, rows that lack are the last one again.
static void turned(const uint32_t *w, int64_t stride, int rows, int u, int units, __m512i (&held)[16]) {
    const __mmask16 there = units - u < 16 ? (1 << (units - u)) - 1 : 0xffff;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) held[i] = _mm512_maskz_loadu_epi32(there, w + std::min(i, rows - 1) * stride + u);
    swap_across<1>(held), swap_across<2>(held), swap_across<4>(held), swap_across<8>(held);
}

// Units of up to WIDE rows: out (units, WIDE).
static void lay_out(const uint32_t *w, int64_t stride, int rows, int units, uint32_t *out) {
    for (int first = 0; first < WIDE; first += 16)
        for (int u = 0; u < units; u += 16) {
            __m512i held[16];
            const int from = std::min(first, rows - 1);
            turned(w + from * stride, stride, rows - from, u, units, held);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (u + i) * WIDE + first, held[i]);
        }
}

// `count` numbers as units of W, with zeros behind them.
template <class W> static void units_of(const float *x, int64_t count, std::vector<uint32_t> &out) {
    out.assign((count + 31) / 16 * 16, 0);
    int64_t i = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<W, Bf16>)
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256((__m256i *)&out[i / 2], (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
    for (; i < count; i++) put((W *)out.data() + i, x[i]);
}

// Dots of x (columns,), as units, with `count` rows of w, which stand `stride` numbers apart; both fill whole units.
template <class W>
static void dots_with(const uint32_t *x, const W *w, int64_t stride, int count, int columns, float *out) {
    const int units = columns * sizeof(W) / 4;
    stride = stride * sizeof(W) / 4;
    for (int first = 0; first < count; first += 16) {
        __m512 sums[4] = {};
        for (int u = 0; u < units; u += 16) {
            __m512i held[16];
            turned((const uint32_t *)w + first * stride, stride, count - first, u, units, held);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) sums[i % 4] = add_products(sums[i % 4], held[i], _mm512_set1_epi32(x[u + i]), W());
        }
        const __mmask16 there = count - first < 16 ? (1 << (count - first)) - 1 : 0xffff;
        _mm512_mask_storeu_ps(out + first, there, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// Adds the products of R rows of x, `units` of each, to sums (R, WIDE).
template <int R, class W> static void tile(const uint32_t *x, int stride, const uint32_t *w, int units, float *sums) {
    __m512 held[R][4];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 4; n++) held[r][n] = _mm512_loadu_ps(sums + r * WIDE + n * 16);
    for (int u = 0; u < units; u++, w += WIDE)
        for (int r = 0; r < R; r++) {
            const __m512i every = _mm512_set1_epi32(x[(int64_t)r * stride + u]);
            for (int n = 0; n < 4; n++) held[r][n] = add_products(held[r][n], every, _mm512_loadu_si512(w + n * 16), W());
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 4; n++) _mm512_storeu_ps(sums + r * WIDE + n * 16, held[r][n]);
}

// Calls give(row of x, row of w, dot) for rows begin..end of a matrix w, whose columns fill whole units.
template <class W, class Give>
static void tiles(const float *x, int rows, const W *w, int columns, int begin, int end, const Give &give) {
    static thread_local std::vector<uint32_t> held_x, laid(PANEL * WIDE);
    static thread_local std::vector<float> sums;
    const int units = columns * sizeof(W) / 4;
    units_of<W>(x, (int64_t)rows * columns, held_x);
    for (; begin < end; begin += WIDE) {
        const int wide = std::min(WIDE, end - begin);
        sums.assign((int64_t)rows * WIDE, 0);
        for (int u = 0; u < units; u += PANEL) {
            const int n = std::min(PANEL, units - u);
            lay_out((const uint32_t *)w + (int64_t)begin * units + u, units, wide, n, laid.data());
            auto some = [&](int r, auto count) {
                for (; r + count <= rows; r += count)
                    tile<count, W>(&held_x[(int64_t)r * units + u], units, laid.data(), n, &sums[(int64_t)r * WIDE]);
                return r;
            };
            some(some(some(0, std::integral_constant<int, 6>()), std::integral_constant<int, 2>()), std::integral_constant<int, 1>());
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < wide; n++) give(r, begin + n, sums[(int64_t)r * WIDE + n]);
    }
}
#endif
