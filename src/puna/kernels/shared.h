// What the compiled kernels share: vectors of floats as wide as the processor has them, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

struct Bf16 { uint16_t bits; };

#ifdef __AVX512F__
typedef __m512 Floats;
static Floats load(const float *p) { return _mm512_loadu_ps(p); }
static Floats load(const Bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static Floats load(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static Floats all(float x) { return _mm512_set1_ps(x); }
static void store(float *p, Floats v) { _mm512_storeu_ps(p, v); }
static Floats nibbles(const uint8_t *p, int shift) {  // less 8
    const Floats value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i bytes = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)), shift);
    return _mm512_permutexvar_ps(bytes, value);  // by the lowest four bits
}
static Floats bf16_of_pairs(const Bf16 *p, bool second) {  // of 2 LANES numbers, every second one
    auto pairs = _mm512_loadu_si512((const __m512i *)p);
    return _mm512_castsi512_ps(second ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
}
static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
typedef int32_t Ints __attribute__((vector_size(64)));
static unsigned lanes(Ints mask) { return _mm512_movepi32_mask((__m512i)mask); }  // a bit a lane that is all ones
#else
typedef __m256 Floats;
static Floats load(const float *p) { return _mm256_loadu_ps(p); }
static Floats load(const Bf16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static Floats load(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static Floats all(float x) { return _mm256_set1_ps(x); }
static void store(float *p, Floats v) { _mm256_storeu_ps(p, v); }
static Floats nibbles(const uint8_t *p, int shift) {
    __m256i bytes = _mm256_srli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), shift);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
}
static Floats bf16_of_pairs(const Bf16 *p, bool second) {  // of 2 LANES numbers, every second one
    auto pairs = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(second ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(pairs, 16));
}
static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static float sum(Floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}
typedef int32_t Ints __attribute__((vector_size(32)));
static unsigned lanes(Ints mask) { return _mm256_movemask_ps((__m256)mask); }  // a bit a lane that is all ones
#endif
static Ints every(uint32_t x) { return Ints{} + (int32_t)x; }
constexpr int LANES = sizeof(Floats) / sizeof(float), BLOCK = 4 * LANES;  // rows that lie together in int4
constexpr int LINE = 64;  // bytes that a cache keeps together

// Numbers from the beginning of such a line on: a vector or a tile's row that stands in two is read twice.
template <class T> struct Lined {
    using value_type = T;
    Lined() = default;
    template <class U> Lined(const Lined<U> &) {}
    T *allocate(size_t count) { return (T *)::operator new(count * sizeof(T), std::align_val_t(LINE)); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t(LINE)); }
    bool operator==(const Lined &) const = default;
};
template <class T> using Room = std::vector<T, Lined<T>>;

static float one(float x) { return x; }
static float one(int8_t x) { return x; }
static float one(Bf16 x) { uint32_t bits = (uint32_t)x.bits << 16; float y; memcpy(&y, &bits, 4); return y; }

static void put(float *p, float x) { *p = x; }
static void put(Bf16 *p, float x) {  // to the nearest, ties to even, as torch rounds
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// e^x for x <= 0 to a few parts in 10^7, and 0 below -87.
static Floats exponential(Floats x) {
    constexpr float ROUNDS = 12582912;  // 1.5 * 2^23: added to a number, it leaves the nearest whole one in the low bits
    Floats held = multiply_add(x < all(-87) ? all(-87) : x, all(1.44269504f), all(ROUNDS)), whole = held - all(ROUNDS);
    Floats rest = multiply_add(whole, all(-0.693359375f), x), y = all(1.9875691500e-4f);  // log 2 in two parts
    rest = multiply_add(whole, all(2.12194440e-4f), rest);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = multiply_add(y, rest, all(next));
    y = multiply_add(y, rest * rest, rest) + all(1);
    return x < all(-87) ? all(0) : (Floats)((Ints)y + ((Ints)held << 23));
}

// Threads that share a step's work. They spin while a step lasts and sleep between steps. Work is taken chunk by chunk,
// and only chunks that a thread took are waited for. Where other programs displace threads in the middle of one, half
// of the threads sit the next steps out: a step on all of them would wait for the scheduler again and again.
class Threads {
    static constexpr int SOME = 1024, STEPS = 32;  // pauses before other programs are let in; steps between two attempts at more
    static constexpr uint64_t LONG = 50000;        // cycles, on top of a chunk or two, after which a thread is late
    std::atomic<uint64_t> ticket{0};               // chunks << 32 | the next one
    std::atomic<uint32_t> done{0}, stepping{0};    // chunks; threads that share the step
    void (*work)(const void *, int) = nullptr;
    const void *context = nullptr;
    int started = 1, sharing = INT_MAX, late = 0, ran = 0, calm = 0;

    static void pause(int &spins) {
        if (++spins % SOME == 0) std::this_thread::yield();
        else __builtin_ia32_pause();
    }
    uint64_t take() {  // the cycles of the longest chunk
        for (uint64_t longest = 0;;) {
            uint64_t now = ticket.load(std::memory_order_acquire);
            if ((uint32_t)now >= now >> 32) return longest;
            now = ticket.fetch_add(1, std::memory_order_acq_rel);
            if ((uint32_t)now >= now >> 32) return longest;
            const uint64_t begun = __rdtsc();
            work(context, (uint32_t)now);
            longest = std::max<uint64_t>(longest, __rdtsc() - begun);
            done.fetch_add(1, std::memory_order_release);
        }
    }

  public:
    std::mutex mutex;

    // `count` threads less those that sit out, `most` of them: where fewer suffice, nobody was displaced.
    void begin(int count, int most) {
        if (late > std::max(1, ran / 16)) sharing = std::max(1, std::min(sharing, count) / 2), calm = 0;
        else if (++calm % STEPS == 0) sharing = std::min(count, 2 * std::min(sharing, count));
        late = ran = 0;
        for (; started < count; started++)
            std::thread([this, number = (uint32_t)started] {
                for (int spins = 0;;) {
                    for (uint32_t now; (now = stepping.load()) <= number;) stepping.wait(now);
                    take();
                    pause(spins);
                }
            }).detach();
        stepping.store(std::min({sharing, count, most})), stepping.notify_all();
    }
    void end() { stepping.store(0); }
    int at_work() const { return stepping.load(); }

    template <class F> void run(int chunks, const F &f) {
        work = [](const void *f, int chunk) { (*(const F *)f)(chunk); };
        context = &f;
        done.store(0, std::memory_order_relaxed);
        ticket.store((uint64_t)chunks << 32, std::memory_order_release);
        const uint64_t longest = take(), begun = __rdtsc();
        int spins = 0;
        ran++;
        while (done.load(std::memory_order_acquire) != (uint32_t)chunks) pause(spins);
        late += longest && __rdtsc() - begun > 2 * longest + LONG;
    }
    // f(begin, end) over `count` things, so many a chunk.
    template <class F> void pieces(int count, int each, const F &f) {
        run((count + each - 1) / each, [&](int chunk) { f(chunk * each, std::min(count, (chunk + 1) * each)); });
    }
    // f(begin, end) over `count` rows in about eight chunks a thread of the step, of whole blocks.
    template <class F> void parts(int count, const F &f) {
        pieces(count, std::max(1, count / BLOCK / (8 * (int)stepping.load())) * BLOCK, f);
    }
    // f(begin, end) over `count` rows of so many numbers, in chunks of about 32 thousand and of whole int4 blocks.
    template <class F> void rows(int count, int columns, const F &f) {
        pieces(count, std::max(1, 32768 / columns / BLOCK) * BLOCK, f);
    }
};
inline Threads &threads = *new Threads;  // never destroyed: its threads may outlive main
