// main() of the models' tests on a GPU: without one they say so at once.
#include <gtest/gtest.h>

#include <cstdio>

#include "kernels/cuda/device.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (const auto gpus = shoal::cuda::ListGpus(); !gpus.ok()) {
    std::fprintf(stderr, "tests on a GPU: %s\n", gpus.status().ToString().c_str());
    return 69;
  }
  return RUN_ALL_TESTS();
}
