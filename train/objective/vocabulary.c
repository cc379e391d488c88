/* The losses of chunk_terms.py over the vocabulary and their gradient, row by row of logits, see vocabulary_native.py,
 * which builds this file.
 *
 * A row of either model stays in the second-level cache while three loops pass over it: the first divides by the
 * temperature and finds the largest, the second sums exponentials, the third writes the gradient, for which it takes
 * the exponentials again rather than keep them. Threads take whole rows: results do not depend on how many. */

#include "vectors.h"

#define BLOCK (64 * LANES) /* as many are summed in REAL, the blocks in double */

typedef struct {
    REAL *student;                             /* (rows, vocabulary): logits before the bias; out: the gradient by them */
    REAL *teacher;                             /* the same, or none; out: undefined */
    const REAL *student_bias, *teacher_bias;   /* (vocabulary), divided by the temperature, or none */
    const REAL *row_weights, *target_weights;  /* (rows), (targets) */
    const int64_t *targets;                    /* of the first rows */
    double *values;                            /* out: (rows, 4) weighted kd, mlm, mse; whether both prefer one token */
    int64_t rows, vocabulary, num_targets, threads;
    double temperature, kd, mlm, mse;
} Problem;

typedef struct {
    REAL *student, *teacher;
    REAL student_largest, teacher_largest;
} Row;

typedef struct {
    double student, teacher, target, parts, squares;
} Sums;

/* Divides by the temperature, in place; the largest. */
static REAL tempered(REAL *row, const REAL *bias, int64_t vocabulary, REAL scale) {
    Vector best = (Vector){} - (REAL)INFINITY;
    int64_t j = 0;
    for (; j + LANES <= vocabulary; j += LANES) {
        Vector next = scale * load(row + j);
        if (bias)
            next += load(bias + j);
        store(row + j, next);
        const Mask larger = next > best;
        best = (Vector)(((Mask)next & larger) | ((Mask)best & ~larger));
    }
    REAL largest = best[0];
    for (int64_t i = 1; i < LANES; ++i)
        largest = best[i] > largest ? best[i] : largest;
    for (; j < vocabulary; ++j) {
        row[j] = scale * row[j] + (bias ? bias[j] : 0);
        largest = row[j] > largest ? row[j] : largest;
    }
    return largest;
}

static inline Vector load_part(const REAL *at, int64_t count, REAL fill) {
    if (count >= LANES)
        return load(at);
    Vector part = (Vector){} + fill;
    memcpy(&part, at, count * sizeof(REAL));
    return part;
}

static inline void store_part(REAL *at, int64_t count, Vector value) {
    if (count >= LANES)
        store(at, value);
    else
        memcpy(at, &value, count * sizeof(REAL));
}

static inline __attribute__((always_inline)) Sums sums_of(const Row *row, int64_t vocabulary, REAL temperature,
                                                          int taught, int targeted) {
    const REAL shift = taught ? row->teacher_largest - row->student_largest : 0;
    Sums sums = {0};
    for (int64_t start = 0; start < vocabulary; start += BLOCK) {
        const int64_t end = start + BLOCK < vocabulary ? start + BLOCK : vocabulary;
        Vector student = {0}, teacher = {0}, target = {0}, parts = {0}, squares = {0};
        for (int64_t j = start; j < end; j += LANES) {
            const Vector logits = load_part(row->student + j, end - j, FAR);
            const Vector own = logits - row->student_largest;
            student += exponential(own);
            if (targeted)
                target += exponential(temperature * own);
            if (taught) {
                const Vector of_teacher = load_part(row->teacher + j, end - j, FAR);
                const Vector exponentials = exponential(of_teacher - row->teacher_largest);
                teacher += exponentials;
                const Vector apart = of_teacher - logits; /* exact where they are near each other */
                parts += exponentials * (apart - shift);
                squares += apart * apart;
            }
        }
        sums.student += total(student);
        sums.teacher += total(teacher);
        sums.target += total(target);
        sums.parts += total(parts);
        sums.squares += total(squares);
    }
    return sums;
}

typedef struct {
    REAL student, teacher, target, difference;
} Factors;

static inline __attribute__((always_inline)) void write_gradient(const Row *row, int64_t vocabulary, REAL temperature,
                                                                 Factors by, int taught, int targeted) {
    for (int64_t j = 0; j < vocabulary; j += LANES) {
        const int64_t left = vocabulary - j;
        const Vector logits = load_part(row->student + j, left, FAR);
        const Vector own = logits - row->student_largest;
        Vector gradient = {0};
        if (targeted)
            gradient = by.target * exponential(temperature * own);
        if (taught) {
            const Vector of_teacher = load_part(row->teacher + j, left, FAR);
            gradient += by.student * exponential(own) - by.teacher * exponential(of_teacher - row->teacher_largest);
            if (by.difference) /* or 0 times what may be infinite */
                gradient += by.difference * (logits - of_teacher);
        }
        store_part(row->student + j, left, gradient);
    }
}

static int same_choice(const Row *row, int64_t vocabulary) {
    for (int64_t j = 0; j < vocabulary; ++j)
        if (row->teacher[j] == row->teacher_largest)
            return row->student[j] == row->student_largest;
    return 0;
}

static void one_row(const Problem *p, int64_t index) {
    const int64_t vocabulary = p->vocabulary;
    const REAL scale = (REAL)(1 / p->temperature), temperature = (REAL)p->temperature;
    const double weight = p->row_weights[index];
    const double of_target = index < p->num_targets ? p->target_weights[index] : 0;
    double *values = p->values + 4 * index;
    Row row = {.student = p->student + index * vocabulary};
    if (weight == 0 && of_target == 0) {
        memset(row.student, 0, vocabulary * sizeof(REAL));
        return;
    }
    row.student_largest = tempered(row.student, p->student_bias, vocabulary, scale);
    if (p->teacher) {
        row.teacher = p->teacher + index * vocabulary;
        row.teacher_largest = tempered(row.teacher, p->teacher_bias, vocabulary, scale);
        values[3] = weight > 0 && same_choice(&row, vocabulary);
    }
    Sums sums;
    if (p->teacher)
        sums = of_target ? sums_of(&row, vocabulary, temperature, 1, 1) : sums_of(&row, vocabulary, temperature, 1, 0);
    else
        sums = sums_of(&row, vocabulary, temperature, 0, 1);
    Factors by = {0};
    if (p->teacher) {
        const double squared = p->temperature * p->temperature * weight, kd = p->kd * p->temperature * weight;
        /* What the rounding of `shift` in sums_of has left. */
        const double rest = (REAL)(row.teacher_largest - row.student_largest)
            - ((double)row.teacher_largest - row.student_largest);
        values[0] = p->kd ? squared * (sums.parts / sums.teacher + rest + log(sums.student / sums.teacher)) : 0;
        values[2] = p->mse ? squared * sums.squares : 0;
        by.student = (REAL)(kd / sums.student);
        by.teacher = (REAL)(kd / sums.teacher);
        by.difference = (REAL)(2 * p->mse * p->temperature * weight);
    }
    REAL at_target = 0;
    if (of_target) {
        const double chosen = p->temperature * (row.student[p->targets[index]] - row.student_largest);
        values[1] = of_target * (log(sums.target) - chosen);
        by.target = (REAL)(p->mlm * of_target / sums.target);
        at_target = (REAL)(p->mlm * of_target);
    }
    if (!p->teacher)
        write_gradient(&row, vocabulary, temperature, by, 0, 1);
    else if (of_target)
        write_gradient(&row, vocabulary, temperature, by, 1, 1);
    else
        write_gradient(&row, vocabulary, temperature, by, 1, 0);
    if (of_target)
        row.student[p->targets[index]] -= at_target;
}

void vocabulary_terms(const Problem *p) {
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t row = 0; row < p->rows; ++row)
        one_row(p, row);
}
