// The next token of each row, chosen on the GPU so that only ids cross to the host.
// As in ringexport/runtime/sampling.py: repetition penalty, temperature, top-k, top-p, min-p, each on what the one
// before left.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

// A row's choice depends on its own logits, parameters, seed and position only, and is the same on every run.
struct SampleParams {
  const float* logits;       // [N, vocab] rows of row_stride elements
  const float* temperature;  // [N] or null: greedy everywhere; 0: greedy, the lowest id on a tie
  const int32_t* top_k;      // [N] or null, 0 keeps all; the lower ids on ties
  const float* top_p;        // [N] or null, 1 keeps all
  const float* min_p;        // [N] or null, 0 keeps all
  const int64_t* seed;       // [N]
  const int32_t* position;   // [N] counts the row's draws
  int64_t* tokens;           // [N] written
  int32_t* next_position;    // [N] or null: raised by one, when everything else has been read
  void* workspace;           // workspace_bytes(), zeroed once by the owner, for this op alone
  int64_t workspace_bytes;
  int64_t row_stride;        // elements
  int32_t rows;              // N
  int32_t vocab_size;
  int32_t programmatic_launch;
  // Repetition penalty, beside a temperature only: of tokens that a row has seen it divides positive logits and
  // multiplies negative ones. The token that is chosen is added to what its row has seen.
  const float* penalty;      // [N] or null, 1 does nothing
  uint32_t* seen;            // [slots, ceil(vocab / 32)] a bit for each token, the lowest first
  const int64_t* seen_slot;  // [N] whose bits are the row's; rows with a penalty have one each
};

Status validate(const SampleParams& params);
size_t workspace_bytes(const SampleParams& params);
Status launch(const SampleParams& params, Stream stream);

}  // namespace ringkernels
