// Defines the operators where no Python does: for programs that load this library alone.
#include <torch/csrc/stable/library.h>

#include "kernels/schemas.h"

// To be called once, and before any operator is.
extern "C" __attribute__((visibility("default"))) void recfx_define_operators() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary* const library =  // for as long as the process lives
      new StableLibrary(StableLibrary::Kind::FRAGMENT, "recfx", nullptr, __FILE__, __LINE__);
  static bool is_defined = false;
  if (is_defined) return;
  is_defined = true;
  for (const char* const schema : SCHEMAS) library->def(schema);
}

#ifdef RECFX_STANDALONE  // then loading is enough
static const bool defined_on_loading = (recfx_define_operators(), true);
#endif
