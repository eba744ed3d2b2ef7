// The only file that knows Python: it passes pointers and sizes through and computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cuda.h"
#include "common/simd.h"

namespace py = pybind11;

static py::dict report() {
    case_fast_cuda_info cuda;
    {
        py::gil_scoped_release release;  // the first call may wait seconds for the CUDA driver
        case_fast_cuda_report(&cuda);
    }
    const int *first = cuda.architectures;
    py::dict out;
    out["version"] = CASE_FAST_VERSION;
    out["simd"] = case_fast_simd_name(case_fast_simd_level());
    out["cuda"] = cuda.compiled != 0;
    out["cuda_architectures"] = std::vector<int>(first, first + cuda.architecture_count);
    out["cuda_runtime"] = std::to_string(cuda.runtime_version / 1000) + "." + std::to_string(cuda.runtime_version % 1000 / 10);
    if (!cuda.compiled) out["cuda_runtime"] = "";
    out["cuda_devices"] = cuda.device_count;
    out["cuda_status"] = cuda.status;
    return out;
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native core of case_fast.";
    module.attr("__version__") = CASE_FAST_VERSION;
    module.attr("simd") = case_fast_simd_name(case_fast_simd_level());
    module.def("report", &report, "How the module was built, and what it finds on this machine now.");
}
