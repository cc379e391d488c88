/* The relation term over many maps, see relations_native.py, which builds this file, and relations.py for the formula.
 *
 * A map is one head of one sequence: n x n relations of n vectors. ROWS rows of a teacher's and a student's map exist at
 * once, in the first-level cache: their products, their exponentials, their divergence, their gradient by the relations,
 * and what that adds to the vectors' gradient, of which each is a row and a column. Vectors lie transposed, so that
 * neighbours are the same component of successive vectors. Threads take whole maps: results do not depend on how many. */

#include "vectors.h"

#define ROWS 8
#define WIDE (2 * LANES) /* columns are padded to a multiple of it, with vectors of zeros */

typedef struct {
    const REAL *student, *teacher; /* first position's vector */
    REAL *gradient;                /* of the loss by the student's, or none */
    int64_t student_stride, teacher_stride, gradient_stride; /* elements from position to position */
} Relation;

typedef struct {
    const Relation *relations;
    const int64_t *starts;    /* (batch + 1): where each sequence begins in `kept` */
    const int64_t *kept;      /* the positions that count, of all sequences */
    const REAL *weights;      /* of every position, by heads */
    double *values;           /* out: (num_relations, batch, heads) weighted divergences */
    REAL *rooms;              /* `room` elements for each thread */
    int64_t room, num_relations, batch, heads, student_size, teacher_size, threads;
} Problem;

#ifdef _OPENMP
int omp_get_thread_num(void); /* omp.h is not everywhere */
#else
static int omp_get_thread_num(void) { return 0; }
#endif

static REAL largest(const REAL *row, int64_t padded) {
    Vector best = load(row);
    for (int64_t j = LANES; j < padded; j += LANES) {
        const Vector next = load(row + j);
        const Mask larger = next > best;
        best = (Vector)(((Mask)next & larger) | ((Mask)best & ~larger));
    }
    REAL result = best[0];
    for (int64_t i = 1; i < LANES; ++i)
        result = best[i] > result ? best[i] : result;
    return result;
}

/* (size, padded): the vectors of the kept positions, scaled; zeros behind them. */
static void transpose(const REAL *from, int64_t stride, const int64_t *kept, int64_t n, int64_t padded, int64_t size,
                      REAL scale, REAL *out) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < size; ++k)
            out[k * padded + i] = scale * from[kept[i] * stride + k];
    for (int64_t k = 0; k < size; ++k)
        for (int64_t i = n; i < padded; ++i)
            out[k * padded + i] = 0;
}

/* (ROWS, padded): relations of the vectors i, i + 1, ... with all of them. */
static void relate(const REAL *vectors, int64_t size, int64_t n, int64_t padded, int64_t i, REAL *out) {
    for (int64_t j = 0; j < padded; j += WIDE) {
        Vector sums[ROWS][2] = {0};
        for (int64_t k = 0; k < size; ++k) {
            const REAL *line = vectors + k * padded;
            const Vector left = load(line + j), right = load(line + j + LANES);
            for (int r = 0; r < ROWS; ++r) {
                sums[r][0] += line[i + r] * left;
                sums[r][1] += line[i + r] * right;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            store(out + r * padded + j, sums[r][0]);
            store(out + r * padded + j + LANES, sums[r][1]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int64_t j = n; j < padded; ++j)
            out[r * padded + j] = FAR;
}

/* Weighted divergence of one row; its gradient by the student's relations takes their place. */
static double compare(REAL *student, REAL *teacher, int64_t padded, REAL weight, int gradient) {
    const REAL of_student = largest(student, padded), of_teacher = largest(teacher, padded);
    Vector student_sums = {0}, teacher_sums = {0}, parts = {0};
    for (int64_t j = 0; j < padded; j += LANES) {
        const Vector own = load(student + j) - of_student, theirs = load(teacher + j) - of_teacher;
        const Vector own_exp = exponential(own), their_exp = exponential(theirs);
        student_sums += own_exp;
        teacher_sums += their_exp;
        parts += their_exp * (theirs - own);
        store(student + j, own_exp);
        store(teacher + j, their_exp);
    }
    const REAL own_sum = total(student_sums), their_sum = total(teacher_sums);
    const REAL divergence = total(parts) / their_sum + (REAL)log(own_sum / their_sum);
    if (gradient) {
        const REAL by_own = weight / own_sum, by_their = weight / their_sum;
        for (int64_t j = 0; j < padded; j += LANES)
            store(student + j, by_own * load(student + j) - by_their * load(teacher + j));
    }
    return (double)weight * divergence;
}

/* Adds to the vectors' gradients (size, padded) what ROWS rows of the relations' gradient come to. */
static void spread(const REAL *rows, const REAL *vectors, int64_t size, int64_t padded, int64_t i, REAL *gradients) {
    for (int64_t k = 0; k < size; ++k) {
        const REAL *line = vectors + k * padded;
        REAL *out = gradients + k * padded;
        Vector sums[ROWS] = {0};
        REAL own[ROWS];
        for (int r = 0; r < ROWS; ++r)
            own[r] = line[i + r];
        for (int64_t j = 0; j < padded; j += LANES) {
            const Vector theirs = load(line + j);
            Vector even = load(out + j), odd = {0};
            for (int r = 0; r < ROWS; r += 2) {
                const Vector first = load(rows + r * padded + j), second = load(rows + (r + 1) * padded + j);
                sums[r] += first * theirs;
                sums[r + 1] += second * theirs;
                even += own[r] * first;
                odd += own[r + 1] * second;
            }
            store(out + j, even + odd);
        }
        for (int r = 0; r < ROWS; ++r)
            out[i + r] += total(sums[r]);
    }
}

static double one_map(const Problem *p, const Relation *relation, int64_t sequence, int64_t head, REAL *room) {
    const int64_t *kept = p->kept + p->starts[sequence];
    const int64_t n = p->starts[sequence + 1] - p->starts[sequence], padded = (n + WIDE - 1) / WIDE * WIDE;
    REAL *student = room, *teacher = student + p->student_size * padded;
    REAL *gradients = teacher + p->teacher_size * padded;
    REAL *own = gradients + p->student_size * padded, *theirs = own + ROWS * padded;
    const REAL scale = (REAL)pow((double)p->student_size, -0.25);
    transpose(relation->student + head * p->student_size, relation->student_stride, kept, n, padded, p->student_size,
              scale, student);
    transpose(relation->teacher + head * p->teacher_size, relation->teacher_stride, kept, n, padded, p->teacher_size,
              (REAL)pow((double)p->teacher_size, -0.25), teacher);
    for (int64_t at = 0; at < p->student_size * padded; ++at)
        gradients[at] = 0;
    double value = 0;
    for (int64_t i = 0; i < n; i += ROWS) {
        relate(student, p->student_size, n, padded, i, own);
        relate(teacher, p->teacher_size, n, padded, i, theirs);
        for (int r = 0; r < ROWS; ++r) {
            const REAL weight = i + r < n ? p->weights[kept[i + r]] : 0;
            value += compare(own + r * padded, theirs + r * padded, padded, weight, relation->gradient != 0);
        }
        if (relation->gradient)
            spread(own, student, p->student_size, padded, i, gradients);
    }
    if (relation->gradient)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < p->student_size; ++k)
                relation->gradient[kept[i] * relation->gradient_stride + head * p->student_size + k] =
                    scale * gradients[k * padded + i];
    return value;
}

void relations(const Problem *p) {
    const int64_t maps = p->num_relations * p->batch * p->heads;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t map = 0; map < maps; ++map) {
        const int64_t sequence = map / p->heads % p->batch;
        p->values[map] = one_map(p, p->relations + map / (p->heads * p->batch), sequence, map % p->heads,
                                 p->rooms + omp_get_thread_num() * p->room);
    }
}
