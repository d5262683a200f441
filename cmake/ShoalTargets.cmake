# shoal_library(NAME SOURCES ... DEPS ...): one static library per folder, named shoal_NAME.
# shoal_test(NAME SOURCES ... DEPS ... [THREADS] [ASAN_FILTER f] [TSAN_FILTER f]): one GoogleTest binary, registered with
#   CTest as one test. THREADS: what it tests has threads; the others are not built for the thread sanitizer. The filters
#   (--gtest_filter) choose what runs under a sanitizer where all of it would take too long.
# shoal_test_environment(TEST...): what every test process needs around it; shoal_test calls it.

add_library(shoal_options INTERFACE)
target_include_directories(shoal_options INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR})
target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:
  -Wall -Wextra -Werror -Wno-unused-parameter -ffp-contract=off -fno-math-errno>)
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wthread-safety>)
endif()
# For sources that unroll their loops by the hundred: null and overflow checks behind each of those loads take the
# compiler minutes.
set(shoal_light_sanitize)
if(SHOAL_SANITIZE)
  # Undefined behaviour must fail a test, not only print a line that nobody reads. Debug information without this folder's
  # name: ccache shares it between clones.
  target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:
    -fsanitize=${SHOAL_SANITIZE} -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
    -fdebug-prefix-map=${CMAKE_SOURCE_DIR}=.>)
  if(SHOAL_SANITIZE MATCHES undefined)
    set(shoal_light_sanitize -fno-sanitize=undefined -fsanitize=alignment,bounds,integer-divide-by-zero,shift
        -fno-sanitize-recover=undefined)
  endif()
  target_link_options(shoal_options INTERFACE -fsanitize=${SHOAL_SANITIZE})
endif()

function(shoal_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(shoal_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(shoal_${name} PUBLIC shoal_options ${ARG_DEPS})
endfunction()

# Open MPI must start as root (containers, CI) and with more ranks than cores, and must not pin every job's ranks to
# the same two cores. The sanitizers are told of what lies in libraries that are not ours.
function(shoal_test_environment)
  set(suppressions ${CMAKE_SOURCE_DIR}/tests/sanitizers)
  set(env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
          OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none)
  if(SHOAL_SANITIZE)
    list(APPEND env
      "ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1"
      "LSAN_OPTIONS=suppressions=${suppressions}/lsan.supp:print_suppressions=0"
      "TSAN_OPTIONS=suppressions=${suppressions}/tsan.supp:halt_on_error=1:second_deadlock_stack=1"
      "UBSAN_OPTIONS=print_stacktrace=1")
  endif()
  set_property(TEST ${ARGN} APPEND PROPERTY ENVIRONMENT ${env})
endfunction()

function(shoal_test name)
  cmake_parse_arguments(ARG "THREADS" "TIMEOUT;ASAN_FILTER;TSAN_FILTER" "SOURCES;DEPS;LABELS" ${ARGN})
  set(filter)
  if(SHOAL_SANITIZE STREQUAL thread)
    if(NOT ARG_THREADS)
      return()
    endif()
    set(filter ${ARG_TSAN_FILTER})
  elseif(SHOAL_SANITIZE)
    set(filter ${ARG_ASAN_FILTER})
  endif()
  if(filter)
    set(filter --gtest_filter=${filter})
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  if(SHOAL_SANITIZE AND NOT ARG_DEPS MATCHES "shoal_kernels|shoal_parallel|simt")  # no oracles, no models
    target_compile_options(${name} PRIVATE -O0)
  endif()
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock_main)
  add_test(NAME ${name} COMMAND ${name} ${filter} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
  if(ARG_TIMEOUT GREATER 300)
    set_tests_properties(${name} PROPERTIES COST ${ARG_TIMEOUT})  # first, so that no core waits for it at the end
  endif()
  shoal_test_environment(${name})
endfunction()
