// fastattn._native: what is not a tensor operator. ISA facts and forcing, and how this build was made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernel_table.h"

namespace py = pybind11;

namespace {

fastattn::Isa parse(const std::string& name) {
  fastattn::Isa isa;
  if (!fastattn::isa_from_name(name, &isa)) {
    throw std::invalid_argument("isa must be one of scalar, avx2, avx512, avx512_bf16, amx, amx_emulated; got '" +
                                name + "'");
  }
  return isa;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < fastattn::kIsaCount; ++i) {
    const fastattn::Isa isa = static_cast<fastattn::Isa>(i);
    if (fastattn::isa_available(isa)) names.emplace_back(fastattn::isa_name(isa));
  }
  return names;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = FASTATTN_COMPILER;
  facts["flags"] = FASTATTN_FLAGS;
  facts["torch"] = FASTATTN_TORCH;
  return facts;
}

fastattn::DType parse_dtype(const std::string& name) {
  if (name == "float32") return fastattn::DType::kFloat32;
  if (name == "float64") return fastattn::DType::kFloat64;
  if (name == "float16") return fastattn::DType::kFloat16;
  if (name == "bfloat16") return fastattn::DType::kBFloat16;
  throw std::invalid_argument("dtype must be one of float64, float32, float16, bfloat16; got '" + name + "'");
}

void gemm(const std::string& isa_name, const std::string& dtype, uintptr_t a, int64_t lda, uintptr_t b, int64_t ldb,
          bool transposed, uintptr_t c, int64_t ldc, const std::vector<int64_t>& shape, bool accumulate,
          int64_t repeats) {
  const fastattn::Isa isa = parse(isa_name);
  if (!fastattn::isa_available(isa)) throw std::invalid_argument("isa '" + isa_name + "' is not available here");
  if (shape.size() != 3) throw std::invalid_argument("shape must be (M, N, K)");
  fastattn::GemmParams p;
  p.dtype = parse_dtype(dtype);
  p.M = shape[0], p.N = shape[1], p.K = shape[2];
  p.a = reinterpret_cast<const void*>(a), p.b = reinterpret_cast<const void*>(b), p.c = reinterpret_cast<void*>(c);
  p.lda = lda, p.ldb = ldb, p.ldc = ldc;
  p.transposed = transposed, p.accumulate = accumulate, p.repeats = repeats;
  const py::gil_scoped_release release;
  fastattn::kernels_for(isa).gemm(p);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "ISA facts, forcing and build facts of fastattn's C++ core.";
  m.def("available_isas", &available_isas,
        "Every instruction set this machine can run, in order of levels; amx_emulated (tiles in memory) is for tests.");
  m.def("current_isa", [] { return fastattn::isa_name(fastattn::current_isa()); }, "The instruction set in force.");
  m.def("isa_message", &fastattn::isa_message, "Why that one.");
  m.def(
      "set_isa", [](const std::string& name) { fastattn::set_isa(parse(name)); }, py::arg("name"),
      "Force an instruction set for this process; ValueError if unknown or not available.");
  m.def("gemm", &gemm, py::arg("isa"), py::arg("dtype"), py::arg("a"), py::arg("lda"), py::arg("b"), py::arg("ldb"),
        py::arg("transposed"), py::arg("c"), py::arg("ldc"), py::arg("shape"), py::arg("accumulate") = false,
        py::arg("repeats") = 1,
        "One ISA's micro-kernel on one thread, for tests and tuning: c (M, N) (+)= a (M, K) times b (K, N), or (N, K) "
        "if transposed. "
        "a, b, c are addresses (Tensor.data_ptr()), c in the accumulation dtype; nothing is checked.");
  m.def("build_facts", &build_facts, "Compiler, flags and torch version of this build.");
}
