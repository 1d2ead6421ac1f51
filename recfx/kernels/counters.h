// The counters of a table: places in `TableState.counters`, i64 [NUM_COUNTERS].
//
// The one definition: recfx/kernels/counters.py reads the names from this file, one a line, for Python and Triton.
#pragma once
#include <cstdint>

enum Counter : int64_t {
  NUM_ROWS,             // rows in use or freed: the next row when none is free
  NUM_FREE,             // freed rows
  NUM_SLOTS,            // slots of the index in use, a power of two
  NUM_CROWDED,          // rows far from their place in the index
  NUM_REFUSED,          // ids that found no room, counted per occurrence
  LOOKED_UP,            // ids looked up by training
  CREATED,              // rows created by training
  EVICTED,              // rows deleted by sweeps
  UNADMITTED,           // ids that were not admitted, counted per occurrence
  SALT,                 // of the hash
  STEP,                 // optimiser steps taken on this table
  NUM_UNIQUE,           // distinct rows touched by the step in progress
  NUM_CANDIDATES,       // ids without a row whose occurrences are counted
  NUM_CANDIDATE_SLOTS,  // slots of their index in use, a power of two
  NUM_COUNTERS
};
