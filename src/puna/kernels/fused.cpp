// What a Llama does between its matrix products on a CPU, and the gradients: a pass over memory for each, where torch's
// operations make several. model/fused.py calls them and says what they compute.
//
// No result depends on how many threads there are.

#include "passes.h"

static Floats sigmoid(Floats x) {
    const Floats e = exponential(x < all(0) ? x : -x);
    return (x < all(0) ? e : all(1)) / (all(1) + e);
}

// scales (rows,): what each row is multiplied by, for the way back.
template <class X, class Y>
static void rms_norm(const X *x, const float *weight, Y *y, float *scales, int64_t rows, int dim, float eps, int threads) {
    over(threads, rows, std::max<int64_t>(1, PIECE / dim), [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const X *from = x + r * dim;
            Floats squares = all(0);
            along(dim, [&](int i, auto part) { squares = multiply_add(part.get(from + i), part.get(from + i), squares); });
            const Floats scale = all(scales[r] = 1 / std::sqrt(sum(squares) / dim + eps));
            along(dim, [&](int i, auto part) { part.set(y + r * dim + i, part.get(from + i) * scale * part.get(weight + i)); });
        }
    });
}

// of_weight (rows / each rounded up, dim): the weight's gradient, `each` rows summed in a part.
template <class X, class Y>
static void rms_norm_back(const Y *slopes, const X *x, const float *weight, const float *scales, X *of_x, float *of_weight,
                          int64_t rows, int dim, int each, int threads) {
    over(threads, rows, each, [=](int64_t begin, int64_t end) {
        float *total = of_weight + begin / each * dim;
        std::fill_n(total, dim, 0.f);
        for (int64_t r = begin; r < end; r++) {
            const Y *slope = slopes + r * dim;
            const X *from = x + r * dim;
            const Floats scale = all(scales[r]);
            Floats dots = all(0);
            along(dim, [&](int i, auto part) {
                const Floats both = part.get(slope + i) * part.get(from + i);
                dots = multiply_add(both, part.get(weight + i), dots);
                part.set(total + i, multiply_add(both, scale, part.get(total + i)));
            });
            const Floats along_x = all(sum(dots) / dim * scales[r] * scales[r] * scales[r]);
            along(dim, [&](int i, auto part) {
                const Floats direct = part.get(slope + i) * part.get(weight + i) * scale;
                part.set(of_x + r * dim + i, direct - part.get(from + i) * along_x);
            });
        }
    });
}

template <class T> static void swiglu(const T *gate, const T *up, T *out, int64_t count, int threads) {
    over(threads, count, PIECE, [=](int64_t begin, int64_t end) {
        along(end - begin, [&](int64_t i, auto part) {
            const Floats x = part.get(gate + begin + i);
            part.set(out + begin + i, x * sigmoid(x) * part.get(up + begin + i));
        });
    });
}

template <class T>
static void swiglu_back(const T *slopes, const T *gate, const T *up, T *of_gate, T *of_up, int64_t count, int threads) {
    over(threads, count, PIECE, [=](int64_t begin, int64_t end) {
        along(end - begin, [&](int64_t i, auto part) {
            const Floats x = part.get(gate + begin + i), slope = part.get(slopes + begin + i);
            const Floats s = sigmoid(x), silu = x * s;
            part.set(of_gate + begin + i, slope * part.get(up + begin + i) * (s + silu - silu * s));
            part.set(of_up + begin + i, slope * silu);
        });
    });
}

// Pairs turned by their position's angle, or back. table (T, E / 2, 2), or one for every row where `of_row` is not 0.
template <class T>
static void rotate(const T *x, const float *table, T *out, int rows, int heads, int tokens, int width, const Layout &from,
                   const Layout &to, int64_t of_row, bool back, int threads) {
    const int each = std::max<int64_t>(1, PIECE / (heads * width));
    over(threads, (int64_t)rows * tokens, each, [=](int64_t begin, int64_t end) {
        Room<float> cosines(padded(width, LANES)), sines(cosines.size());  // of a number, and of the other one of its pair
        Ints other;
        for (int i = 0; i < LANES; i++) other[i] = i ^ 1;
        for (int64_t n = begin; n < end; n++) {
            const int64_t row = n / tokens, token = n % tokens;
            const float *angles = table + row * of_row + token * width;
            for (int i = 0; i < width; i++) {
                const float sine = angles[i | 1];
                cosines[i] = angles[i & ~1], sines[i] = (i & 1) == back ? -sine : sine;
            }
            for (int h = 0; h < heads; h++) {
                const T *from_head = x + row * from.row + token * from.token + h * from.head;
                T *to_head = out + row * to.row + token * to.token + h * to.head;
                along(width, [&](int i, auto part) {
                    const Floats numbers = part.get(from_head + i), others = __builtin_shuffle(numbers, other);
                    part.set(to_head + i, numbers * load(&cosines[i]) + others * load(&sines[i]));
                });
            }
        }
    });
}

// Probabilities, less 1 at the target, in place of logits (rows, vocab); logprobs (rows,) of the targets.
template <class T> static void loss(T *logits, const int64_t *targets, float *logprobs, int64_t rows, int vocab, int threads) {
    over(threads, rows, std::max<int64_t>(1, PIECE / vocab), [=](int64_t begin, int64_t end) {
        std::vector<float> room(vocab + LANES);
        float *held = room.data();
        for (int64_t r = begin; r < end; r++) {
            T *row = logits + r * vocab;
            Floats most = all(-INFINITY);
            along(vocab, [&](int i, auto part) {
                const Floats logit = part.or_lowest(part.get(row + i));
                store(held + i, logit), most = logit > most ? logit : most;
            });
            const float at_most = highest(most), wanted = held[targets[r]], total = exponentials(held, vocab, at_most);
            logprobs[r] = wanted - at_most - std::log(total);
            held[targets[r]] -= total;
            const Floats share_of = all(1 / total);
            along(vocab, [&](int i, auto part) { part.set(row + i, load(held + i) * share_of); });
        }
    });
}

extern "C" {
void puna_share(Share *with) { share = with; }

void puna_rms_norm(const void *x, bool x_is_bf16, const float *weight, void *y, bool y_is_bf16, float *scales, int64_t rows,
                   int dim, float eps, int threads) {
    of_type(x_is_bf16, [&](auto from) {
        of_type(y_is_bf16, [&](auto to) {
            rms_norm((const decltype(from) *)x, weight, (decltype(to) *)y, scales, rows, dim, eps, threads);
        });
    });
}

void puna_rms_norm_back(const void *slopes, bool y_is_bf16, const void *x, bool x_is_bf16, const float *weight,
                        const float *scales, void *of_x, float *of_weight, int64_t rows, int dim, int each,
                        int threads) {
    of_type(x_is_bf16, [&](auto from) {
        of_type(y_is_bf16, [&](auto to) {
            using X = decltype(from);
            rms_norm_back((const decltype(to) *)slopes, (const X *)x, weight, scales, (X *)of_x, of_weight, rows, dim, each,
                          threads);
        });
    });
}

void puna_swiglu(const void *gate, const void *up, void *out, bool is_bf16, int64_t count, int threads) {
    of_type(is_bf16, [&](auto number) {
        using T = decltype(number);
        swiglu((const T *)gate, (const T *)up, (T *)out, count, threads);
    });
}

void puna_swiglu_back(const void *slopes, const void *gate, const void *up, void *of_gate, void *of_up, bool is_bf16,
                      int64_t count, int threads) {
    of_type(is_bf16, [&](auto number) {
        using T = decltype(number);
        swiglu_back((const T *)slopes, (const T *)gate, (const T *)up, (T *)of_gate, (T *)of_up, count, threads);
    });
}

void puna_rotate(const void *x, const float *table, void *out, bool is_bf16, int rows, int heads, int tokens, int width,
                 const Layout *layouts, int64_t of_row, bool back, int threads) {
    of_type(is_bf16, [&](auto number) {
        using T = decltype(number);
        rotate((const T *)x, table, (T *)out, rows, heads, tokens, width, layouts[0], layouts[1], of_row, back, threads);
    });
}

void puna_loss(void *logits, const int64_t *targets, float *logprobs, bool is_bf16, int64_t rows, int vocab, int threads) {
    of_type(is_bf16, [&](auto number) { loss((decltype(number) *)logits, targets, logprobs, rows, vocab, threads); });
}
}
