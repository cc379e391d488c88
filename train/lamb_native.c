/* The two passes of LAMB over spans of memory; see lamb_native.py, which builds this file, and lamb_math.py for
 * the formula. Every element is computed by the same IEEE operations wherever it lies (no contraction but the
 * written fmaf), so that the result does not depend on how the parameters are cut. */

#include <math.h>
#include <stdint.h>

typedef struct {
    float *p, *g, *m, *v;
    int64_t numel;
    double sum_p, sum_u;                          /* out: sums of squares, first pass */
    float beta1_weight, beta2, beta2_weight;      /* 1 - beta1, beta2, 1 - beta2 */
    float grad_norm, stretch, shift, decay;
    float factor;                                 /* step size x trust ratio, second pass */
} Span;

/* Independent accumulators, for one vector register of floats. */
#define LANES 16
/* Elements ahead of use: half a page; the processor's own prefetching stops at its end. */
#define AHEAD 512

/* Prefetching past the end of an array is harmless: it never faults. */
static inline void prefetch(const float *at) { __builtin_prefetch(at + AHEAD, 0, 3); }

static inline float direction(const Span *s, float p, float m, float v) {
    return fmaf(s->decay, p, m / fmaf(s->stretch, sqrtf(v), s->shift));
}

static inline void first_element(const Span *s, int normalize, float *restrict p, float *restrict g,
                                 float *restrict m, float *restrict v, double *sum_p, double *sum_u) {
    const float gi = normalize ? *g / s->grad_norm : *g;
    /* torch's lerp, whose accurate form depends on which end is nearer. */
    const float w = s->beta1_weight;
    const float mi = w < 0.5f ? fmaf(w, gi - *m, *m) : fmaf(w - 1.0f, gi - *m, gi);
    const float vi = fmaf(s->beta2_weight * gi, gi, *v * s->beta2);
    const float u = direction(s, *p, mi, vi);
    *m = mi;
    *v = vi;
    *sum_p += (double)*p * (double)*p;
    *sum_u += (double)u * (double)u;
}

/* `normalize` is a constant where this is called, so that the loop without it has no division by the norm. */
static inline void first_span(Span *span, int normalize) {
    const Span s = *span;
    float *restrict p = s.p, *restrict g = s.g, *restrict m = s.m, *restrict v = s.v;
    double sum_p[LANES] = {0}, sum_u[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= s.numel; i += LANES) {
        prefetch(p + i);
        prefetch(g + i);
        prefetch(m + i);
        prefetch(v + i);
        for (int j = 0; j < LANES; ++j)
            first_element(&s, normalize, p + i + j, g + i + j, m + i + j, v + i + j, sum_p + j, sum_u + j);
    }
    for (int j = 0; i < s.numel; ++i, ++j)
        first_element(&s, normalize, p + i, g + i, m + i, v + i, sum_p + j, sum_u + j);
    for (int j = 0; j < LANES; ++j) {
        span->sum_p += sum_p[j];
        span->sum_u += sum_u[j];
    }
}

void lamb_first_pass(Span *spans, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        if (spans[k].grad_norm == 1.0f)
            first_span(spans + k, 0);
        else
            first_span(spans + k, 1);
    }
}

static inline void second_element(const Span *s, float *restrict p, const float *restrict m,
                                  const float *restrict v) {
    *p = fmaf(-s->factor, direction(s, *p, *m, *v), *p);
}

void lamb_second_pass(const Span *spans, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        const Span s = spans[k];
        float *restrict p = s.p;
        const float *restrict m = s.m, *restrict v = s.v;
        int64_t i = 0;
        for (; i + LANES <= s.numel; i += LANES) {
            prefetch(p + i);
            prefetch(m + i);
            prefetch(v + i);
            for (int j = 0; j < LANES; ++j)
                second_element(&s, p + i + j, m + i + j, v + i + j);
        }
        for (; i < s.numel; ++i)
            second_element(&s, p + i, m + i, v + i);
    }
}
