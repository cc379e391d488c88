/* The two passes of LAMB over spans of memory; see native.py, which builds this file, and update.py for
 * the formula. Every element is computed by the same IEEE operations wherever it lies (no contraction but the
 * written fmaf), so that the result does not depend on how the parameters are cut.
 *
 * Each thread takes one share of every span. Where both passes run in one call, the threads synchronise between them,
 * span by span, and the second pass finds much of what the first one left in the cores' caches. Built by gcc
 * the threads are those of torch's own OpenMP, which wait for work in busy loops that others would compete with. */

#include <float.h>
#include <math.h>
#include <stdint.h>

/* Independent accumulators, for one vector register of floats. */
#define LANES 16
/* Elements ahead of use: half a page; the processor's own prefetching stops at its end. */
#define AHEAD 512
/* The second pass goes backwards in chunks of so many elements, from those that the caches still hold. */
#define CHUNK 65536

typedef struct {
    float *p, *g, *m, *v;
    int64_t numel, adapt;
    double sum_p, sum_u;                     /* out of lamb_first: sums of squares */
    double step_size;
    float beta1_weight, beta2, beta2_weight; /* 1 - beta1, beta2, 1 - beta2 */
    float grad_norm, stretch, shift, decay;
} Span;

typedef struct {
    double p, u;
} Sums;

typedef struct {
    float *ratios;                           /* trust ratio of each span: in to lamb_second, out of lamb_both */
    Sums *sums;                              /* room for the sums of every span and thread */
    float *updates;                          /* room for the updates of every thread's share of a span */
    int64_t room;                            /* of each thread, in elements; lamb_both alone */
    double low, high;                        /* limits of the trust ratio; lamb_both alone */
    int64_t threads;                         /* at most so many */
} Step;

#ifdef _OPENMP
int omp_get_thread_num(void), omp_get_num_threads(void); /* omp.h is not everywhere */
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* Prefetching past the end of an array is harmless: it never faults. */
static inline void prefetch(const float *at) { __builtin_prefetch(at + AHEAD, 0, 3); }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float direction(const Span *s, float p, float m, float v) {
    return fmaf(s->decay, p, m / fmaf(s->stretch, sqrtf(v), s->shift));
}

static inline float first_element(const Span *s, int normalize, const float *restrict p, const float *restrict g,
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
    return u;
}

/* A thread's share of a span: the span's scalars, and pointers to the first of numel elements. */
static Span share_of(const Span *whole, int number, int threads) {
    const int64_t size = (whole->numel / threads / LANES + 1) * LANES;
    const int64_t start = least(number * size, whole->numel);
    Span s = *whole;
    s.p += start;
    s.g += start;
    s.m += start;
    s.v += start;
    s.numel = least(size, whole->numel - start);
    return s;
}

/* `normalize` and `keep` are constants where this is called, so that the loop without them has neither a division
 * by the norm nor the stores of the updates. */
static inline Sums first_loop(const Span *span, int normalize, int keep, float *restrict u) {
    const Span s = *span;
    const float *restrict p = s.p, *restrict g = s.g;
    float *restrict m = s.m, *restrict v = s.v;
    double sum_p[LANES] = {0}, sum_u[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= s.numel; i += LANES) {
        prefetch(p + i);
        prefetch(g + i);
        prefetch(m + i);
        prefetch(v + i);
        for (int j = 0; j < LANES; ++j) {
            const float ui = first_element(&s, normalize, p + i + j, g + i + j, m + i + j, v + i + j, sum_p + j,
                                           sum_u + j);
            if (keep)
                u[i + j] = ui;
        }
    }
    for (int j = 0; i < s.numel; ++i, ++j) {
        const float ui = first_element(&s, normalize, p + i, g + i, m + i, v + i, sum_p + j, sum_u + j);
        if (keep)
            u[i] = ui;
    }
    Sums sums = {0, 0};
    for (int j = 0; j < LANES; ++j) {
        sums.p += sum_p[j];
        sums.u += sum_u[j];
    }
    return sums;
}

/* Moments and sums of squares; the updates too, where there is room for them. */
static Sums first_pass(const Span *s, float *updates) {
    if (s->grad_norm == 1.0f)
        return updates ? first_loop(s, 0, 1, updates) : first_loop(s, 0, 0, 0);
    return updates ? first_loop(s, 1, 1, updates) : first_loop(s, 1, 0, 0);
}

/* p = p - factor x u over [start, stop), with u computed anew. */
static void apply_anew(const Span *span, float factor, int64_t start, int64_t stop) {
    const Span s = *span;
    float *restrict p = s.p;
    const float *restrict m = s.m, *restrict v = s.v;
    int64_t i = start;
    for (; i + LANES <= stop; i += LANES) {
        prefetch(p + i);
        prefetch(m + i);
        prefetch(v + i);
        for (int64_t j = i; j < i + LANES; ++j)
            p[j] = fmaf(-factor, direction(&s, p[j], m[j], v[j]), p[j]);
    }
    for (; i < stop; ++i)
        p[i] = fmaf(-factor, direction(&s, p[i], m[i], v[i]), p[i]);
}

/* The same with the u that the first pass kept. */
static void apply_kept(float *restrict p, const float *restrict u, float factor, int64_t start, int64_t stop) {
    int64_t i = start;
    for (; i + LANES <= stop; i += LANES) {
        prefetch(p + i);
        prefetch(u + i);
        for (int64_t j = i; j < i + LANES; ++j)
            p[j] = fmaf(-factor, u[j], p[j]);
    }
    for (; i < stop; ++i)
        p[i] = fmaf(-factor, u[i], p[i]);
}

static void second_pass(const Span *s, float ratio, const float *updates) {
    const float factor = (float)((double)ratio * s->step_size);
    for (int64_t stop = s->numel, start; stop > 0; stop = start) {
        start = stop > CHUNK ? stop - CHUNK : 0;
        if (updates)
            apply_kept(s->p, updates, factor, start, stop);
        else
            apply_anew(s, factor, start, stop);
    }
}

/* As trust_ratios of update.py for an adapted tensor: 1 where either norm is 0, at most FLT_MAX; a NaN stays one. */
static float trust_ratio(const Step *step, Sums sums) {
    if (!(sums.p > 0 && sums.u > 0))
        return 1.0f;
    const double ratio = sqrt(sums.p / sums.u);
    const double limited = ratio < step->low ? step->low : ratio > step->high ? step->high : ratio;
    return (float)(limited > FLT_MAX ? FLT_MAX : limited);
}

/* The sums over all threads, in the order of their numbers. */
static Sums total(const Sums *sums, int threads) {
    Sums all = {0, 0};
    for (int k = 0; k < threads; ++k) {
        all.p += sums[k].p;
        all.u += sums[k].u;
    }
    return all;
}

/* The first pass over all spans. */
void lamb_first(Span *spans, int64_t count, const Step *step) {
    int team = 1;
#pragma omp parallel num_threads(step->threads)
    {
        const int number = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t k = 0; k < count; ++k) {
            const Span s = share_of(spans + k, number, threads);
            step->sums[k * threads + number] = first_pass(&s, 0);
        }
        if (number == 0)
            team = threads;
    }
    for (int64_t k = 0; k < count; ++k) {
        const Sums all = total(step->sums + k * team, team);
        spans[k].sum_p = all.p;
        spans[k].sum_u = all.u;
    }
}

/* The second pass over all spans. */
void lamb_second(Span *spans, int64_t count, const Step *step) {
#pragma omp parallel num_threads(step->threads)
    for (int64_t k = 0; k < count; ++k) {
        const Span s = share_of(spans + k, omp_get_thread_num(), omp_get_num_threads());
        second_pass(&s, step->ratios[k], 0);
    }
}

/* One thread's part of both passes. No parameter changes before all threads have summed up its tensor. */
static void both_passes(Span *spans, int64_t count, const Step *step, int number, int threads) {
    float *room = step->updates + number * step->room;
    for (int64_t k = 0; k < count; ++k) {
        const Span s = share_of(spans + k, number, threads);
        float *updates = s.numel <= step->room ? room : 0;
        Sums *sums = step->sums + k * threads;
        sums[number] = first_pass(&s, updates);
        float ratio = 1.0f;
        if (s.adapt) {
#pragma omp barrier
            ratio = trust_ratio(step, total(sums, threads));
        }
        if (number == 0)
            step->ratios[k] = ratio;
        second_pass(&s, ratio, updates);
    }
}

/* Both passes, span by span; each span is all of a tensor. */
void lamb_both(Span *spans, int64_t count, const Step *step) {
#pragma omp parallel num_threads(step->threads)
    both_passes(spans, count, step, omp_get_thread_num(), omp_get_num_threads());
}
