// fastattn._native: what is not a tensor operator. ISA facts and forcing, and how this build was made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

fastattn::Isa parse(const std::string& name) {
  fastattn::Isa isa;
  if (!fastattn::isa_from_name(name, &isa)) {
    throw std::invalid_argument("isa must be one of scalar, avx2, avx512, avx512_bf16, amx; got '" + name + "'");
  }
  return isa;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(fastattn::best_isa()); ++i) {
    names.emplace_back(fastattn::isa_name(static_cast<fastattn::Isa>(i)));
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "ISA facts, forcing and build facts of fastattn's C++ core.";
  m.def("available_isas", &available_isas, "Every instruction set this machine can run, slowest first.");
  m.def("current_isa", [] { return fastattn::isa_name(fastattn::current_isa()); }, "The instruction set in force.");
  m.def("isa_message", &fastattn::isa_message, "Why that one.");
  m.def("set_isa", [](const std::string& name) { fastattn::set_isa(parse(name)); }, py::arg("name"),
        "Force an instruction set for this process; ValueError if unknown or not available.");
  m.def("build_facts", &build_facts, "Compiler, flags and torch version of this build.");
}
