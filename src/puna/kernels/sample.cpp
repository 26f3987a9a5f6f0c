// Draws a token from each row of logits on a CPU: sampling.py's draws without a sort of the vocabulary.
//
// Tokens stand in order of their weight e^((logit - highest) / T), the likeliest first, equal ones by their index. They
// are counted into bins by the upper bits of their weight, and the one bin in which a cut or the draw falls is sorted.
// Sums are float64. A row's draw does not depend on the other rows.

#include "shared.h"

struct Settings {  // a number a row; generate/kernel.py's structure of that name
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k;
    const bool *cuts, *greedy;
};

class Row {
    static constexpr int CHUNK = 1024, SHIFT = 19, BINS = (0x3f800000 >> SHIFT) + 1;  // a weight is at most 1
    struct Candidate { float weight; int32_t token; };
    struct End { int bin; size_t within; double mass; };  // the first candidate left out, and the weight of those before

    struct Bin { double mass; int64_t count; };

    std::vector<float> weights;  // and room for whole LANES
    std::vector<double> sums;    // of every CHUNK weights
    std::vector<Candidate> opened;
    Bin bins[BINS];
    double total;
    int vocab, open_bin;

    static int bin_of(float weight) { uint32_t bits; memcpy(&bits, &weight, 4); return bits >> SHIFT; }
    static float lowest_of(int bin) { uint32_t bits = bin << SHIFT; float weight; memcpy(&weight, &bits, 4); return weight; }

    // Calls f(token, weight) where wanted(weights) has a lane all ones.
    template <class Wanted, class F> void where(const Wanted &wanted, const F &f) const {
        for (int i = 0; i < vocab; i += LANES)
            for (unsigned left = lanes(wanted(load(&weights[i]))); left; left &= left - 1) {
                int token = i + __builtin_ctz(left);
                if (token < vocab) f(token, weights[token]);
            }
    }

    // The weights of a row, whose highest logit is returned; not a number where some logit or the highest is none.
    template <class T> float weigh(const T *logits, float temperature) {
        float highest = -INFINITY;
        Floats most = all(-INFINITY);
        Ints broken = {};
        int i = 0;
        for (; i + LANES <= vocab; i += LANES) {
            Floats x = load(logits + i);
            most = x > most ? x : most, broken |= (Ints)(x != x);
        }
        for (int lane = 0; lane < LANES; lane++) {
            highest = std::max(highest, most[lane]);
            if (broken[lane]) return NAN;
        }
        for (; i < vocab; i++) {
            if (std::isnan(one(logits[i]))) return NAN;
            highest = std::max(highest, one(logits[i]));
        }
        if (std::isinf(highest)) return NAN;
        weights.resize(vocab + LANES), sums.clear(), total = 0;
        for (int begin = 0; begin < vocab; begin += CHUNK) {
            int end = std::min(begin + CHUNK, vocab), i = begin;
            Floats held = all(0);
            for (; i + LANES <= end; i += LANES) {
                Floats weight = exponential((load(logits + i) - all(highest)) / all(temperature));
                store(&weights[i], weight), held += weight;
            }
            double sum_of_chunk = sum(held);
            for (; i < end; i++) sum_of_chunk += weights[i] = exponential(all((one(logits[i]) - highest) / temperature))[0];
            sums.push_back(sum_of_chunk), total += sum_of_chunk;
        }
        return highest;
    }

    // Counts the weights from `least` on.
    void count(float least) {
        memset(bins, 0, sizeof bins), open_bin = -1;
        where([&](Floats weight) { return weight >= all(least); },
              [&](int, float weight) { Bin &bin = bins[bin_of(weight)]; bin.mass += weight, bin.count++; });
    }

    // The candidates of a bin in order.
    void open(int bin) {
        if (bin == open_bin) return;
        open_bin = bin, opened.clear();
        where([&](Floats weight) { return ((Ints)weight >> SHIFT) == bin; },
              [&](int token, float weight) { opened.push_back({weight, token}); });
        std::sort(opened.begin(), opened.end(), [](const Candidate &a, const Candidate &b) {
            return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
        });
    }

    // Where the first `most` candidates end, those with less than `limit` before them, and those of at least `least`.
    // The likeliest is never left out.
    End end(int64_t most, double limit, float least) {
        int64_t rank = 0;
        double mass = 0;
        for (int bin = BINS - 1; bin >= 0; bin--) {
            const Bin &held = bins[bin];
            if (!held.count) continue;
            if (rank + held.count <= most && mass + held.mass < limit && lowest_of(bin) >= least) {
                rank += held.count, mass += held.mass;
                continue;
            }
            open(bin);
            for (size_t i = 0; i < opened.size(); i++, rank++) {
                if (rank && (rank >= most || mass >= limit || opened[i].weight < least)) return {bin, i, mass};
                mass += opened[i].weight;
            }
        }
        return {-1, 0, mass};
    }

    // The candidate before `end` where the weight of those up to it passes `target`.
    int64_t at(double target, const End &end) {
        int64_t token = 0;
        double mass = 0;
        for (int bin = BINS - 1; bin >= std::max(end.bin, 0); bin--) {
            if (!bins[bin].count || (bin > end.bin && mass + bins[bin].mass <= target)) {
                mass += bins[bin].mass;
                continue;
            }
            open(bin);
            for (size_t i = 0; i < (bin == end.bin ? end.within : opened.size()); i++) {
                if (opened[i].weight > 0) token = opened[i].token;
                if ((mass += opened[i].weight) > target) return token;
            }
        }
        return token;  // rounding has kept the sum below the target: the last one
    }

    // The token where the weight of those up to it, by their index, passes `target`.
    int64_t at(double target) {
        size_t chunk = 0;
        double mass = 0;
        while (chunk + 1 < sums.size() && mass + sums[chunk] <= target) mass += sums[chunk++];
        int64_t token = 0;
        for (int i = chunk * CHUNK; i < vocab; i++) {
            if (weights[i] > 0) token = i;
            if ((mass += weights[i]) > target) break;
        }
        return token;
    }

    int64_t cut(float uniform, int64_t top_k, float top_p, float min_p) {
        int64_t most = top_k > 0 ? std::min<int64_t>(top_k, vocab) : vocab;
        // What is lighter weighs less than 1 - top_p of it all together. The half is for rounding.
        float light = top_p < 1 ? (float)(total * (1 - top_p) / vocab / 2) : 0;
        count(most < vocab ? 0 : std::max(light, min_p));
        double whole = most < vocab ? end(most, INFINITY, 0).mass : total;
        End last = end(most, top_p < 1 ? top_p * whole : INFINITY, min_p);
        return at(uniform * last.mass, last);
    }

  public:
    template <class T> int64_t draw(const T *logits, int count, const Settings &s, int row, float uniform, float *logprob) {
        vocab = count;
        float temperature = s.greedy[row] ? 1 : s.temperature[row], highest = weigh(logits, temperature);
        if (std::isnan(highest)) return *logprob = NAN, 0;
        int64_t token;
        if (s.greedy[row]) for (token = 0; one(logits[token]) != highest; token++) {}
        else if (s.cuts[row]) token = cut(uniform, s.top_k[row], s.top_p[row], s.min_p[row]);
        else token = at((double)uniform * total);
        *logprob = (float)(((double)one(logits[token]) - highest) / temperature - std::log(total));
        return token;
    }
};

// logits (R, V), uniform (R,) in [0, 1); tokens and logprobs (R,) are written.
extern "C" void puna_sample(const void *logits, bool is_bf16, int rows, int vocab, const Settings *settings,
                            const float *uniform, int64_t *tokens, float *logprobs, int count) {
    std::lock_guard<std::mutex> alone(threads.mutex);
    threads.begin(count, rows);
    threads.run(rows, [&](int r) {
        static thread_local Row row;
        auto draw = [&](auto *all) { return row.draw(all + (int64_t)r * vocab, vocab, *settings, r, uniform[r], logprobs + r); };
        tokens[r] = is_bf16 ? draw((const Bf16 *)logits) : draw((const float *)logits);
    });
    threads.end();
}
