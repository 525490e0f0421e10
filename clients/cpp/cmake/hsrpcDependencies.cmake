# Finds protobuf and gRPC, for the build of the library and for whoever links it: by their own CMake packages, or else
# by CMake's module and by pkg-config. Afterwards the targets protobuf::libprotobuf and gRPC::grpc++ are there, if the
# libraries are.

if(NOT TARGET protobuf::libprotobuf)
  find_package(Protobuf CONFIG QUIET)
  if(NOT Protobuf_FOUND)
    find_package(Protobuf QUIET)
  endif()
endif()
if(NOT TARGET gRPC::grpc++)
  find_package(gRPC CONFIG QUIET)
endif()
if(NOT TARGET gRPC::grpc++)
  find_package(PkgConfig QUIET)
  if(PkgConfig_FOUND)
    pkg_check_modules(hsrpc_grpc QUIET IMPORTED_TARGET GLOBAL grpc++)
  endif()
  if(hsrpc_grpc_FOUND)
    add_library(gRPC::grpc++ INTERFACE IMPORTED GLOBAL)
    set_target_properties(gRPC::grpc++ PROPERTIES INTERFACE_LINK_LIBRARIES PkgConfig::hsrpc_grpc)
  endif()
endif()
