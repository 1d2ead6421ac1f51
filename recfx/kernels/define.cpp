// Defines the operators where no Python does: for programs that load this library alone.
#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels/schemas.h"

extern const char* const ROW_OPTIMIZER_NAMES[];  // rows/optimizer_rows.cpp; the last is null

// To be called once, and before any operator is.
extern "C" __attribute__((visibility("default"))) void recfx_define_operators() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary* const library =  // for as long as the process lives
      new StableLibrary(StableLibrary::Kind::FRAGMENT, "recfx", nullptr, __FILE__, __LINE__);
  static bool is_defined = false;
  if (is_defined) return;
  is_defined = true;
  for (const char* const schema : SCHEMAS) library->def(schema);
  for (auto name = ROW_OPTIMIZER_NAMES; *name; ++name) library->def((std::string(*name) + "_" + ROW_OPTIMIZER).c_str());
}

#ifdef RECFX_STANDALONE  // then loading is enough
static const bool defined_on_loading = (recfx_define_operators(), true);
#endif
