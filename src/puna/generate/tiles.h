// Products with bfloat16 numbers: both sides are rounded to bfloat16 and summed in float32, as torch does.
//
// Rows are turned so that a vector holds a pair of columns of sixteen of them: no sum runs across lanes. Of a weight a
// block is laid out thus at a time, and each pair that is read serves six rows of x. The sums of a row of x do not
// depend on its other rows.

#pragma once

#include "shared.h"

#ifdef __AVX512BF16__
constexpr bool HAS_TILES = true;
constexpr int WIDE = 64, PANEL = 512;  // weight rows of a block; pairs of columns that are laid out at a time

// Swaps what stands S rows and S lanes apart; four such stages turn 16 x 16 numbers.
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

// Pairs p..p+15 of sixteen rows, turned; pairs beyond the last are zeros, rows that lack are the last one again.
static void turned(const Bf16 *w, int64_t stride, int rows, int p, int pairs, __m512i (&held)[16]) {
    const __mmask16 there = pairs - p < 16 ? (1 << (pairs - p)) - 1 : 0xffff;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) held[i] = _mm512_maskz_loadu_epi32(there, w + std::min(i, rows - 1) * stride + 2 * p);
    swap_across<1>(held), swap_across<2>(held), swap_across<4>(held), swap_across<8>(held);
}

// Pairs of columns of up to WIDE rows: out (pairs, WIDE).
static void lay_out(const Bf16 *w, int rows, int columns, int pairs, uint32_t *out) {
    for (int first = 0; first < WIDE; first += 16)
        for (int p = 0; p < pairs; p += 16) {
            __m512i held[16];
            const int from = std::min(first, rows - 1);
            turned(w + (int64_t)from * columns, columns, rows - from, p, pairs, held);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (p + i) * WIDE + first, held[i]);
        }
}

static void narrowed(const float *x, int64_t count, std::vector<uint32_t> &out) {
    out.assign((count + 31) / 32 * 16, 0);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i *)&out[i / 2], (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    for (; i < count; i++) put((Bf16 *)out.data() + i, x[i]);
}

// Dots of x (columns,) with `count` rows of w, which stand `stride` numbers apart.
static void dots_with(const float *x, const Bf16 *w, int64_t stride, int count, int columns, float *out) {
    static thread_local std::vector<uint32_t> narrow;
    narrowed(x, columns, narrow);
    for (int first = 0; first < count; first += 16) {
        __m512 sums[4] = {};
        for (int p = 0; p < columns / 2; p += 16) {
            __m512i held[16];
            turned(w + first * stride, stride, count - first, p, columns / 2, held);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                sums[i % 4] = _mm512_dpbf16_ps(sums[i % 4], (__m512bh)held[i], (__m512bh)_mm512_set1_epi32(narrow[p + i]));
        }
        const __mmask16 there = count - first < 16 ? (1 << (count - first)) - 1 : 0xffff;
        _mm512_mask_storeu_ps(out + first, there, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// Adds the products of R rows of x, `pairs` of each, to sums (R, WIDE).
template <int R> static void tile(const uint32_t *x, int stride, const uint32_t *w, int pairs, float *sums) {
    __m512 held[R][4];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 4; n++) held[r][n] = _mm512_loadu_ps(sums + r * WIDE + n * 16);
    for (int p = 0; p < pairs; p++, w += WIDE)
        for (int r = 0; r < R; r++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(x[(int64_t)r * stride + p]);
            for (int n = 0; n < 4; n++)
                held[r][n] = _mm512_dpbf16_ps(held[r][n], both, (__m512bh)_mm512_loadu_si512(w + n * 16));
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 4; n++) _mm512_storeu_ps(sums + r * WIDE + n * 16, held[r][n]);
}

// Calls give(row of x, row of w, dot) for rows begin..end of a matrix w with an even number of columns.
template <class Give>
static void tiles(const float *x, int rows, const Bf16 *w, int columns, int begin, int end, const Give &give) {
    static thread_local std::vector<uint32_t> narrow, laid(PANEL * WIDE);
    static thread_local std::vector<float> sums;
    const int pairs = columns / 2;
    narrowed(x, (int64_t)rows * columns, narrow);
    for (; begin < end; begin += WIDE) {
        const int wide = std::min(WIDE, end - begin);
        sums.assign((int64_t)rows * WIDE, 0);
        for (int p = 0; p < pairs; p += PANEL) {
            const int n = std::min(PANEL, pairs - p);
            lay_out(w + (int64_t)begin * columns + 2 * p, wide, columns, n, laid.data());
            int r = 0;
            for (; r + 6 <= rows; r += 6) tile<6>(&narrow[(int64_t)r * pairs + p], pairs, laid.data(), n, &sums[r * WIDE]);
            for (; r + 2 <= rows; r += 2) tile<2>(&narrow[(int64_t)r * pairs + p], pairs, laid.data(), n, &sums[r * WIDE]);
            for (; r < rows; r++) tile<1>(&narrow[(int64_t)r * pairs + p], pairs, laid.data(), n, &sums[r * WIDE]);
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < wide; n++) give(r, begin + n, sums[r * WIDE + n]);
    }
}
#else
constexpr bool HAS_TILES = false;
static void dots_with(const float *, const Bf16 *, int64_t, int, int, float *) {}
template <class Give> static void tiles(const float *, int, const Bf16 *, int, int, int, const Give &) {}
#endif
