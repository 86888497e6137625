// Compiled once for each instruction set, with LVTP_ISA its name: see CMakeLists.txt.
#include "eigen.h"
#include "gram.h"
#include "rows.h"

namespace lvtp::cpu::LVTP_ISA {

extern const Simd loops;
const Simd loops = {
    from_half,
    from_bfloat16,
    accumulate_unit,
    transpose,
    gram_strip,
    cross,
    cross_row,
    add_product,
    sigmoid,
    centre,
    centre_each,
    accumulate,
    eight_eigenpairs,
    {multiply<float>, update_and_multiply<float>, current_row<float>, correct<float>, dot<float>, second_vector<float>,
     scale<float>, reflect<float>},
    {multiply<double>, update_and_multiply<double>, current_row<double>, correct<double>, dot<double>,
     second_vector<double>, scale<double>, reflect<double>},
};

}  // namespace lvtp::cpu::LVTP_ISA
