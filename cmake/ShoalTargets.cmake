# shoal_library(NAME SOURCES ... DEPS ...): one static library per folder, named shoal_NAME.
# shoal_test(NAME SOURCES ... DEPS ...): one GoogleTest binary, registered with CTest as one test.
# shoal_test_environment(TEST...): what every test process needs around it; shoal_test calls it.

add_library(shoal_options INTERFACE)
target_include_directories(shoal_options INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR})
target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:
  -Wall -Wextra -Werror -Wno-unused-parameter -ffp-contract=off -fno-math-errno>)
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wthread-safety>)
endif()
if(SHOAL_SANITIZE)
  # Undefined behaviour must fail a test, not only print a line that nobody reads.
  target_compile_options(shoal_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:
    -fsanitize=${SHOAL_SANITIZE} -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1>)
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
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock_main)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
  shoal_test_environment(${name})
endfunction()
