// How the log-sum-exp of a row is handed over. `LseForm` in cupyattn/problem.py has the same fields.
#pragma once

#include "common/types.cuh"

struct LseForm {
    float factor; // of the natural one: 1, or log2(e) for the one to base 2
    float unseen; // of a row that saw no key
};

// `natural` is -infinity for a row that saw no key.
__device__ __forceinline__ float lse_in_form(const LseForm& form, float natural) {
    return natural == -infinity() ? form.unseen : natural * form.factor;
}
