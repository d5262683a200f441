// What `shoal inspect` prints: metadata, tensors, and sizes by type.
#pragma once

#include <string>

#include "shard/checkpoint.h"

namespace shoal {

// A report to read. Long arrays and strings are shortened; names from the file are escaped, so that
// it is safe on a terminal. A checkpoint that is no model we can run is reported all the same, with
// the reason.
std::string InspectText(const Checkpoint& checkpoint);

// The same as one JSON object:
//   files     [path]
//   model     {architecture, name, layers, dim, ...} or absent
//   error     why it cannot be run, when `model` is absent
//   metadata  {key: value}; an array of more than 8 is {length, first: [8 elements]}
//   tensors   [{name, type, shape, bytes, file, offset}], shape with the contiguous axis first
//   types     {type: {tensors, weights, bytes, bits_per_weight}}
//   total     {tensors, weights, bytes, bits_per_weight}
std::string InspectJson(const Checkpoint& checkpoint);

}  // namespace shoal
