# The CUDA compiler and runtime of SHOAL_CUDA: CUDA 12 or 13. CMAKE_CUDA_ARCHITECTURES says for which chips.
find_program(SHOAL_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT SHOAL_NVCC)
  message(FATAL_ERROR "SHOAL_CUDA needs nvcc, which is neither on PATH nor in /usr/local/cuda/bin. Install the CUDA "
    "toolkit, version 12 or 13 (Debian 12: package cuda-toolkit-13-0 of NVIDIA's repository, or nvidia-cuda-toolkit "
    "of a newer Debian), or set CUDA_PATH to where it is. Without SHOAL_CUDA shoal builds for CPUs.")
endif()
set(CMAKE_CUDA_COMPILER ${SHOAL_NVCC})
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the binary starts where there is no CUDA
enable_language(CUDA)
# CMake 3.25 does not know that this compiler takes C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
find_package(CUDAToolkit 12 REQUIRED)
