"""The cloud: large models, the gRPC server, the teacher store."""
