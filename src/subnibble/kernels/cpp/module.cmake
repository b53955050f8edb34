# The Python module. A wheel gets it in subnibble/kernels. An editable install writes it to the package's folder in the
# source tree, which all virtual environments share: as a whole (by renaming), and only if it would differ.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE
                OUTPUT_VARIABLE nanobind_ROOT)
find_package(nanobind CONFIG REQUIRED)

# All that the module depends on; `file(STRINGS)` finds it in the built one.
set(inputs "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} ${CMAKE_CXX_FLAGS} ${CMAKE_BUILD_TYPE}")
string(APPEND inputs " ${SUBNIBBLE_SANITIZE} ${nanobind_VERSION} ${Python_VERSION} ${OpenMP_CXX_FOUND}")
string(SHA256 inputs "${inputs}")
set(built_from "subnibble ${sources} ${inputs}")
get_filename_component(package "${CMAKE_CURRENT_SOURCE_DIR}/.." ABSOLUTE)
set(in_place "${package}/_native${NB_SUFFIX}")
if(SKBUILD_STATE STREQUAL "editable" AND EXISTS "${in_place}")
  file(STRINGS "${in_place}" present REGEX "${built_from}")
  if(present)
    message(STATUS "${in_place} is up to date")
    return()
  endif()
endif()

file(GENERATE OUTPUT built_from.cpp CONTENT
  "extern \"C\" {
__attribute__((visibility(\"default\"))) extern const char subnibble_built_from[];
const char subnibble_built_from[] = \"${built_from}\";
}
")
nanobind_add_module(_native NB_STATIC bindings.cpp step/bindings.cpp "${CMAKE_CURRENT_BINARY_DIR}/built_from.cpp")
target_link_libraries(_native PRIVATE kernels)

if(SKBUILD_STATE STREQUAL "editable")
  string(RANDOM LENGTH 12 word)
  install(CODE "
    set(partial \"${package}/_native.${word}.partial.so\")
    execute_process(COMMAND \"${CMAKE_COMMAND}\" -E copy \"$<TARGET_FILE:_native>\" \"\${partial}\"
                    RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR \"cannot write \${partial}\")
    endif()
    file(RENAME \"\${partial}\" \"${in_place}\")
    message(STATUS \"${in_place} is new\")")
else()
  install(TARGETS _native LIBRARY DESTINATION subnibble/kernels)
endif()
