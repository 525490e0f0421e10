# Generates the stubs from the proto files: cmake -DOUT=FOLDER [-DPROTOC=...] [-DPLUGIN=...] -P GenerateStubs.cmake
#
# hsrpc/v1 comes as it is. Google's messages of error details come under a package and names of files of our own,
# hsrpc.rpc, and without descriptors: a process in which two libraries register the same file ends, and whoever links
# this one may well bring google/rpc along. On the wire they are the same messages.

cmake_minimum_required(VERSION 3.18)
get_filename_component(proto "${CMAKE_CURRENT_LIST_DIR}/../../../proto" ABSOLUTE)
set(PROTOC "protoc" CACHE STRING "The compiler")
set(PLUGIN "grpc_cpp_plugin" CACHE STRING "gRPC's plugin for it")
find_program(plugin "${PLUGIN}" REQUIRED)

function(protoc)
  execute_process(COMMAND "${PROTOC}" ${ARGN} RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${PROTOC} failed: ${failed}")
  endif()
endfunction()

file(MAKE_DIRECTORY "${OUT}")
foreach(name error_details status)
  file(READ "${proto}/google/rpc/${name}.proto" text)
  string(REPLACE "package google.rpc;" "package hsrpc.rpc;\n\noption optimize_for = LITE_RUNTIME;" text "${text}")
  file(WRITE "${OUT}/proto/hsrpc/rpc/${name}.proto" "${text}")
endforeach()
protoc("--proto_path=${OUT}/proto" "--cpp_out=${OUT}" hsrpc/rpc/error_details.proto hsrpc/rpc/status.proto)
file(REMOVE_RECURSE "${OUT}/proto")

set(services hsrpc/v1/generation.proto hsrpc/v1/model.proto hsrpc/v1/server.proto)
protoc("--proto_path=${proto}" "--cpp_out=${OUT}" ${services} hsrpc/v1/prompt.proto)
protoc("--proto_path=${proto}" "--plugin=protoc-gen-grpc=${plugin}" "--grpc_out=${OUT}" ${services})
