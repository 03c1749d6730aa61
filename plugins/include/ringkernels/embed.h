// The first residual stream of tokens: rows of the embedding table as fp32.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

struct EmbedParams {
  const int64_t* tokens;   // [N]; what is not an id of the table gives a row of NaN
  const void* table;       // [vocab, D] dtype
  float* residual;         // [N, D] written
  int32_t rows;            // N
  int32_t columns;         // D, a multiple of 8
  int32_t vocab_size;
  DType dtype;             // kBFloat16 or kFloat16
  int32_t programmatic_launch;
};

Status validate(const EmbedParams& params);
size_t workspace_bytes(const EmbedParams& params);
Status launch(const EmbedParams& params, Stream stream);

}  // namespace ringkernels
