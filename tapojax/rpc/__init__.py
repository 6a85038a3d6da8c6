"""The wire between trainer, rollout servers and reward servers: gRPC, described by tapojax.proto.

`tapojax_pb2*.py` are generated from it and committed; to make them anew:

    python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. tapojax/rpc/tapojax.proto
"""
