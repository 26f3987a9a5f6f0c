// What the passes of training share: work spread over torch's own threads, as threads of ours would wait for them, and,
// with the decoding step, loops along rows of any width. Numbers are float32 or bfloat16 in memory and float32 in registers.

#pragma once

#include "shared.h"

using Share = void(void (*)(void *), void *, unsigned, unsigned);  // OpenMP's GOMP_parallel
inline Share *share = nullptr;  // null where torch's library has none: then one thread does all

constexpr int64_t PIECE = 16384;  // numbers that a thread takes at once

// f(begin, end) over `count` things, `each` at a time.
template <class F> static void over(int threads, int64_t count, int64_t each, const F &f) {
    struct Work { const F &f; const int64_t count, each; std::atomic<int64_t> next{0}; } all_of{f, count, each};
    auto work = [](void *p) {
        Work &w = *(Work *)p;
        for (int64_t begin; (begin = w.next.fetch_add(w.each)) < w.count;) w.f(begin, std::min(w.count, begin + w.each));
    };
    share && count > each && threads > 1 ? share(work, &all_of, threads, 0) : work(&all_of);
}

static int padded(int count, int to) { return (count + to - 1) / to * to; }

// f(number of the type) for float32 or bfloat16.
template <class F> static void of_type(bool is_bf16, const F &f) { is_bf16 ? f(Bf16()) : f(float()); }

struct Layout { int64_t row, head, token; };  // numbers between neighbours of (B, heads, T, E)

static void store(Bf16 *p, Floats v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    for (int i = 0; i < LANES; i++) put(p + i, v[i]);
#endif
}

struct Full {  // LANES numbers
    template <class T> Floats get(const T *p) const { return load(p); }
    template <class T> void set(T *p, Floats v) const { store(p, v); }
    Floats or_lowest(Floats v) const { return v; }
};
struct Part {  // the last ones of a row; lanes beyond them read as 0
    int count;
    template <class T> Floats get(const T *p) const {
        T held[LANES] = {};
        std::copy_n(p, count, held);
        return load(held);
    }
    template <class T> void set(T *p, Floats v) const {
        T held[LANES];
        store(held, v);
        std::copy_n(held, count, p);
    }
    Floats or_lowest(Floats v) const {
        for (int i = count; i < LANES; i++) v[i] = -INFINITY;
        return v;
    }
};
// f(i, Full or Part) along `count` numbers.
template <class F> static void along(int count, const F &f) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) f(i, Full());
    if (i < count) f(i, Part{count - i});
}

static float highest(Floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, v[i]);
    return most;
}

// e^(x - most) of `count` numbers, with zeros behind them up to whole LANES; their sum.
static float exponentials(float *x, int count, float most) {
    Floats total = all(0);
    for (int i = 0; i < count; i += LANES) {
        const Floats e = exponential(load(x + i) - all(most));
        store(x + i, e), total += e;
    }
    return sum(total);
}
