//! Where a gRPC server listens and a client connects.
