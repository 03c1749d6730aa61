// Building blocks of validate(): each returns from the calling function with the Status that names the field.
#pragma once

#include <cstdint>

#include "ringkernels/types.h"

#define RING_REQUIRE(condition, status_code, field_name, expected_text, got_value)             \
  do {                                                                                         \
    if (!(condition))                                                                          \
      return Status{StatusCode::status_code, field_name, expected_text, (int64_t)(got_value)}; \
  } while (0)

#define RING_REQUIRE_POINTER(params, field) \
  RING_REQUIRE((params).field != nullptr, kNullPointer, #field, "a pointer", 0)

// Kernels read and write 16 bytes at a time.
#define RING_REQUIRE_ALIGNED(params, field)                                                       \
  RING_REQUIRE((reinterpret_cast<uintptr_t>((params).field) & 15) == 0, kMisaligned, #field,      \
               "a multiple of 16 bytes", reinterpret_cast<uintptr_t>((params).field) & 15)

#define RING_RETURN_IF_ERROR(expression)              \
  do {                                                \
    const Status ring_status = (expression);          \
    if (!ring_status.ok()) return ring_status;        \
  } while (0)
